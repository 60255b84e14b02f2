"""How a masked forward runs: what is put in place of the model's own tensors and attributes for its duration."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cpd_fast.errors import PlanError
from cpd_fast.ops import grouped_conv2d
from cpd_fast.prune.picks import Kept, Pick
from cpd_fast.types import ChannelGraph

CLASS = "__class__"


class Structure(Protocol):
    """A compacted model as differences from the original; see :class:`cpd_fast.compact.Structure`."""

    @property
    def kept(self) -> Mapping[str, Kept]:
        """What remains of tensors."""
        ...

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        """Attributes by module."""
        ...

    @property
    def rows(self) -> Mapping[str, list[tuple[np.ndarray, float]]]:
        """Scaled rows by tensor."""
        ...


@dataclass
class Place:
    """One name of a tensor: its module, the dict there that holds it, and the key."""

    module: str
    of: nn.Module
    owner: dict[str, Any]
    key: str


@dataclass(eq=False)
class Stand:
    """A tensor that something else stands for during a forward."""

    name: str
    places: list[Place]
    is_parameter: bool
    held: Tensor | None = None  # what stood there in the last forward, for checkpoints that compute it again
    original: Any = None
    version: int = 0


@dataclass(eq=False)
class Edit:
    """Attributes that a module has during a forward."""

    name: str
    module: nn.Module
    values: dict[str, Any]
    before: dict[str, Any] = field(default_factory=dict)


_MISSING = object()


class Execution(ABC):
    """Puts tensors and attributes in place at the start of a forward, and back at its end.

    A module that an activation checkpoint runs again during a backward has its part put in place once more, with the
    tensors of the last forward.
    """

    def __init__(self, model: nn.Module, stands: list[Stand], edits: list[Edit]) -> None:
        self._model, self._stands, self._edits = model, stands, edits
        self._active: tuple[list[Stand], list[Edit]] | None = None
        self._parts: dict[str, tuple[list[Stand], list[Edit]]] = {}
        self.taken: dict[str, Tensor] | None = None  # parameters' values, where they are to be taken out once

    sites: Any = None  # normalising calls that run over kept channels only

    @property
    def stands(self) -> list[Stand]:
        """The tensors that something stands for."""
        return self._stands

    @abstractmethod
    def kept(self, name: str) -> Kept | None:
        """What is kept of a tensor; None where it is all of it."""

    @property
    def changes(self) -> bool:
        """Whether anything is masked."""
        return bool(self._stands or self._edits)

    @abstractmethod
    def value(self, stand: Stand, original: Tensor) -> Tensor:
        """What stands for a tensor."""

    def enter(self) -> None:
        """Start of a forward.

        Raises:
            PlanError: If the model holds other tensors than its graph says.
        """
        self._put(self._stands, self._edits, again=False)

    def again(self, module: str) -> None:
        """Start of a module's forward during a backward."""
        if module not in self._parts:
            prefix = f"{module}." if module else ""
            mine = [s for s in self._stands if any(_is_in(p.module, module, prefix) for p in s.places)]
            self._parts[module] = (mine, [e for e in self._edits if _is_in(e.name, module, prefix)])
        self._put(*self._parts[module], again=True)

    def _put(self, stands: list[Stand], edits: list[Edit], again: bool) -> None:
        self._active = ([], [])
        try:
            for s in stands:
                original = s.places[0].owner[s.places[0].key]
                value = s.held
                if value is None or not again or not s.is_parameter:
                    value = self._value(s, original)
                s.original, s.version = original, 0 if value.is_inference() else value._version
                s.held = value
                self._active[0].append(s)
                for place in s.places:
                    place.owner[place.key] = value
            for e in edits:
                own = e.module.__dict__
                e.before = {k: type(e.module) if k == CLASS else own.get(k, _MISSING) for k in e.values}
                self._active[1].append(e)
                _set(e.module, e.values)
        except BaseException:
            self.leave()
            raise

    def _value(self, stand: Stand, original: Tensor) -> Tensor:
        if self.taken is None or not stand.is_parameter or torch.is_grad_enabled():
            return self.value(stand, original)
        if stand.name not in self.taken:
            self.taken[stand.name] = self.value(stand, original)
        return self.taken[stand.name]

    def leave(self) -> None:
        """End of a forward, also of one that raised."""
        if self._active is None:
            return
        stands, edits = self._active
        self._active = None
        for e in edits:
            _set(e.module, e.before)
        for s in stands:
            now = s.places[0].owner[s.places[0].key]
            for place in s.places:
                place.owner[place.key] = s.original
            if not s.is_parameter:
                self.write_back(s, now)
            if s.held is not None and not s.held.requires_grad:
                s.held = None

    def write_back(self, stand: Stand, now: Tensor) -> None:
        """Take over what a forward did to a buffer; nothing, unless an execution says so."""
        del stand, now


def _set(module: nn.Module, values: Mapping[str, Any]) -> None:
    own = module.__dict__
    for key, value in values.items():
        if key == CLASS:
            module.__class__ = value
        elif value is _MISSING:
            own.pop(key, None)
        else:
            own[key] = value


def _is_in(name: str, module: str, prefix: str) -> bool:
    return name == module or name.startswith(prefix)


class CompactExecution(Execution):
    """Runs the compacted structure: kept elements are taken out of the parameters at the start of every forward.

    They are differentiable functions of the parameters: gradients arrive there, exactly zero where something was
    removed. Buffers that a forward changes (running statistics) are written back.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, places: Mapping[str, list[Place]], structure: Structure
    ) -> None:
        self._kept = structure.kept
        self._picks = {n: Pick(graph.tensors[n].shape, k) for n, k in structure.kept.items()}
        self._factors: dict[str, Tensor] = {}
        for name, scalings in structure.rows.items():
            shape = graph.tensors[name].shape
            factor = torch.ones(shape[0], *[1] * (len(shape) - 1), dtype=torch.float64)
            for rows, f in scalings:
                factor[torch.from_numpy(np.ascontiguousarray(rows))] *= f
            self._factors[name] = factor
        names = dict.fromkeys([*self._picks, *self._factors])
        stands = [Stand(n, places[n], graph.tensors[n].is_parameter) for n in names]
        edits = [
            Edit(n, model.get_submodule(n) if n else model, dict(values)) for n, values in structure.attributes.items()
        ]
        grouped = self._grouped(model, graph, structure)
        self.grouped = tuple(e.name for e in grouped)
        super().__init__(model, stands, [*edits, *grouped])

    def _grouped(self, model: nn.Module, graph: ChannelGraph, structure: Structure) -> list[Edit]:
        """Grouped convolutions that lose channels call the op that picks a kernel for few channels a group."""
        found = []
        for name, m in model.named_modules():
            plain = isinstance(m, nn.Conv2d) and type(m)._conv_forward is nn.Conv2d._conv_forward
            if not plain or m.groups == 1 or m.padding_mode != "zeros" or "_conv_forward" in vars(m):
                continue
            weight = self._kept.get(graph.aliases.get(f"{name}.weight", ""))
            groups = structure.attributes.get(name, {}).get("groups", m.groups)
            if weight is not None and max(weight.shape[1], weight.shape[0] // groups) > 1:
                found.append(Edit(name, m, {"_conv_forward": functools.partial(_conv_forward, m)}))
        return found

    def kept(self, name: str) -> Kept | None:
        """What is kept of a tensor."""
        return self._kept.get(name)

    def value(self, stand: Stand, original: Tensor) -> Tensor:
        """The kept elements.

        Raises:
            PlanError: If the tensor has another shape than the graph says.
        """
        pick, factor = self._picks.get(stand.name), self._factors.get(stand.name)
        if pick is not None and tuple(original.shape) != pick.full:
            raise PlanError(
                f"{stand.name}: the graph expects shape {pick.full}, the model has {tuple(original.shape)}; a model "
                "can be masked once at a time, and only at its original shapes"
            )
        if factor is not None:
            if factor.device != original.device or factor.dtype != original.dtype:
                factor = self._factors[stand.name] = factor.to(original.device, original.dtype)
            original = original * factor
        return original if pick is None else pick.take(original)

    def write_back(self, stand: Stand, now: Tensor) -> None:
        """Running statistics of kept channels; those of removed channels stand still."""
        pick = self._picks.get(stand.name)
        if pick is None or tuple(now.shape) != pick.shape:
            return
        learns = any(place.of.training for place in stand.places)  # batch norm does not count its writes as versions
        if learns or now is not stand.held or now.is_inference() or now._version != stand.version:
            with torch.no_grad():
                pick.write(stand.original, now.detach())


def _conv_forward(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return grouped_conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


def places_of(model: nn.Module, graph: ChannelGraph, names: Iterable[str]) -> dict[str, list[Place]]:
    """Where tensors of a graph sit in a model, by first name, under all their names.

    Raises:
        PlanError: If the model lacks one, or has it in another shape.
    """
    aliases: dict[str, list[str]] = {}
    for alias, first in graph.aliases.items():
        aliases.setdefault(first, []).append(alias)
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[str, list[Place]] = {}
    for name in names:
        tensor = graph.tensors[name]
        for alias in aliases[name]:
            path, _, key = alias.rpartition(".")
            module = modules.get(path)
            if module is None:
                raise PlanError(f"the model has no module {path!r} that the graph knows; comb this model")
            owner: dict[str, Any] = module._parameters if tensor.is_parameter else module._buffers
            value = owner.get(key)
            if value is None or tuple(value.shape) != tensor.shape:
                got = None if value is None else tuple(value.shape)
                raise PlanError(
                    f"{alias}: the graph expects shape {tensor.shape}, the model has {got}; comb this model"
                )
            places.setdefault(name, []).append(Place(path, module, owner, key))
    return places

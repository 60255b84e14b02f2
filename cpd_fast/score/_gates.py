"""Gates of ones on channels, put where convolutions and linear layers consume them, without touching the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cpd_fast.adapters import adaptable, adapted_forward
from cpd_fast.errors import ScoreError
from cpd_fast.score.criterion import Context
from cpd_fast.types import CoupledGroup, ParamSlice

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_LINEAR = torch.nn.functional.linear
_STEPS = 3  # at most from a parameter to the weight that a layer gets


@dataclass(frozen=True)
class Use:
    """Where a group's channels lie in an activation: ``index`` ``(n_channels, k)`` along the channel dim."""

    group: CoupledGroup
    index: np.ndarray


class Sites(TorchFunctionMode):
    """Sees every activation that a convolution or linear layer consumes.

    Groups that no such layer consumes (query and key dims) are seen where they are produced. Modules with an adapter
    (``nn.MultiheadAttention``) run it inside the block: their own forward is one call, whose layers nobody sees.
    """

    sees_original_shapes = True  # a masked model runs at full width below this mode

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context
        self._consumers: dict[int, list[tuple[CoupledGroup, ParamSlice]]] = {}
        self._producers: dict[int, list[tuple[CoupledGroup, ParamSlice]]] = {}
        for g in context.graph.groups:
            wide = [s for s in g.slices if s.param in context.params and context.params[s.param].dim() > 1]
            columns = [s for s in wide if not s.produces]
            table, chosen = (self._consumers, columns) if columns else (self._producers, wide)
            for s in chosen:
                table.setdefault(id(context.params[s.param]), []).append((g, s))
        self.rows: int | None = None  # fewest rows (dim 0) that any layer saw
        self._seen: set[str] = set()
        self._adapted: list[nn.Module] = []

    def __enter__(self) -> Sites:
        for module in self.context.model.modules():
            if adaptable(module):
                module.forward = partial(adapted_forward(module), module)
                self._adapted.append(module)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._adapted:
            del self._adapted.pop().__dict__["forward"]

    @abstractmethod
    def at(self, x: Tensor, dim: int, uses: Sequence[Use]) -> Tensor:
        """What takes the place of ``x``, whose channels run along ``dim``."""

    def weight(self, weight: Tensor) -> Tensor:
        """What takes the place of a layer's weight."""
        return weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not _LINEAR and func not in _CONVOLUTIONS:
            return func(*args, **kwargs)
        args = list(args)
        x = args.pop(0) if args else kwargs.pop("input")
        weight = args.pop(0) if args else kwargs.pop("weight")
        dim = x.dim() - 1 if func is _LINEAR else x.dim() - weight.dim() + 1
        if dim > 0:
            self.rows = min(x.shape[0], self.rows or x.shape[0])
        key = self._parameter(weight)
        if key in self._consumers:
            uses = [Use(g, inputs_of(s, weight, x.shape[dim])) for g, s in self._consumers[key]]
            self._seen.update(u.group.name for u in uses)
            x = self.at(x, dim, uses)
        y = func(x, self.weight(weight), *args, **kwargs)
        if key in self._producers:
            uses = [Use(g, i) for g, s in self._producers[key] if (i := outputs_of(s, weight)).size]
            self._seen.update(u.group.name for u in uses)
            y = self.at(y, dim, uses) if uses else y
        return y

    def _parameter(self, weight: Tensor) -> int:
        """Identity of the parameter that a layer's weight is, or is made from in a few steps (mask, cast, chunk)."""
        known = {**self._consumers, **self._producers}
        if id(weight._base) in known:
            return id(weight._base)
        nodes = [weight.grad_fn]
        for _ in range(_STEPS):
            nodes = [n for node in nodes if node is not None for n, _ in node.next_functions]
            for node in nodes:
                if id(source := getattr(node, "variable", None)) in known:
                    return id(source)
        return id(weight)

    def refuse_unseen(self, criterion: str) -> None:
        """Raise if a prunable group was met nowhere.

        Raises:
            ScoreError: If there is one.
        """
        lack = [g.name for g in self.context.graph.prunable_groups if g.name not in self._seen]
        if lack:
            raise ScoreError(
                f"{criterion}: no convolution or linear layer of {len(lack)} prunable groups was called: "
                f"{', '.join(lack[:5])}; use HessianTrace or Taylor, or ignore them in comb"
            )


class Marks(Sites):
    """Remembers the activations as they are: a gate's gradient is the sum of activation times gradient."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.tensors: list[Tensor] = []
        self.dims: list[int] = []
        self.uses: list[Sequence[Use]] = []

    def at(self, x: Tensor, dim: int, uses: Sequence[Use]) -> Tensor:
        """The same values, as a tensor of their own."""
        if x.requires_grad:
            x = x.view_as(x)
            self.tensors.append(x)
            self.dims.append(dim)
            self.uses.append(uses)
        return x


class Rows(Sites):
    """Changes nothing; finds out in how many samples dim 0 can be told apart everywhere."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._counts: set[int] = set()

    def at(self, x: Tensor, dim: int, uses: Sequence[Use]) -> Tensor:
        """The tensor itself."""
        self._counts.add(x.shape[0] if dim > 0 else 1)
        return x

    @property
    def samples(self) -> int:
        """Samples of the batch, or 1 where some activation does not hold a block of rows for each."""
        known = self.context.samples or self.rows or 1
        return known if all(n % known == 0 for n in self._counts) else 1


class Gates(Sites):
    """Multiplies every channel by a gate of its own for each sample, 1 unless moved.

    Weights of the layers are held constant: no gradient of theirs is computed, nothing is kept for it.

    Args:
        context: Model and graph.
        samples: Samples of the batch; dim 0 of every activation holds a block of rows for each.
        values: Gate values by group name, ``(samples, n_channels)``; 1 where None.
    """

    def __init__(self, context: Context, samples: int, values: dict[str, Tensor] | None = None) -> None:
        super().__init__(context)
        self.samples = samples
        self.gates: dict[str, Tensor] = {}
        self._values = values or {}

    def weight(self, weight: Tensor) -> Tensor:
        """The weight as a constant."""
        return weight.detach()

    def _gate(self, group: CoupledGroup, like: Tensor) -> Tensor:
        if group.name not in self.gates:
            value = self._values.get(group.name)
            if value is None:
                dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
                value = torch.ones(self.samples, group.n_channels, device=like.device, dtype=dtype)
            self.gates[group.name] = value.detach().clone().requires_grad_()
        return self.gates[group.name]

    def at(self, x: Tensor, dim: int, uses: Sequence[Use]) -> Tensor:
        """The activation with its channels multiplied by their gates."""
        parts = [self._gate(u.group, x) for u in uses]
        width = x.shape[dim]
        where = np.full(width, -1)
        start = 0
        for u in uses:
            where[u.index] = np.arange(start, start + u.group.n_channels)[:, None]
            start += u.group.n_channels
        if start == width and np.array_equal(where, np.arange(width)):
            gate = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        else:
            where[where < 0] = start
            ones = parts[0].new_ones(len(parts[0]), 1)
            gate = torch.cat([*parts, ones], 1)[:, torch.from_numpy(where).to(x.device)]
        shape = [width if d == dim else 1 for d in range(x.dim())]
        if dim > 0 and self.samples > 1:
            repeats = x.shape[0] // self.samples
            gate = gate if repeats == 1 else gate.repeat_interleave(repeats, 0)
            shape[0] = x.shape[0]
        return x * gate.view(shape).to(x.dtype)


def outputs_of(s: ParamSlice, weight: Tensor) -> np.ndarray:
    """Indices of the layer's outputs that each channel of a producing slice owns: ``(n_channels, k)``.

    The layer's weight may be a chunk of the parameter's rows; k is 0 where it holds none of the slice.
    """
    if weight._base is None:
        return s.index
    start = (weight.storage_offset() - weight._base.storage_offset()) // weight.stride(0)
    inside = (s.index >= start) & (s.index < start + len(weight))
    if len(set(inside.sum(1))) > 1:  # not the same share of every channel: not a chunk of whole blocks
        return s.index[:, :0]
    return (s.index[inside] - start).reshape(len(s.index), -1)


def inputs_of(s: ParamSlice, weight: Tensor, width: int) -> np.ndarray:
    """Indices of the layer's input channels that each channel of a consuming slice owns: ``(n_channels, k)``."""
    if s.dims == (1,):
        return s.index
    rows, columns = weight.shape[:2]  # a grouped convolution: dims (0, 1), input channel from (row, column)
    groups = max(width // columns, 1)
    inputs = s.index // columns // max(rows // groups, 1) * columns + s.index % columns
    return np.stack([np.unique(r) for r in inputs])

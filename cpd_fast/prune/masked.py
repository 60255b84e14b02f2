"""Masks: a plan applied to a full-size model, so that it computes what the compacted one will."""

from __future__ import annotations

from collections import Counter
from types import MethodType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from cpd_fast.adapters import adaptable, adapted_forward
from cpd_fast.errors import PlanError
from cpd_fast.prune.norms import MASKED
from cpd_fast.types import ChannelGraph, NormSite, PrunePlan


class MaskHandle:
    """Masks on a model: forwards run as if the removed channels did not exist.

    Inside a forward every parameter is replaced by ``parameter * mask``, rows of removed channels and columns that
    read them alike, so that their gradients are exactly zero and nothing an optimizer does to them is ever seen.
    Normalisations count kept channels only. Between forwards the model is as it was.
    """

    dropped_by_compaction = True  # a compacted copy of a masked model has nothing left to mask

    def __init__(self, model: nn.Module, graph: ChannelGraph, plan: PrunePlan | None = None) -> None:
        self.graph = graph
        self._model = model
        self._places = _places(model, graph)
        self._masks: dict[str, Tensor] = {}
        self._swapped: list[tuple[dict[str, Any], str, Any]] = []
        self._adapted: list[nn.Module] = []  # modules that run their adapter's forward, during a forward
        self._sites: _NormMode | None = None
        self._running: _NormMode | None = None  # the one that the forward under way has entered
        self._stack_hooks: list[RemovableHandle] = []
        self._hooks: list[RemovableHandle] = []
        self.plan = PrunePlan({}, graph.fingerprint)
        if plan is not None:
            self.update(plan)

    def update(self, plan: PrunePlan) -> None:
        """Replace the plan. Weights are never touched, so any plan can follow any other.

        Raises:
            PlanError: If the plan does not fit the graph.
        """
        plan.check(self.graph)
        alive = self.graph.alive(plan)
        masks: dict[str, Tensor] = {}
        for name, tensor in self.graph.tensors.items():
            if name not in self._places or all(alive[m].all() for m in tensor.maps):
                continue
            keep = alive[tensor.maps[0]]
            for m in tensor.maps[1:]:
                keep = keep & alive[m]
            masks[name] = torch.from_numpy(np.ascontiguousarray(keep))
        self._masks = masks
        sites = [s for s in self.graph.norm_sites if not alive[s.channels].all()]
        self._sites = _NormMode(sites, alive) if sites else None
        self.plan = plan

    def enter(self) -> None:
        """Put masked parameters in place (start of a forward).

        Raises:
            PlanError: If a forward of this model is running already.
        """
        if self._swapped:
            raise PlanError("the masked model was called inside its own forward; call it once at a time")
        if self._masks or self._sites is not None:
            for module in self._model.modules():
                if adaptable(module):
                    module.forward = MethodType(adapted_forward(module), module)
                    self._adapted.append(module)
        for name, mask in self._masks.items():
            places = self._places[name]
            owner, key = places[0]
            original = owner[key]
            if mask.device != original.device or mask.dtype != original.dtype:
                mask = self._masks[name] = mask.to(original.device, original.dtype)
            product = original * mask
            for owner, key in places:
                self._swapped.append((owner, key, original))
                owner[key] = product
        if self._sites is not None:
            self._sites.start()
            for name, module in self._model.named_modules():
                if name:  # the stack starts at the model itself
                    self._stack_hooks += self._sites.watch(name, module)
            self._sites.__enter__()
            self._running = self._sites

    def leave(self) -> None:
        """Put the parameters back (end of a forward, also one that raised)."""
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None
        for hook in self._stack_hooks:
            hook.remove()
        self._stack_hooks = []
        for module in self._adapted:
            del module.__dict__["forward"]
        self._adapted = []
        for owner, key, original in self._swapped:
            owner[key] = original
        self._swapped = []

    def attach(self) -> MaskHandle:
        """Mask every call of the model itself from now on."""
        if not self._hooks:
            self._hooks = [
                self._model.register_forward_pre_hook(self._before, prepend=True),
                self._model.register_forward_hook(self._after, always_call=True),
            ]
        return self

    def _before(self, _module: nn.Module, _args: Any) -> None:
        self.enter()

    def _after(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        self.leave()

    def remove(self) -> None:
        """Take the masks off; the model computes what it did before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.leave()


class MaskedModel(nn.Module):
    """The model seen through a plan; shares every parameter with it. Made by :func:`masked`."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> None:
        super().__init__()
        self.model = model
        self._handle = MaskHandle(model, graph, plan)
        self._modes = {m: m.training for m in model.modules()}
        self.train(model.training)

    @property
    def plan(self) -> PrunePlan:
        """The plan that is applied."""
        return self._handle.plan

    def update(self, plan: PrunePlan) -> None:
        """Look at the model through another plan."""
        self._handle.update(plan)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output as if the removed channels did not exist."""
        self._handle.enter()
        try:
            return self.model(*args, **kwargs)
        finally:
            self._handle.leave()

    def __enter__(self) -> MaskedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, training in self._modes.items():
            module.training = training


def masked(model: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> MaskedModel:
    """Run a model at its original shapes as if the channels that a plan removes did not exist.

    Args:
        model: The model that ``graph`` was combed from (or one of the same structure).
        graph: Its coupled channel groups.
        plan: Kept channels; an empty plan changes nothing, bit for bit.

    Returns:
        A module, also usable as a context manager, that shares parameters with ``model``. Outputs equal those of
        ``compact(model, graph, plan)``; gradients of removed weights are exactly zero.

    Raises:
        PlanError: If the plan or the model does not fit the graph.

    Example:
        >>> import torch, cpd_fast as cpd
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> x = torch.zeros(1, 3, 8, 8)
        >>> graph = cpd.comb(net, x)
        >>> plan = cpd.random_plan(graph, keep=0.5)
        >>> with cpd.masked(net, graph, plan) as m:
        ...     y = m(x)
    """
    return MaskedModel(model, graph, plan)


def attach_masks(model: nn.Module, graph: ChannelGraph, plan: PrunePlan | None = None) -> MaskHandle:
    """Mask the user's own model object, for training loops that keep calling ``model(x)``.

    Args:
        model: The model that ``graph`` was combed from.
        graph: Its coupled channel groups.
        plan: First plan; without one nothing is masked yet.

    Returns:
        A handle: ``update(plan)`` changes the masks, ``remove()`` takes them off.

    Raises:
        PlanError: If the plan or the model does not fit the graph.
    """
    return MaskHandle(model, graph, plan).attach()


class _NormMode(TorchFunctionMode):
    """Replaces normalising calls over masked axes, told apart as comb did: module, op, number of the call."""

    def __init__(self, sites: list[NormSite], alive: np.ndarray) -> None:
        super().__init__()
        self._keep = {
            (s.module, s.op, s.call): torch.from_numpy(alive[s.channels]) for s in sites if not alive[s.channels].all()
        }
        self._stack = [""]
        self._calls: Counter[tuple[str, str]] = Counter()

    def start(self) -> None:
        self._stack = [""]
        self._calls.clear()

    def watch(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        """Hooks that keep the stack of running modules."""
        return [
            module.register_forward_pre_hook(lambda _m, _a: self._stack.append(name)),
            module.register_forward_hook(lambda _m, _a, _o: (self._stack.pop(), None)[1], always_call=True),
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = getattr(func, "__name__", "")
        run = MASKED.get(op)
        if run is None:
            return func(*args, **kwargs)
        key = (self._stack[-1], op)
        site = (*key, self._calls[key])
        self._calls[key] += 1
        keep = self._keep.get(site)
        if keep is None:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs.pop("query" if "query" in kwargs else "input")
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        if keep.device != x.device or keep.dtype != wide:
            keep = self._keep[site] = keep.to(x.device, wide)
        return run(keep, x, *args[1:], **kwargs)


def _places(model: nn.Module, graph: ChannelGraph) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Where every maskable tensor sits: parameters, and buffers that a product reads through their columns.

    Raises:
        PlanError: If the model lacks a tensor of the graph, or has it in another shape.
    """
    consumed = {s.param for g in graph.groups for s in g.slices if not s.produces}
    names: dict[str, list[str]] = {}
    for alias, first in graph.aliases.items():
        names.setdefault(first, []).append(alias)
    places: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for name, tensor in graph.tensors.items():
        if not tensor.masked or (not tensor.is_parameter and name not in consumed):
            continue
        for alias in names[name]:
            path, _, key = alias.rpartition(".")
            try:
                module = model.get_submodule(path)
            except AttributeError as e:
                raise PlanError(f"the model has no module {path!r} that the graph knows; comb this model") from e
            owner = module._parameters if tensor.is_parameter else module._buffers
            value = owner.get(key)
            if value is None or tuple(value.shape) != tensor.shape:
                got = None if value is None else tuple(value.shape)
                raise PlanError(
                    f"{alias}: the graph expects shape {tensor.shape}, the model has {got}; comb this model"
                )
            places.setdefault(name, []).append((owner, key))
    return places

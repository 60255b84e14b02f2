"""Masked execution at the original widths: weights times masks, and normalisations over kept channels only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cpd_fast.adapters import adaptable, adapted_forward
from cpd_fast.prune.execution import Edit, Execution, Place, Stand
from cpd_fast.prune.norms import MASKED
from cpd_fast.prune.picks import Kept, Part
from cpd_fast.types import ChannelGraph, NormSite


class FullWidthExecution(Execution):
    """Runs the model at its original shapes; nothing is saved, but any forward that comb follows can be run.

    Every parameter is replaced by ``parameter * mask``, rows of removed channels and columns that read them alike.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, places: Mapping[str, list[Place]], alive: np.ndarray
    ) -> None:
        consumed = {s.param for g in graph.groups for s in g.slices if not s.produces}
        self._masks: dict[str, Tensor] = {}
        for name, tensor in graph.tensors.items():
            if not tensor.masked or (not tensor.is_parameter and name not in consumed):
                continue
            if all(alive[m].all() for m in tensor.maps):
                continue
            keep = alive[tensor.maps[0]]
            for m in tensor.maps[1:]:
                keep = keep & alive[m]
            self._masks[name] = torch.from_numpy(np.ascontiguousarray(keep))
        self._shapes = {n: graph.tensors[n].shape for n in self._masks}
        sites = [s for s in graph.norm_sites if not alive[s.channels].all()]
        self.sites = _NormMode(sites, alive) if sites else None
        self._entered: _NormMode | None = None
        edits = []
        if self._masks or sites:
            edits = [
                Edit(n, m, {"forward": MethodType(adapted_forward(m), m)})
                for n, m in model.named_modules()
                if adaptable(m)
            ]
        super().__init__(model, [Stand(n, places[n], graph.tensors[n].is_parameter) for n in self._masks], edits)

    @property
    def changes(self) -> bool:
        """Whether anything is masked."""
        return super().changes or self.sites is not None

    def kept(self, name: str) -> Kept | None:
        """What is kept of a tensor."""
        mask, shape = self._masks[name], self._shapes[name]
        return Part((int(mask.expand(shape).sum()),), {}, mask.bool().expand(shape).cpu().numpy())

    def value(self, stand: Stand, original: Tensor) -> Tensor:
        """The tensor times its mask."""
        mask = self._masks[stand.name]
        if mask.device != original.device or mask.dtype != original.dtype:
            mask = self._masks[stand.name] = mask.to(original.device, original.dtype)
        return original * mask

    def enter(self) -> None:
        """Start of a forward."""
        super().enter()
        self._count("")

    def again(self, module: str) -> None:
        """Start of a module's forward during a backward; its calls are counted from 0."""
        super().again(module)
        self._count(module)

    def _count(self, module: str) -> None:
        if self.sites is not None:
            self.sites.start(module)
            self.sites.__enter__()
            self._entered = self.sites

    def leave(self) -> None:
        """End of a forward."""
        if self._entered is not None:
            self._entered.__exit__(None, None, None)
            self._entered = None
        super().leave()


class _NormMode(TorchFunctionMode):
    """Replaces normalising calls over masked axes, told apart as comb did: module, op, number of the call."""

    def __init__(self, sites: list[NormSite], alive: np.ndarray) -> None:
        super().__init__()
        self._keep = {(s.module, s.op, s.call): torch.from_numpy(alive[s.channels]) for s in sites}
        self.stack = [""]
        self._calls: Counter[tuple[str, str]] = Counter()

    def start(self, module: str) -> None:
        self.stack = [module]
        self._calls.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = getattr(func, "__name__", "")
        run = MASKED.get(op)
        if run is None:
            return func(*args, **kwargs)
        key = (self.stack[-1], op)
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

"""Values that a forward makes of nothing but numbers: known in a trace although everything else there is shape.

``torch.arange`` and what is computed from it may decide which way a forward takes (position masks, tables of levels).
Such small tensors are evaluated beside the trace, on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from cpd_fast.comb.calls import Call
from cpd_fast.comb.leaves import leaves

LARGEST = 1 << 14  # elements
# checks of a forward that all is well: a trace takes it for granted
NAN_CHECKS = {"isfinite": True, "isnan": False, "isinf": False}
FACTORIES = frozenset(f"aten.{n}" for n in "arange zeros ones full eye linspace scalar_tensor".split())


class Values:
    """What is known of the values of meta tensors, by id (the trace keeps its tensors alive)."""

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}
        self._views: dict[int, list[int]] = {}  # base -> tensors that share its memory

    def of(self, t: Any) -> Tensor | None:
        """The value of a meta tensor, on the CPU."""
        return self._known.get(id(t))

    def bears_on(self, call: Call) -> bool:
        """Whether a call reads or overwrites anything known."""
        if not self._known:
            return False
        tensors = [t for t in call.args if isinstance(t, Tensor)]
        return any(id(t) in self._known for t in tensors) or any(
            id(t if t._base is None else t._base) in self._views for t in tensors
        )

    def set(self, t: Tensor, value: Tensor, numel: int | None = None) -> None:
        """Remember a value; the caller keeps ``t`` alive."""
        if (t.numel() if numel is None else numel) <= LARGEST:
            self._known[id(t)] = value
            self._views.setdefault(id(t if t._base is None else t._base), []).append(id(t))

    def assume(self, t: Tensor, value: bool) -> None:
        """All elements of a tensor of any size are taken for ``value``."""
        with _disable_current_modes():
            self.set(t, torch.tensor(value).expand(t.shape), LARGEST)

    def forget(self, t: Tensor) -> None:
        """``t`` is written in place: nothing is known of it any more, nor of what shares its memory."""
        for key in self._views.pop(id(t if t._base is None else t._base), []):
            self._known.pop(key, None)

    def follow(self, op: str, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Evaluate a call if it depends on known values only."""
        tensors = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func._schema.is_mutable:
            for t in tensors[:1]:
                self.forget(t)
            return
        if tensors:
            if not self._known or any(id(t) not in self._known for t in tensors):
                return
        elif op not in FACTORIES:
            return
        outs = [o for o in leaves(out) if isinstance(o, Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags or any(o.numel() > LARGEST for o in outs):
            return
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        args, kwargs = tree_map_only(Tensor, lambda t: self._known[id(t)], (args, kwargs))
        for o, value in zip(outs, leaves(func(*args, **kwargs)), strict=True):
            self.set(o, value)

"""Values that a forward makes of nothing but numbers: known in a trace although everything else there is shape.

``torch.arange`` and what is computed from it may decide which way a forward takes (position masks, tables of levels).
Such tensors are evaluated beside the trace, on the CPU, where they are small or have equal elements (a padding mask of
ones). Nothing that depends on an input or a weight is ever known; small buffers (switches) are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from cpd_fast.comb.calls import Call
from cpd_fast.comb.leaves import leaves
from cpd_fast.comb.meta import switch
from cpd_fast.comb.walk import modules_of

LARGEST = 1 << 14  # elements
MOST_NUMBERS = 16  # elements of a tensor that stands for numbers
# checks of a forward that all is well: a trace takes it for granted, unless it knows better
CHECKS = {"isfinite": True, "isnan": False, "isinf": False, "_is_all_true": True}
OF_NUMBERS = {"tensor": 0, "as_tensor": 0, "asarray": 0, "new_tensor": 1}  # position of the numbers
# their values depend on no other tensor's values
FACTORIES = frozenset(
    f"aten.{n}"
    for n in "arange zeros ones full empty eye linspace scalar_tensor zeros_like ones_like full_like empty_like "
    "new_zeros new_ones new_full new_empty".split()
)
EQUAL = {"zeros": 0, "ones": 1}  # what all elements are; of ``full``, an argument
POINTWISE = frozenset(f"aten.{n}" for n in "_to_copy clone detach alias lift_fresh".split())


class Values:
    """What is known of the values of meta tensors, by id (the trace keeps its tensors alive).

    Views of a known tensor share its memory, so that what is written into one shows in all.
    """

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}
        self._sharing: dict[int, list[int]] = {}  # address of a memory -> tensors whose values lie there
        # every tensor and value there was, so that an id or an address stands for one only: a forward may drop a buffer
        self._alive: list[tuple[Tensor, Tensor]] = []
        self._held: set[int] = set()  # tensors that depend on a buffer, which a compaction may cut

    def of(self, t: Any) -> Tensor | None:
        """The value of a meta tensor, on the CPU."""
        return self._known.get(id(t))

    def bears_on(self, call: Call) -> bool:
        """Whether a call reads or overwrites anything known."""
        if not self._known:
            return False
        tensors = [t for t in call.args if isinstance(t, Tensor)]
        return any(id(t) in self._known or (t._base is not None and id(t._base) in self._known) for t in tensors)

    def numbers(self, call: Call) -> tuple[float, ...]:
        """The elements of known arguments that are as small as numbers and no buffers; equal ones count once."""
        known = [t for t in call.args if id(t) in self._known] if self._known else []
        if not known:
            return ()
        with _disable_current_modes():
            return tuple(n for t in known for n in self._numbers(t))

    def _numbers(self, t: Tensor) -> list[float]:
        value = self._known[id(t)]
        if value.is_complex() or not value.numel() or id(t) in self._held:
            return []
        if _equal(value):
            return [value.flatten()[0].item()]
        if value.numel() > MOST_NUMBERS:
            return []
        elements = value.flatten().tolist()
        return elements[:1] if len(set(elements)) == 1 else elements

    def set(self, t: Tensor, value: Tensor) -> None:
        """Remember a value."""
        self._known[id(t)] = value
        self._alive.append((t, value))
        self._sharing.setdefault(value.untyped_storage().data_ptr(), []).append(id(t))

    def fill(self, t: Tensor, value: Any) -> None:
        """All elements of a tensor of any size are ``value``."""
        with _disable_current_modes():
            self.set(t, torch.tensor(value, dtype=t.dtype).expand(t.shape))

    def read_switches(self, clone: nn.Module) -> None:
        """Small buffers of a model without weights have the values that the model has."""
        with _disable_current_modes():
            for buffer in (b for m in modules_of(clone) for b in m._buffers.values() if b is not None):
                if (value := switch(buffer)) is not None:
                    self.set(buffer, value.clone())
                    self._held.add(id(buffer))

    def made_of(self, t: Tensor, data: Any) -> None:
        """``torch.tensor(data)``, made on the meta device at once."""
        numbers = leaves(data)
        if t.is_meta and len(numbers) <= LARGEST and all(isinstance(v, (bool, int, float, complex)) for v in numbers):
            with _disable_current_modes():
                self.set(t, torch.tensor(data, dtype=t.dtype))

    def forget(self, t: Tensor) -> None:
        """``t`` is written in place: nothing is known of it any more, nor of what shares its memory."""
        for held in (t, t._base):
            value = self.of(held)
            if value is not None:
                for key in self._sharing.pop(value.untyped_storage().data_ptr(), []):
                    self._known.pop(key, None)

    def follow(self, op: str, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Evaluate a call if it depends on known values only."""
        if op in FACTORIES:
            self._make(op, func, args, kwargs, out)
            return
        if not self._known:
            return
        tensors = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor)]
        values = [v for t in tensors if (v := self.of(t)) is not None]
        written = tensors if func._schema.is_mutable else []
        if len(values) < len(tensors) or not tensors or torch.Tag.nondeterministic_seeded in func.tags:
            found = None
        else:
            found = self._evaluate(op, func, args, kwargs, out, values)
        if found is None:
            for t in written:
                self.forget(t)
            return
        held = any(id(t) in self._held for t in tensors)
        for o, value in zip((o for o in leaves(out) if isinstance(o, Tensor)), found, strict=True):
            self.set(o, value)
            if held:
                self._held.add(id(o))

    def _evaluate(
        self, op: str, func: Any, args: Any, kwargs: dict[str, Any], out: Any, values: list[Tensor]
    ) -> list[Tensor] | None:
        """The values of a call's outputs; None where they are not worth their memory."""
        kwargs = _on_cpu(kwargs)
        large = any(o.numel() > LARGEST for o in leaves(out) if isinstance(o, Tensor)) and not func.is_view
        if large and not (isinstance(out, Tensor) and _is_pointwise(op, func) and all(map(_equal, values))):
            return None
        if func._schema.is_mutable and (large or not all(map(_has_places, values))):
            return None
        try:
            if large:
                one = tree_map_only(Tensor, lambda t: self._known[id(t)].flatten()[:1], (args, kwargs))
                return [func(*one[0], **one[1]).reshape(()).expand(out.shape)]
            args, kwargs = tree_map_only(Tensor, lambda t: self._known[id(t)], (args, kwargs))
            return [v for v in leaves(func(*args, **kwargs)) if isinstance(v, Tensor)]
        except RuntimeError:  # strides that only the meta tensor has
            return None

    def _make(self, op: str, func: Any, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
        """A new tensor: equal elements need no memory where they are many."""
        name = op.removeprefix("aten.").removeprefix("new_").removesuffix("_like")
        if out.numel() <= LARGEST:
            args, kwargs = tree_map_only(Tensor, lambda t: t.new_empty(t.shape, device="cpu"), (args, _on_cpu(kwargs)))
            self.set(out, func(*args, **kwargs))
        elif name in EQUAL:
            self.fill(out, EQUAL[name])
        elif name == "full" and isinstance(args[1], (bool, int, float)):
            self.fill(out, args[1])


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs if kwargs.get("device") is None else {**kwargs, "device": torch.device("cpu")}


def _is_pointwise(op: str, func: Any) -> bool:
    return op in POINTWISE or torch.Tag.pointwise in func.tags


def _equal(value: Tensor) -> bool:
    """Whether all elements are one in memory."""
    strides = zip(value.shape, value.stride(), strict=True)
    return value.numel() > 0 and not any(stride and size > 1 for size, stride in strides)


def _has_places(value: Tensor) -> bool:
    """Whether every element has a place of its own, so that it can be written."""
    return all(stride or size < 2 for size, stride in zip(value.shape, value.stride(), strict=True))

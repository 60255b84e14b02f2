"""What a trace records of calls, the rule table, and which of a call's numbers must stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cpd_fast.comb.leaves import leaves
from cpd_fast.comb.planes import State

if TYPE_CHECKING:
    from cpd_fast.comb.trace import Tracer


@dataclass(frozen=True)
class Term:
    """A cost: ``coefficient`` times the joint box of ``planes`` (label arrays of one rank)."""

    kind: str
    module: str
    coefficient: int
    planes: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Step:
    """One computing call of a trace: what it was, and the shape and label arrays of its first output.

    ``constants`` are its numbers that must not change; ``scaled`` the state of the first argument, where a constant
    scales it; ``loose`` the dims along which it is as long as the forward asks for, since elements repeat there.
    """

    op: str
    module: str
    shape: tuple[int, ...]
    planes: tuple[np.ndarray, ...]
    constants: tuple[float, ...]
    scaled: State | None
    loose: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Site:
    """A call that normalises over a channel axis; ``labels`` broadcast to its input."""

    module: str
    op: str
    call: int
    labels: np.ndarray


@dataclass(frozen=True)
class AttentionSite:
    """An attention call that takes 1/sqrt(head_dim) as its scale; the ``call``-th of one forward of the module."""

    module: str
    call: int
    q: State


@dataclass(frozen=True)
class Call:
    """One ATen call as a rule sees it."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def arg(self, i: int, name: str, default: Any = None) -> Any:
        """Positional argument ``i``, or keyword ``name``."""
        return self.args[i] if i < len(self.args) else self.kwargs.get(name, default)


Rule = Callable[["Tracer", Call], Any]
RULES: dict[str, Rule] = {}


def register_rule(*ops: str) -> Callable[[Rule], Rule]:
    """Say how channels run through an operator.

    The rule gets the tracer and the call and returns the :class:`State` of the output (a list of them for several
    outputs). It unites labels through ``tracer.meet``, freezes through ``tracer.freeze_dims``.

    Args:
        ops: Names of ATen or custom operators without overload, such as ``"aten.relu"`` or ``"mylib.my_op"``.

    Example:
        >>> from cpd_fast.comb import register_rule
        >>> @register_rule("mylib.swish_gate")          # y = x * sigmoid(gate), shapes (N, C, H, W) and (N, C, 1, 1)
        ... def swish_gate(tracer, call):
        ...     return tracer.meet(call.args[0], call.args[1], out=call.out)
    """

    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, rule))
        return rule

    return add


SCALING = {"aten.mul", "aten.div", "scaled_dot_product_attention"}
FACTORS = frozenset(f"aten.{n}" for n in ("mul", "add", "sub"))  # may be given what a comparison of sizes says
# calls whose integers are sizes, which may shrink
SIZED = {
    *(f"aten.{n}" for n in "convolution native_layer_norm repeat tile zeros ones full empty arange rand randn".split()),
    *(f"aten.{n}" for n in "new_zeros new_ones new_full new_empty linspace eye native_channel_shuffle".split()),
    *(
        "linear",
        "matmul",
        "__matmul__",
        "layer_norm",
        "rms_norm",
        "aten.empty_strided",
        "aten.new_empty_strided",
        "aten.split",
        "aten.unsafe_split",
    ),
}


def constants(call: Call) -> tuple[float, ...]:
    """The numbers of a call that must be the same in a compacted model: floats, and integers that are no sizes."""
    found = leaves([call.args, call.kwargs] if call.kwargs else call.args)
    flags = call.op in FACTORS
    numbers = [v for v in found if isinstance(v, (int, float)) and (flags or (v is not True and v is not False))]
    if call.op in ("aten.full", "aten.new_full"):
        return (call.args[-1],) if isinstance(call.args[-1], (int, float)) else ()
    if call.op == "aten.native_group_norm":
        return tuple(numbers[-2:])  # groups, eps
    return tuple(v for v in numbers if isinstance(v, float) or call.op not in SIZED)


# calls that only change how a tensor is stored; whether they happen at all may depend on strides
VIEWS = {f"aten.{n}" for n in "detach alias lift_fresh _unsafe_view clone _to_copy copy_ as_strided_ empty".split()}


def out_of_place_tags(func: Any) -> list[Any]:
    """Tags of ``relu`` for ``relu_``: in-place variants often lack them."""
    ns, name = func._schema.name.split("::")
    packet = getattr(getattr(torch.ops, ns), name.rstrip("_"), None)
    if packet is None or not name.endswith("_"):
        return []
    overload = getattr(packet, func._overloadname, None) or getattr(packet, "default", None)
    return list(overload.tags) if overload is not None else []

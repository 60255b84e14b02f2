"""Elementwise calls, copies, and tensors that the forward makes."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from typing import Any

from torch import Tensor

from cpd_fast.comb.calls import Call, register_rule
from cpd_fast.comb.leaves import leaves
from cpd_fast.comb.planes import State, constant_state
from cpd_fast.comb.rules.common import tensors_of
from cpd_fast.comb.trace import Tracer


@register_rule(
    "pointwise",
    *(f"aten.{n}" for n in "complex polar _conj real imag floor_divide".split()),
    *(
        f"aten.{n}"
        for n in "where clamp lerp masked_fill bernoulli fill hardswish hardsigmoid silu mish softplus".split()
    ),
    *(
        f"aten.{n}"
        for n in "celu selu elu leaky_relu hardtanh relu6 threshold logit rrelu _prelu_kernel dropout".split()
    ),
)
def pointwise(t: Tracer, call: Call) -> Any:
    """Index by index; an in-place result replaces what was known of its first argument."""
    tensors = tensors_of(call)
    name = call.op.split(".")[-1].rstrip("_")
    pole = POLES.get(name, 0 if name == "pow" and not _exponent(call) >= 1 else len(tensors))
    if pole < len(tensors):
        t.avoid_zero(tensors[pole], name)
    outs = [o for o in leaves(call.out) if isinstance(o, Tensor)]
    if not tensors:
        return [constant_state(o.dim()) for o in outs]
    target = tensors[0]
    if call.op.endswith("_") and t.state(target).constant and target._is_view():
        for other in tensors[1:]:
            t.freeze_all(other, "written in place into a part of another tensor")
    state = t.meet(*tensors, out=outs[0], zero=_zero(name, tensors, call))
    if call.op.endswith("_") and any(p.zero for p in t.state(target).planes) and not all(p.zero for p in state.planes):
        t.not_zero(target)
    if call.op.rstrip("_") == "aten.add" and len(tensors) == 2 and (bias := t.state(tensors[1]).source):
        return replace(state, scaled_by=(*before, bias) if (before := t.state(target).scaled_by) else ())
    scalar = call.op.rstrip("_") in ("aten.mul", "aten.div", "aten.neg") and len(tensors) == 1
    return replace(state, scaled_by=t.state(target).scaled_by) if scalar else state


# operand that must not be 0, in the forward or the backward
POLES = {"div": 1, "floor_divide": 1, "fmod": 1, "remainder": 1} | dict.fromkeys(
    "log log2 log10 sqrt rsqrt reciprocal logit".split(), 0
)
ODD = frozenset(  # f(0) = 0
    "neg abs relu gelu silu mish tanh sinh sin tan asin asinh atan atanh sqrt square elu selu celu leaky_relu "
    "hardswish hardshrink softshrink sign sgn round floor ceil trunc frac expm1 log1p erf erfinv dropout nan_to_num "
    "rrelu _prelu_kernel positive conj_physical".split()
)


def _zero(name: str, tensors: list[Tensor], call: Call) -> str:
    """When the result of an elementwise call is 0 at removed channels, given that its operands are."""
    numbers = [v for v in (*call.args[1:], *call.kwargs.values()) if isinstance(v, (int, float))]
    if name == "mul":
        return "any"
    if name in ("div", "floor_divide", "fmod", "remainder", *ODD):
        return "first"
    if name in ("maximum", "minimum", "complex", "where", "lerp", "max", "min") or (
        name in ("add", "sub") and len(tensors) > 1
    ):
        return "all"
    if len(tensors) == 1 and name in ("hardtanh", "relu6", "clamp", "clamp_min", "clamp_max"):
        low = call.arg(1, "min_val" if name == "hardtanh" else "min") if name != "clamp_max" else None
        high = call.arg(1 if name == "clamp_max" else 2, "max_val" if name == "hardtanh" else "max")
        return "first" if (low or 0) <= 0 <= (high or 0) else ""
    if name == "pow":
        return "first" if _exponent(call) > 0 else ""
    return "first" if name in ("add", "sub", "masked_fill") and not any(numbers) and len(tensors) == 1 else ""


def _exponent(call: Call) -> float:
    """The number that a tensor is raised to; NaN where that is a tensor."""
    base, exponent = call.args[:2]
    return exponent if isinstance(base, Tensor) and isinstance(exponent, (int, float)) else nan


@register_rule("aten.native_dropout")
def native_dropout(t: Tracer, call: Call) -> Any:
    """Keeps the axes; the mask has the same ones."""
    return [t.state(call.args[0]), t.state(call.args[0])]


@register_rule(
    "aten.clone", "aten.detach", "aten.alias", "aten.lift_fresh", "aten.contiguous", "aten._to_copy", "aten.to"
)
def same(t: Tracer, call: Call) -> State:
    """The same values."""
    return replace(t.state(call.args[0]), identity=None)


@register_rule("aten.copy")
def copy_(t: Tracer, call: Call) -> State:
    """dst.copy_(src)."""
    dst, src = call.args[0], call.args[1]
    if dst._is_view() and not (t.state(src).planes and all(p.zero for p in t.state(src).planes)):
        t.not_zero(dst)
    if dst._is_view() and t.state(src).planes:
        return t.meet(dst, src, out=dst) if t.state(dst).planes else t.freeze_all(src, "written in place")
    return replace(t.state(src) if src.shape == dst.shape else t.meet(dst, src, out=dst), source=None)


@register_rule(*(f"aten.{n}_like" for n in "zeros ones full empty rand randn".split()))
def created_like(t: Tracer, call: Call) -> State:
    """Values made by the forward, as many as another tensor has."""
    zero = call.op == "aten.zeros_like"
    planes = tuple(replace(p, zero=zero) for p in t.state(call.args[0]).planes)
    varying = {d for p in planes for d in p.dims}
    return State(planes, frozenset(range(call.out.dim())) - varying)


@register_rule(
    *(f"aten.{n}" for n in "zeros ones full empty arange rand randn eye scalar_tensor randperm linspace".split()),
    *(f"aten.new_{n}" for n in "zeros ones full empty empty_strided".split()),
    *(f"aten.{n}" for n in "empty_strided uniform normal zero".split()),
)
def created(t: Tracer, call: Call) -> State:
    """Made by the forward: meets anything."""
    if call.op.endswith("_"):
        t.not_zero(call.args[0])
    return constant_state(call.out.dim())

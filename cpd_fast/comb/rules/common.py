"""What the rule files share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cpd_fast.comb.leaves import leaves
from cpd_fast.comb.trace import Call, Tracer

Shape = tuple[int, ...]
POOLS = "a pooling window or interpolation runs over this axis"


def tensors_of(call: Call) -> list[Tensor]:
    """The tensors among a call's arguments, in order."""
    return [t for t in leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]


def norm_dims(dims: Any, ndim: int) -> list[int]:
    """Dims as non-negative numbers; none given means all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(ndim))
    return [d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def sources_of(t: Tracer, *params: Tensor | None) -> tuple[str, ...]:
    """Names of the parameters a result is linear in, or nothing where one of them is computed."""
    names = [t.state(p).source for p in params if p is not None]
    return tuple(n for n in names if n) if all(names) else ()

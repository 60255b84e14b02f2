"""What the rule files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpd_fast.comb.calls import Call
from cpd_fast.comb.leaves import leaves
from cpd_fast.comb.trace import Tracer

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


def indexed(x: Tensor, indices: Any) -> list[int] | None:
    """The dims of ``x`` that a list of tensors (or None) indexes; None where they are not side by side.

    A tensor of booleans indexes as many dims as it has.
    """
    hit: list[int] = []
    dim = 0
    for i in indices:
        width = 1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.dim()
        if i is not None:
            hit += range(dim, dim + width)
        dim += width
    return hit if hit and hit == list(range(hit[0], hit[-1] + 1)) else None

"""Normalisation over kept channels only: what a masked call of each normalising function computes.

``keep`` is 1 for kept and 0 for removed positions of the normalised axis. Removed positions come out as bias, which a
masked model holds at 0 there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    keep: Tensor,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Statistics over the kept positions of the last dims; fp32 or better inside."""
    dims = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    n = keep.sum()
    mean = (wide * keep).sum(dims, keepdim=True) / n
    centred = (wide - mean) * keep
    var = (centred * centred).sum(dims, keepdim=True) / n
    return _affine(centred * torch.rsqrt(var + eps), weight, bias).to(x.dtype)


def rms_norm(
    keep: Tensor, x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Root mean square over the kept positions of the last dims; fp32 or better inside."""
    dims = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    wide = wide * keep
    square = (wide * wide).sum(dims, keepdim=True) / keep.sum()
    tiny = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(wide * torch.rsqrt(square + tiny), weight, None).to(x.dtype)


def group_norm(
    keep: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Statistics over the kept channels of each group, x of shape (N, C, ...)."""
    n, c = x.shape[:2]
    grouped = x.reshape(n, num_groups, c // num_groups, -1)
    grouped = grouped if x.dtype in (torch.float32, torch.float64) else grouped.float()
    mask = keep.reshape(1, num_groups, c // num_groups, 1)
    count = mask.sum(2, keepdim=True) * grouped.shape[-1]
    mean = (grouped * mask).sum((2, 3), keepdim=True) / count
    centred = (grouped - mean) * mask
    var = (centred * centred).sum((2, 3), keepdim=True) / count
    out = (centred * torch.rsqrt(var + eps)).reshape(x.shape)
    shape = (1, c, *[1] * (x.dim() - 2))
    scale, shift = (None if p is None else p.reshape(shape) for p in (weight, bias))
    return _affine(out, scale, shift).to(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


# function as called -> (name of the op that comb records, what runs instead)
MASKED: dict[Any, tuple[str, Callable[..., Tensor]]] = {
    F.layer_norm: ("layer_norm", layer_norm),
    torch.layer_norm: ("layer_norm", layer_norm),
    F.rms_norm: ("rms_norm", rms_norm),
    torch.rms_norm: ("rms_norm", rms_norm),
    F.group_norm: ("group_norm", group_norm),
    torch.group_norm: ("group_norm", group_norm),
}

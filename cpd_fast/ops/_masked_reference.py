"""The reference of masked layers: at full width, shapes that do not depend on the masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast.ops._masked_channels import Keep, check_input, check_lists


def _alive(keep: Keep, channels: int, x: Tensor) -> Tensor | None:
    """``keep`` as a bool mask, without looking at its values: shapes stay the same whatever is masked."""
    if keep is None or (isinstance(keep, Tensor) and keep.dtype == torch.bool):
        return keep
    index = keep if isinstance(keep, Tensor) else torch.tensor(tuple(keep), dtype=torch.int64, device=x.device)
    return torch.zeros(channels, dtype=torch.bool, device=x.device).index_fill(0, index.long(), True)


def _zero_where_dead(x: Tensor, alive: Tensor | None, dim: int) -> Tensor:
    if alive is None:
        return x
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.where(alive.reshape(shape), x, 0.0)


def masked_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_keep: Keep,
    in_keep: Keep,
    place: Sequence[Any],
    groups: int,
) -> Tensor:
    """At full width: what is masked is zero before and after an ordinary convolution; ``place``: stride to dilation."""
    out_channels, per_in = weight.shape[:2]
    alive_out, alive_in = _alive(out_keep, out_channels, x), _alive(in_keep, per_in * groups, x)
    if alive_in is not None:
        columns = alive_in.reshape(groups, 1, per_in).expand(-1, out_channels // groups, -1)
        weight = torch.where(columns.reshape(out_channels, per_in, *[1] * (weight.dim() - 2)), weight, 0.0)
    x, weight = _zero_where_dead(x, alive_in, 1), _zero_where_dead(weight, alive_out, 0)
    bias = None if bias is None else _zero_where_dead(bias, alive_out, 0)
    convolve: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    y = convolve(x, weight, bias, *place, groups)
    return _zero_where_dead(y, alive_out, 1)


def checked_conv_reference(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_keep: Keep,
    in_keep: Keep,
    place: Sequence[Any],
    groups: int,
    compact_input: bool,
    compact_output: bool,
) -> Tensor:
    """Check what is given, then the same, from and to live channels where they are asked for.

    Raises:
        ShapeError: If shapes, devices or channel lists do not fit.
    """
    channels = weight.shape[1] * groups
    tensors = [t for t in (x, weight, bias) if t is not None]
    check_lists(op, {"out_keep": (out_keep, weight.shape[0]), "in_keep": (in_keep, channels)}, *tensors)
    x = widen(x, 1, in_keep, channels) if compact_input else x
    check_input(op, x, weight, bias, channels, None)
    y = masked_conv_reference(x, weight, bias, out_keep, in_keep, place, groups)
    return narrow(y, 1, out_keep) if compact_output else y


def masked_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, out_keep: Keep, in_keep: Keep) -> Tensor:
    """Likewise a linear layer."""
    alive_out, alive_in = _alive(out_keep, weight.shape[0], x), _alive(in_keep, weight.shape[1], x)
    w = _zero_where_dead(_zero_where_dead(weight, alive_in, 1), alive_out, 0)
    b = None if bias is None else _zero_where_dead(bias, alive_out, 0)
    return _zero_where_dead(F.linear(_zero_where_dead(x, alive_in, -1), w, b), alive_out, -1)


def widen(x: Tensor, dim: int, keep: Keep, channels: int) -> Tensor:
    """A compact input at full width."""
    if keep is None:
        return x
    index = _narrow_index(keep, x)
    if x.shape[dim] != len(index):
        return x  # the check that follows says so
    shape = list(x.shape)
    shape[dim] = channels
    return torch.zeros(shape, dtype=x.dtype, device=x.device).index_copy(dim, index, x)


def narrow(y: Tensor, dim: int, keep: Keep) -> Tensor:
    return y if keep is None else y.index_select(dim, _narrow_index(keep, y))


def _narrow_index(keep: Tensor | Sequence[int], x: Tensor) -> Tensor:
    if not isinstance(keep, Tensor):
        return torch.tensor(tuple(keep), dtype=torch.int64, device=x.device)
    return keep.nonzero().flatten() if keep.dtype == torch.bool else keep.long()

"""The compact body of masked layers: the library's convolution on weights without masked rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast.ops._masked_channels import Channels, Geometry, index_of
from cpd_fast.ops.elements import elements_of, is_channels_last


def compact_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, channels: Channels, geometry: Geometry) -> Tensor:
    """A grouped convolution for each number of live channels that groups have."""
    parts = []
    size = geometry.out_size(x, weight)
    dtype: torch.dtype | None = None
    for bucket in channels.buckets:
        b = None if bias is None else _select(bias, {0: bucket.weight_rows})
        if not bucket.inputs:  # nothing to read: the bias alone
            part = x.new_zeros(x.shape[0], len(bucket.outputs), *size)
            parts.append((bucket.written, part if b is None else part + b.to(part.dtype).reshape(1, -1, 1, 1)))
            continue
        columns = {1: bucket.inputs} if bucket.weight_columns and channels.groups == 1 else {}
        w = _select(weight, {0: bucket.weight_rows, **columns})
        if bucket.weight_columns and channels.groups > 1:
            w = _TakeColumns.apply(w, index_of(bucket.weight_columns, w.device).reshape(len(w), -1))
        if is_channels_last(weight):
            w = w.contiguous(memory_format=torch.channels_last)
        parts.append((bucket.written, F.conv2d(_select(x, {1: bucket.read}), w, b, *geometry, bucket.groups)))
        dtype = parts[-1][1].dtype
    if dtype is not None:  # under autocast the bias alone is of another dtype
        return _spread([(written, part.to(dtype)) for written, part in parts], 1, len(channels.held))
    zeros = _Zeros.apply((x.shape[0], len(channels.held), *size), x, weight, bias)
    return zeros + _spread(parts, 1, len(channels.held)) if parts else zeros


def compact_linear(x: Tensor, weight: Tensor, bias: Tensor | None, channels: Channels) -> Tensor:
    """A linear layer on live rows and columns."""
    rows, columns = channels.outputs, channels.inputs
    if not rows:
        return _Zeros.apply((*x.shape[:-1], len(channels.held)), x, weight, bias)
    w = _select(weight, {0: rows, 1: columns})
    b = None if bias is None else _select(bias, {0: rows})
    y = F.linear(x if channels.compact_input else _select(x, {x.dim() - 1: columns}), w, b)
    return y if channels.compact_output else _spread([(rows, y)], x.dim() - 1, channels.out_channels)


def _select(t: Tensor, wanted: dict[int, tuple[int, ...]]) -> Tensor:
    """Some indices of dims of a tensor, in its memory format; the tensor itself where they are all."""
    lists = tuple((d, indices) for d, indices in wanted.items() if len(indices) < t.shape[d])
    return elements_of(tuple(t.shape), lists).take(t) if lists else t


def _spread(parts: list[tuple[tuple[int, ...], Tensor]], dim: int, size: int) -> Tensor:
    """One tensor of a size from parts and where they belong along a dim; zero where no part belongs."""
    places, first = parts[0]
    if len(places) == size:
        return first
    full = (*first.shape[:dim], size, *first.shape[dim + 1 :])
    result = elements_of(full, ((dim, places),)).put(first, is_channels_last(first))
    for places, part in parts[1:]:
        index = index_of(places, part.device)
        if is_channels_last(result):
            result = result.permute(0, 2, 3, 1).index_copy(3, index, part.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            result = result.index_copy(dim, index, part)
    return result


class _TakeColumns(torch.autograd.Function):
    """For every row of a convolution's weight columns of its own, each at most once."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        ctx.shape = weight.shape
        rows = torch.arange(len(weight), device=weight.device)[:, None]
        return weight[rows, columns]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (columns,) = ctx.saved_tensors
        rows = torch.arange(ctx.shape[0], device=grad.device)[:, None]
        zeros = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        return zeros.index_put((rows.expand_as(columns), columns), grad), None


class _Zeros(torch.autograd.Function):
    """Zeros that depend on tensors in name: their gradients are zero, not None."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], x: Tensor, *others: Tensor | None) -> Tensor:
        ctx.inputs = [t if t is None else t.detach() for t in (x, *others)]
        return x.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[1:]
        return None, *(
            torch.zeros_like(t) if need and t is not None else None for t, need in zip(ctx.inputs, wanted, strict=True)
        )

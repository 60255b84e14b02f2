"""The compact body of masked layers: the library's convolution on weights without masked rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast.ops._masked_channels import Channels, Geometry, index_of


def compact_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, channels: Channels, geometry: Geometry) -> Tensor:
    """A grouped convolution for each number of live channels that groups have."""
    parts = []
    size = geometry.out_size(x, weight)
    dtype: torch.dtype | None = None
    for bucket in channels.buckets:
        b = None if bias is None else _select(bias, 0, bucket.weight_rows, None, channels.out_channels)
        if not bucket.inputs:  # nothing to read: the bias alone
            part = x.new_zeros(x.shape[0], len(bucket.outputs), *size)
            parts.append((bucket.outputs, part if b is None else part + b.to(part.dtype).reshape(1, -1, 1, 1)))
            continue
        w = _select(weight, 0, bucket.weight_rows, None, channels.out_channels)
        if bucket.weight_columns and channels.groups == 1:
            w = _select(w, 1, bucket.inputs, None, channels.in_channels)
        elif bucket.weight_columns:
            w = _TakeColumns.apply(w, index_of(bucket.weight_columns, w.device).reshape(len(w), -1))
        if is_channels_last(weight):
            w = w.contiguous(memory_format=torch.channels_last)
        present = channels.inputs if channels.compact_input else None
        seen = _select(x, 1, bucket.inputs, present, channels.in_channels)
        parts.append((bucket.outputs, F.conv2d(seen, w, b, *geometry, bucket.groups)))
        dtype = parts[-1][1].dtype
    if dtype is not None:  # under autocast the bias alone is of another dtype
        return _spread([(outputs, part.to(dtype)) for outputs, part in parts], 1, channels.held)
    zeros = _Zeros.apply((x.shape[0], len(channels.held), *size), x, weight, bias)
    return zeros + _spread(parts, 1, channels.held) if parts else zeros


def compact_linear(x: Tensor, weight: Tensor, bias: Tensor | None, channels: Channels) -> Tensor:
    """A linear layer on live rows and columns."""
    rows, columns = channels.outputs, channels.inputs
    if not rows:
        return _Zeros.apply((*x.shape[:-1], len(channels.held)), x, weight, bias)
    w = _select(weight, 0, rows, None, channels.out_channels)
    w = _select(w, 1, columns, None, channels.in_channels)
    b = None if bias is None else _select(bias, 0, rows, None, channels.out_channels)
    present = channels.inputs if channels.compact_input else None
    seen = _select(x, -1, columns, present, channels.in_channels)
    return _spread([(rows, F.linear(seen, w, b))], -1, channels.held)


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _select(x: Tensor, dim: int, wanted: tuple[int, ...], present: tuple[int, ...] | None, channels: int) -> Tensor:
    """Channels ``wanted`` of a tensor that holds ``present`` (None: all); in the memory format of ``x``."""
    held = tuple(range(channels)) if present is None else present
    if wanted == held:
        return x
    at = {c: i for i, c in enumerate(held)} if present is not None else None
    places = wanted if at is None else tuple(at[c] for c in wanted)
    index = index_of(places, x.device)
    if dim == 1 and is_channels_last(x):
        return _Take.apply(x.permute(0, 2, 3, 1), 3, index).permute(0, 3, 1, 2)
    return _Take.apply(x, dim, index)


def _spread(parts: list[tuple[tuple[int, ...], Tensor]], dim: int, held: tuple[int, ...]) -> Tensor:
    """One tensor with channels ``held`` from parts that have some of them; zero where no part has one."""
    if len(parts) == 1 and parts[0][0] == held:
        return parts[0][1]
    first = parts[0][1]
    shape = list(first.shape)
    shape[dim] = len(held)
    at = {c: i for i, c in enumerate(held)}
    last = dim == 1 and is_channels_last(first)
    result = torch.zeros(shape, dtype=first.dtype, device=first.device)
    if last:
        result = result.contiguous(memory_format=torch.channels_last)
    for outputs, part in parts:
        index = index_of(tuple(at[c] for c in outputs), part.device)
        if last:
            result = result.permute(0, 2, 3, 1).index_copy(3, index, part.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            result = result.index_copy(dim, index, part)
    return result


class _Take(torch.autograd.Function):
    """``index_select`` of different indices: its gradient is a copy into zeros, which costs half of adding to them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim, ctx.shape = dim, x.shape
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        zeros = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        return zeros.index_copy(ctx.dim, index, grad), None, None


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

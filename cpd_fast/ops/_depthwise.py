"""The native body of depthwise layers of masked_conv2d: planes of live channels, read and written where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast.ops import _dispatch
from cpd_fast.ops._direct import gradients_again
from cpd_fast.ops._masked_channels import Channels, Geometry, index_of
from cpd_fast.ops._masked_compact import compact_conv2d


def is_better(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether this is the faster of the native bodies, both of which could run."""
    return weight.shape[:2] == (groups, 1) and x.is_contiguous()


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, channels: Channels, geometry: Geometry) -> Tensor:
    """Planes that are alive on both sides are convolved where they are; those without an input give their bias."""
    places, lonely, written = channels.planes
    if not places[0] or not len(x):  # nothing to convolve: no memory to point at
        return compact_conv2d(x, weight, bias, channels, geometry)
    size = geometry.out_size(x, weight)
    y: Tensor = Depthwise.apply(x, weight, bias, places, size, len(channels.held), geometry)
    if lonely and bias is not None:
        part = bias[index_of(lonely, x.device)].reshape(1, -1, 1, 1).expand(len(x), -1, *size)
        y = y.index_copy(1, index_of(written, x.device), part)
    return y


class Depthwise(torch.autograd.Function):
    """Live planes convolved one by one; planes that are not live are zero, in the result and in every gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        places: tuple[Sequence[int], Sequence[int], Sequence[int]],
        out_size: Sequence[int],
        channels: int,
        geometry: Geometry,
    ) -> Tensor:
        # places: where the live channels are in x, in the result (of `channels`) and in the weight.
        ctx.save_for_backward(x, weight, bias)
        ctx.places, ctx.geometry = places, geometry
        stride, padding, dilation = geometry
        n, c = x.shape[:2]
        kernel = weight.shape[2:]
        ctx.sizes = [
            n, c, channels, weight.shape[0], *x.shape[2:], *out_size, *kernel, *stride, *padding, *dilation
        ]  # fmt: skip
        y = torch.empty((n, channels, *out_size), dtype=x.dtype)
        w = weight.contiguous()
        b = None if bias is None else bias.contiguous()
        _call("masked_depthwise", (x, w, b, y), ctx)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the result must be differentiable
            y = depthwise_reference(x, weight, bias, ctx.places, grad.shape[1], ctx.geometry)
            return *gradients_again(ctx, y, grad), None, None, None, None
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        grad = grad.contiguous()
        dx = torch.empty_like(x) if need_x else None
        dw = torch.empty(weight.shape, dtype=weight.dtype) if need_w or need_b else None
        db = torch.empty(bias.shape, dtype=bias.dtype) if need_b else None
        if dx is not None:
            _call("masked_depthwise_input", (grad, weight.contiguous(), dx), ctx)
        if dw is not None:
            _call("masked_depthwise_weight", (grad, x, dw, db), ctx)
        return dx, dw if need_w else None, db, None, None, None, None


def _call(name: str, tensors: Sequence[Tensor | None], ctx: Any) -> None:
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    first: Any = tensors[0]
    code = _dispatch.DTYPE_CODES[first.dtype]
    getattr(_dispatch._native(), name)(code, *pointers, ctx.places, ctx.sizes, torch.get_num_threads())


def depthwise_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: tuple[Sequence[int], Sequence[int], Sequence[int]],
    channels: int,
    geometry: Geometry,
) -> Tensor:
    """The same by the library's convolution, differentiable as often as one likes."""
    stride, padding, dilation = geometry
    read, written, own = (torch.tensor(list(p), dtype=torch.int64) for p in places)
    b = None if bias is None else bias[own]
    y = F.conv2d(x[:, read], weight[own], b, stride, padding, dilation, len(own))
    return torch.zeros(y.shape[0], channels, *y.shape[2:], dtype=y.dtype).index_copy(1, written, y)

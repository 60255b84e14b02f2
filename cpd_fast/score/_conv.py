"""A convolution whose double backward costs four convolutions, whatever the number of groups.

PyTorch's own double backward computes weight gradients as convolutions over transposed tensors, with a loop over the
groups in C++: 67 convolutions and 128 copies for one depthwise layer of 64 channels. Both gradients of a convolution
are bilinear, so their derivatives are again a forward convolution and one ``convolution_backward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SPATIAL = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_Geometry = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


def _forward(x: Tensor, w: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution.default(x, w, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(gy: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, need_x: bool, need_w: bool) -> list[Tensor | None]:
    stride, padding, dilation, groups = geometry
    if not (need_x or need_w):
        return [None, None]
    gx, gw, _ = torch.ops.aten.convolution_backward.default(
        gy, x, w, None, stride, padding, dilation, False, [0] * len(stride), groups, [need_x, need_w, False]
    )
    return [gx if need_x else None, gw if need_w else None]


class Conv(torch.autograd.Function):
    """``aten.convolution`` whose backward is :class:`ConvBackward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return _forward(x, w, bias, geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (gy,) = grads
        if gy is None:
            return None, None, None, None
        x, w = ctx.saved_tensors
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        gx, gw = None, None
        if need_x or need_w:
            # A Function costs as much as a small convolution: none where no graph is made.
            run = ConvBackward.apply if torch.is_grad_enabled() else _backward
            gx, gw = run(gy, x, w, ctx.geometry, need_x, need_w)
        gb = gy.sum([d for d in range(gy.dim()) if d != 1]) if need_b else None
        return gx, gw, gb, None


class ConvBackward(torch.autograd.Function):
    """Gradients of a convolution with respect to input and weight, themselves differentiable once."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, need_x: bool, need_w: bool) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, x, w)
        ctx.geometry = geometry
        return tuple(_backward(gy, x, w, geometry, need_x, need_w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ggx, ggw = grads  # None: that gradient takes no part in what is differentiated
        gy, x, w = ctx.saved_tensors
        need_gy, need_x, need_w = ctx.needs_input_grad[:3]
        ggy = None
        if need_gy:
            if ggx is not None:
                ggy = _forward(ggx, w, None, ctx.geometry)
            if ggw is not None:
                part = _forward(x, ggw, None, ctx.geometry)
                ggy = part if ggy is None else ggy.add_(part)
        gx, gw = _backward(
            gy,
            x if ggx is None else ggx,
            w if ggw is None else ggw,
            ctx.geometry,
            need_x and ggw is not None,
            need_w and ggx is not None,
        )
        return ggy, gx, gw, None, None, None


def call(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The result of ``torch.conv1d/2d/3d`` by :class:`Conv`; None where the call cannot be expressed as one."""
    if func not in _SPATIAL:
        return None
    parsed = _parse(_SPATIAL[func], *args, **kwargs)
    return None if parsed is None else Conv.apply(*parsed)


def _parse(
    n: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, _Geometry] | None:
    """The arguments of :class:`Conv`, or None where PyTorch's own convolution must run."""
    if input.dim() != n + 2 or input.dtype != weight.dtype or torch.is_autocast_enabled(input.device.type):
        return None
    dilation = _tuple(dilation, n)
    if isinstance(padding, str):
        total = (
            [0] * n if padding == "valid" else [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        )
        if any(t % 2 for t in total):
            return None  # padded unevenly
        padding = [t // 2 for t in total]
    return input, weight, bias, (_tuple(stride, n), _tuple(padding, n), dilation, groups)


def _tuple(value: int | Sequence[int], n: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * n if len(values) == 1 else values

"""Batch norm in eval mode, whose double backward costs three passes over the activation.

PyTorch's own is written for training mode, from a dozen elementwise operators. In eval mode a batch norm is affine in
its input, its weight and its bias, and both its gradients are bilinear: their derivatives are again one batch norm, and
one ``native_batch_norm_backward``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_Statistics = tuple[Tensor, Tensor, float]  # running mean and variance, epsilon


def _forward(x: Tensor, weight: Tensor, bias: Tensor, statistics: _Statistics) -> Tensor:
    mean, var, eps = statistics
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)


def _backward(gy: Tensor, x: Tensor, weight: Tensor, statistics: _Statistics, wanted: list[bool]) -> Any:
    """Gradients with respect to input, weight and bias; None where not wanted."""
    mean, var, eps = statistics
    found = torch.ops.aten.native_batch_norm_backward.default(gy, x, weight, mean, var, None, None, False, eps, wanted)
    return tuple(g if want else None for g, want in zip(found, wanted, strict=True))


class Norm(torch.autograd.Function):
    """``y = (x - mean) / std * weight + bias``, whose backward is :class:`NormBackward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: _Statistics) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.statistics = statistics
        return _forward(x, weight, bias, statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (gy,) = grads
        if gy is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        # Functions cost more than small maps: none where no graph is made.
        run = NormBackward.apply if torch.is_grad_enabled() else _backward
        return *run(gy, x, weight, ctx.statistics, wanted), None


class NormBackward(torch.autograd.Function):
    """Gradients of :class:`Norm` with respect to input, weight and bias, themselves differentiable once."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, weight: Tensor, statistics: _Statistics, wanted: list[bool]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, x, weight)
        mean, var, eps = ctx.statistics = statistics
        ctx.scale = (weight.detach() * (var + eps).rsqrt()).view(-1, *[1] * (x.dim() - 2))
        ctx.zeros = torch.zeros_like(mean)
        return _backward(gy, x, weight, statistics, wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ggx, ggw, ggb = grads  # None: that gradient takes no part in what is differentiated
        gy, x, weight = ctx.saved_tensors
        need_gy, need_x, need_w = ctx.needs_input_grad[:3]
        ggy = gx = gw = None
        if need_gy:
            if ggw is not None or ggb is not None:
                w, b = (ctx.zeros if g is None else g for g in (ggw, ggb))
                ggy = _forward(x, w, b, ctx.statistics)
            if ggx is not None:
                ggy = ggx * ctx.scale if ggy is None else ggy.addcmul_(ggx, ctx.scale)
        # The gradients are gy * weight / std and sum(gy * (x - mean)) / std: the same with other factors.
        need_x, need_w = need_x and ggw is not None, need_w and ggx is not None
        if need_x or need_w:
            _, var, eps = ctx.statistics
            other, factor = gy if ggx is None else ggx, weight if ggw is None else ggw
            gx, gw, _ = _backward(gy, other, factor, (ctx.zeros, var, eps), [need_x, need_w, False])
        return ggy, gx, gw, None, None


def call(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The result of ``F.batch_norm`` by :class:`Norm`; None where the call cannot be expressed as one."""
    if func is not torch.nn.functional.batch_norm:
        return None
    parsed = _parse(*args, **kwargs)
    return None if parsed is None else Norm.apply(*parsed)


def _parse(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, _Statistics] | None:
    """The arguments of :class:`Norm`, or None where PyTorch's own batch norm must run."""
    if training or weight is None or bias is None or running_mean is None or running_var is None:
        return None
    tensors = (input, weight, bias, running_mean, running_var)
    if len({t.dtype for t in tensors}) > 1 or torch.is_autocast_enabled(input.device.type):
        return None
    if input.dim() < 2 or running_mean.requires_grad or running_var.requires_grad:
        return None
    return input, weight, bias, (running_mean, running_var, eps)

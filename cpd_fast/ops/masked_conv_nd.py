"""Masked convolutions of one and three dims: the reference alone, at full width; they save no time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cpd_fast.errors import BackendError, ShapeError
from cpd_fast.ops import _dispatch
from cpd_fast.ops._masked_channels import Keep, check_groups
from cpd_fast.ops._masked_reference import checked_conv_reference

_SIZES = {1: "L", 3: "D, H, W"}


def masked_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    out_keep: Keep = None,
    in_keep: Keep = None,
    compact_input: bool = False,
    compact_output: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A convolution over one dim of which only some channels are alive; as :func:`masked_conv2d`, but no faster.

    Args:
        x: Input, shape ``(N, C_in, L)``.
        weight: Weight at full width, shape ``(C_out, C_in / groups, k)``.
        bias: Bias at full width, shape ``(C_out,)``.
        stride: As in ``torch.nn.functional.conv1d``.
        padding: As there.
        dilation: As there.
        groups: As there; divides C_in and C_out.
        out_keep: Live output channels: a bool mask or increasing indices; ``None``: all.
        in_keep: Live input channels, likewise.
        compact_input: ``x`` holds the live channels only.
        compact_output: So shall the result.
        backend: ``None`` or ``"reference"``, the only body.

    Returns:
        Shape ``(N, C_out, L_out)``, masked channels exactly 0; with ``compact_output`` the live ones only.

    Raises:
        ShapeError: If shapes, devices or channel lists do not fit.
        BackendError: If another backend is asked for.

    Example:
        >>> import torch
        >>> masked_conv1d(torch.ones(1, 3, 1), torch.ones(2, 3, 1), in_keep=[0, 2], out_keep=[1]).flatten().tolist()
        [0.0, 2.0]
    """
    place = (stride, padding, dilation, groups)
    return _masked_conv(1, x, weight, bias, place, out_keep, in_keep, compact_input, compact_output, backend)


def masked_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    out_keep: Keep = None,
    in_keep: Keep = None,
    compact_input: bool = False,
    compact_output: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A convolution over three dims of which only some channels are alive; as :func:`masked_conv1d`.

    Args:
        x: Input, shape ``(N, C_in, D, H, W)``.
        weight: Weight at full width, shape ``(C_out, C_in / groups, kD, kH, kW)``.
        bias: Bias at full width, shape ``(C_out,)``.
        stride: As in ``torch.nn.functional.conv3d``.
        padding: As there.
        dilation: As there.
        groups: As there; divides C_in and C_out.
        out_keep: Live output channels: a bool mask or increasing indices; ``None``: all.
        in_keep: Live input channels, likewise.
        compact_input: ``x`` holds the live channels only.
        compact_output: So shall the result.
        backend: ``None`` or ``"reference"``, the only body.

    Returns:
        Shape ``(N, C_out, D_out, H_out, W_out)``, masked channels exactly 0; with ``compact_output`` the live ones
        only.

    Raises:
        ShapeError: If shapes, devices or channel lists do not fit.
        BackendError: If another backend is asked for.

    Example:
        >>> import torch
        >>> masked_conv3d(torch.ones(1, 2, 1, 1, 1), torch.ones(1, 2, 1, 1, 1), in_keep=[1]).item()
        1.0
    """
    place = (stride, padding, dilation, groups)
    return _masked_conv(3, x, weight, bias, place, out_keep, in_keep, compact_input, compact_output, backend)


def _masked_conv(
    rank: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    place: tuple[Any, Any, Any, int],
    out_keep: Keep,
    in_keep: Keep,
    compact_input: bool,
    compact_output: bool,
    backend: str | None,
) -> Tensor:
    op = f"masked_conv{rank}d"
    if backend not in (None, "reference"):
        raise BackendError(f"{op}: backend {backend!r} is for masked_conv2d; this op has the reference alone")
    if x.dim() != rank + 2 or weight.dim() != rank + 2:
        raise ShapeError(
            f"{op}: expected input (N, C, {_SIZES[rank]}) and weight of {rank + 2} dims, got {x.dim()} and "
            f"{weight.dim()}"
        )
    check_groups(op, weight, place[3])
    return checked_conv_reference(
        op, x, weight, bias, out_keep, in_keep, place[:3], place[3], compact_input, compact_output
    )


def _explain(op: str, *_: Any, **__: Any) -> str:
    return f"{op}: reference (the library's kernels at full width)\n  there is no other body"


for _name in ("masked_conv1d", "masked_conv3d"):
    _dispatch.EXPLAINERS[_name] = _explain

"""Convolutions and linear layers of which only some channels are alive: a masked channel costs nothing.

The *reference* fills with zeros and calls the library's convolution at full width: its shapes do not depend on the
masks, so it is what compilers and ``torch.func`` see. *compact* calls the library on weights without masked rows and
columns; convolution groups with different numbers of live channels are sorted into buckets of equal numbers, each one
grouped convolution, and groups without live channels are never touched. Direct bodies, for groups of few channels, read
and write through index lists: no copy of an activation is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from cpd_fast.errors import ShapeError
from cpd_fast.ops import _depthwise, _dispatch
from cpd_fast.ops._direct import direct_conv2d
from cpd_fast.ops._masked_channels import (
    Geometry,
    Keep,
    Pair,
    channels_of,
    check_groups,
    check_input,
    check_lists,
    kept,
    pair_of,
    why_not_compact,
)
from cpd_fast.ops._masked_choice import Convolution, Layer, choose, explain
from cpd_fast.ops._masked_compact import compact_conv2d, compact_linear
from cpd_fast.ops._masked_reference import checked_conv_reference, masked_linear_reference, narrow, widen

for _name in ("masked_conv2d", "masked_linear"):
    _dispatch.EXPLAINERS[_name] = explain


def masked_conv2d(
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
    r"""A convolution of which only some channels are alive: as if the others were removed, at the cost of the rest.

    y = conv2d(x * in_mask, weight, bias) * out_mask, but masked channels are neither read nor computed, whatever they
    hold (NaN as well), and all gradients of theirs are exactly zero. Any set may be kept: groups may have different
    numbers of live channels, none at all (a group without live inputs gives its bias), or all.

    Args:
        x: Input, shape ``(N, C_in, H, W)``, contiguous or channels-last; the result has the same memory format.
        weight: Weight at full width, shape ``(C_out, C_in / groups, kH, kW)``.
        bias: Bias at full width, shape ``(C_out,)``.
        stride: As in ``torch.nn.functional.conv2d``.
        padding: As there; ``"same"`` pads one more at the end where kernels are even.
        dilation: As there.
        groups: As there; divides C_in and C_out.
        out_keep: Live output channels: a bool mask ``(C_out,)`` or increasing indices; ``None``: all. Indices are read
            once for each version of a tensor.
        in_keep: Live input channels, likewise.
        compact_input: ``x`` holds the live channels only, in order: shape ``(N, len(in_keep), H, W)``. Between coupled
            layers this saves the copy that taking them out costs.
        compact_output: So shall the result.
        backend: ``None`` (the one that suits the layer and the device); ``"cuda"``, ``"cpu"`` or ``"triton"``
            (depthwise layers, groups of at most 16 channels; 32 on the CPU), ``"compact"`` or ``"reference"``; see
            :func:`explain_backend`.

    Returns:
        Shape ``(N, C_out, H_out, W_out)``, masked channels exactly 0; with ``compact_output`` the live ones only.

    Raises:
        ShapeError: If shapes, devices or channel lists do not fit.

    Example:
        >>> import torch
        >>> x, weight = torch.ones(1, 3, 1, 1), torch.ones(2, 3, 1, 1)
        >>> masked_conv2d(x, weight, in_keep=[0, 2], out_keep=[1]).flatten().tolist()
        [0.0, 2.0]
    """
    op = "masked_conv2d"
    if x.dim() != 4 or weight.dim() != 4:
        raise ShapeError(f"{op}: expected input (N, C, H, W) and weight of 4 dims, got {x.dim()} and {weight.dim()}")
    check_groups(op, weight, groups)
    in_channels = weight.shape[1] * groups
    x, padding = _explicit_padding(op, x, weight, stride, padding, dilation)
    geometry = Geometry(pair_of(op, "stride", stride, 1), padding, pair_of(op, "dilation", dilation, 1))
    if min(geometry.out_size(x, weight)) < 1:
        raise ShapeError(
            f"{op}: a kernel of {tuple(weight.shape[2:])} with dilation {geometry.dilation} does not fit an input of "
            f"shape {tuple(x.shape)} with padding {geometry.padding}"
        )
    watched = why_not_compact(*(t for t in (x, weight, bias) if t is not None))
    if watched is None and backend != "reference":
        outputs = kept(op, "out_keep", out_keep, weight.shape[0], x.device)
        inputs = kept(op, "in_keep", in_keep, in_channels, x.device)
        check_input(op, x, weight, bias, in_channels, len(inputs) if compact_input and inputs is not None else None)
        if outputs is None and inputs is None and backend is None:
            return F.conv2d(x, weight, bias, *geometry, groups)
        chosen = choose(op, backend, Convolution(x, weight, bias, groups), None)
        channels = channels_of(outputs, inputs, len(weight), in_channels, groups, compact_input, compact_output)
        if chosen == "compact":
            return compact_conv2d(x, weight, bias, channels, geometry)
        if chosen == "cpu" and _depthwise.is_better(x, weight, groups):
            return _depthwise.depthwise_conv2d(x, weight, bias, channels, geometry)
        return direct_conv2d(x, weight, bias, channels, geometry, chosen)
    choose(op, backend, Convolution(x, weight, bias, groups), watched)
    return checked_conv_reference(
        op, x, weight, bias, out_keep, in_keep, geometry, groups, compact_input, compact_output
    )


def _explicit_padding(
    op: str, x: Tensor, weight: Tensor, stride: Any, padding: int | Sequence[int] | str, dilation: Any
) -> tuple[Tensor, Pair]:
    """Padding as two numbers; what is not the same on both sides is done here.

    Raises:
        ShapeError: If the padding is neither numbers nor a known word.
    """
    if not isinstance(padding, str):
        return x, pair_of(op, "padding", padding, 0)
    if padding == "valid":
        return x, (0, 0)
    if padding != "same" or pair_of(op, "stride", stride, 1) != (1, 1):
        raise ShapeError(f"{op}: padding must be numbers, 'valid', or 'same' with stride 1, got {padding!r}")
    dilated = pair_of(op, "dilation", dilation, 1)
    total = [d * (k - 1) for d, k in zip(dilated, weight.shape[2:], strict=True)]
    if all(t % 2 == 0 for t in total):
        return x, (total[0] // 2, total[1] // 2)
    top, left = (t // 2 for t in total)
    return F.pad(x, (left, total[1] - left, top, total[0] - top)), (0, 0)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_keep: Keep = None,
    in_keep: Keep = None,
    compact_input: bool = False,
    compact_output: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A linear layer of which only some features are alive; the meaning is that of :func:`masked_conv2d`.

    Args:
        x: Input, shape ``(..., in_features)``.
        weight: Weight at full width, shape ``(out_features, in_features)``.
        bias: Bias at full width, shape ``(out_features,)``.
        out_keep: Live outputs: a bool mask or increasing indices; ``None``: all.
        in_keep: Live inputs, likewise.
        compact_input: ``x`` holds the live features only.
        compact_output: So shall the result.
        backend: ``None``, ``"compact"`` or ``"reference"``.

    Returns:
        Shape ``(..., out_features)``, masked features exactly 0; with ``compact_output`` the live ones only.

    Raises:
        ShapeError: If shapes, devices or lists do not fit.

    Example:
        >>> import torch
        >>> masked_linear(torch.ones(1, 3), torch.ones(2, 3), in_keep=[0, 2], out_keep=[1]).tolist()
        [[0.0, 2.0]]
    """
    op = "masked_linear"
    if weight.dim() != 2 or x.dim() < 1:
        raise ShapeError(f"{op}: expected input (..., F) and weight of 2 dims, got {x.dim()} and {weight.dim()} dims")
    out_features, in_features = weight.shape
    tensors = [t for t in (x, weight, bias) if t is not None]
    if choose(op, backend, Layer(), why_not_compact(*tensors)) == "reference":
        check_lists(op, {"out_keep": (out_keep, out_features), "in_keep": (in_keep, in_features)}, *tensors)
        x = widen(x, -1, in_keep, in_features) if compact_input else x
        check_input(op, x, weight, bias, in_features, None)
        y = masked_linear_reference(x, weight, bias, out_keep, in_keep)
        return narrow(y, -1, out_keep) if compact_output else y
    outputs = kept(op, "out_keep", out_keep, out_features, x.device)
    inputs = kept(op, "in_keep", in_keep, in_features, x.device)
    check_input(op, x, weight, bias, in_features, len(inputs) if compact_input and inputs is not None else None)
    if outputs is None and inputs is None:
        return F.linear(x, weight, bias)
    channels = channels_of(outputs, inputs, out_features, in_features, 1, compact_input, compact_output)
    return compact_linear(x, weight, bias, channels)

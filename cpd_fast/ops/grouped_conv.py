"""A grouped convolution by the faster body: the native one for few channels a group, or the library's.

What compact execution of masked models calls: activations and weights hold live channels only, groups are even.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast.ops import _dispatch
from cpd_fast.ops._direct import direct_conv2d
from cpd_fast.ops._direct import why_not as why_not_direct
from cpd_fast.ops._masked_channels import Geometry, channels_of, pair_of


def why_library(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> str | None:
    """Why the library's kernel runs; None where the native one does.

    Measured on AVX2 with one thread (CPU time, loaded machine), the 3x3 layers of ResNeXt-50 at batch 4, forward
    and with backward: of the library's time 0.1 to 0.5 at 2 to 6 channels a group and 0.3 to 0.6 at 12; 0.6 to 1.3 at 8
    and 16. With the channels last it is 0.3 to 1.9, mostly around 1.
    """
    tensors = [t for t in (x, weight, bias) if t is not None]
    if _dispatch.is_watched(*tensors):
        return "is what compilers, tracers, modes and tensor subclasses see"
    most = max(weight.shape[1], weight.shape[0] // groups)
    if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
        return f"runs all but float32 images on the CPU, got {x.dim()} dims of {x.dtype} on {x.device}"
    if groups == 1 or most == 1 or most > 16 or most % 8 == 0:
        return f"is mostly as fast or faster but for 2 to 16 channels a group, multiples of 8 aside; got {most}"
    if not x.is_contiguous():
        return "is mostly as fast or faster where channels are not first"
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups or not len(x):
        return "says what does not fit"
    why = why_not_direct(x, weight, bias, groups) or _dispatch._why_not_cpu(x)
    return None if why is None else f"runs here: the native one {why}"


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d``, by the native kernel where it is the faster one; same arguments, same shapes.

    Example:
        >>> x, weight = torch.ones(1, 4, 1, 1), torch.ones(4, 2, 1, 1)
        >>> grouped_conv2d(x, weight, groups=2).flatten().tolist()
        [2.0, 2.0, 2.0, 2.0]
    """
    library: Any = F.conv2d
    if isinstance(padding, str) or why_library(x, weight, bias, groups) is not None:
        return library(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
    op = "grouped_conv2d"
    geometry = Geometry(
        pair_of(op, "stride", stride, 1), pair_of(op, "padding", padding, 0), pair_of(op, "dilation", dilation, 1)
    )
    if min(geometry.out_size(x, weight)) < 1:
        return library(x, weight, bias, *geometry, groups)  # type: ignore[no-any-return]
    channels = channels_of(None, None, weight.shape[0], x.shape[1], groups, False, False)
    return direct_conv2d(x, weight, bias, channels, geometry, "cpu")


def _explain(op: str, *args: Any, **options: Any) -> str:
    names = ("x", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | options
    why = why_library(given["x"], given["weight"], given.get("bias"), given.get("groups", 1))
    if isinstance(given.get("padding"), str):
        why = f"takes padding={given['padding']!r}"
    if why is None:
        native: Any = _dispatch._native()
        return f"{op}: cpu (native kernels for few channels a group, {native.current_isa()})\n  not library: is slower"
    return f"{op}: library\n  not cpu: the library's kernel {why}"


_dispatch.EXPLAINERS["grouped_conv2d"] = _explain

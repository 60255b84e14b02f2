"""The direct bodies of masked_conv2d for few channels a group, read and written through index lists where they are.

``cpu`` runs csrc/cpu/masked_groups.cpp (``_depthwise`` has one more body), ``cuda`` csrc/cuda/masked_groups.cu,
``triton`` kernels/masked_groups.py. Lists and shapes are those of csrc/masked_groups.h.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cpd_fast.ops import _dispatch
from cpd_fast.ops._masked_channels import Channels, Geometry
from cpd_fast.ops._masked_compact import compact_conv2d
from cpd_fast.ops.elements import is_channels_last

MOST = {"cpu": 32}  # channels a group, as measured; 16 elsewhere


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> str | None:
    """Why no direct body can run, whatever the device; None if one may."""
    most = MOST.get(x.device.type, 16)
    if groups == 1 or max(weight.shape[1], weight.shape[0] // groups) > most:
        return f"is for depthwise layers and groups of at most {most} channels"
    if not (x.is_contiguous() or is_channels_last(x)):
        return f"needs contiguous NCHW or channels-last, got strides {tuple(x.stride())}"
    if any(t.dtype != x.dtype for t in (weight, bias) if t is not None) or torch.is_autocast_enabled(x.device.type):
        return "needs one dtype for all tensors, outside autocast"
    return None


def direct_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, channels: Channels, geometry: Geometry, backend: str
) -> Tensor:
    """Groups are convolved where they are; where nothing is read or written no kernel runs."""
    if not channels.outputs or not x.numel():
        return compact_conv2d(x, weight, bias, channels, geometry)
    if not (weight.is_contiguous() or is_channels_last(weight)):
        weight = weight.contiguous()
    y: Tensor = Direct.apply(x, weight, bias if bias is None else bias.contiguous(), channels, geometry, backend)
    return y


@functools.lru_cache(maxsize=1024)
def table_of(channels: Channels, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """The lists of csrc/masked_groups.h, inputs and then outputs, and their lengths: live and held of both."""
    inputs = _lists(channels.inputs, channels.in_channels, channels.groups, channels.compact_input)
    outputs = _lists(channels.outputs, channels.out_channels, channels.groups, channels.compact_output)
    columns = [i % (channels.in_channels // channels.groups) for i in channels.inputs]
    parts: list[Iterable[int]] = [*inputs[:3], columns, inputs[3], *outputs[:3], channels.outputs, outputs[3]]
    lengths = len(channels.inputs), len(inputs[3]), len(channels.outputs), len(outputs[3])
    return torch.tensor(list(itertools.chain(*parts)), dtype=torch.int64, device=device), lengths


def _lists(live: tuple[int, ...], total: int, groups: int, is_compact: bool) -> tuple[list[int], ...]:
    """Where the live channels and the places of groups start, where live channels are, and what is at each place."""
    size = total // groups
    counts = [0] * (groups + 1)
    for i in live:
        counts[i // size + 1] += 1
    starts = list(itertools.accumulate(counts))
    if is_compact:
        places = list(range(len(live)))
        return starts, starts, places, places
    slots = [-1] * total
    for i, place in enumerate(live):
        slots[place] = i
    return starts, list(range(0, total + 1, size)), list(live), slots


class Direct(torch.autograd.Function):
    """The live channels of every group; what is not live is zero, in the result and in every gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, channels: Channels, geometry: Geometry, backend: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.channels, ctx.geometry, ctx.backend = channels, geometry, backend
        size = geometry.out_size(x, weight)
        y = torch.empty((len(x), len(channels.held), *size), dtype=x.dtype, device=x.device, memory_format=_format(x))
        _call(0, ctx, x, weight, bias, None, y, None, None, None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the result must be differentiable
            y = compact_conv2d(x, weight, bias, ctx.channels, ctx.geometry)
            return *gradients_again(ctx, y, grad), None, None, None
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        grad = grad.contiguous(memory_format=_format(x))
        dx = torch.empty_like(x) if need_x else None
        dw = torch.empty_like(weight) if need_w or need_b else None
        db = torch.empty_like(bias) if need_b else None
        if dx is not None:
            _call(1, ctx, None, weight, None, grad, None, dx, None, None)
        if dw is not None:
            _call(2, ctx, x, weight, None, grad, None, None, dw, db)
        return dx, dw if need_w else None, db, None, None, None


def gradients_again(ctx: Any, y: Tensor, grad: Tensor) -> list[Tensor | None]:
    """Gradients of the saved tensors that are wanted, themselves differentiable, through ``y`` made by the library."""
    needs = ctx.needs_input_grad[:3]
    wanted = [t for t, need in zip(ctx.saved_tensors, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


_NAMES = ("masked_groups", "masked_groups_input", "masked_groups_weight")


def _call(which: int, ctx: Any, *tensors: Tensor | None) -> None:
    x, weight, _, dy, y, dx = tensors[:6]
    images = x if x is not None else dx
    results = y if y is not None else dy
    assert images is not None and results is not None and weight is not None
    table, lengths = table_of(ctx.channels, images.device)
    rows, columns, kh, kw = weight.shape
    steps = (weight.stride(1), 1) if weight.is_contiguous() else (1, columns)
    numbers = [
        _dispatch.DTYPE_CODES[images.dtype], is_channels_last(images), ctx.channels.groups, *lengths,
        rows, columns * kh * kw, *steps, len(images), *images.shape[2:], *results.shape[2:], kh, kw,
        *ctx.geometry.stride, *ctx.geometry.padding, *ctx.geometry.dilation,
    ]  # fmt: skip
    launch(ctx.backend, which, tensors, table, numbers)


def launch(backend: str, which: int, tensors: tuple[Tensor | None, ...], table: Tensor, numbers: list[int]) -> None:
    """Run a body: values, the gradient of inputs or that of weights."""
    if backend == "triton":
        kernels = importlib.import_module("cpd_fast.kernels.masked_groups")
        with _dispatch._on(table):
            kernels.masked_groups_launch(which, tensors, table, numbers)
        return
    native: Any = _dispatch._native()
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    if backend == "cpu":
        getattr(native, _NAMES[which])(pointers, table.data_ptr(), numbers, torch.get_num_threads())
        return
    with _dispatch._on(table):
        stream = _dispatch._stream(table)
        scratch = [native.masked_groups_weight_cuda_scratch(numbers)] if which == 2 else []
        room = [table.new_empty(bytes, dtype=torch.uint8) for bytes in scratch]
        extra = [t.data_ptr() for t in room]
        getattr(native, f"{_NAMES[which]}_cuda")(pointers, table.data_ptr(), numbers, *extra, stream)

"""Triton body of masked_conv2d for few channels a group; lists and shapes as in ``csrc/masked_groups.h``.

A program makes the values of up to 4 places of one group at a block of positions of one image, reading each tap once
for them; places that are not live are written as zeros. Gradients of weights: a program takes an output, an input of
its group, 16 taps and a share of all positions; a second launch adds the shares in order. No float atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

PLACES = 4
BLOCK = 256
OPTIONS = {"num_warps": 4, "maxnreg": 128}  # left to itself, ptxas stops at fewer registers and spills
TAPS = 16
WEIGHT_BLOCK = 128
FINISH_BLOCK = 128
SHARE_LEAST = 2048  # positions that are worth a program
PROGRAMS_WANTED = 1024


@triton.jit
def _source(at, k, stride, padding, dilation, size, BACKWARD: tl.constexpr):
    # Where tap k of a result at `at` reads, and whether it does.
    if BACKWARD:
        to = at + padding - k * dilation
        found = tl.maximum(to, 0) // stride
        inside = (to >= 0) & (found * stride == to) & (found < size)
    else:
        found = at * stride - padding + k * dilation
        inside = (found >= 0) & (found < size)
    return found, inside


@triton.jit
def _offset(n, places, pixels, place, pixel, LAST: tl.constexpr):
    # In 64 bits: place is.
    if LAST:
        offset = (n.to(tl.int64) * pixels + pixel) * places + place
    else:
        offset = (n.to(tl.int64) * places + place) * pixels + pixel
    return offset


@triton.jit
def masked_groups_values_kernel(
    from_ptr,  # images that are read
    to_ptr,  # images that are written, every place
    weight_ptr,
    bias_ptr,  # of rows, read if HAS_BIAS
    table_ptr,  # int64: starts, held, at, index, slot of what is read; the same of what is written
    groups,
    read_live,
    read_places,
    written_live,
    written_places,
    weight_row,
    column_step,
    tap_step,
    from_h,
    from_w,
    to_h,
    to_w,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    read_table,  # where each side begins in the table
    written_table,
    pixel_tiles,
    place_tiles,
    BACKWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LAST: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: PLACES places of a group, BLOCK positions of an image."""
    job = tl.program_id(0)
    place_tile = job % place_tiles
    rest = job // place_tiles
    g = rest % groups
    rest = rest // groups
    tile = rest % pixel_tiles
    n = rest // pixel_tiles
    read = table_ptr + read_table
    written = table_ptr + written_table
    read_start = tl.load(read + g)
    count = (tl.load(read + g + 1) - read_start).to(tl.int32)
    at_ptr = read + 2 * (groups + 1) + read_start
    read_index_ptr = at_ptr + read_live
    lists = written + 2 * (groups + 1)
    place = tl.load(written + groups + 1 + g) + place_tile * PLACES + tl.arange(0, PLACES)
    there = place < tl.load(written + groups + 2 + g)
    slot = tl.load(lists + 2 * written_live + place, mask=there, other=-1)
    live = slot >= 0
    index = tl.load(lists + written_live + slot, mask=live, other=0)
    count = tl.where(tl.max(slot, axis=0) >= 0, count, 0)  # nothing alive: nothing to read
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < to_h * to_w
    y = pixel // to_w
    x = pixel - y * to_w
    total = tl.zeros((PLACES, BLOCK), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + index, mask=live, other=0.0).to(tl.float32)[:, None]
    for c in range(0, count):
        source_place = tl.load(at_ptr + c)
        own = tl.load(read_index_ptr + c)
        if BACKWARD:
            weights = weight_ptr + own * weight_row + index * column_step
        else:
            weights = weight_ptr + index * weight_row + own * column_step
        for i in range(0, kernel_h):
            row, row_inside = _source(y, i, stride_h, padding_h, dilation_h, from_h, BACKWARD)
            for j in range(0, kernel_w):
                column, column_inside = _source(x, j, stride_w, padding_w, dilation_w, from_w, BACKWARD)
                offset = _offset(n, read_places, from_h * from_w, source_place, row * from_w + column, LAST)
                value = tl.load(from_ptr + offset, mask=inside & row_inside & column_inside, other=0.0).to(tl.float32)
                weight = tl.load(weights + (i * kernel_w + j) * tap_step, mask=live, other=0.0).to(tl.float32)
                total += weight[:, None] * value[None, :]
    offset = _offset(n, written_places, to_h * to_w, place[:, None], pixel[None, :], LAST)
    tl.store(to_ptr + offset, total, mask=there[:, None] & inside[None, :])


@triton.jit
def masked_groups_partial_kernel(
    x_ptr,
    dy_ptr,
    partials_ptr,  # (outputs, per_in + 1, chunks, shares, TAPS) fp32; input per_in stands for the bias
    table_ptr,  # int64, inputs first
    groups,
    input_live,
    input_places,
    output_live,
    output_places,
    output_table,
    n,
    per_in,
    per_out,
    x_h,
    x_w,
    y_h,
    y_w,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    chunks,
    shares,
    share,  # positions of a share, fewer than 2^31
    LAST: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: an output, an input of its group, TAPS taps, a share of all positions."""
    job = tl.program_id(0).to(tl.int64)
    which = job % shares
    rest = job // shares
    chunk = rest % chunks
    pair = rest // chunks
    c = pair % (per_in + 1)
    o = pair // (per_in + 1)
    lists = table_ptr + output_table + 2 * (groups + 1)
    g = tl.load(lists + output_live + o) // per_out
    own = tl.load(lists + o)
    start = tl.load(table_ptr + g)
    count = tl.load(table_ptr + g + 1) - start
    is_bias = c == per_in
    is_live = c < count
    place = tl.load(table_ptr + 2 * (groups + 1) + start + c, mask=is_live, other=0)
    tap = (chunk * TAPS + tl.arange(0, TAPS)).to(tl.int32)
    has_tap = (tap < kernel_h * kernel_w) & is_live
    i = tap // kernel_w
    j = tap - i * kernel_w
    pixels = y_h * y_w
    begin = which * share
    end = tl.where(is_live | is_bias, tl.minimum(begin + share, n.to(tl.int64) * pixels), begin)
    total = tl.zeros((TAPS, BLOCK), tl.float32)
    for first in range(0, (end - begin).to(tl.int32), BLOCK):
        at = begin + first + tl.arange(0, BLOCK)
        inside = at < end
        image = at // pixels
        pixel = (at - image * pixels).to(tl.int32)
        y = pixel // y_w
        x = pixel - y * y_w
        d = tl.load(dy_ptr + _offset(image, output_places, pixels, own, pixel, LAST), mask=inside, other=0.0)
        row, row_inside = _source(y[None, :], i[:, None], stride_h, padding_h, dilation_h, x_h, False)
        column, column_inside = _source(x[None, :], j[:, None], stride_w, padding_w, dilation_w, x_w, False)
        offset = _offset(image[None, :], input_places, x_h * x_w, place, row * x_w + column, LAST)
        mask = inside[None, :] & has_tap[:, None] & row_inside & column_inside
        value = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(is_bias & (tap == 0)[:, None], 1.0, value)
        total += d.to(tl.float32)[None, :] * value
    tl.store(partials_ptr + job * TAPS + tl.arange(0, TAPS), tl.sum(total, axis=1))


@triton.jit
def masked_groups_finish_kernel(
    partials_ptr,
    dweight_ptr,
    dbias_ptr,  # written if HAS_BIAS
    table_ptr,
    groups,
    input_live,
    output_live,
    output_table,
    per_in,
    per_out,
    weight_row,
    column_step,
    tap_step,
    taps,
    chunks,
    shares,
    HAS_BIAS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK weights of live outputs, or biases, each summed over the shares in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a_row = per_in * taps + 1
    o = at // a_row
    c = (at - o * a_row) // taps
    tap = at - o * a_row - c * taps
    inside = o < output_live
    row = tl.load(table_ptr + output_table + 2 * (groups + 1) + output_live + o, mask=inside, other=0)
    g = row // per_out
    start = tl.load(table_ptr + g, mask=inside, other=0)
    is_live = inside & (c < tl.load(table_ptr + g + 1, mask=inside, other=0) - start)
    is_bias = inside & (c == per_in)
    column = tl.load(table_ptr + 2 * (groups + 1) + input_live + start + c, mask=is_live, other=0)
    first = ((o.to(tl.int64) * (per_in + 1) + c) * chunks + tap // TAPS) * shares
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(0, shares):
        total += tl.load(partials_ptr + (first + s) * TAPS + tap % TAPS, mask=is_live | is_bias, other=0.0)
    tl.store(dweight_ptr + row * weight_row + column * column_step + tap * tap_step, total, mask=is_live)
    if HAS_BIAS:
        tl.store(dbias_ptr + row, total, mask=is_bias)


def masked_groups_launch(which: int, tensors: Sequence[Tensor | None], table: Tensor, numbers: Sequence[int]) -> None:
    """Values, the gradient of inputs or that of weights; tensors and numbers as csrc/bindings_masked_groups.cpp."""
    x, weight, bias, dy, y, dx, dweight, dbias = tensors
    _, last, groups, in_live, in_places, out_live, out_places, rows, weight_row, column_step, tap_step = numbers[:11]
    n, in_h, in_w, out_h, out_w, kernel_h, kernel_w, *rest = numbers[11:]
    taps, output_table = kernel_h * kernel_w, 2 * (groups + 1) + 2 * in_live + in_places
    per_in, per_out = weight_row // taps, rows // groups
    steps = (weight_row, column_step, tap_step)
    if which == 2:
        assert x is not None and dy is not None and dweight is not None
        chunks = triton.cdiv(taps, TAPS)
        jobs, positions = out_live * (per_in + 1) * chunks, n * out_h * out_w
        shares = max(
            1, min(triton.cdiv(PROGRAMS_WANTED, jobs), positions // SHARE_LEAST), triton.cdiv(positions, 2**30)
        )
        partials = x.new_empty(jobs * shares * TAPS, dtype=table.new_empty(0).float().dtype)
        masked_groups_partial_kernel[(jobs * shares,)](
            x, dy, partials, table, groups, in_live, in_places, out_live, out_places, output_table, n, per_in, per_out,
            in_h, in_w, out_h, out_w, kernel_h, kernel_w, *rest, chunks, shares, triton.cdiv(positions, shares),
            LAST=bool(last), TAPS=TAPS, BLOCK=WEIGHT_BLOCK, **OPTIONS,
        )  # fmt: skip
        dweight.zero_()
        if dbias is not None:
            dbias.zero_()
        masked_groups_finish_kernel[(triton.cdiv(out_live * (per_in * taps + 1), FINISH_BLOCK),)](
            partials, dweight, dweight if dbias is None else dbias, table, groups, in_live, out_live, output_table,
            per_in, per_out, *steps, taps, chunks, shares,
            HAS_BIAS=dbias is not None, TAPS=TAPS, BLOCK=FINISH_BLOCK, **OPTIONS,
        )  # fmt: skip
        return
    backward = which == 1
    source, to = (dy, dx) if backward else (x, y)
    inputs, outputs = (in_live, in_places, in_h, in_w, 0), (out_live, out_places, out_h, out_w, output_table)
    read, written = (outputs, inputs) if backward else (inputs, outputs)
    pixel_tiles = triton.cdiv(written[2] * written[3], BLOCK)
    place_tiles = triton.cdiv(min(per_in if backward else per_out, max(written[1], 1)), PLACES)
    masked_groups_values_kernel[(n * pixel_tiles * groups * place_tiles,)](
        source, to, weight, weight if bias is None else bias, table, groups, *read[:2], *written[:2], *steps,
        *read[2:4], *written[2:4], kernel_h, kernel_w, *rest, read[4], written[4], pixel_tiles, place_tiles,
        BACKWARD=backward, HAS_BIAS=bias is not None and not backward, LAST=bool(last), PLACES=PLACES, BLOCK=BLOCK,
        **OPTIONS,
    )  # fmt: skip

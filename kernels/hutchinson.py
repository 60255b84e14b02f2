"""Triton bodies of rademacher, hutchinson_reduce and channel_sums; meanings and the layout of signs as on the CPU.

Programs of one launch cannot wait for each other, so a reduction is a launch for every class of entries (row length,
dtype, memory layout), which leaves partial sums, and one that adds them in order. The words of Philox are made 32
elements at a time and shifted to where a row begins.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _word(index, seed, tensor, probe):
    # Word `index` of a tensor's signs: elements 32 * index and on.
    zero = tl.zeros_like(index)
    c0, c1, c2, c3 = tl.philox(
        seed,
        (index // 4).to(tl.uint32),
        (zero + tensor).to(tl.uint32),
        (zero + probe).to(tl.uint32),
        zero.to(tl.uint32),
    )
    which = index % 4
    return tl.where(which == 0, c0, tl.where(which == 1, c1, tl.where(which == 2, c2, c3)))


@triton.jit
def _last_offset(f, channels, inner):
    # Where logical element f lies in a tensor that is (rows, inner, channels) in memory.
    length = channels * inner
    row = f // length
    e = f - row * length
    c = e // inner
    return row * length + (e - c * inner) * channels + c


@triton.jit
def rademacher_kernel(
    out_ptr,
    numel,
    channels,  # of a channels-last tensor
    inner,
    seed,
    tensor,
    probe,
    alpha,
    ADD: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of a probe, written or added ``alpha`` times."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    words = _word(begin // 32 + tl.arange(0, BLOCK // 32), seed, tensor, probe)
    bits = (words[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
    f = begin + tl.arange(0, BLOCK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = f < numel
    offset = f
    if IS_LAST:
        offset = _last_offset(f, channels, inner)
    step = tl.where(bits == 1, -alpha, alpha)
    if ADD:
        step = tl.load(out_ptr + offset, mask=inside, other=0.0).to(tl.float32) + step
    tl.store(out_ptr + offset, step.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(
    addresses_ptr,  # int64, one a tensor, 0 where absent
    entries_ptr,  # (entries, 10) int64, fields as in csrc/hutchinson.h
    items_ptr,  # (items, 7) int64: entry, r0, r1, e0, e1, where partial sums of rows and of elements go (-1: nowhere)
    partials_ptr,  # fp32
    seed,
    probe,
    HAS_SIGNS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,  # then an item is at most BLOCK_E elements wide
    IS_LAST: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: one item."""
    item_ptr = items_ptr + tl.program_id(0).to(tl.int64) * 7
    entry_ptr = entries_ptr + tl.load(item_ptr) * 10
    r0 = tl.load(item_ptr + 1)
    r1 = tl.load(item_ptr + 2)
    e0 = tl.load(item_ptr + 3)
    e1 = tl.load(item_ptr + 4)
    row_sums = tl.load(item_ptr + 5)
    element_sums = tl.load(item_ptr + 6)
    tensor = tl.load(entry_ptr + 1)
    length = tl.load(entry_ptr + 3) * tl.load(entry_ptr + 4)
    channels = tl.load(entry_ptr + 8)
    inner = tl.load(entry_ptr + 9)
    address = tl.load(addresses_ptr + tl.load(entry_ptr))
    is_there = address != 0
    data_ptr = address.to(tl.pointer_type(DTYPE))

    columns = tl.zeros((BLOCK_E,), tl.float32)
    for start_r in range(r0, r1, BLOCK_R):
        r = start_r + tl.arange(0, BLOCK_R)
        rows = tl.zeros((BLOCK_R,), tl.float32)
        for start_e in range(e0, e1, BLOCK_E):
            e = start_e + tl.arange(0, BLOCK_E)
            inside = (r[:, None] < r1) & (e[None, :] < e1) & is_there
            f = r[:, None] * length + e[None, :]
            offset = f
            if IS_LAST:
                offset = _last_offset(f, channels, inner)
            x = tl.load(data_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            if HAS_SIGNS:
                first = r * length + start_e
                shift = (first % 32).to(tl.uint32)[:, None]
                index = (first // 32)[:, None] + tl.arange(0, BLOCK_E // 32)[None, :]
                low = _word(index, seed, tensor, probe) >> shift
                up = _word(index + 1, seed, tensor, probe)
                # Two shifts: one by 32 has no meaning.
                words = low | ((up << (31 - shift)) << 1)
                bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1
                y = tl.where(tl.reshape(bits, (BLOCK_R, BLOCK_E)) == 1, -x, x)
            else:
                y = x * x
            rows += tl.sum(y, axis=1)
            if HAS_COLUMNS:
                columns += tl.sum(y, axis=0)
        tl.store(partials_ptr + row_sums + r - r0, rows, mask=(r < r1) & (row_sums >= 0))
    if HAS_COLUMNS:
        at = tl.arange(0, BLOCK_E)
        tl.store(partials_ptr + element_sums + at, columns, mask=at < e1 - e0)


@triton.jit
def segment_sums_kernel(
    starts_ptr,  # int64: positions of output i are index[starts[i] : starts[i + 1]]
    index_ptr,  # int64
    cells_ptr,  # int64, which factor of scale goes with each position, read if HAS_SCALE
    x_ptr,  # fp32
    scale_ptr,  # fp32, read if HAS_SCALE
    out_ptr,  # fp32
    owners_ptr,  # int64, which tensor each output is of, read if ADD
    bad_ptr,  # int32, one a tensor: 1 where an output is not finite, written if ADD
    n_out,
    alpha,
    HAS_SCALE: tl.constexpr,
    ADD: tl.constexpr,  # out += alpha * sum, else out = sum
    BLOCK: tl.constexpr,
):
    """One program: BLOCK outputs, each summed in order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n_out
    first = tl.load(starts_ptr + i, mask=inside, other=0)
    last = tl.load(starts_ptr + i + 1, mask=inside, other=0)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, tl.max(last - first, axis=0)):
        more = first + j < last
        value = tl.load(x_ptr + tl.load(index_ptr + first + j, mask=more, other=0), mask=more, other=0.0)
        if HAS_SCALE:
            cell = tl.load(cells_ptr + first + j, mask=more, other=0)
            value *= tl.load(scale_ptr + cell, mask=more, other=0.0)
        total += value
    if ADD:
        is_bad = (total != total) | (tl.abs(total) == float("inf"))
        owner = tl.load(owners_ptr + i, mask=inside, other=0)
        tl.store(bad_ptr + owner, 1, mask=inside & is_bad)
        total = tl.load(out_ptr + i, mask=inside, other=0.0) + alpha * total
    tl.store(out_ptr + i, total, mask=inside)


TRITON_TYPES = {0: tl.float32, 2: tl.float16, 3: tl.bfloat16}
FILL_BLOCK = 2048
SEGMENT_BLOCK = 128


def reduce_config(width: int) -> dict[str, Any]:
    """Tile and warps for items of this width: a static table, since autotuning needs a driver."""
    block_e = min(max(triton.next_power_of_2(width), 32), 1024)
    return {"BLOCK_E": block_e, "BLOCK_R": min(2048 // block_e, 32), "num_warps": 8}


def rademacher_launch(
    out: Tensor, last: tuple[int, int], alpha: float, add: bool, seed: int, probe: int, tensor: int
) -> None:
    """Write a probe's tensor, or add ``alpha`` times it; ``last`` is (channels, inner) of a channels-last tensor."""
    with torch.no_grad():
        rademacher_kernel[(triton.cdiv(out.numel(), FILL_BLOCK),)](
            out,
            out.numel(),
            *last,
            seed,
            tensor,
            probe,
            alpha,
            ADD=add,
            IS_LAST=last[0] > 0,
            BLOCK=FILL_BLOCK,
            num_warps=8,
        )


def reduce_launch(
    addresses: Tensor,
    entries: Tensor,
    items: Tensor,
    partials: Tensor,
    width: int,
    seed: int,
    probe: int,
    has_signs: bool,
    has_columns: bool,
    is_last: bool,
    dtype: int,
) -> None:
    """Partial sums of the items of one class."""
    with torch.no_grad():
        reduce_kernel[(len(items),)](
            addresses,
            entries,
            items,
            partials,
            seed,
            probe,
            HAS_SIGNS=has_signs,
            HAS_COLUMNS=has_columns,
            IS_LAST=is_last,
            DTYPE=TRITON_TYPES[dtype],
            **reduce_config(width),
        )


def segment_sums_launch(
    starts: Tensor,
    index: Tensor,
    cells: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    out: Tensor,
    owners: Tensor | None = None,
    bad: Tensor | None = None,
    alpha: float = 1.0,
) -> None:
    """``out = sums``, or ``out += alpha * sums`` with ``bad`` marked where ``owners`` and ``bad`` are given."""
    with torch.no_grad():
        segment_sums_kernel[(triton.cdiv(len(out), SEGMENT_BLOCK),)](
            starts,
            index,
            index if cells is None else cells,
            x,
            x if scale is None else scale,
            out,
            index if owners is None else owners,
            index if bad is None else bad,
            len(out),
            alpha,
            HAS_SCALE=scale is not None,
            ADD=bad is not None,
            BLOCK=SEGMENT_BLOCK,
        )

"""How a reduce table is cut into items, one a block of the GPU; kernels and numbers are those of csrc/hutchinson.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from cpd_fast.ops.hutchinson import Entry

ITEM_ELEMENTS = 32768
SHORT_ROW = 32  # a thread each, where no columns are wanted
STRIP, STRIP_FP64 = 1024, 512  # elements of a row that a warp takes
COLUMN_ROWS = 256  # most rows of an item with columns: 32 a warp, added in fp32


class Items(NamedTuple):
    """The items of all entries.

    Attributes:
        items: int64 ``(n, 7)``: entry, rows [r0, r1), elements [e0, e1) of each, where partial sums of rows and of
            columns lie (-1: not wanted, or straight to the result).
        entry_starts: int64 ``(n_entries + 1,)``: where each entry's items begin.
        tensors: int64 ``(n,)``: which tensor each item is of.
        n_partials: How many partial sums there are.
    """

    items: Tensor
    entry_starts: Tensor
    tensors: Tensor
    n_partials: int


def cut(entries: Sequence[Entry], is_double: Sequence[bool]) -> Items:
    """Cut entries into items by their shapes alone, so that the order of additions depends on nothing else."""
    parts: list[np.ndarray] = []
    starts, partials = [0], 0
    for number, (e, wide) in enumerate(zip(entries, is_double, strict=True)):
        block, partials = _cut_one(number, e, STRIP_FP64 if wide else STRIP, partials)
        parts.append(block)
        starts.append(starts[-1] + len(block))
    items = np.concatenate([np.zeros((0, 7), np.int64), *parts])
    tensors = np.repeat([e.tensor for e in entries], np.diff(starts)).astype(np.int64)
    return Items(
        torch.from_numpy(items), torch.tensor(starts, dtype=torch.int64), torch.from_numpy(tensors), int(partials)
    )


class TritonClass(NamedTuple):
    """Items that one Triton launch can serve."""

    width: int
    has_columns: bool
    is_last: bool
    dtype: int
    items: Tensor


class TritonTable(NamedTuple):
    """What Triton's two stages read: items by class, and which partial sums each entry of the result adds up."""

    classes: list[TritonClass]
    starts: Tensor
    positions: Tensor
    n_partials: int


def triton_table(entries: Sequence[Entry], numbers: Tensor, n_out: int) -> TritonTable:
    """Cut entries for the Triton body: every sum goes through a partial one, columns an element at a time.

    Args:
        entries: The entries.
        numbers: The same as a kernel reads them, ``EntryTable.numbers`` on the CPU.
        n_out: Length of the result.
    """
    classes: dict[tuple[int, bool, bool, int], list[np.ndarray]] = {}
    to: list[np.ndarray] = [np.zeros(0, np.int64)]
    at: list[np.ndarray] = [np.zeros(0, np.int64)]
    partials = 0
    for number, e in enumerate(entries):
        items, _ = _cut_one(number, e, STRIP, 0)
        row_sizes = items[:, 2] - items[:, 1] if e.row_start >= 0 else np.zeros(len(items), np.int64)
        widths = items[:, 4] - items[:, 3] if e.column_start >= 0 else np.zeros(len(items), np.int64)
        ends = partials + np.cumsum(row_sizes + widths)
        items[:, 5] = np.where(row_sizes > 0, ends - widths - row_sizes, -1)
        items[:, 6] = np.where(widths > 0, ends - widths, -1)
        partials = int(ends[-1])
        for _, r0, r1, e0, e1, row_at, column_at in items:
            if row_at >= 0:
                to.append(e.row_start + np.arange(r0, r1))
                at.append(row_at + np.arange(r1 - r0))
            if column_at >= 0:
                to.append(e.column_start + np.arange(e0, e1) // e.inner)
                at.append(column_at + np.arange(e1 - e0))
        width = 1 << int(max(min(e.channels * e.inner, STRIP) - 1, 0)).bit_length()  # few classes: powers of two
        width = next(w for w in (32, 128, STRIP) if width <= w)
        key = (width, e.column_start >= 0, bool(numbers[number, 8] > 0), int(numbers[number, 7]))
        classes.setdefault(key, []).append(items)
    owner = np.concatenate(to)
    order = np.argsort(owner, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=n_out))]).astype(np.int64)
    made = [TritonClass(*key, torch.from_numpy(np.concatenate(items))) for key, items in classes.items()]
    return TritonTable(made, torch.from_numpy(starts), torch.from_numpy(np.concatenate(at)[order]), partials)


def _cut_one(number: int, e: Entry, strip: int, partials: int) -> tuple[np.ndarray, int]:
    """The items of one entry, row block by row block, and the number of partial sums so far."""
    length, has_columns = e.channels * e.inner, e.column_start >= 0
    if has_columns:
        width = min(length, strip)
        rows = min(max(ITEM_ELEMENTS // width, 8), COLUMN_ROWS)
    else:
        width = min(length, ITEM_ELEMENTS)
        rows = max(ITEM_ELEMENTS // width, 1)
    row_blocks, ranges = np.arange(0, e.rows, rows), np.arange(0, length, width)
    r0, e0 = np.repeat(row_blocks, len(ranges)), np.tile(ranges, len(row_blocks))
    r1, e1 = np.minimum(r0 + rows, e.rows), np.minimum(e0 + width, length)
    row_sizes = r1 - r0 if e.row_start >= 0 and width < length else np.zeros_like(r0)
    # One block of rows is the whole sum of a column, unless ranges of elements cut a channel.
    are_whole = rows >= e.rows and (e.inner == 1 or width == length)
    channels = (e1 - 1) // e.inner + 1 - e0 // e.inner
    column_sizes = channels if has_columns and not are_whole else np.zeros_like(r0)
    ends = partials + np.cumsum(row_sizes + column_sizes)
    row_at = ends - column_sizes - row_sizes
    column_at = ends - column_sizes
    items = np.stack(
        [
            *(np.full_like(r0, number), r0, r1, e0, e1),
            np.where(row_sizes > 0, row_at, -1),
            np.where(column_sizes > 0, column_at, -1),
        ],
        axis=1,
    )
    return items.astype(np.int64), int(ends[-1])

"""Turns probes, reduce tables and channel tables into what kernels read: addresses and tables of integers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cpd_fast.ops import _dispatch

if TYPE_CHECKING:
    from cpd_fast.ops.channel_sums import ChannelTable
    from cpd_fast.ops.hutchinson import Counter, EntryTable


def memory_of(t: Tensor) -> tuple[int, int] | None:
    """``(0, 0)`` for a contiguous tensor, ``(channels, inner)`` for a channels-last one, None for any other."""
    if t.is_contiguous():
        return 0, 0
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    if last is not None and t.is_contiguous(memory_format=last):
        return t.shape[1], t.shape[2:].numel()
    return None


def rademacher(
    chosen: str, tensors: Sequence[Tensor], alpha: float | None, seed: int, probe: int, ids: Sequence[int]
) -> None:
    """Fill tensors with a probe (``alpha`` None) or add ``alpha`` times it, in place."""
    numbers: list[int] = []
    dense: list[tuple[Tensor, tuple[int, int]]] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for t, i in zip(tensors, ids, strict=True):
        memory = memory_of(t)
        if memory is None:
            copies.append((t, t.contiguous()))
            t, memory = copies[-1][1], (0, 0)
        dense.append((t, memory))
        numbers += (_dispatch.DTYPE_CODES[t.dtype], t.data_ptr(), t.numel(), *memory, i)
    add, step = alpha is not None, 1.0 if alpha is None else alpha
    native: Any = _dispatch._native()
    if chosen == "cpu":
        native.rademacher(numbers, seed, probe, add, step, torch.get_num_threads())
    else:
        with _dispatch._on(tensors[0]):
            if chosen == "cuda":
                native.rademacher_cuda(numbers, seed, probe, add, step, _dispatch._stream(tensors[0]))
            else:
                for (t, memory), i in zip(dense, ids, strict=True):
                    if t.numel():
                        _triton().rademacher_launch(t, memory, step, add, seed, probe, i)
    for t, copy in copies:
        t.copy_(copy)


def hutchinson_reduce(
    chosen: str,
    table: EntryTable,
    values: Mapping[int, Tensor],
    counter: Counter,
    out: Tensor,
    alpha: float,
    bad: Tensor,
) -> None:
    """Add ``alpha`` times the sums of the table's entries to ``out``, and mark tensors in ``bad``."""
    addresses = [0] * table.n_tensors
    copies = []  # live until the kernel is through
    for i, value in values.items():
        e = table.expected[i]
        if not value.is_contiguous(memory_format=e.memory_format):
            value = value.contiguous(memory_format=e.memory_format)
            copies.append(value)
        addresses[i] = value.data_ptr()
    seed, probe = (0, 0) if counter is None else counter
    has_signs, first, last = counter is not None, *table.range_of(values)
    numbers = (has_signs, seed, probe, alpha, out.data_ptr(), out.dtype == torch.float64, bad.data_ptr())
    native: Any = _dispatch._native()
    if chosen == "cpu":
        start = table.numbers.data_ptr() + first * table.numbers.stride(0) * 8
        native.hutchinson_reduce(start, last - first, addresses, *numbers, torch.get_num_threads())
        return
    with _dispatch._on(out):
        if chosen == "cuda":
            native.hutchinson_reduce_cuda(table.on_gpu(first, last), addresses, *numbers, _dispatch._stream(out))
        else:
            _reduce_by_triton(table, addresses, counter, out, alpha, bad)


def _reduce_by_triton(
    table: EntryTable, addresses: Sequence[int], counter: Counter, out: Tensor, alpha: float, bad: Tensor
) -> None:
    if len(present := [i for i, address in enumerate(addresses) if address]) == 1:
        table = table.part(present[0])  # a gradient hook: not a launch for every other tensor
    if not table.entries:
        return
    made, numbers = table.for_triton(len(out))
    seed, probe = (0, 0) if counter is None else counter
    on_device = torch.tensor(addresses, dtype=torch.int64).to(out.device, non_blocking=True)
    partials = torch.empty(made.n_partials, dtype=torch.float32, device=out.device)
    for c in made.classes:
        _triton().reduce_launch(
            *(on_device, numbers, c.items, partials, c.width, seed, probe, counter is not None),
            *(c.has_columns, c.is_last, c.dtype),
        )
    _triton().segment_sums_launch(
        made.starts, made.positions, None, partials, None, out, table.owner(len(out)), bad, alpha
    )


def channel_sums(chosen: str, table: ChannelTable, vector: Tensor, scale: Tensor | None) -> Tensor:
    """The sums of every channel."""
    vector = vector.contiguous()
    scale = None if scale is None else scale.contiguous()
    out = vector.new_empty(table.n_channels)
    if chosen == "triton":
        if len(out):
            with _dispatch._on(vector):
                _triton().segment_sums_launch(*table.flat, vector, scale, out)
        return out
    arguments = (
        *(x.data_ptr() for x in table.csr),
        *(table.n_channels, vector.data_ptr(), 0 if scale is None else scale.data_ptr(), out.data_ptr()),
        vector.dtype == torch.float64,
    )
    native: Any = _dispatch._native()
    if chosen == "cpu":
        native.channel_sums(*arguments, torch.get_num_threads())
    else:
        with _dispatch._on(vector):
            native.channel_sums_cuda(*arguments, _dispatch._stream(vector))
    return out


def _triton() -> Any:
    return importlib.import_module("cpd_fast.kernels.hutchinson")

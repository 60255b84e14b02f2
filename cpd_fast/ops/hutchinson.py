"""Sums of a Hessian-vector product against its probe, over the slices of many parameters at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from cpd_fast.errors import ShapeError
from cpd_fast.ops import _dispatch, _gpu_table, _philox, _probe_kernels
from cpd_fast.ops.rademacher import LIBRARY, reference

Values = Sequence[Tensor | None] | Mapping[int, Tensor | None]
_ABSENT = -1


class Entry(NamedTuple):
    """One tensor seen as ``(rows, channels, inner)``, and where its sums go (-1: not wanted)."""

    tensor: int  # position in the table
    id: int  # number within the probe
    rows: int
    channels: int
    inner: int
    row_start: int  # of `rows` sums over channels and inner
    column_start: int  # of `channels` sums over rows and inner


@dataclass(frozen=True)
class _Expected:
    """What a tensor of the table is."""

    shape: torch.Size
    dtype: torch.dtype
    last: tuple[int, int]  # (channels, inner) where dim 1 runs fastest in memory, else (0, 0)
    memory_format: torch.memory_format

    @classmethod
    def of(cls, t: Tensor) -> _Expected:
        last = _probe_kernels.memory_of(t)
        is_last = last is not None and last != (0, 0)
        form = {4: torch.channels_last, 5: torch.channels_last_3d}[t.dim()] if is_last else torch.contiguous_format
        return cls(t.shape, t.dtype, last if last is not None else (0, 0), form)


class EntryTable:
    """The entries as a kernel reads them: int64 ``(len(entries), 10)``, fields as in ``csrc/hutchinson.h``."""

    def __init__(
        self, entries: Sequence[Entry], expected: Mapping[int, _Expected], n_tensors: int, device: torch.device
    ) -> None:
        self.entries, self.expected, self.n_tensors, self.device = entries, expected, n_tensors, device
        rows = [(*e, _dispatch.DTYPE_CODES[expected[e.tensor].dtype], *expected[e.tensor].last) for e in entries]
        self.numbers = torch.tensor(rows, dtype=torch.int64).reshape(-1, len(Entry._fields) + 3)
        self._parts: dict[int, EntryTable] = {}
        self._owner: Tensor | None = None
        self._gpu: tuple[Tensor, ...] | None = None
        self._starts: list[int] = []
        self._for_triton: tuple[_gpu_table.TritonTable, Tensor] | None = None
        self._ranges: dict[int, tuple[int, int]] = {}
        for at, e in enumerate(entries):
            self._ranges[e.tensor] = (self._ranges.get(e.tensor, (at, 0))[0], at + 1)

    def part(self, tensor: int) -> EntryTable:
        """The table of one tensor's entries."""
        if tensor not in self._parts:
            first, last = self._ranges.get(tensor, (0, 0))
            self._parts[tensor] = EntryTable(self.entries[first:last], self.expected, self.n_tensors, self.device)
        return self._parts[tensor]

    def owner(self, n_out: int) -> Tensor:
        """Which tensor each entry of the result is of, int64 ``(n_out,)``; 0 where no entry goes."""
        if self._owner is None:
            owner = torch.zeros(n_out, dtype=torch.int64)
            for e in self.entries:
                for start, size in ((e.row_start, e.rows), (e.column_start, e.channels)):
                    if start != _ABSENT:
                        owner[start : start + size] = e.tensor
            self._owner = owner.to(self.device)
        return self._owner

    def on_gpu(self, first: int, last: int) -> list[int]:
        """The table of the CUDA body for entries [first, last): eight numbers, as in ``csrc/hutchinson.h``."""
        if self._gpu is None:
            wide = [self.expected[e.tensor].dtype == torch.float64 for e in self.entries]
            made = _gpu_table.cut(self.entries, wide)
            out = torch.float64 if any(wide) else torch.float32
            self._gpu = (
                *(x.to(self.device) for x in (self.numbers, made.items, made.entry_starts)),
                made.tensors,
                torch.empty(made.n_partials, dtype=out, device=self.device),
                torch.zeros(len(self.entries), dtype=torch.int32, device=self.device),
            )
            self._starts = made.entry_starts.tolist()
        begin, end = self._starts[first], self._starts[last]
        *tables, partials, arrived = (x.data_ptr() for x in self._gpu)
        return [*tables, begin, end - begin, partials, arrived]

    def for_triton(self, n_out: int) -> tuple[_gpu_table.TritonTable, Tensor]:
        """The table of the Triton body, and the entries on its device."""
        if self._for_triton is None:
            made = _gpu_table.triton_table(self.entries, self.numbers, n_out)
            classes = [c._replace(items=c.items.to(self.device)) for c in made.classes]
            starts, positions = made.starts.to(self.device), made.positions.to(self.device)
            made = made._replace(classes=classes, starts=starts, positions=positions)
            self._for_triton = made, self.numbers.to(self.device)
        return self._for_triton

    def range_of(self, tensors: Mapping[int, Tensor]) -> tuple[int, int]:
        """Where the entries of these tensors lie: of one tensor they are neighbours."""
        if len(tensors) == 1:
            return self._ranges.get(next(iter(tensors)), (0, 0))
        return 0, len(self.entries)


class ReduceTable:
    """Which sums :func:`hutchinson_reduce` makes of which tensors; made once, used every probe.

    A *piece* is a tensor and some of its dims: the values summed over all other dims, flattened in the order of these
    dims. Pieces of consecutive dims (rows ``(0,)``, columns ``(1,)``, pairs ``(0, 1)`` of a grouped convolution,
    ``(2,)`` of a position embedding) are made by one kernel; a tensor's rows and columns from one read. Any others go
    through plain PyTorch.

    Args:
        tensors: The parameters, or tensors like them: shapes, dtypes, strides and device are taken, values are not.
        pieces: ``(position in tensors, dims)`` for every piece wanted. Their sums lie one after another in the result.
        ids: Number of each tensor within a probe; its position if None.

    Attributes:
        starts: Where each piece begins in the result.
        n_out: Length of the result.
        owner: Which tensor each entry of the result is of: int64 ``(n_out,)``.
        dtype: Of the result: fp64 if a tensor is, else fp32.
        bad: int32 ``(len(tensors),)`` on the tensors' device: 1 where a sum of that tensor was not finite, ever since
            it was last set to zero. Nothing waits for the device.

    Raises:
        ShapeError: If a tensor is not of floating point, tensors are on several devices, or a piece has dims that its
            tensor does not have.

    Example:
        >>> import torch
        >>> table = ReduceTable([torch.empty(2, 3)], [(0, (0,)), (0, (1,))])
        >>> table.starts, table.n_out
        ([0, 2], 5)
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        pieces: Sequence[tuple[int, tuple[int, ...]]],
        *,
        ids: Sequence[int] | None = None,
    ) -> None:
        self.device = tensors[0].device if tensors else torch.device("cpu")
        for i, t in enumerate(tensors):
            if not t.is_floating_point():
                raise ShapeError(f"ReduceTable: expected floating-point tensors, got {t.dtype} (tensor {i})")
            if t.device != self.device:
                raise ShapeError(
                    f"ReduceTable: tensors must be on one device, got {self.device} and {t.device} (tensor {i}); make "
                    "a table a device"
                )
        self.ids = list(range(len(tensors)) if ids is None else ids)
        if len(self.ids) != len(tensors):
            raise ShapeError(f"ReduceTable: expected one id a tensor, got {len(self.ids)} for {len(tensors)} tensors")
        _philox.check_counter("ReduceTable", 0, 0, self.ids)
        self.expected = [_Expected.of(t) for t in tensors]
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        self.starts: list[int] = []
        sizes: list[int] = []
        self.n_out = 0
        for i, dims in pieces:
            if not 0 <= i < len(tensors) or any(not 0 <= d < tensors[i].dim() for d in dims):
                what = f"shape {tuple(tensors[i].shape)}" if 0 <= i < len(tensors) else f"{len(tensors)} tensors"
                raise ShapeError(f"ReduceTable: piece ({i}, {dims}) does not fit {what}")
            if len(set(dims)) != len(dims):
                raise ShapeError(f"ReduceTable: piece ({i}, {dims}) names a dim twice")
            sizes.append(prod(tensors[i].shape[d] for d in dims))
            self.starts.append(self.n_out)
            self.n_out += sizes[-1]
        self.entries, self.others = _entries(self, pieces)
        self.kernel = EntryTable(self.entries, dict(enumerate(self.expected)), len(tensors), self.device)
        owners = [torch.full((n,), i) for (i, _), n in zip(pieces, sizes, strict=True)]
        self.owner = torch.cat([torch.zeros(0, dtype=torch.int64), *owners]).to(self.device)
        self.bad = torch.zeros(len(tensors), dtype=torch.int32, device=self.device)

    def check(self, op: str, values: Values) -> dict[int, Tensor]:
        """The values that are there, by position, in the memory layout of the table's tensors.

        Raises:
            ShapeError: If there are more or fewer than tensors, or a shape, dtype or device differs.
        """
        if not isinstance(values, Mapping):
            if len(values) != len(self.expected):
                raise ShapeError(f"{op}: expected {len(self.expected)} tensors (None where absent), got {len(values)}")
            values = dict(enumerate(values))
        found = {}
        for i, value in values.items():
            if value is None:
                continue
            if not 0 <= i < len(self.expected):
                raise ShapeError(f"{op}: the table has {len(self.expected)} tensors, got a value for number {i}")
            e = self.expected[i]
            if value.shape != e.shape or value.dtype != e.dtype or value.device != self.device:
                raise ShapeError(
                    f"{op}: tensor {i} must be {tuple(e.shape)} {e.dtype} on {self.device}, got {tuple(value.shape)} "
                    f"{value.dtype} on {value.device}; make the table from the tensors that are reduced"
                )
            found[i] = value
        return found


def _entries(
    table: ReduceTable, pieces: Sequence[tuple[int, tuple[int, ...]]]
) -> tuple[list[Entry], list[tuple[int, tuple[int, ...], int]]]:
    """Kernel entries, and ``(tensor, dims, start)`` of the pieces that are none."""
    entries: list[Entry] = []
    others: list[tuple[int, tuple[int, ...], int]] = []
    for (i, dims), start in zip(pieces, table.starts, strict=True):
        shape = table.expected[i].shape
        first = dims[0] if dims else 0
        if list(dims) != list(range(first, first + len(dims))):
            others.append((i, dims, start))
            continue
        before, size = prod(shape[:first]), prod(shape[d] for d in dims)
        inner = prod(shape[first + len(dims) :])
        if before * size * inner == 0:
            continue  # sums of nothing: zero
        if before == 1:
            entries.append(Entry(i, table.ids[i], size, 1, inner, start, _ABSENT))
        else:
            entries.append(Entry(i, table.ids[i], before, size, inner, _ABSENT, start))
    return _merge(entries), others


def _merge(entries: Sequence[Entry]) -> list[Entry]:
    """Let rows and columns of one tensor share a read."""
    merged: list[Entry] = []
    rows = {(e.tensor, e.rows): e for e in entries if e.column_start == _ABSENT}
    for e in entries:
        if e.column_start != _ABSENT and (e.tensor, e.rows) in rows:
            merged.append(e._replace(row_start=rows.pop((e.tensor, e.rows)).row_start))
        elif e.column_start != _ABSENT:
            merged.append(e)
    used = {e.row_start for e in merged}
    merged += [e for e in entries if e.column_start == _ABSENT and e.row_start not in used]
    return sorted(merged)


def hutchinson_reduce(
    table: ReduceTable,
    values: Values,
    seed: int,
    probe: int,
    *,
    out: Tensor | None = None,
    alpha: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """``v . (H v)`` of one probe, summed to the pieces of all parameters: one read of H v, the probe made on the fly.

    Args:
        table: Which sums of which tensors.
        values: H v, one tensor a parameter: a sequence with None, or a mapping from positions to tensors, where a
            parameter is unused. Shape, dtype and device are the parameter's; strides other than the parameter's cost a
            copy.
        seed: Key of the probe, in [0, 2^63).
        probe: Number of the probe, in [0, 2^32).
        out: The sums are added to it, ``(table.n_out,)`` in ``table.dtype``; None: to zeros.
        alpha: Factor on the sums.
        backend: As for :func:`rademacher`.

    Returns:
        ``out``, with ``alpha`` times the sums added. Sums are made in fp32 or better, in an order that does not depend
        on the number of threads: the same bits from run to run.

    Raises:
        ShapeError: If a value does not fit the table.
        ValueError: If a number is out of its range.

    Source: Hutchinson 1990; Yu et al., arXiv:2101.08940, traces of channel blocks.

    Example:
        >>> import cpd_fast, torch
        >>> w = torch.zeros(2, 3)
        >>> table = ReduceTable([w], [(0, (0,)), (0, (1,))])
        >>> v = cpd_fast.ops.rademacher(w, seed=0, probe=0, tensor=0)
        >>> hutchinson_reduce(table, [2 * v], seed=0, probe=0)
        tensor([6., 6., 4., 4., 4.])
    """
    _philox.check_counter("hutchinson_reduce", seed, probe, ())
    return _reduce("hutchinson_reduce", table, values, (seed, probe), out, alpha, backend)


def squared_norms(
    table: ReduceTable, values: Values, *, out: Tensor | None = None, alpha: float = 1.0, backend: str | None = None
) -> Tensor:
    """Sums of squares over the pieces of all parameters, such as ||w||^2 of every row and column.

    Args:
        table: Which sums of which tensors.
        values: The parameters; as in :func:`hutchinson_reduce`.
        out: The sums are added to it, ``(table.n_out,)`` in ``table.dtype``; None: to zeros.
        alpha: Factor on the sums.
        backend: As for :func:`rademacher`.

    Returns:
        ``out``, with ``alpha`` times the sums added.

    Raises:
        ShapeError: If a value does not fit the table.

    Example:
        >>> import torch
        >>> w = torch.ones(2, 3)
        >>> squared_norms(ReduceTable([w], [(0, (0,))]), [w])
        tensor([3., 3.])
    """
    return _reduce("squared_norms", table, values, None, out, alpha, backend)


Counter = tuple[int, int] | None  # seed and probe; None: values times themselves


def _reduce(
    op: str,
    table: ReduceTable,
    values: Values,
    counter: Counter,
    out: Tensor | None,
    alpha: float,
    backend: str | None,
) -> Tensor:
    """Check, then run.

    Raises:
        ShapeError: If a tensor does not fit the table.
    """
    found = table.check(op, values)
    if out is None:
        out = torch.zeros(table.n_out, dtype=table.dtype, device=table.device)
    elif out.shape != (table.n_out,) or out.dtype != table.dtype or out.device != table.device:
        raise ShapeError(
            f"{op}: out must be ({table.n_out},) {table.dtype} on {table.device}, got {tuple(out.shape)} {out.dtype} "
            f"on {out.device}"
        )
    if not found:
        return out
    watched = backend is None and _dispatch.is_watched(*found.values())
    chosen = "reference" if watched else _dispatch.choose(op, out, backend)
    if chosen != "reference":
        _probe_kernels.hutchinson_reduce(chosen, table.kernel, found, counter, out, alpha, table.bad)
        if not table.others:
            return out
        sums = torch.zeros_like(out)
    elif watched:
        sums = _call_registered(table, found, counter)
    else:
        sums = _sums_of_entries(table.entries, found, counter, table.n_out, table.dtype, table.device)
    _add_others(table, found, counter, sums, watched)
    table.bad.scatter_reduce_(0, table.owner, (~torch.isfinite(sums)).to(torch.int32), "amax")
    return out.add_(sums, alpha=alpha)


def _sums_of_entries(
    entries: Sequence[Entry],
    values: Mapping[int, Tensor],
    counter: Counter,
    n_out: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    out = torch.zeros(n_out, dtype=dtype, device=device)
    for e in entries:
        if e.tensor not in values:
            continue
        x = _product(values[e.tensor], counter, e.id, dtype).reshape(e.rows, e.channels, e.inner)
        if e.row_start != _ABSENT:
            out[e.row_start : e.row_start + e.rows] = x.sum((1, 2))
        if e.column_start != _ABSENT:
            out[e.column_start : e.column_start + e.channels] = x.sum((0, 2))
    return out


def _product(value: Tensor, counter: Counter, tensor: int, dtype: torch.dtype, watched: bool = False) -> Tensor:
    """``v * value``, or ``value * value`` without a counter, in the accumulation dtype."""
    x = value.detach().to(dtype)
    if counter is None:
        return x * x
    make = torch.ops.cpd_fast.rademacher if watched else reference
    return x * make(value.detach(), *counter, tensor)


def _add_others(
    table: ReduceTable, values: Mapping[int, Tensor], counter: Counter, sums: Tensor, watched: bool
) -> None:
    """Pieces that no kernel makes: those whose dims do not follow one another."""
    for i, dims, start in table.others:
        if i in values:
            product = _product(values[i], counter, table.ids[i], table.dtype, watched)
            rest = [d for d in range(product.dim()) if d not in dims]
            order = [sorted(dims).index(d) for d in dims]
            part = (product.sum(rest) if rest else product).permute(order).reshape(-1)
            sums[start : start + part.numel()] += part


# -------------------------------------------------------------------------------------------------------- registration


def _call_registered(table: ReduceTable, values: Mapping[int, Tensor], counter: Counter) -> Tensor:
    seed, probe = (None, 0) if counter is None else counter
    return torch.ops.cpd_fast.hutchinson_reduce(
        [values[i].detach() if i in values else None for i in range(len(table.expected))],
        [number for e in table.entries for number in e],
        table.n_out,
        table.dtype,
        table.device,
        seed,
        probe,
    )


def _op(
    values: Sequence[Tensor | None],
    entries: Sequence[int],
    n_out: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int | None,
    probe: int,
) -> Tensor:
    size = len(Entry._fields)
    found = {i: v for i, v in enumerate(values) if v is not None}
    counter = None if seed is None else (seed, probe)
    rows = [Entry(*entries[i : i + size]) for i in range(0, len(entries), size)]
    if (
        found
        and (chosen := _dispatch.choose("hutchinson_reduce", torch.empty(0, dtype=dtype, device=device))) != "reference"
    ):
        expected = {i: _Expected.of(v) for i, v in found.items()}
        table = EntryTable([e for e in rows if e.tensor in found], expected, len(values), device)
        out = torch.zeros(n_out, dtype=dtype, device=device)
        bad = torch.zeros(len(values), dtype=torch.int32, device=device)
        _probe_kernels.hutchinson_reduce(chosen, table, found, counter, out, 1.0, bad)
        return out
    return _sums_of_entries(rows, found, counter, n_out, dtype, device)


LIBRARY.define(
    "hutchinson_reduce(Tensor?[] values, int[] entries, int n_out, ScalarType dtype, Device device, int? seed, "
    "int probe) -> Tensor"
)
LIBRARY.impl("hutchinson_reduce", _op, "CompositeExplicitAutograd")


@torch.library.register_fake("cpd_fast::hutchinson_reduce", lib=LIBRARY)
def _fake(
    values: Sequence[Tensor | None],
    entries: Sequence[int],
    n_out: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int | None,
    probe: int,
) -> Tensor:
    return torch.empty(n_out, dtype=dtype, device=device)

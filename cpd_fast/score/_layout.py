"""Sums of per-parameter values over the slices of all channels, without a loop over channels.

Three levels. A *piece* is one (parameter, dims) pair: values summed over all other dims. A *cell* is one channel of one
slice: the sum of the piece's entries that the channel owns. A channel's score adds up its cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from cpd_fast.ops import ChannelTable, ReduceTable, channel_sums, hutchinson_reduce
from cpd_fast.types import ChannelGraph, CoupledGroup, ParamSlice


@dataclass(frozen=True)
class Run:
    """One slice and where its cells lie: ``cells[start : start + group.n_channels]``."""

    group: CoupledGroup
    slice: ParamSlice
    start: int
    elements: int  # parameters that each channel owns in this slice


@dataclass(frozen=True)
class _Piece:
    dims: tuple[int, ...]
    start: int
    size: int


class Layout:
    """Index tables of one graph for one set of parameters; made once, used every probe."""

    def __init__(self, graph: ChannelGraph, params: Mapping[str, Tensor]) -> None:
        self.graph = graph
        device = next(iter(params.values())).device if params else torch.device("cpu")
        self._pieces: dict[str, list[_Piece]] = {}
        self.runs: list[Run] = []
        starts: dict[tuple[str, tuple[int, ...]], int] = {}
        cells = total = 0
        gathers: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for g in graph.groups:
            for s in g.slices:
                if s.param not in params:
                    continue  # a buffer
                shape = params[s.param].shape
                key, size = (s.param, s.dims), prod(shape[d] for d in s.dims)
                if key not in starts:
                    starts[key] = total
                    self._pieces.setdefault(s.param, []).append(_Piece(s.dims, total, size))
                    total += size
                k = s.index.shape[1]
                self.runs.append(Run(g, s, cells, k * (params[s.param].numel() // max(size, 1))))
                gathers.setdefault(k, []).append((np.arange(cells, cells + g.n_channels), s.index + starts[key]))
                cells += g.n_channels
        self.n_pieces, self.n_cells, self.n_channels = total, cells, graph.n_channels
        self.device = device
        dtypes = [p.dtype for p in params.values()]
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self._gathers = [
            (
                torch.from_numpy(np.concatenate([c for c, _ in rows])).to(device),
                torch.from_numpy(np.concatenate([i for _, i in rows])).to(device),
            )
            for rows in gathers.values()
        ]
        self._bad = torch.zeros(total, dtype=torch.bool, device=device)
        number = {name: i for i, name in enumerate(params)}
        in_order = sorted((p.start, number[name], p.dims) for name, ps in self._pieces.items() for p in ps)
        self.table = ReduceTable([p.detach() for p in params.values()], [(i, dims) for _, i, dims in in_order])
        assert self.table.starts == [start for start, _, _ in in_order]
        self._names = list(params)
        self._channels = ChannelTable(
            self.n_channels,
            total,
            [(r.group.offset, r.slice.index + starts[r.slice.param, r.slice.dims]) for r in self.runs],
            device=device,
        )

    def reduce(self, values: Mapping[str, Tensor | None]) -> Tensor:
        """Sum every parameter's values over the dims outside each piece: ``(n_pieces,)``; absent values are zero.

        Entries that are not finite are remembered for :meth:`bad_parameter`; nothing is synchronised.
        """
        out = torch.zeros(self.n_pieces, dtype=self.dtype, device=self.device)
        for name in self._pieces:
            value = values.get(name)
            if value is not None:
                self.add(out, name, value.detach())
        self.note_bad(out)
        return out

    def empty(self, rows: int) -> Tensor:
        """Sums of nothing yet: ``(rows, n_pieces)``."""
        return torch.zeros(rows, self.n_pieces, dtype=self.dtype, device=self.device)

    def add(self, out: Tensor, name: str, value: Tensor, share: float = 1.0) -> None:
        """Add ``share`` times one parameter's values, summed to its pieces, to ``out``."""
        pieces = self._pieces[name]
        if value.dim() > 2 and all(max(p.dims) < 2 for p in pieces):
            value = value.flatten(2).sum(2, dtype=self.dtype)  # one pass over the large tensor serves all pieces
        for p in pieces:
            out[p.start : p.start + p.size].add_(_sum_to(value, p.dims, self.dtype), alpha=share)

    def note_bad(self, pieces: Tensor) -> None:
        """Remember entries that are not finite for :meth:`bad_parameter`."""
        self._bad |= ~torch.isfinite(pieces)

    def reduce_probe(
        self,
        values: Sequence[Tensor | None] | Mapping[int, Tensor | None],
        seed: int,
        probe: int,
        out: Tensor | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """:meth:`reduce` of values (by number of the parameter) times the signs of a probe, added to ``out``."""
        return hutchinson_reduce(self.table, values, seed, probe, out=out, alpha=share)

    def reduce_product(
        self, a: Mapping[str, Tensor], b: Mapping[str, Tensor | None], kept: Mapping[str, Tensor]
    ) -> Tensor:
        """:meth:`reduce` of ``a * b`` (times ``kept``, where there is one), in the accumulation dtype."""
        pairs = [(name, a[name].detach(), b.get(name)) for name in self._pieces if name in a]
        given = [(name, x, y.detach()) for name, x, y in pairs if y is not None]
        out = torch.zeros(self.n_pieces, dtype=self.dtype, device=self.device)
        # one buffer for all products: fresh memory for each costs more than the products
        room = out.new_empty(max((x.numel() for _, x, _ in given), default=0))
        for name, x, y in given:
            dense = torch.empty_like(x, device="meta").stride()
            product = room[: x.numel()].as_strided(x.shape, dense)
            torch.mul(x.to(self.dtype), y.to(self.dtype), out=product)
            if name in kept:
                product.mul_(kept[name])
            self.add(out, name, product)
        self.note_bad(out)
        return out

    def cells(self, pieces: Tensor) -> Tensor:
        """The sum that each channel owns of each slice: ``(n_cells,)`` from ``(n_pieces,)``."""
        out = torch.empty(self.n_cells, dtype=pieces.dtype, device=self.device)
        for where, index in self._gathers:
            out[where] = pieces[index[:, 0]] if index.shape[1] == 1 else pieces[index].sum(1)
        return out

    def channels(self, cells: Tensor) -> Tensor:
        """Add up the cells of every channel: ``(n_channels,)`` by global channel id."""
        out = torch.zeros(self.n_channels, dtype=cells.dtype, device=self.device)
        i = 0
        while i < len(self.runs):
            g, first, j = self.runs[i].group, self.runs[i].start, i
            while j < len(self.runs) and self.runs[j].group is g:
                j += 1
            n = g.n_channels
            out[g.offset : g.offset + n] = cells[first : first + (j - i) * n].view(j - i, n).sum(0)
            i = j
        return out

    def scaled_channels(self, pieces: Tensor, scale: Tensor) -> Tensor:
        """``channels(cells(pieces) * scale)`` in one go."""
        return channel_sums(self._channels, pieces, scale)

    def per_cell(self, value: Callable[[Run], float]) -> Tensor:
        """One number a slice, repeated for its cells: ``(n_cells,)``."""
        numbers = np.repeat([float(value(r)) for r in self.runs], [r.group.n_channels for r in self.runs])
        return torch.from_numpy(numbers).to(self.device, self.dtype)

    def mean_weights(self, chosen: Callable[[Run], bool]) -> Tensor:
        """Cell weights that average a group's chosen slices (all of them where none is chosen): ``(n_cells,)``."""
        count: dict[str, int] = {}
        for r in self.runs:
            count[r.group.name] = count.get(r.group.name, 0) + chosen(r)
        sizes = {r.group.name: len([q for q in self.runs if q.group is r.group]) for r in self.runs}

        def weight(r: Run) -> float:
            n = count[r.group.name]
            return float(chosen(r)) / n if n else 1 / sizes[r.group.name]

        return self.per_cell(weight)

    def bad_parameter(self) -> str | None:
        """Name of the first parameter whose values were not finite since the last call."""
        of_probes = self.table.bad.nonzero()
        self.table.bad.zero_()
        if len(of_probes):
            return self._names[int(of_probes[0])]
        bad, self._bad = self._bad, torch.zeros_like(self._bad)
        if not bool(bad.any()):
            return None
        at = int(bad.nonzero()[0])
        return next(n for n, ps in self._pieces.items() for p in ps if p.start <= at < p.start + p.size)


def _sum_to(value: Tensor, dims: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Sum over all dims but ``dims``; flattened in the order of ``dims``."""
    others = [d for d in range(value.dim()) if d not in dims]
    value = value.sum(others, dtype=dtype) if others else value.to(dtype)
    order = [sorted(dims).index(d) for d in dims]
    return value.permute(order).reshape(-1)

"""From sums over slices of parameters to channels of coupled groups: a segmented sum in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from cpd_fast.errors import ShapeError
from cpd_fast.ops import _dispatch, _probe_kernels


class ChannelTable:
    """Which entries of a vector each channel owns; made once, used every probe.

    A *cell* is one channel of one run (a slice of a coupled group): the sum of the ``k`` entries that the channel owns
    there. A channel is the sum of its cells, each times a factor of its own.

    Args:
        n_channels: Length of the result.
        n_in: Length of the vector that is summed.
        runs: ``(first channel, index)`` a run; ``index`` is int64 ``(channels, k)``, positions in the vector, and row i
            belongs to channel ``first + i``. Cells are numbered through all runs, in this order.
        device: Where the table lies.

    Attributes:
        n_cells: How many cells.
        csr: What kernels read, int64: where each channel's cells begin, which these are, where each cell's positions
            begin, the positions.
        flat: The same in one level: where each channel's positions begin, the positions, the cell of each.

    Raises:
        ShapeError: If a run names a channel or position that there is not.

    Example:
        >>> import numpy as np, torch
        >>> table = ChannelTable(2, 3, [(0, np.array([[0, 2], [1, 1]])), (1, np.array([[2]]))])
        >>> channel_sums(table, torch.tensor([1.0, 10.0, 100.0]))
        tensor([101., 120.])
    """

    def __init__(
        self,
        n_channels: int,
        n_in: int,
        runs: Sequence[tuple[int, np.ndarray]],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        for r, (first, index) in enumerate(runs):
            if index.ndim != 2:
                raise ShapeError(f"ChannelTable: run {r}: index must be (channels, k), got shape {index.shape}")
            if first < 0 or first + len(index) > n_channels:
                raise ShapeError(
                    f"ChannelTable: run {r} has channels {first} to {first + len(index) - 1}, expected 0 to "
                    f"{n_channels - 1}"
                )
            if index.size and not (index.min() >= 0 and index.max() < n_in):
                raise ShapeError(
                    f"ChannelTable: run {r} has positions {index.min()} to {index.max()}, expected 0 to {n_in - 1}"
                )
        self.n_channels, self.n_in, self.device = n_channels, n_in, torch.device(device)
        counts = [len(index) for _, index in runs]
        self._starts = [0, *accumulate(counts)]
        self.n_cells = self._starts[-1]
        channel_starts, cell_ids, cell_starts, positions = _csr(n_channels, runs)
        self.csr = tuple(x.to(self.device) for x in (channel_starts, cell_ids, cell_starts, positions))
        sizes = cell_starts.diff()[cell_ids]
        cells = torch.repeat_interleave(cell_ids, sizes)
        offsets = torch.arange(len(cells)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])[channel_starts]
        flat = (starts, positions[cell_starts[cells] + offsets], cells)
        self.flat = tuple(x.to(self.device) for x in flat)
        self._runs = [(first, torch.from_numpy(own).to(self.device, torch.int64)) for first, own in runs]

    def cells(self, vector: Tensor) -> Tensor:
        """The sum that each channel owns of each run, ``(n_cells,)``, in plain PyTorch."""
        parts = [vector[index].sum(1) for _, index in self._runs]
        return torch.cat([vector.new_zeros(0), *parts])


def _csr(n_channels: int, runs: Sequence[tuple[int, np.ndarray]]) -> tuple[Tensor, ...]:
    nothing = np.zeros(0, np.int64)
    owner = np.concatenate([nothing, *(np.arange(first, first + len(index)) for first, index in runs)])
    sizes = np.concatenate([nothing, *(np.full(len(index), index.shape[1]) for _, index in runs)])
    counts = np.bincount(owner, minlength=n_channels)
    tables = (
        np.concatenate([[0], np.cumsum(counts)]),
        np.argsort(owner, kind="stable"),
        np.concatenate([[0], np.cumsum(sizes)]),
        np.concatenate([nothing, *(index.reshape(-1) for _, index in runs)]),
    )
    return tuple(torch.from_numpy(np.ascontiguousarray(t, dtype=np.int64)) for t in tables)


def channel_sums(
    table: ChannelTable, vector: Tensor, scale: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``sum over the cells of a channel of scale[cell] * sum of the entries of the cell``.

    Args:
        table: Who owns what.
        vector: ``(table.n_in,)``, fp32 or fp64.
        scale: One factor a cell, ``(table.n_cells,)``, in the vector's dtype; None: ones.
        backend: As for :func:`cpd_fast.ops.rademacher`.

    Returns:
        ``(table.n_channels,)`` in the vector's dtype; 0 for channels that own nothing. The order of additions is that
        of the table.

    Raises:
        ShapeError: If a shape, dtype or device does not fit the table.
    """
    for name, x, n in (("vector", vector, table.n_in), ("scale", scale, table.n_cells)):
        if x is None:
            continue
        if x.shape != (n,) or x.dtype != vector.dtype or x.dtype not in (torch.float32, torch.float64):
            raise ShapeError(
                f"channel_sums: {name} must be ({n},) in fp32 or fp64, that of the vector; got {tuple(x.shape)} "
                f"{x.dtype}"
            )
        if x.device != table.device:
            raise ShapeError(f"channel_sums: {name} must be on the table's device {table.device}, got {x.device}")
    chosen = _dispatch.choose("channel_sums", vector, backend)
    watched = backend is None and _dispatch.is_watched(vector)
    if chosen == "reference" or watched:
        return _reference(table, vector, scale)
    return _probe_kernels.channel_sums(chosen, table, vector, scale)


def _reference(table: ChannelTable, vector: Tensor, scale: Tensor | None) -> Tensor:
    """The sums in plain PyTorch."""
    cells = table.cells(vector)
    if scale is not None:
        cells = cells * scale
    out = vector.new_zeros(table.n_channels)
    for (first, index), start in zip(table._runs, table._starts, strict=False):
        out[first : first + len(index)] += cells[start : start + len(index)]
    return out

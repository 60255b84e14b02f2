"""Elements of a tensor that a plan keeps: taken out, and put back, with gradients both ways."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cpd_fast.ops.elements import Elements, is_channels_last


class Kept(Protocol):
    """What a compaction knows of one tensor; see :class:`cpd_fast.compact.shrink.Kept`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What remains."""
        ...

    @property
    def dims(self) -> dict[int, np.ndarray]:
        """Kept indices by dim."""
        ...

    @property
    def grid(self) -> np.ndarray | None:
        """What remains, over leading dims."""
        ...


class Pick:
    """Some elements of tensors of one shape: the product of index lists, or a grid over the leading dims.

    Args:
        full: Shape of the tensors.
        kept: Which elements.
    """

    def __init__(self, full: tuple[int, ...], kept: Kept) -> None:
        self.full, self.shape = tuple(full), tuple(kept.shape)
        self._grid = kept.grid
        self._lead = 0 if kept.grid is None else kept.grid.ndim  # dims of a grid, which are seen as one
        if kept.grid is None:
            self._elements = Elements(self.full, {d: torch.from_numpy(i) for d, i in kept.dims.items()})
        else:
            rows = torch.from_numpy(np.flatnonzero(kept.grid))
            self._elements = Elements((kept.grid.size, *self.full[self._lead :]), {0: rows})

    def take(self, t: Tensor) -> Tensor:
        """The elements, differentiable, contiguous in the memory format of ``t``: ``shape``."""
        if not self._lead:
            return self._elements.take(t)
        rows = self._elements.take(t.reshape(self._elements.full))
        return _in_layout(rows.reshape(self.shape), is_channels_last(t))

    def put(self, values: Tensor, channels_last: bool) -> Tensor:
        """The elements in a tensor of the full shape that is 0 elsewhere."""
        if not self._lead:
            return self._elements.put(values, channels_last)
        out = self._elements.put(values.reshape(self._elements.shape)).reshape(self.full)
        return _in_layout(out, channels_last)

    def write(self, t: Tensor, values: Tensor | float) -> None:
        """Overwrite the elements of ``t``, in place."""
        if isinstance(values, (int, float)):
            values = t.new_full((), values).expand(self.shape)
        if not self._lead:
            self._elements.write(t, values)
        elif t.is_contiguous():
            self._elements.write(t.view(self._elements.full), values.reshape(self._elements.shape))
        else:
            mask = torch.from_numpy(self._grid).to(t.device)
            t[mask] = values.to(t.dtype).reshape(-1, *self.full[self._lead :])


def complement(full: tuple[int, ...], kept: Kept) -> list[Pick]:
    """Picks of all elements that ``kept`` leaves out, each once."""
    if kept.grid is not None:
        gone = ~kept.grid
        return [Pick(full, Part((int(gone.sum()), *full[gone.ndim :]), {}, gone))]
    parts, before = [], {}
    for d, index in sorted(kept.dims.items()):
        gone = np.delete(np.arange(full[d]), index)
        dims = {**before, d: gone}
        if len(gone):
            parts.append(Pick(full, Part(tuple(len(dims[e]) if e in dims else s for e, s in enumerate(full)), dims)))
        before[d] = index
    return parts


class Part:
    """Index lists by dim, or a grid over the leading dims; see :class:`Kept`."""

    def __init__(self, shape: tuple[int, ...], dims: dict[int, np.ndarray], grid: np.ndarray | None = None) -> None:
        self.shape, self.dims, self.grid = shape, dims, grid


def _in_layout(t: Tensor, channels_last: bool) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if channels_last and t.dim() == 4 else t

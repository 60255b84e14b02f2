"""Cut tensors down to their surviving elements."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpd_fast.types import TensorMap

Cut = Callable[[Tensor], Tensor]


def make_cut(tensor: TensorMap, alive: np.ndarray) -> Cut | None:
    """A function that removes the dead elements of a tensor of this shape (and of its gradient, its momentum ...).

    Args:
        tensor: Channel maps of the tensor.
        alive: Which channels survive, as ``ChannelGraph.alive`` gives it.

    Returns:
        The cut, or None where everything survives. Memory format and dtype are kept.
    """
    left = what_is_left(tensor, alive)
    if left is None:
        return None
    if left.grid is None:
        indices = {dim: torch.from_numpy(i) for dim, i in left.dims.items()}

        def cut(t: Tensor) -> Tensor:
            out = t
            for dim, index in indices.items():
                out = out.index_select(dim, index.to(t.device))
            return _like(t, out)

        return cut
    mask = torch.from_numpy(left.grid)

    def cut_grid(t: Tensor) -> Tensor:
        return _like(t, t[mask.to(t.device)].reshape(left.shape))

    return cut_grid


class Kept(NamedTuple):
    """The elements of a tensor that a plan keeps.

    Attributes:
        shape: What remains.
        dims: Kept indices by dim, int64 and sorted, where the elements are a product of such lists.
        grid: Which elements remain, over the leading dims that matter, where they are not; None otherwise.
    """

    shape: tuple[int, ...]
    dims: dict[int, np.ndarray]
    grid: np.ndarray | None


def what_is_left(
    tensor: TensorMap, alive: np.ndarray, lines: dict[int, np.ndarray | None] | None = None
) -> Kept | None:
    """Which elements of a tensor survive; None where all do.

    Args:
        tensor: Channel maps of the tensor.
        alive: Which channels survive.
        lines: What was found for maps along one dim, by ``id``: tensors share them. Filled here.
    """
    lines = {} if lines is None else lines
    kept: dict[int, np.ndarray] = {}
    maps = []
    for m in tensor.maps:
        if m.shape and m.size not in m.shape:
            if not alive[m].all():
                maps.append(m)
            continue
        if id(m) not in lines:
            index = alive[m.reshape(-1)].nonzero()[0]
            lines[id(m)] = None if len(index) == m.size else index
        found = lines[id(m)]
        if found is not None:
            maps.append(m)
            dim = m.shape.index(m.size)
            kept[dim] = np.intersect1d(kept[dim], found) if dim in kept else found
    if not maps:
        return None
    if len(maps) == len(kept) or all(max(m.shape, default=1) == m.size for m in maps):
        return Kept(tuple(len(kept[d]) if d in kept else s for d, s in enumerate(tensor.shape)), kept, None)
    lead = 1 + max(d for m in maps for d, size in enumerate(m.shape) if size > 1)
    grid = np.ones(tensor.shape[:lead], bool)
    for m in maps:
        grid &= alive[m.reshape(m.shape[:lead])]
    return Kept((*box_shape(grid), *tensor.shape[lead:]), {}, grid)


def kept_shape(tensor: TensorMap, alive: np.ndarray) -> tuple[int, ...]:
    """The shape that the surviving elements of a tensor have."""
    keep = np.ones((1,) * len(tensor.shape), bool)
    for m in tensor.maps:
        keep = keep & alive[m]
    return tuple(box_shape(keep, tensor.shape))


def box_shape(keep: np.ndarray, full: tuple[int, ...] | None = None) -> list[int]:
    """Shape of what remains: rows may keep different columns along one dim, but equally many.

    Args:
        keep: What remains, of a tensor or of the dims that matter (size 1 on the others).
        full: Shape of the tensor that ``keep`` broadcasts to.

    Raises:
        ValueError: If what remains is no box.
    """
    for fast in reversed(range(keep.ndim)):
        counts = keep.sum(fast)
        rows = counts > 0
        left = counts[rows]
        if not left.size or (left != left[0]).any():
            continue
        axes = range(rows.ndim)
        shape = [int(rows.any(tuple(a for a in axes if a != d)).sum()) for d in axes]
        if int(np.prod(shape)) == int(rows.sum()):
            box = [*shape[:fast], int(left[0]), *shape[fast:]]
            return box if full is None else [f if k == 1 else b for b, k, f in zip(box, keep.shape, full, strict=True)]
    raise ValueError(f"{int(keep.sum())} of {keep.size} elements remain, which is not a box")


def left_shape(shape: tuple[int, ...], maps: tuple[np.ndarray, ...], alive: np.ndarray) -> list[int]:
    """Shape of what remains of a tensor with these channel maps."""
    dims = [[d for d, s in enumerate(m.shape) if s > 1] for m in maps]
    flat = [d for ds in dims for d in ds]
    if any(len(ds) != 1 for ds in dims) or len(set(flat)) < len(flat):
        return box_shape(functools.reduce(np.logical_and, (alive[m] for m in maps)), shape)
    new = list(shape)
    for (d,), m in zip(dims, maps, strict=True):
        new[d] = int(np.count_nonzero(alive[m]))
    return new


def _like(old: Tensor, new: Tensor) -> Tensor:
    """``new`` contiguous, in the memory format of ``old``."""
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if old.dim() == rank and old.is_contiguous(memory_format=layout) and not old.is_contiguous():
            return new.contiguous(memory_format=layout)
    return new.contiguous()

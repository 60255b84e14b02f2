"""Cut tensors down to their surviving elements."""

from __future__ import annotations

import functools
from collections.abc import Callable

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
    maps = [m for m in tensor.maps if not alive[m].all()]
    if not maps:
        return None
    if all(sum(s > 1 for s in m.shape) <= 1 for m in maps):
        kept = {}
        for m in maps:
            dim = int(np.argmax(m.shape))
            index = np.flatnonzero(alive[m.reshape(-1)])
            kept[dim] = np.intersect1d(kept[dim], index) if dim in kept else index
        indices = {dim: torch.from_numpy(np.ascontiguousarray(i)) for dim, i in kept.items()}

        def cut(t: Tensor) -> Tensor:
            out = t
            for dim, index in indices.items():
                out = out.index_select(dim, index.to(t.device))
            return _like(t, out)

        return cut
    keep = np.ones(tensor.shape, bool)
    for m in maps:
        keep &= alive[m]
    shape = box_shape(keep)
    mask = torch.from_numpy(keep)

    def cut_grid(t: Tensor) -> Tensor:
        return _like(t, t[mask.to(t.device)].reshape(shape))

    return cut_grid


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

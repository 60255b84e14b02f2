"""Elements of a tensor that a plan keeps: taken out, and put back, with gradients both ways."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


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
        self._dims = [(d, torch.from_numpy(i)) for d, i in sorted(kept.dims.items())]
        self._grid = kept.grid
        self._flat: Tensor | None = None

    def take(self, t: Tensor) -> Tensor:
        """The elements, differentiable, contiguous in the memory format of ``t``: ``shape``."""
        if torch._C._are_functorch_transforms_active() or not (t.requires_grad and torch.is_grad_enabled()):
            return self._take(t)
        out: Tensor = _Take.apply(t, self)
        return out

    def _take(self, t: Tensor) -> Tensor:
        if self._grid is not None:
            lead = self._grid.ndim
            rows = t.reshape(-1, *t.shape[lead:]).index_select(0, self._positions(t.device, lead))
            return _in_layout(rows.reshape(self.shape), _is_channels_last(t))
        order = _order(t)
        out = t.permute(order)
        for d, index in self._on(t.device):
            out = out.index_select(order.index(d), index)
        return out.permute(_inverse(order))

    def put(self, values: Tensor, channels_last: bool) -> Tensor:
        """The elements in a tensor of the full shape that is 0 elsewhere."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty(self.full, dtype=values.dtype, device=values.device, memory_format=layout).zero_()
        self.write(out, values)
        return out

    def write(self, t: Tensor, values: Tensor | float) -> None:
        """Overwrite the elements of ``t``, in place."""
        lead = self._grid.ndim if self._grid is not None else 1 + max(d for d, _ in self._dims)
        if isinstance(values, (int, float)):
            values = t.new_full((), values).expand(self.shape)
        values = values.to(t.dtype)
        if self._grid is None and len(self._dims) == 1:
            d, index = self._on(t.device)[0]
            t.index_copy_(d, index, values)
        elif t.is_contiguous():
            rows = t.view(-1, *self.full[lead:])
            rows.index_copy_(0, self._positions(t.device, lead), values.reshape(-1, *self.full[lead:]))
        elif self._grid is not None:
            mask = torch.from_numpy(self._grid).to(t.device)
            t[mask] = values.reshape(-1, *self.full[lead:])
        else:
            order = _order(t)
            _overwrite(
                t.permute(order), [(order.index(d), index) for d, index in self._on(t.device)], values.permute(order)
            )

    def _on(self, device: torch.device) -> list[tuple[int, Tensor]]:
        if self._dims and self._dims[0][1].device != device:
            self._dims = [(d, i.to(device)) for d, i in self._dims]
        return self._dims

    def _positions(self, device: torch.device, lead: int) -> Tensor:
        """Row-major positions over the leading dims; made when a gradient first needs them."""
        if self._flat is None:
            if self._grid is not None:
                self._flat = torch.from_numpy(np.flatnonzero(self._grid))
            else:
                flat = torch.zeros((), dtype=torch.int64)
                lists = dict(self._dims)
                for d in range(lead):
                    index = lists[d].cpu() if d in lists else torch.arange(self.full[d])
                    flat = (flat[..., None] * self.full[d] + index).reshape(*flat.shape, -1)
                self._flat = flat.reshape(-1)
        if self._flat.device != device:
            self._flat = self._flat.to(device)
        return self._flat


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, pick: Pick) -> Tensor:
        ctx.pick, ctx.channels_last = pick, _is_channels_last(t)
        return pick._take(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Put.apply(grads[0], ctx.pick, ctx.channels_last), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, pick: Pick, channels_last: bool) -> Tensor:
        ctx.pick = pick
        return pick.put(values, channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.pick.take(grads[0]), None, None


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


def _overwrite(t: Tensor, where: list[tuple[int, Tensor]], values: Tensor) -> None:
    """Write the product of index lists dim by dim: slices are read, changed, and written back."""
    (d, index), rest = where[0], where[1:]
    if rest:
        inner = t.index_select(d, index)
        _overwrite(inner, rest, values)
        values = inner
    t.index_copy_(d, index, values)


def _is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _order(t: Tensor) -> tuple[int, ...]:
    """Dims by stride, so that the permuted tensor is contiguous."""
    return (0, 2, 3, 1) if _is_channels_last(t) else tuple(range(t.dim()))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(order))


def _in_layout(t: Tensor, channels_last: bool) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if channels_last and t.dim() == 4 else t

"""Elements of a tensor named by index lists along its dims: taken out, written back, or put among zeros.

On the CPU one native pass moves them, rows and columns at once; elsewhere, and where tensors are watched, it is a chain
of ``index_select``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cpd_fast.ops import _dispatch

_TAKE, _WRITE, _PUT = 0, 1, 2


class Elements:
    """The elements of tensors of one shape that lie in the product of index lists.

    Args:
        full: Shape of the tensors.
        lists: Increasing indices by dim, int64.

    Attributes:
        full: Shape of the tensors.
        shape: Shape of what is taken out.

    Example:
        >>> some = Elements((2, 3), {0: torch.tensor([1]), 1: torch.tensor([0, 2])})
        >>> some.take(torch.arange(6).reshape(2, 3)).tolist(), some.put(torch.ones(1, 2)).tolist()
        ([[3, 5]], [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    """

    def __init__(self, full: tuple[int, ...], lists: Mapping[int, Tensor]) -> None:
        self.full = tuple(full)
        self.shape = tuple(len(lists[d]) if d in lists else size for d, size in enumerate(full))
        self._lists = {d: lists[d].contiguous() for d in sorted(lists)}
        self._native = None if isinstance(_dispatch._native(), str) else _dispatch._native()
        self._moves: dict[bool, Any] = {}  # by "channels last": lists and sizes as the native pass takes them

    def take(self, t: Tensor) -> Tensor:
        """The elements, differentiable, contiguous in the memory format of ``t``."""
        if _is_differentiated(t):
            taken: Tensor = _Take.apply(t, self)
            return taken
        last = is_channels_last(t)
        if self._can_move(t, last):
            part = torch.empty(self.shape, dtype=t.dtype, memory_format=_layout(last))
            self._move(_TAKE, t, part, last)
            return part
        order = _order(t.dim(), last)
        out = t.permute(order)
        for d, index in self._on(t.device).items():
            out = out.index_select(order.index(d), index)
        return out.permute(_inverse(order))

    def put(self, values: Tensor, channels_last: bool = False) -> Tensor:
        """``values`` at the elements of a tensor that is 0 elsewhere, differentiable."""
        if _is_differentiated(values):
            spread: Tensor = _Put.apply(values, self, channels_last)
            return spread
        out = torch.empty(self.full, dtype=values.dtype, device=values.device, memory_format=_layout(channels_last))
        if self._can_move(values, channels_last, whole=out):
            self._move(_PUT, out, values.contiguous(memory_format=_layout(channels_last)), channels_last)
        else:
            self.write(out.zero_(), values)
        return out

    def write(self, t: Tensor, values: Tensor) -> None:
        """Overwrite the elements of ``t``, in place."""
        last = is_channels_last(t)
        values = values.to(t.device, t.dtype)
        if self._can_move(values, last, whole=t):
            self._move(_WRITE, t, values.contiguous(memory_format=_layout(last)), last)
            torch.autograd.graph.increment_version(t)
            return
        order = _order(t.dim(), last)
        where = [(order.index(d), index) for d, index in self._on(t.device).items()]
        _overwrite(t.permute(order), where, values.permute(order))

    def _on(self, device: torch.device) -> dict[int, Tensor]:
        if any(index.device != device for index in self._lists.values()):
            self._lists = {d: index.to(device) for d, index in self._lists.items()}
            self._moves = {}
        return self._lists

    # ------------------------------------------------------------------------------------------------- native pass
    def _can_move(self, t: Tensor, last: bool, whole: Tensor | None = None) -> bool:
        """Whether the native pass runs: for plain memory, and for rows and columns at most."""
        if self._native is None or t.device.type != "cpu" or _dispatch.is_watched(t) or t.is_conj() or t.is_neg():
            return False
        whole = t if whole is None else whole
        if not (last or whole.is_contiguous()) or torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        if last not in self._moves:
            self._moves[last] = self._sizes(_order(len(self.full), last))
        return self._moves[last] is not None

    def _sizes(self, order: tuple[int, ...]) -> tuple[list[int], list[int]] | None:
        """Addresses of the lists of rows and columns, 0 for all; and their lengths and the sizes around them."""
        self._on(torch.device("cpu"))
        found = {order.index(d): index for d, index in self._lists.items()}
        sizes, at = [self.full[d] for d in order], max(found)
        rows, columns = found.pop(0, None), found.pop(at, None)
        if found or not all(self.shape):
            return None
        if rows is None:
            sizes, at = [math.prod(sizes[:at]), *sizes[at:]], 1
        at = max(at, 1)
        around = [sizes[0], math.prod(sizes[1:at]), *(sizes[at : at + 1] or [1]), math.prod(sizes[at + 1 :])]
        counts = [around[0] if rows is None else len(rows), around[2] if columns is None else len(columns)]
        return [0 if i is None else i.data_ptr() for i in (rows, columns)], [*counts, *around]

    def _move(self, what: int, whole: Tensor, part: Tensor, last: bool) -> None:
        lists, sizes = self._moves[last]
        self._native.elements(  # type: ignore[union-attr]
            what, (whole.data_ptr(), part.data_ptr(), *lists), (*sizes, whole.element_size()), torch.get_num_threads()
        )


def _is_differentiated(t: Tensor) -> bool:
    """Whether a gradient is to be taken; torch.func finds it in what is differentiable by itself."""
    return t.requires_grad and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, elements: Elements) -> Tensor:
        ctx.elements, ctx.channels_last = elements, is_channels_last(t)
        return elements.take(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.elements.put(grads[0], ctx.channels_last), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, elements: Elements, channels_last: bool) -> Tensor:
        ctx.elements = elements
        return elements.put(values, channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.elements.take(grads[0]), None, None


@functools.lru_cache(maxsize=4096)
def elements_of(full: tuple[int, ...], lists: tuple[tuple[int, tuple[int, ...]], ...]) -> Elements:
    """The same object for the same elements; ``lists`` are pairs of a dim and its indices."""
    return Elements(full, {d: torch.tensor(indices, dtype=torch.int64) for d, indices in lists})


def is_channels_last(t: Tensor) -> bool:
    """Whether a tensor is channels-last and not contiguous as well."""
    return t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _layout(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def _order(rank: int, last: bool) -> tuple[int, ...]:
    """Dims by stride, so that the permuted tensor is contiguous."""
    return (0, 2, 3, 1) if last else tuple(range(rank))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(d) for d in range(len(order)))


def _overwrite(t: Tensor, where: list[tuple[int, Tensor]], values: Tensor) -> None:
    """Write the product of index lists dim by dim: slices are read, changed, and written back."""
    (d, index), rest = where[0], where[1:]
    if rest:
        inner = t.index_select(d, index)
        _overwrite(inner, rest, values)
        values = inner
    t.index_copy_(d, index, values)

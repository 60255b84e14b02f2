"""Planes: how the labels of a tensor follow its dims through meets and reshapes.

A tensor carries a short list of planes. A plane is an integer array with the tensor's number of dims, of size 1 on the
dims it does not vary over: a conv output (N, C, H, W) has one plane of shape (1, C, 1, 1), a weight (O, I, k, k) two.
Shape ops act on a plane as they act on the tensor. A plane that varies over several dims is a *grid* (heads x head
dims, conv groups x channels): what remains of it must be a box, whose rows may keep different columns only along the
``fast`` dim, the one that runs fastest in the axis the grid was split from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np

from cpd_fast.comb.labels import LabelStore


@dataclass(frozen=True, eq=False)
class Plane:
    """Labels that broadcast to a tensor; ``fast`` is the only dim along which rows may differ in what they keep.

    ``zero``: in a masked forward the tensor is 0 wherever the channel is removed. Unknown means False. ``stays``: rows
    of a grid, which never go; they say nothing where another plane runs over the same dim.
    """

    labels: np.ndarray
    fast: int
    zero: bool = False
    stays: bool = False

    def moved(self, labels: np.ndarray, fast: int) -> Plane:
        """The plane of a tensor of the same values elsewhere."""
        return Plane(labels, fast, self.zero, self.stays)

    def where_zero(self, zero: bool) -> Plane:
        """The same plane, with what is known of the tensor at removed channels."""
        return self if self.zero == zero else Plane(self.labels, self.fast, zero, self.stays)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """The dims that the labels vary over."""
        return tuple(d for d, s in enumerate(self.labels.shape) if s > 1)

    @property
    def rows(self) -> tuple[int, ...]:
        """The varying dims other than ``fast``."""
        return tuple(d for d in self.dims if d != self.fast)


@dataclass(frozen=True, eq=False)
class State:
    """What the trace knows of one tensor.

    Attributes:
        planes: Its planes, over disjoint sets of dims or nested grids.
        constant: Dims along which the tensor is constant and made by the forward (zeros, expand): they meet anything.
        source: Name of the parameter or buffer that it is a view of.
        scaled_by: Parameters whose scaling scales the tensor (weight and bias of the linear or norm it comes from).
        identity: Name of the ``nn.Identity`` that just returned it.
    """

    planes: tuple[Plane, ...] = ()
    constant: frozenset[int] = frozenset()
    source: str | None = None
    scaled_by: tuple[str, ...] = ()
    identity: str | None = None

    def with_planes(self, planes: list[Plane] | tuple[Plane, ...], constant: frozenset[int] = frozenset()) -> State:
        """The same origin seen through a shape op."""
        return State(tuple(planes), constant, self.source, self.scaled_by)


def constant_state(ndim: int) -> State:
    """A tensor of equal values."""
    return State(constant=frozenset(range(ndim)))


def orbit(store: LabelStore, plane: Plane, dims: tuple[int, ...]) -> Plane:
    """Unite along ``dims``: whatever goes in one row goes in all of them."""
    labels = plane.labels
    for d in dims:
        store.unite(labels, labels.take([0], d))
    return plane


def collapse(store: LabelStore, plane: Plane) -> np.ndarray:
    """Unite each row of a grid into one label; returns the labels with size 1 on the fast dim."""
    store.unite(plane.labels, plane.labels.take([0], plane.fast))
    return plane.labels.take([0], plane.fast)


def meet(
    store: LabelStore,
    states: list[State],
    shapes: list[tuple[int, ...]],
    out: tuple[int, ...],
    heads: bool = False,
    zero: str = "",
) -> State:
    """Elementwise meeting of broadcast operands: labels at equal positions of equal dims are united.

    ``heads`` decides what a row of a grid is that meets something smaller: a channel of its own, or fixed. ``zero``
    says when the result is 0 at removed channels: where ``any`` operand is (a product), where ``all`` are (a sum),
    where the ``first`` is, or (by default) never for all that is known.
    """
    ndim = len(out)
    labelled: list[Plane] = []
    free: set[int] = set()
    constant = set(range(ndim))
    operands: list[list[Plane]] = []
    for state, shape in zip(states, shapes, strict=True):
        shift = ndim - len(shape)
        mine = list(state.planes)
        if shift:
            mine = [p.moved(p.labels.reshape((1,) * shift + p.labels.shape), p.fast + shift) for p in mine]
        labelled += mine
        operands.append(mine)
        varying = {d for p in mine for d in p.dims}
        for d, size in enumerate(shape, shift):
            if size > 1 and d - shift not in state.constant:
                constant.discard(d)
                if d not in varying:
                    free.add(d)
    met: list[Plane] = []
    for plane in labelled:
        touched = free.intersection(plane.dims)
        if heads and plane.rows and touched == {plane.fast}:  # whole rows may still go
            collapse(store, plane)
            met = _add_plane(store, met, plane, heads)
        elif touched:
            store.freeze(plane.labels, f"meets a dim that carries no channels (tokens, space, batch) ({store.where()})")
        elif plane.dims:
            met = _add_plane(store, met, plane, heads)
    judge = _JUDGES.get(zero)
    met = [p.where_zero(judge is not None and judge(_is_zero(p, planes) for planes in operands)) for p in met]
    return State(tuple(met), frozenset(d for d in constant if out[d] > 1))


_JUDGES: dict[str, Callable[[Iterable[bool]], bool]] = {
    "any": any,
    "all": all,
    "first": lambda facts: next(iter(facts)),
}


def _is_zero(plane: Plane, planes: list[Plane]) -> bool:
    """Whether a tensor with ``planes`` is 0 wherever channels of ``plane`` are removed."""
    return any(q.zero and (q.dims == plane.dims or set(plane.dims) <= set(q.dims)) for q in planes)


def _add_plane(store: LabelStore, planes: list[Plane], new: Plane, heads: bool) -> list[Plane]:
    """Unite ``new`` with the planes it overlaps; returns the planes of the joint tensor."""
    if not planes:
        return [new]
    kept: list[Plane] = []
    for old in planes:
        a, b = set(old.dims), set(new.dims)
        if not a & b:
            kept.append(old)
        elif a == b and old.stays != new.stays and _beside_rows(store, old, new):
            new = new if old.stays else old
        elif a == b and old.fast == new.fast:
            store.unite(old.labels, new.labels)
            new = old
        elif a < b or b < a:
            big, small = (new, old) if a < b else (old, new)
            if heads and small.dims == (big.fast,):  # rotary tables, norms over head dims
                store.freeze(small.labels, f"runs over head dims, which granularity='head' keeps ({store.where()})")
                collapse(store, big)
                new = big
            elif big.fast in small.dims:
                missing = tuple(d for d in big.dims if d not in small.dims)
                orbit(store, big, missing)
                store.unite(small.labels, big.labels)
                new = big
            elif heads:
                rows = collapse(store, big)
                missing = tuple(d for d in big.rows if d not in small.dims)
                orbit(store, Plane(rows, big.fast), missing)
                store.unite(small.labels, rows)
                new = small if set(small.dims) == set(big.rows) else Plane(rows, big.rows[-1])
            else:  # rows of a grid stay: what runs over them stays too
                store.freeze(small.labels, "runs over attention heads, which this graph keeps (granularity='dim')")
                new = big
        else:
            store.freeze(old.labels, "two grids cross")
            store.freeze(new.labels, "two grids cross")
            kept.append(old)
    return [*kept, new]


def _beside_rows(store: LabelStore, a: Plane, b: Plane) -> bool:
    """Channels meet what each of their rows has one of (a statistic of a norm group, expanded over the group).

    Rows stay, and keep equally many channels each; False where the channels do not lie in equal runs, one a row.
    """
    rows, plane = (a, b) if a.stays else (b, a)
    if len(plane.dims) > 1:
        return False
    flat = rows.labels.reshape(-1)
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    run = len(flat) // len(starts)
    if run == 1 or (starts != np.arange(0, len(flat), run)).any():
        return False
    if len(starts) > 1:
        store.grid(plane.labels.reshape(len(starts), run), whole_rows=False)
    return True


def reshape(store: LabelStore, state: State, old: tuple[int, ...], new: tuple[int, ...]) -> State:
    """A view or reshape from shape ``old`` to ``new``."""
    if old == new:
        return state.with_planes(state.planes, state.constant)
    blocks = _match_dims(old, new)
    if blocks is None:
        for p in state.planes:
            store.freeze(
                p.labels,
                f"a reshape mixes this axis with others in a way that has no channel structure ({store.where()})",
            )
        return state.with_planes(())
    constant = {
        o for ins, outs in blocks for o in outs if new[o] > 1 and all(old[i] == 1 or i in state.constant for i in ins)
    }
    planes = [_reshape_plane(store, p, old, new, blocks) for p in state.planes]
    said = {d for p in planes if not p.stays for d in p.dims}
    planes = [p for p in planes if p.dims and not (p.stays and said.intersection(p.dims))]
    return state.with_planes(planes, frozenset(constant))


def _match_dims(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Smallest runs of old and new dims with equal products."""
    if prod(old) != prod(new) or 0 in old:
        return None
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        ins, outs, a, b = [], [], 1, 1
        if i < len(old):
            ins, a, i = [i], old[i], i + 1
        if j < len(new):
            outs, b, j = [j], new[j], j + 1
        while a != b:
            if a < b:
                if i >= len(old):
                    return None
                ins, a, i = [*ins, i], a * old[i], i + 1
            else:
                if j >= len(new):
                    return None
                outs, b, j = [*outs, j], b * new[j], j + 1
        blocks.append((ins, outs))
    return blocks


def _line(plane: Plane, new: tuple[int, ...], blocks: list[tuple[list[int], list[int]]]) -> Plane | None:
    """A plane over one dim that the reshape only moves; None where it splits, merges or repeats it."""
    (dim,) = plane.dims
    outs = next(outs for ins, outs in blocks if dim in ins)
    size = plane.labels.size
    to = [o for o in outs if new[o] > 1]
    flat = plane.labels.reshape(-1)
    if plane.fast != dim or len(to) != 1 or new[to[0]] != size or flat[0] == flat[-1]:
        return None
    return plane.moved(flat.reshape([size if o == to[0] else 1 for o in range(len(new))]), to[0])


def _reshape_plane(
    store: LabelStore,
    plane: Plane,
    old: tuple[int, ...],
    new: tuple[int, ...],
    blocks: list[tuple[list[int], list[int]]],
) -> Plane:
    if len(plane.dims) == 1 and (kept := _line(plane, new, blocks)) is not None:
        return kept
    labels, fast, out_shape = plane.labels, None, []
    for ins, outs in blocks:
        varying = [d for d in ins if labels.shape[d] > 1]
        if not varying:
            out_shape += [1] * len(outs)
            continue
        if plane.fast in varying and varying[-1] != plane.fast:
            # flattened with the fast dim not innermost (channel shuffle): rows must lose the same columns
            orbit(store, plane, plane.rows)
        full = [old[d] if d in ins else s for d, s in enumerate(labels.shape)]
        labels = np.broadcast_to(labels, full)
        out_shape += [new[o] for o in outs]
        if plane.fast in varying:
            fast = outs
    labels = np.ascontiguousarray(labels).reshape(out_shape)
    for d in range(labels.ndim):
        if labels.shape[d] > 1 and (labels == labels.take([0], d)).all():
            labels = labels.take([0], d)
    dims = [d for d, s in enumerate(labels.shape) if s > 1]
    inner = [d for d in (fast or []) if d in dims]
    result = plane.moved(labels, inner[-1] if inner else dims[-1] if dims else 0)
    if len(dims) > 1:
        record_grid(store, result)
    return result


def record_grid(store: LabelStore, plane: Plane, whole_rows: bool = True) -> None:
    """What remains of a plane over several dims must be a box."""
    store.grid(np.moveaxis(plane.labels, plane.fast, -1), whole_rows)


def permute(state: State, order: list[int]) -> State:
    """Dim ``i`` of the result is dim ``order[i]`` of the input."""
    planes = [p.moved(p.labels.transpose(order), order.index(p.fast)) for p in state.planes]
    return state.with_planes(planes, frozenset(i for i, d in enumerate(order) if d in state.constant))


def freeze_dims(store: LabelStore, state: State, dims: set[int], reason: str) -> State:
    """Freeze the planes that vary over any of ``dims`` and forget them."""
    kept = []
    for p in state.planes:
        if dims.intersection(p.dims):
            store.freeze(p.labels, reason)
        else:
            kept.append(p)
    return state if len(kept) == len(state.planes) else replace(state, planes=tuple(kept))

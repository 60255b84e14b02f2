"""Calls that move, split, join or look up indices."""

from __future__ import annotations

from dataclasses import replace
from math import gcd, prod

import numpy as np
from torch import Tensor

from cpd_fast.comb.calls import Call, register_rule
from cpd_fast.comb.planes import Plane, State, meet, orbit, permute, record_grid, reshape
from cpd_fast.comb.rules.common import POOLS, norm_dims
from cpd_fast.comb.trace import Tracer

MOST_PARTS = 8  # a slice at a multiple of a smaller part of its axis is one of unequal parts


@register_rule("aten.view", "aten._unsafe_view", "aten.reshape", "aten.squeeze", "aten.unsqueeze", "aten.flatten")
def view(t: Tracer, call: Call) -> State:
    """Split and merge dims."""
    return reshape(t.store, t.state(call.args[0]), tuple(call.args[0].shape), tuple(call.out.shape))


@register_rule("aten.permute", "aten.transpose", "aten.t")
def permute_dims(t: Tracer, call: Call) -> State:
    """Move dims."""
    x = call.args[0]
    order = list(range(x.dim()))
    if call.op == "aten.permute":
        order = norm_dims(call.args[1], x.dim())
    elif call.op == "aten.t":
        order = order[::-1]
    elif x.dim():
        a, b = call.args[1] % x.dim(), call.args[2] % x.dim()
        order[a], order[b] = order[b], order[a]
    return permute(t.state(x), order)


@register_rule("aten.view_as_complex")
def view_as_complex(t: Tracer, call: Call) -> State:
    """A last dim of real and imaginary part goes."""
    last = call.args[0].dim() - 1
    state = t.freeze_dims(call.args[0], {last}, "real and imaginary part")
    return State(tuple(p.moved(p.labels.squeeze(last), p.fast) for p in state.planes), state.constant - {last})


@register_rule("aten.view_as_real")
def view_as_real(t: Tracer, call: Call) -> State:
    """A last dim of real and imaginary part comes."""
    return State(tuple(p.moved(p.labels[..., None], p.fast) for p in t.state(call.args[0]).planes))


@register_rule("aten.expand")
def expand(t: Tracer, call: Call) -> State:
    """New or stretched dims are constant along their length."""
    x, out = call.args[0], call.out
    shift = out.dim() - x.dim()
    state = t.state(x)
    planes = [p.moved(p.labels.reshape((1,) * shift + p.labels.shape), p.fast + shift) for p in state.planes]
    stretched = {d for d in range(out.dim()) if out.shape[d] > 1 and (d < shift or x.shape[d - shift] == 1)}
    return state.with_planes(planes, frozenset(stretched | {d + shift for d in state.constant}))


@register_rule("aten.repeat", "aten.tile")
def repeat(t: Tracer, call: Call) -> State:
    """Copies share their channels."""
    x, out = call.args[0], call.out
    state = t.state(x)
    reps = list(call.args[1])
    shift = out.dim() - x.dim()
    planes = []
    for p in state.planes:
        labels = p.labels.reshape((1,) * shift + p.labels.shape)
        labels = np.tile(labels, [r if s > 1 else 1 for r, s in zip(reps, labels.shape, strict=True)])
        planes.append(p.moved(labels, p.fast + shift))
    constant = {d for d in range(out.dim()) if out.shape[d] > 1 and (d < shift or x.shape[d - shift] == 1)}
    return state.with_planes(planes, frozenset(constant | {d + shift for d in state.constant}))


@register_rule("aten.as_strided")
def as_strided(t: Tracer, call: Call) -> State:
    """Other strides for the same shape; anything else is not followed."""
    x = call.args[0]
    if tuple(call.args[1]) == tuple(call.out.shape) and x.numel() == call.out.numel() and x.dim() == call.out.dim():
        return replace(t.state(x), identity=None)
    return t.freeze_all(x, "as_strided")


def _cut(t: Tracer, x: Tensor, dim: int, start: int, stop: int, step: int = 1) -> State:
    state = t.state(x)
    planes = []
    for p in state.planes:
        if p.labels.shape[dim] > 1:
            labels = p.labels.take(range(start, stop, step), dim)
            p = p.moved(labels, p.fast)
            if labels.shape[dim] == 1 and p.fast == dim:
                p = p.moved(labels, p.dims[-1] if p.dims else dim)
        if p.dims:
            planes.append(p)
    return state.with_planes(planes, state.constant)


def _varies(t: Tracer, x: Tensor, dim: int) -> bool:
    return any(p.labels.shape[dim] > 1 for p in t.state(x).planes)


@register_rule("aten.slice", "aten.narrow")
def slice_(t: Tracer, call: Call) -> State:
    """A part of an axis.

    Whether the bounds in the forward follow the number of channels, only a rehearsal can tell. Bounds that cut the
    axis into a few equal parts are taken for parts that stay equal; every k-th channel for one of a run of k that goes
    together; others for unequal parts, whose sizes are attributes to be repaired.
    """
    x, out = call.args[0], call.out
    dim = call.arg(1, "dim", 0) % max(x.dim(), 1)
    if x.shape == out.shape or not _varies(t, x, dim):
        return t.state(x)
    if call.op == "aten.narrow" or not t.hope():
        return t.freeze_dims(x, {dim}, "sliced at fixed positions")
    size = x.shape[dim]
    start, stop, step = slice(call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1)).indices(size)
    if step > 1:
        if start >= step or size % step or out.shape[dim] * step != size:
            return t.freeze_dims(x, {dim}, "sliced at fixed positions")
        for p in t.state(x).planes:
            if p.labels.shape[dim] > 1:
                runs = p.labels.reshape(*p.labels.shape[:dim], size // step, step, *p.labels.shape[dim + 1 :])
                t.store.unite(runs, runs.take([0], dim + 1))
    elif size // (part := gcd(start, stop, size)) <= MOST_PARTS:
        _equal_parts(t, x, dim, part)
    return _cut(t, x, dim, start, stop, step)


def _equal_parts(t: Tracer, x: Tensor, dim: int, part: int) -> None:
    """Parts of a dim must keep equally many channels; none may vanish, but for a row (a head) that goes whole."""
    for p in t.state(x).planes:
        if p.labels.shape[dim] > 1 and part > 1:
            shape = (*p.labels.shape[:dim], x.shape[dim] // part, part, *p.labels.shape[dim + 1 :])
            fast = dim + 1 if p.fast == dim else p.fast + (p.fast > dim)
            record_grid(t.store, Plane(p.labels.reshape(shape), fast), whole_rows=len(p.dims) > 1)


@register_rule("aten.select")
def select(t: Tracer, call: Call) -> State:
    """One index of a dim."""
    x = call.args[0]
    dim, index = call.args[1] % x.dim(), call.args[2] % x.shape[call.args[1]]
    return _select(t, x, dim, index)


def _select(t: Tracer, x: Tensor, dim: int, index: int) -> State:
    if any(p.fast == dim and p.labels.shape[dim] > 1 for p in t.state(x).planes):
        t.freeze_dims(x, {dim}, "indexed at a fixed position")
    cut = _cut(t, x, dim, index, index + 1)
    planes = [p.moved(p.labels.squeeze(dim), p.fast - (p.fast > dim)) for p in cut.planes]
    constant = frozenset(d - (d > dim) for d in cut.constant if d != dim)
    return cut.with_planes([p for p in planes if p.dims], constant)


@register_rule("aten.unbind")
def unbind(t: Tracer, call: Call) -> list[State]:
    """All indices of a dim, one by one."""
    x = call.args[0]
    dim = call.arg(1, "dim", 0) % x.dim()
    return [_select(t, x, dim, i) for i in range(x.shape[dim])]


@register_rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_split", "aten.unsafe_chunk")
def split(t: Tracer, call: Call) -> list[State]:
    """Equal parts must stay equal; unequal parts are free, their sizes are repaired in compaction."""
    x = call.args[0]
    dim = call.arg(2, "dim", 0) % x.dim()
    sizes = [o.shape[dim] for o in call.out]
    if len(set(sizes)) == 1 and len(sizes) > 1:
        _equal_parts(t, x, dim, sizes[0])
    elif call.op in ("aten.split", "aten.unsafe_split") and len(sizes) > 1 and _varies(t, x, dim):
        t.freeze_dims(x, {dim}, "split into unequal parts of one stated size")
    starts = np.cumsum([0, *sizes])
    return [_cut(t, x, dim, int(a), int(b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]


@register_rule("aten.glu")
def glu(t: Tracer, call: Call) -> State:
    """a * sigmoid(b) of the two halves of a dim, which meet."""
    x = call.args[0]
    dim = call.arg(1, "dim", -1) % x.dim()
    half = x.shape[dim] // 2
    parts = [_cut(t, x, dim, start, start + half) for start in (0, half)]
    shape = tuple(call.out.shape)
    return meet(t.store, parts, [shape, shape], shape, t.heads, "first")


@register_rule("aten.im2col")
def im2col(t: Tracer, call: Call) -> State:
    """(N, C, H, W) -> (N, C * window, L): every channel becomes one run of rows."""
    x, out = call.args[0], call.out
    state = t.only_dim(x, x.dim() - 3, POOLS)
    runs = out.shape[-2] // x.shape[-3]
    planes = [p.moved(np.repeat(p.labels.squeeze(-1), runs, -2), out.dim() - 2) for p in state.planes]
    return State(tuple(planes))


@register_rule("aten.col2im")
def col2im(t: Tracer, call: Call) -> State:
    """(N, C * window, L) -> (N, C, H, W): the rows of a window go together."""
    x, out = call.args[0], call.out
    c = out.shape[-3]
    split_shape = (*x.shape[:-2], c, x.shape[-2] // c, x.shape[-1])
    state = t.freeze_dims(x, {x.dim() - 1}, POOLS)
    planes = []
    for p in reshape(t.store, state, tuple(x.shape), split_shape).planes:
        window = len(split_shape) - 2
        orbit(t.store, p, (window,))
        labels = p.labels.take([0], window)
        planes.append(p.moved(labels, window - 1 if p.fast == window else p.fast))
    return State(tuple(p for p in planes if p.dims))


@register_rule("aten.unfold")
def unfold(t: Tracer, call: Call) -> State:
    """Windows along a dim that carries no channels; their positions become a last dim."""
    x, dim = call.args[0], call.args[1] % max(call.args[0].dim(), 1)
    state = t.freeze_dims(x, {dim}, POOLS)
    return State(tuple(p.moved(p.labels[..., None], p.fast) for p in state.planes))


@register_rule("aten.cat", "aten.concatenate")
def cat(t: Tracer, call: Call) -> State:
    """Axes one after the other; other dims meet."""
    tensors = [x for x in call.args[0] if x.numel() > 0 or x.dim() > 1]
    out = call.out
    dim = call.arg(1, "dim", 0) % out.dim()
    one = tuple(1 if d == dim else s for d, s in enumerate(out.shape))
    parts: list[Plane] = []
    rest: list[State] = []
    labelled = any(_varies(t, x, dim) for x in tensors)
    for x in tensors:
        state = t.state(x)
        across = [p for p in state.planes if p.labels.shape[dim] > 1]
        rest.append(State(tuple(p for p in state.planes if p.labels.shape[dim] == 1), state.constant - {dim}))
        if not labelled:
            continue
        if len(across) == 1:
            parts.append(across[0])
        else:
            for p in across:
                t.store.freeze(p.labels, "several grids are concatenated")
            shape = [x.shape[dim] if d == dim else 1 for d in range(out.dim())]
            parts.append(Plane(t.store.pinned(x.shape[dim]).reshape(shape), dim, zero=True))
    met = meet(t.store, rest, [one] * len(rest), one, t.heads, "all")
    constant = met.constant | ({dim} if all(dim in t.state(x).constant for x in tensors) else frozenset())
    if not labelled:
        return State(met.planes, frozenset(constant))
    varying = {d for p in parts for d in p.dims} - {dim}
    full = [[out.shape[d] if d in varying else s for d, s in enumerate(p.labels.shape)] for p in parts]
    labels = np.concatenate([np.broadcast_to(p.labels, f) for p, f in zip(parts, full, strict=True)], dim)
    fasts = {p.fast for p in parts if p.dims}
    if len(fasts) > 1:
        for p in parts:
            orbit(t.store, p, p.rows)
    planes = [Plane(labels, parts[0].fast if len(fasts) == 1 else dim, all(p.zero for p in parts))]
    if len(planes[0].dims) > 1:
        record_grid(t.store, planes[0])
    overlapping = [p for p in met.planes if set(p.dims) & varying]
    for p in overlapping:
        t.store.freeze(p.labels, "a grid is concatenated")
    return State((*(p for p in met.planes if p not in overlapping), *planes), constant)


@register_rule("aten.stack")
def stack(t: Tracer, call: Call) -> State:
    """The parts meet index by index along a new free dim."""
    dim = call.arg(1, "dim", 0) % call.out.dim()
    parts = call.args[0]
    state = t.meet(*parts, out=parts[0], zero="all")
    planes = [p.moved(np.expand_dims(p.labels, dim), p.fast + (p.fast >= dim)) for p in state.planes]
    return State(tuple(planes), frozenset(d + (d >= dim) for d in state.constant))


@register_rule("aten.roll", "aten.flip")
def roll(t: Tracer, call: Call) -> State:
    """Moving positions of a channel axis is not a fixed map once channels go."""
    x = call.args[0]
    dims = norm_dims(call.args[2] if call.op == "aten.roll" else call.args[1], x.dim())
    return t.freeze_dims(x, set(dims), "rolled or flipped along this axis")


@register_rule("aten.rot90")
def rot90(t: Tracer, call: Call) -> State:
    """Turns two dims that carry no channels."""
    x = call.args[0]
    return State(
        t.freeze_dims(x, set(norm_dims(call.arg(2, "dims", [0, 1]), x.dim())), "turned along this axis").planes
    )


@register_rule("aten.constant_pad_nd", "aten.reflection_pad2d", "aten.replication_pad2d", "aten.reflection_pad1d")
def pad(t: Tracer, call: Call) -> State:
    """Padding along a channel axis adds positions that stay."""
    x, out = call.args[0], call.out
    state = t.state(x)
    if call.op != "aten.constant_pad_nd":
        return t.freeze_dims(x, {d for d in range(x.dim()) if x.shape[d] != out.shape[d]}, POOLS)
    amounts = list(call.args[1])
    planes = []
    for p in state.planes:
        labels = p.labels
        for i in range(len(amounts) // 2):
            d, (before, after) = x.dim() - 1 - i, (amounts[2 * i], amounts[2 * i + 1])
            if labels.shape[d] > 1 and (before or after):
                if min(before, after) < 0:
                    t.store.freeze(labels, "cropped along this axis")
                shape = list(labels.shape)
                ends = []
                for n in (max(before, 0), max(after, 0)):
                    shape[d] = n
                    ends.append(t.store.pinned(prod(shape)).reshape(shape))
                inner = labels.take(range(max(-before, 0), labels.shape[d] - max(-after, 0)), d)
                labels = np.concatenate([ends[0], inner, ends[1]], d)
        zero = p.zero and not call.arg(2, "value", 0)
        planes.append(Plane(labels, p.fast, zero))
    return State(tuple(planes))


@register_rule("function.pad")
def pad_by_mode(t: Tracer, call: Call) -> State:
    """F.pad: circular padding is a series of writes in place underneath, and copies what is there."""
    x, amounts, mode = call.arg(0, "input"), call.arg(1, "pad"), call.arg(2, "mode", "constant")
    if mode == "constant":
        return pad(t, Call("aten.constant_pad_nd", (x, amounts, call.arg(3, "value") or 0), {}, call.out))
    return t.freeze_dims(x, {x.dim() - 1 - i // 2 for i, n in enumerate(amounts) if n}, POOLS)


@register_rule("aten.pixel_shuffle", "aten.pixel_unshuffle", "aten.channel_shuffle", "aten.native_channel_shuffle")
def shuffle(t: Tracer, call: Call) -> State:
    """The view-permute-view that the operator stands for."""
    x, out = call.args[0], call.out
    n, (c, h, w) = x.dim() - 3, x.shape[-3:]
    lead = tuple(x.shape[:n])
    if call.op == "aten.pixel_shuffle":
        r = call.args[1]
        split_shape, order = (*lead, c // r**2, r, r, h, w), [0, 3, 1, 4, 2]
    elif call.op == "aten.pixel_unshuffle":
        r = call.args[1]
        split_shape, order = (*lead, c, h // r, r, w // r, r), [0, 2, 4, 1, 3]
    else:
        g = call.args[1]
        split_shape, order = (*lead, g, c // g, h, w), [1, 0, 2, 3]
    state = reshape(t.store, t.state(x), tuple(x.shape), split_shape)
    state = permute(state, [*range(n), *(n + d for d in order)])
    mid = tuple(split_shape[i] for i in [*range(n), *(n + d for d in order)])
    return reshape(t.store, state, mid, tuple(out.shape))

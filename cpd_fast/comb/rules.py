"""How channels run through the ATen operators: one rule an operator family."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cpd_fast.comb.planes import Plane, State, constant_state, meet, orbit, permute, record_grid, reshape
from cpd_fast.comb.trace import Call, Tracer, register_rule

Shape = tuple[int, ...]
POOLS = "a pooling window or interpolation runs over this axis"


def _tensors(call: Call) -> list[Tensor]:
    return [t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]


def _norm_dims(dims: Any, ndim: int) -> list[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(ndim))
    return [d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


# ---- elementwise


@register_rule(
    "pointwise",
    *(
        f"aten.{n}"
        for n in "where clamp lerp masked_fill bernoulli fill hardswish hardsigmoid silu mish softplus".split()
    ),
    *(f"aten.{n}" for n in "celu selu elu leaky_relu hardtanh relu6 threshold logit rrelu prelu dropout".split()),
)
def pointwise(t: Tracer, call: Call) -> Any:
    """Index by index; an in-place result replaces what was known of its first argument."""
    tensors = _tensors(call)
    outs = [o for o in tree_leaves(call.out) if isinstance(o, Tensor)]
    if not tensors:
        return [constant_state(o.dim()) for o in outs]
    target = tensors[0]
    if call.op.endswith("_") and t.state(target).constant and target._is_view():
        for other in tensors[1:]:
            t.freeze_all(other, "written in place into a part of another tensor")
    state = t.meet(*tensors, out=outs[0])
    if call.op.rstrip("_") == "aten.add" and len(tensors) == 2 and (bias := t.state(tensors[1]).source):
        return replace(state, scaled_by=(*before, bias) if (before := t.state(target).scaled_by) else ())
    scalar = call.op.rstrip("_") in ("aten.mul", "aten.div", "aten.neg") and len(tensors) == 1
    return replace(state, scaled_by=t.state(target).scaled_by) if scalar else state


@register_rule("aten.native_dropout")
def native_dropout(t: Tracer, call: Call) -> Any:
    """Keeps the axes; the mask has the same ones."""
    return [t.state(call.args[0]), t.state(call.args[0])]


@register_rule(
    "aten.clone", "aten.detach", "aten.alias", "aten.lift_fresh", "aten.contiguous", "aten._to_copy", "aten.to"
)
def same(t: Tracer, call: Call) -> State:
    """The same values."""
    return replace(t.state(call.args[0]), identity=None)


@register_rule("aten.copy")
def copy_(t: Tracer, call: Call) -> State:
    """dst.copy_(src)."""
    dst, src = call.args[0], call.args[1]
    if dst._is_view() and t.state(src).planes:
        return t.meet(dst, src, out=dst) if t.state(dst).planes else t.freeze_all(src, "written in place")
    return replace(t.state(src) if src.shape == dst.shape else t.meet(dst, src, out=dst), source=None)


@register_rule(
    *(f"aten.{n}" for n in "zeros ones full empty arange rand randn eye scalar_tensor randperm linspace".split()),
    *(f"aten.{n}_like" for n in "zeros ones full empty rand randn".split()),
    *(f"aten.new_{n}" for n in "zeros ones full empty empty_strided".split()),
    *(f"aten.{n}" for n in "empty_strided uniform normal zero".split()),
)
def created(t: Tracer, call: Call) -> State:
    """Made by the forward: meets anything."""
    return constant_state(call.out.dim())


# ---- shapes


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
        order = _norm_dims(call.args[1], x.dim())
    elif call.op == "aten.t":
        order = order[::-1]
    elif x.dim():
        a, b = call.args[1] % x.dim(), call.args[2] % x.dim()
        order[a], order[b] = order[b], order[a]
    return permute(t.state(x), order)


@register_rule("aten.expand")
def expand(t: Tracer, call: Call) -> State:
    """New or stretched dims are constant along their length."""
    x, out = call.args[0], call.out
    shift = out.dim() - x.dim()
    state = t.state(x)
    planes = [Plane(p.labels.reshape((1,) * shift + p.labels.shape), p.fast + shift) for p in state.planes]
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
        planes.append(Plane(labels, p.fast + shift))
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
            p = Plane(labels, p.fast)
            if labels.shape[dim] == 1 and p.fast == dim:
                p = Plane(labels, p.dims[-1] if p.dims else dim)
        if p.dims:
            planes.append(p)
    return state.with_planes(planes, state.constant)


def _varies(t: Tracer, x: Tensor, dim: int) -> bool:
    return any(p.labels.shape[dim] > 1 for p in t.state(x).planes)


@register_rule("aten.slice", "aten.narrow")
def slice_(t: Tracer, call: Call) -> State:
    """A part of an axis; the bounds stand in the forward, so a cut channel axis is kept whole."""
    x, out = call.args[0], call.out
    dim = call.arg(1, "dim", 0) % max(x.dim(), 1)
    if x.shape == out.shape:
        return t.state(x)
    if _varies(t, x, dim):
        return t.freeze_dims(x, {dim}, "sliced at fixed positions")
    return t.state(x)


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
    planes = [Plane(p.labels.squeeze(dim), p.fast - (p.fast > dim)) for p in cut.planes]
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
        for p in t.state(x).planes:
            if p.labels.shape[dim] > 1 and sizes[0] > 1:
                shape = (*p.labels.shape[:dim], len(sizes), sizes[0], *p.labels.shape[dim + 1 :])
                fast = dim + 1 if p.fast == dim else p.fast + (p.fast > dim)
                record_grid(t.store, Plane(p.labels.reshape(shape), fast))
    elif call.op in ("aten.split", "aten.unsafe_split") and len(sizes) > 1 and _varies(t, x, dim):
        t.freeze_dims(x, {dim}, "split into unequal parts of one stated size")
    starts = np.cumsum([0, *sizes])
    return [_cut(t, x, dim, int(a), int(b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]


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
            parts.append(Plane(t.store.pinned(x.shape[dim]).reshape(shape), dim))
    met = meet(t.store, rest, [one] * len(rest), one, t.heads)
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
    planes = [Plane(labels, parts[0].fast if len(fasts) == 1 else dim)]
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
    state = t.meet(*parts, out=parts[0])
    planes = [Plane(np.expand_dims(p.labels, dim), p.fast + (p.fast >= dim)) for p in state.planes]
    return State(tuple(planes), frozenset(d + (d >= dim) for d in state.constant))


@register_rule("aten.roll", "aten.flip")
def roll(t: Tracer, call: Call) -> State:
    """Moving positions of a channel axis is not a fixed map once channels go."""
    x = call.args[0]
    dims = _norm_dims(call.args[2] if call.op == "aten.roll" else call.args[1], x.dim())
    return t.freeze_dims(x, set(dims), "rolled or flipped along this axis")


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
        planes.append(Plane(labels, p.fast))
    return State(tuple(planes))


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


# ---- sums of products


@register_rule("aten.convolution", "aten.conv1d", "aten.conv2d", "aten.conv3d", "aten._convolution")
def convolution(t: Tracer, call: Call) -> State:
    """x (N, C_in, ...) * w (C_out, C_in / groups, ...), or transposed w (C_in, C_out / groups, ...)."""
    x, w, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    x_state = t.only_dim(x, 1, POOLS)
    w_state = t.state(w)
    for p in w_state.planes:
        if set(p.dims) & set(range(2, w.dim())):
            t.store.freeze(p.labels, "")
    w_planes = [p for p in w_state.planes if not set(p.dims) & set(range(2, w.dim()))]
    x_labels = next((p.labels.reshape(-1) for p in x_state.planes if p.labels.shape[1] > 1), None)
    side_in, side_out = (0, 1) if transposed else (1, 0)
    rows = next((p for p in w_planes if p.dims == (side_out,)), None)
    if groups == 1:
        cols = next((p for p in w_planes if p.dims == (side_in,)), None)
        if cols is not None:
            if w_state.source:
                t.store.consume(cols.labels)
            if x_labels is None:
                t.store.freeze(cols.labels, "reads a model input or another axis without channels")
            else:
                t.store.unite(cols.labels.reshape(-1), x_labels)
        elif x_labels is not None and w.shape[side_in] > 1:
            t.store.freeze(x_labels, f"meets a convolution weight whose input axis has no channels ({t.where()})")
        out_labels = None if rows is None else rows.labels.reshape(-1)
    else:
        out_labels = _grouped(t, w, w_state, x_labels, groups, transposed)
    out_channels = call.out.shape[1]
    positions = prod(call.out.shape) // max(out_channels, 1) if not transposed else prod(x.shape) // x.shape[1]
    weight_planes = [p.labels for p in t.state(w).planes if not set(p.dims) & set(range(2, w.dim()))]
    t.add_cost("macs", positions, tuple(w.shape), weight_planes)
    scaled = _sources(t, w, bias)
    if out_labels is None:
        state = State(constant=frozenset())
    else:
        shape = [out_channels if d == 1 else 1 for d in range(call.out.dim())]
        state = State((Plane(out_labels.reshape(shape), 1),))
    if bias is not None:
        bias_shape = (1, out_channels, *[1] * (call.out.dim() - 2))
        moved = reshape(t.store, t.state(bias), tuple(bias.shape), bias_shape)
        state = meet(t.store, [state, moved], [tuple(call.out.shape), bias_shape], tuple(call.out.shape), t.heads)
    return replace(state, scaled_by=scaled)


def _grouped(
    t: Tracer, w: Tensor, w_state: State, x_labels: np.ndarray | None, groups: int, transposed: bool
) -> np.ndarray | None:
    """Channels of a grouped convolution: inputs and outputs keep equally many in each conv group."""
    if transposed:
        c_in, per_out = w.shape[0], w.shape[1]
        rows_in = next((p.labels.reshape(-1) for p in w_state.planes if p.dims == (0,)), None)
        if rows_in is not None and x_labels is not None:
            if w_state.source:
                t.store.consume(rows_in)
            t.store.unite(rows_in, x_labels)
        if per_out == 1 and c_in == groups:
            return rows_in
        for p in w_state.planes:
            t.store.freeze(p.labels, "grouped transposed convolution")
        return t.store.pinned(per_out * groups)
    c_out, per_in = w.shape[0], w.shape[1]
    per_out = c_out // groups
    rows = next((p.labels.reshape(-1) for p in w_state.planes if p.dims == (0,)), None)
    if rows is None:
        if x_labels is not None:
            t.store.freeze(x_labels, f"meets a grouped convolution whose weight has no channels ({t.where()})")
        return None
    if x_labels is None:
        t.store.freeze(rows, "grouped convolution over an axis without channels")
        return rows
    over_rows = [p for p in w_state.planes if p.dims == (0,)]
    if per_in == 1 and len(over_rows) == 2:  # compacted down to one column a group: (rows, columns), seen in a replay
        t.store.unite(over_rows[1].labels.reshape(groups, per_out), x_labels.reshape(groups, 1))
        return rows
    if per_in == 1:  # depthwise: input channel g and its outputs go together
        t.store.unite(rows.reshape(groups, per_out), x_labels.reshape(groups, 1))
        return rows
    columns = next((p for p in w_state.planes if 1 in p.dims), None)
    if columns is None or columns.dims != (0, 1):
        # dim 1 is shared by the groups: give each group's columns their own labels, (C_out, C_in / groups)
        own = t.store.new(groups * per_in).reshape(groups, 1, per_in)
        grid = np.broadcast_to(own, (groups, per_out, per_in)).reshape(c_out, per_in, *[1] * (w.dim() - 2))
        if w_state.source is None:
            t.store.freeze(rows, "grouped convolution with a computed weight")
            t.store.freeze(x_labels, "grouped convolution with a computed weight")
            return rows
        new = Plane(np.ascontiguousarray(grid), 1)
        planes = [p for p in t.planes[w_state.source] if 1 not in p.dims]
        t.planes[w_state.source] = [*planes, new]
        t.set_state(w, replace(w_state, planes=tuple(t.planes[w_state.source])))
        columns = new
    labels = columns.labels.reshape(groups, per_out, per_in)[:, 0]
    t.store.consume(labels)
    t.store.unite(labels, x_labels.reshape(groups, per_in))
    t.store.grid(labels)
    t.store.grid(rows.reshape(groups, per_out))
    return rows


def _contract(t: Tracer, a: State, shape_a: Shape, b: State, shape_b: Shape, out: Shape) -> State:
    """a (*batch, M, K) @ b (*batch, K, N), batch broadcast: labels of K meet, batch dims meet, M and N remain."""
    batch = len(out) - 2

    def lift(state: State, shape: Shape, absent: int) -> tuple[State, Shape]:
        shift = len(out) - len(shape)
        planes = []
        for p in state.planes:
            labels = np.expand_dims(p.labels.reshape((1,) * shift + p.labels.shape), absent)
            fast = p.fast + shift
            planes.append(Plane(labels, fast + (fast >= absent)))
        constant = {d + shift for d in state.constant}
        full = (1,) * shift + shape
        return State(tuple(planes), frozenset(d + (d >= absent) for d in constant)), (*full[:absent], 1, *full[absent:])

    for state, inner in ((a, len(shape_a) - 1), (b, len(shape_b) - 2)):
        if state.source:
            for p in state.planes:
                if p.labels.shape[inner] > 1:
                    t.store.consume(p.labels)
    lifted = [lift(a, shape_a, batch + 2), lift(b, shape_b, batch)]  # (batch, M, K, 1), (batch, 1, K, N)
    joint = (*out[:batch], shape_a[-2], shape_a[-1], out[-1])
    met = meet(t.store, [s for s, _ in lifted], [shape for _, shape in lifted], joint, t.heads)
    t.add_cost("macs", 1, joint, [p.labels for p in met.planes])
    planes = [
        Plane(p.labels.squeeze(batch + 1), p.fast - (p.fast > batch + 1))
        for p in t.reduce_planes(met.planes, {batch + 1})
    ]
    return State(tuple(planes), frozenset(d - (d > batch + 1) for d in met.constant if d != batch + 1))


def _matmul(t: Tracer, a: Tensor, b: Tensor, out: Tensor) -> State:
    """torch.matmul, vectors included."""
    sa, shape_a, sb, shape_b, shape = t.state(a), tuple(a.shape), t.state(b), tuple(b.shape), tuple(out.shape)
    if a.dim() == 1:
        sa, shape_a, shape = reshape(t.store, sa, shape_a, (1, *shape_a)), (1, *shape_a), (*shape[:-1], 1, *shape[-1:])
    if b.dim() == 1:
        sb, shape_b, shape = reshape(t.store, sb, shape_b, (*shape_b, 1)), (*shape_b, 1), (*shape, 1)
    state = _contract(t, sa, shape_a, sb, shape_b, shape)
    return reshape(t.store, state, shape, tuple(out.shape))


def _sources(t: Tracer, *params: Tensor | None) -> tuple[str, ...]:
    """Names of the parameters a result is linear in, or nothing where one of them is computed."""
    names = [t.state(p).source for p in params if p is not None]
    return tuple(n for n in names if n) if all(names) else ()


def _add_bias(t: Tracer, state: State, bias: Tensor, out: Tensor) -> State:
    shape = tuple(out.shape)
    return meet(t.store, [state, t.state(bias)], [shape, tuple(bias.shape)], shape, t.heads)


@register_rule("function.linear")
def linear(t: Tracer, call: Call) -> State:
    """x (..., K) with weight (N, K) and bias (N,)."""
    x, w, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    shape = tuple(call.out.shape)
    sx, shape_x = t.state(x), tuple(x.shape)
    if x.dim() == 1:
        sx, shape_x, shape = reshape(t.store, sx, shape_x, (1, *shape_x)), (1, *shape_x), (1, *shape)
    state = _contract(t, sx, shape_x, permute(t.state(w), [1, 0]), (w.shape[1], w.shape[0]), shape)
    state = reshape(t.store, state, shape, tuple(call.out.shape))
    if bias is not None:
        state = _add_bias(t, state, bias, call.out)
    return replace(state, scaled_by=_sources(t, w, bias))


@register_rule("aten.mm", "aten.bmm", "aten.matmul", "aten.mv", "aten.dot", "function.matmul", "function.__matmul__")
def matmul(t: Tracer, call: Call) -> State:
    """Products of matrices, batches of them, and vectors."""
    state = _matmul(t, call.args[0], call.args[1], call.out)
    return replace(state, scaled_by=_sources(t, call.args[1]) if call.op == "aten.mm" else ())


@register_rule("function.__rmatmul__")
def rmatmul(t: Tracer, call: Call) -> State:
    """b.__rmatmul__(a) is a @ b."""
    return _matmul(t, call.args[1], call.args[0], call.out)


@register_rule("aten.addmm", "aten.baddbmm", "aten.addmv")
def addmm(t: Tracer, call: Call) -> State:
    """bias + a @ b."""
    bias, a, b = call.args[:3]
    return replace(_add_bias(t, _matmul(t, a, b, call.out), bias, call.out), scaled_by=_sources(t, b, bias))


@register_rule("function.scaled_dot_product_attention")
def attention(t: Tracer, call: Call) -> State:
    """softmax(q k^T * scale + mask) v; q (..., N, E), k (..., S, E), v (..., S, E_v)."""
    q, k, v = (call.arg(i, name) for i, name in enumerate(("query", "key", "value")))
    mask = call.arg(3, "attn_mask")
    if call.arg(7, "enable_gqa", False):
        for x in (q, k, v):
            t.freeze_all(x, "grouped-query attention")
        return State()
    scores = (*call.out.shape[:-1], k.shape[-2])
    swapped = [*range(k.dim() - 2), k.dim() - 1, k.dim() - 2]
    shape_k = tuple(k.shape[d] for d in swapped)
    state = _contract(t, t.state(q), tuple(q.shape), permute(t.state(k), swapped), shape_k, scores)
    if t.replay and q.shape[-1] == 1:  # one dim a head left: its label would pass for the head's
        state = State()
    if mask is not None:
        state = meet(t.store, [state, t.state(mask)], [scores, tuple(mask.shape)], scores, t.heads)
    return _contract(t, state, scores, t.state(v), tuple(v.shape), tuple(call.out.shape))


@register_rule("aten.embedding")
def embedding(t: Tracer, call: Call) -> State:
    """weight (V, C) looked up: the table's rows stay, its columns are channels."""
    w, index = call.args[:2]
    state = t.freeze_dims(w, {0}, "rows of a lookup table")
    n = index.dim()
    planes = [Plane(p.labels.reshape([1] * n + [-1]), n) for p in state.planes]
    return State(tuple(planes))


@register_rule("aten.index", "aten.index_select", "aten.gather")
def index(t: Tracer, call: Call) -> State:
    """Lookup at fixed positions: the indexed dims stay, the others keep their channels."""
    x, out = call.args[0], call.out
    if call.op == "aten.index":
        indices = list(call.args[1]) + [None] * (x.dim() - len(call.args[1]))
        hit = [d for d, i in enumerate(indices) if i is not None]
        adjacent = hit == list(range(hit[0], hit[-1] + 1)) and all(
            indices[d].dtype.is_floating_point is False for d in hit
        )
    else:
        hit, adjacent = [call.args[1] % x.dim()], call.op == "aten.index_select"
    if not adjacent:
        t.freeze_all(x, "indexed by a tensor")
        return State()
    state = t.freeze_dims(x, set(hit), "indexed by a tensor")
    shift = out.dim() - x.dim()
    planes = []
    for p in state.planes:
        labels = p.labels.squeeze(tuple(hit))
        labels = labels.reshape(*labels.shape[: hit[0]], *[1] * (len(hit) + shift), *labels.shape[hit[0] :])
        planes.append(Plane(labels, p.fast + (shift if p.fast > hit[-1] else 0)))
    return State(tuple(planes))


# ---- normalisation and reductions


@register_rule(
    *(f"aten.{n}" for n in ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")),
    *(f"aten.{n}" for n in ("cudnn_batch_norm", "_batch_norm_with_update")),
)
def native_batch_norm(t: Tracer, call: Call) -> Any:
    """(x, weight, bias, running mean, running variance, training, ...)."""
    training = call.op != "aten._native_batch_norm_legit_no_training" and call.args[5] is True
    state = _batch_norm(t, call.args[0], call.args[1:3], call.args[3:5], training)
    return [state, *(State() for o in tree_leaves(call.out) if isinstance(o, Tensor))][:-1]


@register_rule("function.batch_norm")
def batch_norm(t: Tracer, call: Call) -> State:
    """F.batch_norm(x, running_mean, running_var, weight, bias, training, ...)."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    x, mean, var, weight, bias, training = (call.arg(i, n) for i, n in enumerate(names))
    return _batch_norm(t, x, (weight, bias), (mean, var), bool(training))


def _batch_norm(t: Tracer, x: Tensor, affine: Any, running: Any, training: bool) -> State:
    """x (N, C, ...) with weight, bias and running statistics (C,)."""
    state = t.state(x)
    shape = tuple(s if d == 1 else 1 for d, s in enumerate(x.shape))
    for p in (*affine, *running):
        if isinstance(p, Tensor):
            moved = reshape(t.store, t.state(p), tuple(p.shape), shape)
            state = meet(t.store, [state, moved], [tuple(x.shape), shape], tuple(x.shape), t.heads)
    t.add_site(x, [p for p in t.state(x).planes if set(p.dims) - {1}] if training else [])
    return replace(state, scaled_by=_sources(t, *affine))


@register_rule("aten.native_layer_norm", "function.layer_norm", "function.rms_norm")
def layer_norm(t: Tracer, call: Call) -> Any:
    """Statistics over the last dims: a mask counts kept channels only."""
    x, shape = call.arg(0, "input"), call.arg(1, "normalized_shape")
    normalised = set(range(x.dim() - len(shape), x.dim()))
    given = (*call.args[2:4], call.kwargs.get("weight"), call.kwargs.get("bias"))
    affine = [p for p in given if isinstance(p, Tensor)]
    t.add_site(x, [p for p in t.state(x).planes if normalised.intersection(p.dims)])
    outs = [o for o in tree_leaves(call.out) if isinstance(o, Tensor)]
    state = t.meet(x, *affine, out=outs[0])
    state = replace(state, scaled_by=_sources(t, *affine))
    return [state, *(_drop(t, x, o) for o in outs[1:])] if isinstance(call.out, (tuple, list)) else state


@register_rule("aten._weight_norm_interface")
def weight_norm(t: Tracer, call: Call) -> Any:
    """g * v / norm(v) with the norm over all dims but one: that one keeps its channels."""
    v, g, dim = call.args[0], call.args[1], call.arg(2, "dim", 0) % call.args[0].dim()
    t.freeze_dims(v, {d for d in range(v.dim()) if d != dim}, "weight_norm runs over this axis")
    t.unmasked.add(t.state(v).source or "")  # g masks the product; rows of zeros have no direction
    state = meet(t.store, [t.state(v), t.state(g)], [tuple(v.shape), tuple(g.shape)], tuple(v.shape), t.heads)
    return [state, t.state(g)]


def _drop(t: Tracer, x: Tensor, out: Tensor) -> State:
    """Statistics of x: same rank, the planes that survive."""
    return State(tuple(p for p in t.state(x).planes if all(out.shape[d] == x.shape[d] for d in p.dims)))


@register_rule("aten.native_group_norm", "aten.group_norm")
def group_norm(t: Tracer, call: Call) -> Any:
    """Statistics over C / groups channels: groups keep equally many."""
    x = call.args[0]
    weight, bias = call.arg(1, "weight"), call.arg(2, "bias")
    groups = call.arg(6, "group")
    planes = [p for p in t.state(x).planes if set(p.dims) - {0}]
    if groups > 1:
        for p in planes:
            if p.dims == (1,):
                t.store.grid(p.labels.reshape(groups, -1))
            else:
                t.store.freeze(p.labels, "group_norm runs over a grid of channels")
    t.add_site(x, planes)
    state = t.state(x)
    shape = tuple(s if d == 1 else 1 for d, s in enumerate(x.shape))
    for p in (weight, bias):
        if isinstance(p, Tensor):
            moved = reshape(t.store, t.state(p), tuple(p.shape), shape)
            state = meet(t.store, [state, moved], [tuple(x.shape), shape], tuple(x.shape), t.heads)
    return [replace(state, scaled_by=()), State(), State()]


@register_rule(
    *(f"aten.{n}" for n in "sum mean prod amax amin max min var std var_mean std_mean argmax argmin".split()),
    *(f"aten.{n}" for n in "linalg_vector_norm norm logsumexp any all nansum median".split()),
)
def reduce(t: Tracer, call: Call) -> Any:
    """Over space or tokens the channels stay; over channels the result would change with their number."""
    x = call.args[0]
    outs = [o for o in tree_leaves(call.out) if isinstance(o, Tensor)]
    position = 2 if call.op in ("aten.linalg_vector_norm", "aten.norm") else 1
    if call.op in ("aten.max", "aten.min") and len(call.args) > 1 and isinstance(call.args[1], Tensor):
        return pointwise(t, call)
    dims = _norm_dims(call.arg(position, "dim"), x.dim())
    state = t.state(x)
    t.add_site(x, [p for p in state.planes if set(dims).intersection(p.dims)])
    keep = outs[0].dim() == x.dim()
    planes = []
    for p in t.reduce_planes(state.planes, set(dims)):
        labels = p.labels if keep else p.labels.squeeze(tuple(dims))
        planes.append(Plane(labels, p.fast if keep else p.fast - sum(d < p.fast for d in dims)))
    kept = [d for d in range(x.dim()) if d not in dims]
    constant = frozenset((d if keep else kept.index(d)) for d in state.constant if d in kept)
    result = State(tuple(planes), constant)
    return [result] * len(outs) if isinstance(call.out, (tuple, list)) else result


@register_rule(
    *(f"aten.{n}" for n in "_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumprod sort topk".split()),
)
def softmax(t: Tracer, call: Call) -> Any:
    """Along tokens the channels stay; along channels the result would change with their number."""
    x = call.args[0]
    default = x.dim() - 1
    dim = call.arg(2 if "topk" in call.op else 1, "dim", default) % x.dim()
    state = t.freeze_dims(x, {dim}, f"{call.op.split('.')[1].strip('_')} over this axis")
    return [state, state] if isinstance(call.out, (tuple, list)) else state


@register_rule(
    *(f"aten.{n}" for n in "max_pool2d_with_indices max_pool2d avg_pool2d avg_pool1d max_pool1d max_pool3d".split()),
    *(f"aten.{n}" for n in "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool2d adaptive_avg_pool2d".split()),
    *(f"aten.{n}" for n in "_adaptive_avg_pool3d adaptive_max_pool2d mkldnn_max_pool2d adaptive_avg_pool1d".split()),
    *(f"aten.upsample_{n}" for n in "nearest2d bilinear2d bicubic2d nearest1d linear1d nearest3d trilinear3d".split()),
    *(f"aten._upsample_{n}" for n in "bilinear2d_aa bicubic2d_aa nearest_exact2d".split()),
)
def pool(t: Tracer, call: Call) -> Any:
    """Works on each channel by itself."""
    x = call.args[0]
    spatial = 3 if "3d" in call.op else 1 if "1d" in call.op else 2
    state = State(t.only_dim(x, x.dim() - spatial - 1, POOLS, range(x.dim() - spatial, x.dim())).planes)
    return [state, state] if isinstance(call.out, (tuple, list)) else state


@register_rule("function.lstm", "function.gru", "function.rnn_tanh", "function.rnn_relu")
def recurrent(t: Tracer, call: Call) -> Any:
    """Recurrent layers keep a list of their weights beside the parameters: they stay whole."""
    for x in _tensors(call):
        t.freeze_all(x, "runs through a recurrent layer")
    return [State() for o in tree_leaves(call.out) if isinstance(o, Tensor)]


@register_rule("unknown")
def unknown(t: Tracer, call: Call) -> Any:
    """An operator without a rule, when the user asked to leave such ones whole."""
    for x in _tensors(call):
        t.freeze_all(x, f"reaches {call.op}, which has no channel rule")
    outs = [o for o in tree_leaves(call.out) if isinstance(o, Tensor)]
    return [State()] * len(outs)

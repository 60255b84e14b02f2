"""Sums of products: convolutions, linears, matmuls, attention, lookup tables."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
from torch import Tensor

from cpd_fast.comb.calls import Call, register_rule
from cpd_fast.comb.planes import Plane, State, meet, permute, reshape
from cpd_fast.comb.rules.common import POOLS, Shape, indexed, sources_of
from cpd_fast.comb.trace import Tracer

NOT_ZERO = "sums products over channels, neither factor of which is 0 once they are removed"


@register_rule("aten.convolution", "aten.conv1d", "aten.conv2d", "aten.conv3d", "aten._convolution")
def convolution(t: Tracer, call: Call) -> State:
    """x (N, C_in, ...) * w (C_out, C_in / groups, ...), or transposed w (C_in, C_out / groups, ...)."""
    x, w, bias = call.args[0], call.args[1], call.arg(2, "bias")
    composite = call.op not in ("aten.convolution", "aten._convolution")  # (..., dilation, groups), in inference mode
    transposed, groups = (False, call.arg(6, "groups", 1)) if composite else (call.args[6], call.args[8])
    same = set(w.shape[2:]) == {1} and tuple(call.out.shape[2:]) == tuple(x.shape[2:])
    mixed = any(1 in p.dims and len(p.dims) > 1 for p in t.state(x).planes)
    pointwise = same and groups == 1 and not transposed and not mixed
    x_state = t.only_dim(x, 1, POOLS, [0] if pointwise else None)
    # channels along the other dims, which a 1x1 convolution leaves alone
    beside = [p for p in x_state.planes if p.labels.shape[1] == 1 and p.dims]
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
            elif not cols.zero and not all(p.zero for p in x_state.planes):
                t.store.freeze(cols.labels, f"{NOT_ZERO} ({t.where()})")
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
    if beside:
        lead, rest = (1,) * w.dim(), tuple(call.out.shape[2:])
        weight_planes = [labels.reshape(labels.shape + (1,) * len(rest)) for labels in weight_planes]
        weight_planes += [p.labels.reshape(lead + p.labels.shape[2:]) for p in beside]
        t.add_cost("macs", call.out.shape[0], (*w.shape, *rest), weight_planes)
    else:
        t.add_cost("macs", positions, tuple(w.shape), weight_planes)
    scaled = sources_of(t, w, bias)
    if out_labels is None:
        state = State(tuple(beside))
    else:
        shape = [out_channels if d == 1 else 1 for d in range(call.out.dim())]
        zero = all(p.zero for p in t.state(w).planes if p.dims == (side_out,))
        state = State((Plane(out_labels.reshape(shape), 1, zero), *beside))
    if bias is not None:
        bias_shape = (1, out_channels, *[1] * (call.out.dim() - 2))
        moved = reshape(t.store, t.state(bias), tuple(bias.shape), bias_shape)
        full = tuple(call.out.shape)
        state = meet(t.store, [state, moved], [full, bias_shape], full, t.heads, "all")
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
    if t.whole_conv_groups:
        _whole_groups(t, w_state, rows.reshape(groups, per_out), x_labels.reshape(groups, per_in))
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
    t.store.grid(labels, whole_rows=False)
    t.store.grid(rows.reshape(groups, per_out), whole_rows=False)
    return rows


def _whole_groups(t: Tracer, w_state: State, rows: np.ndarray, inputs: np.ndarray) -> None:
    """Inputs (groups, C_in / groups) and outputs (groups, C_out / groups) of a conv group go together."""
    for labels in (rows, inputs):
        t.store.unite(labels, rows[:, :1])
    for p in w_state.planes:
        if 1 in p.dims:
            t.store.freeze(p.labels, "")  # positions inside a group


def _contract(
    t: Tracer, a: State, shape_a: Shape, b: State, shape_b: Shape, out: Shape, first: Tensor | None = None
) -> State:
    """a (*batch, M, K) @ b (*batch, K, N), batch broadcast: labels of K meet, batch dims meet, M and N remain.

    Where neither side is known to be 0 at removed channels of K, a masked forward must clear them: in ``first``, the
    tensor of a, if the running function takes it as its first argument; otherwise they are frozen.
    """
    batch = len(out) - 2

    def lift(state: State, shape: Shape, absent: int) -> tuple[State, Shape]:
        shift = len(out) - len(shape)
        planes = []
        for p in state.planes:
            labels = np.expand_dims(p.labels.reshape((1,) * shift + p.labels.shape), absent)
            fast = p.fast + shift
            planes.append(p.moved(labels, fast + (fast >= absent)))
        constant = {d + shift for d in state.constant}
        full = (1,) * shift + shape
        return State(tuple(planes), frozenset(d + (d >= absent) for d in constant)), (*full[:absent], 1, *full[absent:])

    for state, inner in ((a, len(shape_a) - 1), (b, len(shape_b) - 2)):
        if state.source:
            for p in state.planes:
                if p.labels.shape[inner] > 1:
                    t.store.consume(p.labels)
    masked = {id(s): s if not s.source or s.source in t.unmasked else _as_zero(s) for s in (a, b)}
    a, b = masked[id(a)], masked[id(b)]
    lifted = [lift(a, shape_a, batch + 2), lift(b, shape_b, batch)]  # (batch, M, K, 1), (batch, 1, K, N)
    joint = (*out[:batch], shape_a[-2], shape_a[-1], out[-1])
    met = meet(t.store, [s for s, _ in lifted], [shape for _, shape in lifted], joint, t.heads, "any")
    open_planes = [p for p in met.planes if p.labels.shape[batch + 1] > 1 and not p.zero]
    if open_planes:
        labels = [p.labels.squeeze(batch + 2) for p in open_planes]
        t.add_product_site(labels, shape_a if first is not None else None, NOT_ZERO)
    t.add_cost("macs", 1, joint, [p.labels for p in met.planes])
    planes = [
        p.moved(p.labels.squeeze(batch + 1), p.fast - (p.fast > batch + 1))
        for p in t.reduce_planes(met.planes, {batch + 1})
    ]
    return State(tuple(planes), frozenset(d - (d > batch + 1) for d in met.constant if d != batch + 1))


def _as_zero(state: State) -> State:
    """A mask clears the columns of parameters, and of buffers that are read as columns."""
    return replace(state, planes=tuple(replace(p, zero=True) for p in state.planes))


def _matmul(t: Tracer, a: Tensor, b: Tensor, out: Tensor) -> State:
    """torch.matmul, vectors included."""
    sa, shape_a, sb, shape_b, shape = t.state(a), tuple(a.shape), t.state(b), tuple(b.shape), tuple(out.shape)
    if a.dim() == 1:
        sa, shape_a, shape = reshape(t.store, sa, shape_a, (1, *shape_a)), (1, *shape_a), (*shape[:-1], 1, *shape[-1:])
    if b.dim() == 1:
        sb, shape_b, shape = reshape(t.store, sb, shape_b, (*shape_b, 1)), (*shape_b, 1), (*shape, 1)
    state = _contract(t, sa, shape_a, sb, shape_b, shape, a if a.dim() > 1 else None)
    return reshape(t.store, state, shape, tuple(out.shape))


def _add_bias(t: Tracer, state: State, bias: Tensor, out: Tensor) -> State:
    shape = tuple(out.shape)
    return meet(t.store, [state, t.state(bias)], [shape, tuple(bias.shape)], shape, t.heads, "all")


@register_rule("function.linear")
def linear(t: Tracer, call: Call) -> State:
    """x (..., K) with weight (N, K) and bias (N,)."""
    x, w, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    if w.dim() == 1:  # a product with a vector
        return _matmul(t, x, w, call.out)
    shape = tuple(call.out.shape)
    sx, shape_x = t.state(x), tuple(x.shape)
    if x.dim() == 1:
        sx, shape_x, shape = reshape(t.store, sx, shape_x, (1, *shape_x)), (1, *shape_x), (1, *shape)
    state = _contract(t, sx, shape_x, permute(t.state(w), [1, 0]), (w.shape[1], w.shape[0]), shape, x)
    state = reshape(t.store, state, shape, tuple(call.out.shape))
    if bias is not None:
        state = _add_bias(t, state, bias, call.out)
    return replace(state, scaled_by=sources_of(t, w, bias))


@register_rule(
    "aten.mm", "aten.bmm", "aten.matmul", "aten.mv", "aten.dot", "aten.vdot", "function.matmul", "function.__matmul__"
)
def matmul(t: Tracer, call: Call) -> State:
    """Products of matrices, batches of them, and vectors."""
    state = _matmul(t, call.args[0], call.args[1], call.out)
    return replace(state, scaled_by=sources_of(t, call.args[1]) if call.op == "aten.mm" else ())


@register_rule("function.__rmatmul__")
def rmatmul(t: Tracer, call: Call) -> State:
    """b.__rmatmul__(a) is a @ b."""
    return _matmul(t, call.args[1], call.args[0], call.out)


@register_rule("aten.addmm", "aten.baddbmm", "aten.addmv")
def addmm(t: Tracer, call: Call) -> State:
    """bias + a @ b."""
    bias, a, b = call.args[:3]
    return replace(_add_bias(t, _matmul(t, a, b, call.out), bias, call.out), scaled_by=sources_of(t, b, bias))


@register_rule("function.scaled_dot_product_attention")
def attention(t: Tracer, call: Call) -> State:
    """softmax(q k^T * scale + mask) v; q (..., N, E), k (..., S, E), v (..., S, E_v)."""
    q, k, v = (call.arg(i, name) for i, name in enumerate(("query", "key", "value")))
    mask = call.arg(3, "attn_mask")
    (state_k, shape_k), (state_v, shape_v) = ((t.state(x), tuple(x.shape)) for x in (k, v))
    if call.arg(7, "enable_gqa", False):
        if k.shape[-1] == v.shape[-1]:  # callers ask for it where the two are equal only, as fused kernels do
            planes = [p for s in (state_k, state_v) for p in s.planes if p.labels.shape[-1] > 1]
            if len(planes) == 2:
                t.store.grid(np.concatenate([p.labels.reshape(-1, k.shape[-1]) for p in planes]))
        state_k, shape_k = _share_heads(state_k, shape_k, q.shape[-3])
        state_v, shape_v = _share_heads(state_v, shape_v, q.shape[-3])
    scores = (*call.out.shape[:-1], k.shape[-2])
    swapped = [*range(k.dim() - 2), k.dim() - 1, k.dim() - 2]
    shape_k = tuple(shape_k[d] for d in swapped)
    state = _contract(t, t.state(q), tuple(q.shape), permute(state_k, swapped), shape_k, scores, q)
    if mask is not None:
        state = meet(t.store, [state, t.state(mask)], [scores, tuple(mask.shape)], scores, t.heads)
    return _contract(t, state, scores, state_v, shape_v, tuple(call.out.shape))


def _share_heads(state: State, shape: Shape, heads: int) -> tuple[State, Shape]:
    """Keys or values (..., kv_heads, S, E) as every query head sees them: (..., heads, S, E)."""
    dim = len(shape) - 3
    times = heads // shape[dim]
    planes = [p.moved(np.repeat(p.labels, times, dim) if p.labels.shape[dim] > 1 else p.labels, p.fast)
              for p in state.planes]  # fmt: skip
    constant = state.constant | ({dim} if shape[dim] == 1 < times else frozenset())
    return state.with_planes(planes, constant), (*shape[:dim], heads, *shape[dim + 1 :])


@register_rule("aten.embedding")
def embedding(t: Tracer, call: Call) -> State:
    """weight (V, C) looked up: the table's rows stay, its columns are channels."""
    w, index = call.args[:2]
    state = t.freeze_dims(w, {0}, "rows of a lookup table")
    n = index.dim()
    planes = [p.moved(p.labels.reshape([1] * n + [-1]), n) for p in state.planes]
    return State(tuple(planes))


@register_rule("aten.index", "aten.index_select")
def index(t: Tracer, call: Call) -> State:
    """Lookup at fixed positions: the indexed dims stay, the others keep their channels."""
    x, out = call.args[0], call.out
    hit = indexed(x, call.args[1]) if call.op == "aten.index" else [call.args[1] % x.dim()]
    if hit is None:
        t.freeze_all(x, "indexed by a tensor")
        return State()
    state = t.freeze_dims(x, set(hit), "indexed by a tensor")
    shift = out.dim() - x.dim()
    planes = []
    for p in state.planes:
        labels = p.labels.squeeze(tuple(hit))
        labels = labels.reshape(*labels.shape[: hit[0]], *[1] * (len(hit) + shift), *labels.shape[hit[0] :])
        planes.append(p.moved(labels, p.fast + (shift if p.fast > hit[-1] else 0)))
    return State(tuple(planes))


@register_rule("aten.gather")
def gather(t: Tracer, call: Call) -> State:
    """Lookup along one dim, element by element: along the other dims table and index meet."""
    x, dim, index = call.args[0], call.args[1] % max(call.args[0].dim(), 1), call.args[2]
    state = t.freeze_dims(x, {dim}, "indexed by a tensor")
    if any(x.shape[d] != index.shape[d] for p in state.planes for d in p.dims):
        return t.freeze_all(x, "indexed by a tensor")
    shape = tuple(index.shape)
    row = tuple(1 if d == dim else s for d, s in enumerate(shape))
    return meet(
        t.store, [State(state.planes, state.constant - {dim}), t.state(index)], [row, shape], shape, t.heads, "first"
    )

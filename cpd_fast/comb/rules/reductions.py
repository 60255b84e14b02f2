"""Normalisation, reductions and pooling; recurrent layers; calls without a rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from cpd_fast.comb.calls import Call, register_rule
from cpd_fast.comb.leaves import leaves
from cpd_fast.comb.planes import State, meet, reshape
from cpd_fast.comb.rules.common import POOLS, indexed, norm_dims, sources_of, tensors_of
from cpd_fast.comb.rules.elementwise import pointwise
from cpd_fast.comb.trace import Tracer


@register_rule(
    *(f"aten.{n}" for n in ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")),
    *(f"aten.{n}" for n in ("cudnn_batch_norm", "_batch_norm_with_update")),
)
def native_batch_norm(t: Tracer, call: Call) -> Any:
    """(x, weight, bias, running mean, running variance, training, ...)."""
    training = call.op != "aten._native_batch_norm_legit_no_training" and call.args[5] is True
    state = _batch_norm(t, call.args[0], call.args[1:3], call.args[3:5], training)
    return [state, *(State() for o in leaves(call.out) if isinstance(o, Tensor))][:-1]


@register_rule("function.batch_norm")
def batch_norm(t: Tracer, call: Call) -> State:
    """F.batch_norm(x, running_mean, running_var, weight, bias, training, ...)."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    x, mean, var, weight, bias, training = (call.arg(i, n) for i, n in enumerate(names))
    return _batch_norm(t, x, (weight, bias), (mean, var), bool(training))


def _batch_norm(t: Tracer, x: Tensor, affine: Any, running: Any, training: bool) -> State:
    """x (N, C, ...) with weight, bias and running statistics (C,)."""
    state = t.state(x)
    given = [p for p in (*affine, *running) if isinstance(p, Tensor)]
    if len(state.planes) == 1 and state.planes[0].dims == (1,) and not state.constant:
        labels = state.planes[0].labels.reshape(-1)
        lines = [q.labels for p in given for q in t.state(p).planes if q.dims == (0,)]
    if len(state.planes) == 1 and state.planes[0].dims == (1,) and not state.constant and len(lines) == len(given):
        for line in lines:
            t.store.unite(labels, line)
    else:
        shape = tuple(s if d == 1 else 1 for d, s in enumerate(x.shape))
        for p in given:
            moved = reshape(t.store, t.state(p), tuple(p.shape), shape)
            state = meet(t.store, [state, moved], [tuple(x.shape), shape], tuple(x.shape), t.heads)
    t.add_site(x, [p for p in t.state(x).planes if set(p.dims) - {1}] if training else [])
    cleared = all(isinstance(p, Tensor) and _cleared(t, p) for p in affine)
    planes = tuple(p.where_zero(cleared if p.dims == (1,) else training) for p in state.planes)
    return State(planes, state.constant, scaled_by=sources_of(t, *affine))


def _cleared(t: Tracer, param: Tensor | None) -> bool:
    """Whether a scale or shift is 0 at removed channels."""
    return param is None or (bool(t.state(param).planes) and all(p.zero for p in t.state(param).planes))


@register_rule("aten.native_layer_norm", "function.layer_norm", "function.rms_norm")
def layer_norm(t: Tracer, call: Call) -> Any:
    """Statistics over the last dims: a mask counts kept channels only."""
    x, shape = call.arg(0, "input"), call.arg(1, "normalized_shape")
    normalised = set(range(x.dim() - len(shape), x.dim()))
    given = (*call.args[2:4], call.kwargs.get("weight"), call.kwargs.get("bias"))
    affine = [p for p in given if isinstance(p, Tensor)]
    t.add_site(x, [p for p in t.state(x).planes if normalised.intersection(p.dims)])
    outs = [o for o in leaves(call.out) if isinstance(o, Tensor)]
    state = t.meet(x, *affine, out=outs[0])
    over = [bool(normalised.intersection(p.dims)) and _cleared(t, (*affine, None, None)[1]) for p in state.planes]
    planes = tuple(replace(p, zero=zero) for p, zero in zip(state.planes, over, strict=True))
    state = replace(state, planes=planes, scaled_by=sources_of(t, *affine))
    return [state, *(_drop(t, x, o) for o in outs[1:])] if isinstance(call.out, (tuple, list)) else state


@register_rule("aten._weight_norm_interface")
def weight_norm(t: Tracer, call: Call) -> Any:
    """g * v / norm(v) with the norm over all dims but one: that one keeps its channels."""
    v, g, dim = call.args[0], call.args[1], call.arg(2, "dim", 0) % call.args[0].dim()
    t.freeze_dims(v, {d for d in range(v.dim()) if d != dim}, "weight_norm runs over this axis")
    t.unmasked.add(t.state(v).source or "")  # g masks the product; rows of zeros have no direction
    state = meet(t.store, [t.state(v), t.state(g)], [tuple(v.shape), tuple(g.shape)], tuple(v.shape), t.heads, "any")
    return [state, t.state(g)]


def _drop(t: Tracer, x: Tensor, out: Tensor) -> State:
    """Statistics of x: same rank, the planes that survive."""
    return State(tuple(p for p in t.state(x).planes if all(out.shape[d] == x.shape[d] for d in p.dims)))


@register_rule("aten.native_group_norm", "aten.group_norm")
def group_norm(t: Tracer, call: Call) -> Any:
    """Statistics over C / groups channels: groups keep equally many."""
    x, composite = call.args[0], call.op == "aten.group_norm"  # (x, groups, weight, bias), in inference mode
    weight, bias = call.arg(1 + composite, "weight"), call.arg(2 + composite, "bias")
    groups = call.args[1] if composite else call.arg(6, "group")
    planes = [p for p in t.state(x).planes if set(p.dims) - {0}]
    if groups > 1:
        for p in planes:
            if p.dims == (1,):
                t.store.grid(p.labels.reshape(groups, -1), whole_rows=False)
            else:
                t.store.freeze(p.labels, "group_norm runs over a grid of channels")
    t.add_site(x, planes)
    state = t.state(x)
    shape = tuple(s if d == 1 else 1 for d, s in enumerate(x.shape))
    for p in (weight, bias):
        if isinstance(p, Tensor):
            moved = reshape(t.store, t.state(p), tuple(p.shape), shape)
            state = meet(t.store, [state, moved], [tuple(x.shape), shape], tuple(x.shape), t.heads)
    zero = _cleared(t, weight) and _cleared(t, bias)
    cleared = tuple(replace(p, zero=zero and p.dims == (1,)) for p in state.planes)
    result = replace(state, planes=cleared, scaled_by=())
    return result if composite else [result, State(), State()]


CHECKS = ("aten.all", "aten.any")


@register_rule(
    *(f"aten.{n}" for n in "sum mean prod amax amin max min var std var_mean std_mean argmax argmin".split()),
    *(f"aten.{n}" for n in "linalg_vector_norm norm logsumexp any all _is_all_true nansum median".split()),
    *(f"aten.{n}" for n in "kthvalue mode aminmax".split()),
)
def reduce(t: Tracer, call: Call) -> Any:
    """Over space or tokens the channels stay; over channels the result would change with their number."""
    x = call.args[0]
    outs = [o for o in leaves(call.out) if isinstance(o, Tensor)]
    position = 2 if call.op in ("aten.linalg_vector_norm", "aten.norm", "aten.kthvalue") else 1
    if call.op in ("aten.max", "aten.min") and len(call.args) > 1 and isinstance(call.args[1], Tensor):
        return pointwise(t, call)
    if call.op == "aten._is_all_true" or (call.op in CHECKS and t.values.of(outs[0]) is not None):
        # known (or taken for granted), however many channels there are
        return State()
    dims = norm_dims(call.arg(position, "dim"), x.dim())
    state = t.tie_rows(x, set(dims))
    t.add_site(x, [p for p in state.planes if set(dims).intersection(p.dims)])
    keep = outs[0].dim() == x.dim()
    zero = not call.op.startswith(("aten.logsumexp", "aten.arg"))
    planes = []
    for p in t.reduce_planes(state.planes, set(dims)):
        labels = p.labels if keep else p.labels.squeeze(tuple(dims))
        moved = p.moved(labels, p.fast if keep else p.fast - sum(d < p.fast for d in dims))
        planes.append(moved.where_zero(p.zero and zero))
    kept = [d for d in range(x.dim()) if d not in dims]
    constant = frozenset((d if keep else kept.index(d)) for d in state.constant if d in kept)
    result = State(tuple(planes), constant)
    if call.op in ("aten.max", "aten.min") and len(outs) > 1:
        t.places(outs[1], [p.labels for p in state.planes if set(dims).intersection(p.dims)])
    return [result] * len(outs) if isinstance(call.out, (tuple, list)) else result


@register_rule(*(f"aten.{n}" for n in "_softmax _log_softmax _safe_softmax softmax log_softmax".split()))
def softmax(t: Tracer, call: Call) -> State:
    """Over a channel axis a mask counts kept channels only; removed ones come out as 0."""
    x = call.args[0]
    dim = call.arg(1, "dim", x.dim() - 1) % x.dim()
    state = t.tie_rows(x, {dim})
    t.add_site(x, [p for p in state.planes if dim in p.dims])
    return replace(
        state, planes=tuple(p.where_zero(dim in p.dims) for p in state.planes), constant=state.constant - {dim}
    )


@register_rule(*(f"aten.{n}" for n in "cumsum cumprod cummax cummin logcumsumexp sort topk".split()))
def ordered(t: Tracer, call: Call) -> Any:
    """Along tokens the channels stay; along channels their order counts."""
    x = call.args[0]
    dim = call.arg(2 if "topk" in call.op else 1, "dim", x.dim() - 1) % x.dim()
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


@register_rule("aten.grid_sampler_2d", "aten.grid_sampler_3d")
def grid_sample(t: Tracer, call: Call) -> State:
    """Looks every channel up at the same places; the places themselves stay."""
    x, grid = call.args[:2]
    t.freeze_all(grid, "places of a grid_sample")
    return State(t.only_dim(x, 1, POOLS).planes)


@register_rule("function.lstm", "function.gru", "function.rnn_tanh", "function.rnn_relu")
def recurrent(t: Tracer, call: Call) -> Any:
    """Recurrent layers keep a list of their weights beside the parameters: they stay whole."""
    for x in tensors_of(call):
        t.freeze_all(x, "runs through a recurrent layer, whose gates are rows of one matrix and stay whole")
    return [State() for o in leaves(call.out) if isinstance(o, Tensor)]


@register_rule("aten._fft_r2c", "aten._fft_c2r", "aten._fft_c2c")
def fourier(t: Tracer, call: Call) -> State:
    """Fourier transforms along dims that carry no channels."""
    return State(
        t.freeze_dims(call.args[0], set(norm_dims(call.args[1], call.args[0].dim())), "fft over this axis").planes
    )


@register_rule("aten.tril", "aten.triu")
def triangle(t: Tracer, call: Call) -> State:
    """Cuts a triangle out of the last two dims."""
    x = call.args[0]
    return t.freeze_dims(x, {x.dim() - 2, x.dim() - 1}, "tril or triu over this axis")


@register_rule(
    *(
        f"aten.{n}"
        for n in "masked_scatter diag_embed renorm linalg_cross _embedding_bag _embedding_bag_forward_only".split()
    ),
    *(f"aten.{n}" for n in "_trilinear nonzero".split()),
)
def not_followed(t: Tracer, call: Call) -> Any:
    """Known, but with no map of channels: what it reads stays whole."""
    for x in tensors_of(call):
        t.freeze_all(x, f"reaches {call.op.split('.')[1].strip('_')}, which has no channel structure")
    if call.op.endswith("_"):
        t.not_zero(call.args[0])
    outs = [o for o in leaves(call.out) if isinstance(o, Tensor)]
    return [State()] * len(outs)


@register_rule(*(f"aten.{n}" for n in "scatter scatter_add scatter_reduce index_add index_copy index_fill".split()))
def written_along(t: Tracer, call: Call) -> Any:
    """Slices or elements written at indices along one dim, which stays; along the others they meet."""
    x, dim, index = call.args[0], call.args[1] % max(call.args[0].dim(), 1), call.args[2]
    others = [v for v in (call.arg(3, "src"), call.kwargs.get("source")) if isinstance(v, Tensor) and v.dim()]
    others += [index] if "scatter" in call.op else []
    unlike = any(o.shape[d] != x.shape[d] for o in others for d in range(x.dim()) if d != dim)
    if unlike or (call.op.endswith("_") and x._is_view()):
        return not_followed(t, call)
    if call.op.endswith("_"):
        t.not_zero(x)
    states = [t.freeze_dims(o, {dim}, "written at indices along this axis") for o in (x, *others)]
    row = tuple(1 if d == dim else s for d, s in enumerate(x.shape))
    states = [State(s.planes, s.constant - {dim}) for s in states]
    return meet(t.store, states, [row] * len(states), row, t.heads)


@register_rule("aten.index_put", "aten._unsafe_index_put")
def index_put(t: Tracer, call: Call) -> Any:
    """x[indices] = number: the indexed dims stay. Other values have no map of channels."""
    x, hit, values = call.args[0], indexed(call.args[0], call.args[1]), call.args[2]
    if hit is None or values.numel() != 1 or (call.op.endswith("_") and x._is_view()):
        return not_followed(t, call)
    if call.op.endswith("_"):
        t.not_zero(x)
    state = t.freeze_dims(x, set(hit), "written at indices along this axis")
    return State(tuple(p.where_zero(False) for p in state.planes), state.constant - set(hit))


@register_rule("aten.diagonal")
def diagonal(t: Tracer, call: Call) -> State:
    """Two dims that carry no channels become a last one."""
    x = call.args[0]
    gone = tuple(call.arg(i, name, default) % x.dim() for i, name, default in ((2, "dim1", 0), (3, "dim2", 1)))
    planes = t.freeze_dims(x, set(gone), "diagonal over this axis").planes
    left = [(p, p.labels.squeeze(gone)[..., None]) for p in planes]
    return State(tuple(p.moved(labels, p.fast - sum(d < p.fast for d in gone)) for p, labels in left))


@register_rule("unknown")
def unknown(t: Tracer, call: Call) -> Any:
    """An operator without a rule, when the user asked to leave such ones whole."""
    for x in tensors_of(call):
        t.freeze_all(x, f"reaches {call.op}, which has no channel rule")
    outs = [o for o in leaves(call.out) if isinstance(o, Tensor)]
    return [State()] * len(outs)

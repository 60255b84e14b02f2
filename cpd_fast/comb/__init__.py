"""Comb a model into coupled channel groups: which channels go together, and which may not go."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

import cpd_fast.comb.rules  # noqa: F401  (fills the rule table)
from cpd_fast.adapters import adapt, register_adapter
from cpd_fast.comb.calls import register_rule
from cpd_fast.comb.forward import run_trace
from cpd_fast.comb.labels import LabelStore
from cpd_fast.comb.meta import clone_to_meta, example_args, has_hooks, tensor_names
from cpd_fast.comb.planes import Plane, State, freeze_dims
from cpd_fast.comb.resolve import fingerprint, resolve
from cpd_fast.comb.trace import Tracer
from cpd_fast.comb.training import TrainingWatch
from cpd_fast.comb.walk import named_tensors
from cpd_fast.errors import CpdError, PlanError, TraceError
from cpd_fast.types import ChannelGraph, CostTerm, NormSite, ScaleSite, TensorMap, TraceStep
from cpd_fast.wrappers import unwrap

__all__ = ["comb", "register_adapter", "register_rule"]


def comb(
    model: nn.Module,
    example_inputs: Any,
    ignore: Iterable[str | nn.Module] = (),
    on_unknown: str = "error",
    granularity: str = "dim",
    conv_groups: str = "channel",
    strict: frozenset[str] = frozenset(),
) -> ChannelGraph:
    """Find the coupled channel groups of a model, as far as a trace alone shows them.

    The model is run once in eval mode on a copy without weights (meta device), what reads ``training`` in train mode
    too, and channels are followed through every operator. ``cpd_fast.comb`` does this and then rehearses a compaction;
    it explains the arguments. ``strict`` names modules in which sliced channel axes stay whole.

    Raises:
        UnsupportedOpError: An operator has no rule and ``on_unknown="error"``.
        TraceError: The forward fails on the example inputs, or its path depends on data.
        ValueError: ``on_unknown``, ``granularity`` or ``conv_groups`` is none of the choices.
    """
    for value, choices, what in (
        (on_unknown, ("error", "freeze"), "on_unknown"),
        (granularity, ("dim", "head"), "granularity"),
        (conv_groups, ("channel", "group"), "conv_groups"),
    ):
        if value not in choices:
            raise ValueError(f"{what}: expected one of {', '.join(choices)}, got {value!r}")
    model = unwrap(model)
    try:
        return _comb(model, example_inputs, ignore, on_unknown, granularity, conv_groups, strict, hooks=False)
    except TraceError:
        if not has_hooks(model):
            raise
        return _comb(model, example_inputs, ignore, on_unknown, granularity, conv_groups, strict, hooks=True)


def _comb(
    model: nn.Module,
    example_inputs: Any,
    ignore: Iterable[str | nn.Module],
    on_unknown: str,
    granularity: str,
    conv_groups: str,
    strict: frozenset[str],
    hooks: bool,
) -> ChannelGraph:
    """Trace and resolve; without hooks, because the user's own need not run on meta tensors."""
    _, aliases = tensor_names(model)
    tensors_by_name = named_tensors(model)
    shapes = {n: tuple(t.shape) for n, t in tensors_by_name}
    store = LabelStore()
    planes: dict[str, list[Plane]] = {}
    unmasked: set[str] = set()
    heads = granularity == "head"
    whole = conv_groups == "group"
    eval_trace = _trace(model, example_inputs, store, planes, unmasked, on_unknown, heads, whole, False, hooks, strict)
    train_trace = eval_trace
    if eval_trace.watch is None or eval_trace.watch.matters:
        train_trace = _trace(
            model, example_inputs, store, planes, unmasked, on_unknown, heads, whole, True, hooks, strict
        )
    order = list(dict.fromkeys([*eval_trace.order, *train_trace.order]))
    _freeze_ignored(model, ignore, planes, store)
    sites = {(s.module, s.op, s.call): s for s in [*train_trace.sites, *eval_trace.sites]}
    scale_sites = _scale_sites(planes, eval_trace)
    resolved = resolve(store, planes, order)

    converted: dict[int, tuple[np.ndarray, ...]] = {}  # many tensors share a label array

    def to_maps(arrays: Iterable[np.ndarray]) -> tuple[np.ndarray, ...]:
        maps: tuple[np.ndarray, ...] = ()
        for a in arrays:
            if id(a) not in converted:
                ids = resolved.channel[a]
                converted[id(a)] = (ids,) if (ids >= 0).any() else ()
            maps += converted[id(a)]
        return maps

    parameters = {n: t for n, t in tensors_by_name if isinstance(t, nn.Parameter)}
    tensors = {
        n: TensorMap(n, shapes[n], to_maps(p.labels for p in planes[n]), n in parameters, n not in unmasked)
        for n in order
    }
    used = set(order)
    mapped = {n for n, t in tensors.items() if t.maps and t.is_parameter}
    terms = tuple(
        CostTerm(t.kind, t.module, *_fold(t.coefficient, t.planes, resolved.channel)) for t in eval_trace.terms
    )
    steps = tuple(
        TraceStep(s.op, s.module, s.shape, to_maps(s.planes), s.constants, _rows_that_scale(planes, s.scaled), s.loose)
        for s in eval_trace.steps
    )
    return ChannelGraph(
        groups=resolved.groups,
        tensors={n: t for n, t in tensors.items() if t.maps},
        terms=terms,
        steps=steps,
        norm_sites=tuple(NormSite(s.module, s.op, s.call, resolved.channel[s.labels]) for s in sites.values()),
        scale_sites=tuple(replace(s, channels=resolved.channel[s.channels]) for s in scale_sites),
        aliases=aliases,
        fingerprint=fingerprint(shapes, resolved.groups),
        inputs=example_args(example_inputs),
        output_shapes=eval_trace.output_shapes,
        needs_hooks=hooks,
        heads=heads,
        hopes=frozenset(eval_trace.hopes | train_trace.hopes),
        unused=tuple(n for n in parameters if n not in used),
        untouched=sum(p.numel() for n, p in parameters.items() if n not in mapped),
    )


def _fold(coefficient: int, planes: tuple[np.ndarray, ...], channel: np.ndarray) -> tuple[int, tuple[np.ndarray, ...]]:
    """Planes without channels become part of the coefficient."""
    maps = [channel[p] for p in planes]
    kept = [m for m in maps if (m >= 0).any()]
    covered = {d for m in kept for d, s in enumerate(m.shape) if s > 1}
    gone: dict[int, int] = {}
    for m in maps:
        gone |= {d: s for d, s in enumerate(m.shape) if s > 1 and d not in covered}
    return coefficient * int(np.prod(list(gone.values()), dtype=object)), tuple(kept)


def _trace(
    model: nn.Module,
    example_inputs: Any,
    store: LabelStore,
    planes: dict[str, list[Plane]],
    unmasked: set[str],
    on_unknown: str,
    heads: bool,
    whole_conv_groups: bool,
    training: bool,
    hooks: bool,
    strict: frozenset[str],
) -> Tracer:
    clone = clone_to_meta(model, hooks=hooks).train(training)
    adapt(clone)
    watch = None if training or hooks else TrainingWatch(clone)
    if watch is not None and watch.matters:
        watch = None
    ids, _ = tensor_names(clone)
    tracer = Tracer(store, ids, planes, heads, unmasked)
    tracer.on_unknown, tracer.whole_conv_groups, tracer.strict = on_unknown, whole_conv_groups, strict
    tracer.watch = watch
    args, kwargs = example_args(example_inputs)
    try:
        out = run_trace(clone, args, kwargs, tracer)
    except CpdError:
        raise
    except Exception as e:
        if training:  # e.g. BatchNorm over one value; what eval mode showed stands
            return tracer
        raise TraceError(
            f"the forward failed on the example inputs (eval mode, meta device) {tracer.where()}: {e}"
        ) from e
    for t in out:
        freeze_dims(store, tracer.state(t), set(range(t.dim())), "is an output of the model")
    return tracer


def _freeze_ignored(
    model: nn.Module, ignore: Iterable[str | nn.Module], planes: dict[str, list[Plane]], store: LabelStore
) -> None:
    by_id = {id(m): n for n, m in model.named_modules()}
    for item in [ignore] if isinstance(ignore, (str, nn.Module)) else ignore:
        if isinstance(item, nn.Module):
            name = by_id.get(id(item))
            if name is None:
                raise PlanError(f"ignore: {type(item).__name__} is not a module of this model")
            patterns = [f"{name}.*" if name else "*"]
        else:
            patterns = [item, f"{item}.*"]
        hit = [n for n in planes if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        if not hit:
            raise PlanError(f"ignore: {item!r} matches no module or parameter that the forward uses")
        for n in hit:
            for p in planes[n]:
                store.freeze(p.labels, "ignored on request")


def _scale_sites(planes: dict[str, list[Plane]], tracer: Tracer) -> list[ScaleSite]:
    """Attention calls whose scale follows head_dim: how compaction can keep it."""
    sites = []
    for call in tracer.attention:
        plane = next((p for p in call.q.planes if p.labels.shape[-1] > 1), None)
        if plane is None:
            continue
        labels = plane.labels.reshape(-1, plane.labels.shape[-1])
        labels = labels[np.sort(np.unique(labels, axis=0, return_index=True)[1])]
        sites.append(ScaleSite(call.module, call.call, labels, call.q.identity, _rows_that_scale(planes, call.q)))
    return sites


def _rows_that_scale(planes: dict[str, list[Plane]], state: State | None) -> tuple[tuple[str, np.ndarray], ...]:
    """Rows of the parameters that a tensor is linear in: scaling them scales the tensor."""
    if state is None or not state.scaled_by or not state.planes:
        return ()
    labels = np.unique(np.concatenate([p.labels.reshape(-1) for p in state.planes]))
    rows: list[tuple[str, np.ndarray]] = []
    for name in state.scaled_by:
        if rows:  # the bias has the rows of the weight
            rows.append((name, rows[0][1]))
            continue
        hit = [np.flatnonzero(np.isin(p.labels.reshape(-1), labels)) for p in planes.get(name, ()) if p.dims == (0,)]
        if not hit or not len(hit[0]):
            return ()
        rows.append((name, hit[0]))
    return tuple(rows)

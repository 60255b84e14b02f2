"""Calls that wire several rooms together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from cpd_fast.comb import comb as trace_groups
from cpd_fast.comb.meta import collection_paused
from cpd_fast.compact import rehearse, trial_plan
from cpd_fast.errors import CompactError, TraceError
from cpd_fast.schedule import plan_cost
from cpd_fast.types import ChannelGraph, Cost, CoupledGroup, PrunePlan
from cpd_fast.wrappers import unwrap


@collection_paused()
def comb(
    model: nn.Module,
    example_inputs: Any,
    ignore: Iterable[str | nn.Module] = (),
    on_unknown: str = "error",
    granularity: str = "dim",
    conv_groups: str = "channel",
    protect: Iterable[str] = (),
) -> ChannelGraph:
    """Find the coupled channel groups of a model, and rehearse a compaction of them.

    The model is run on a copy without weights (meta device), in eval mode and, as far as its modules read
    ``training``, in train mode, and channels are followed through every operator. Then an uneven plan is compacted,
    also without weights: where a module's forward holds a size that cannot be repaired, the groups that reach it are
    frozen, with that reason. The model is not touched.

    Args:
        model: Any ``nn.Module``; wrappers of DDP and ``torch.compile`` are looked through.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments for one forward.
        ignore: Modules, or names and ``fnmatch`` patterns of modules and parameters, whose own tensors keep their
            shapes.
        on_unknown: What an operator without a channel rule means: ``"error"``, or ``"freeze"`` to keep every channel
            that reaches it.
        granularity: What a channel of an attention is: ``"dim"``, one dim of each head (every head keeps equally
            many), or ``"head"``, a whole head.
        conv_groups: What a channel of a grouped convolution is: ``"channel"``, one input or output of each conv group
            (every conv group keeps equally many), or ``"group"``, a whole conv group; then ``groups`` shrinks.
        protect: ``"first"``, ``"last"`` or both: layers that stay whole; see :meth:`ChannelGraph.protect`.

    Returns:
        The graph: groups, reasons for what is frozen, and what is needed to mask, compact and count costs.

    Raises:
        UnsupportedOpError: An operator has no rule and ``on_unknown="error"``.
        TraceError: The forward fails on the example inputs, or its path depends on data.
        ValueError: ``on_unknown``, ``granularity`` or ``conv_groups`` is none of the choices.
        PlanError: ``ignore`` matches nothing, or ``protect`` is none of its choices.

    Source: the coupling of CPD (arXiv:2408.03046, section III-B), generalised to single indices.

    Example:
        >>> import torch, cpd_fast as cpd
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> graph = cpd.comb(net, torch.zeros(1, 3, 8, 8))
        >>> [(g.name, g.n_channels) for g in graph.prunable_groups]
        [('0', 8)]
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"comb: expected a torch.nn.Module, got {type(model).__name__}")
    strict: frozenset[str] = frozenset()
    ignore = [ignore] if isinstance(ignore, (str, nn.Module)) else list(ignore)
    protected = [protect] if isinstance(protect, str) else list(protect)
    graph = trace_groups(model, example_inputs, ignore, on_unknown, granularity, conv_groups)
    graph = graph.protect(*protected)
    options = _options(model, ignore, on_unknown, granularity, conv_groups)
    failed: set[str] = set()
    while graph.prunable_groups:
        try:
            uneven = trial_plan(graph, lambda n: 0.45 + 0.4 * ((n * 0.618) % 1))
            if rehearse(model, graph, uneven):  # the way to the sizes depended on the plan
                rehearse(model, graph, trial_plan(graph, lambda n: 0.5))
            break
        except CompactError as e:
            dashed = _dashed(graph.hopes, unwrap(model), e.module or "")
            if dashed:
                strict |= dashed
                graph = trace_groups(model, example_inputs, ignore, on_unknown, granularity, conv_groups, strict)
                graph = graph.protect(*protected)
                failed.clear()
                continue
            graph = _freeze_around(graph, unwrap(model), e.module or "", widely=e.module in failed)
            failed.add(e.module or "")
    return replace(graph, options=options, _by_name={})


def _options(model: nn.Module, ignore: Iterable[str | nn.Module], *choices: str) -> dict[str, Any]:
    """What :func:`comb` was told beside its defaults, as plain values."""
    given = dict(zip(("on_unknown", "granularity", "conv_groups"), choices, strict=True))
    options: dict[str, Any] = {k: v for k, v in given.items() if v not in ("error", "dim", "channel")}
    names = {id(m): n for n, m in unwrap(model).named_modules()}
    if ignored := [i if isinstance(i, str) else names[id(i)] or "*" for i in ignore]:
        options["ignore"] = ignored
    return options


def _dashed(hopes: frozenset[str], model: nn.Module, module: str) -> frozenset[str]:
    """The modules with slices among the failing one, its likes, and what is near it in the module tree."""
    kind, near = type(model.get_submodule(module)), module.rpartition(".")[0]
    return frozenset(
        h for h in hopes if type(model.get_submodule(h)) is kind or h.startswith(near) or module.startswith(h)
    )


def _freeze_around(graph: ChannelGraph, model: nn.Module, module: str, widely: bool) -> ChannelGraph:
    """Freeze the groups that live inside the failing module and its likes, or (widely) all that reach them."""
    owner = model.get_submodule(module)
    alike = [module]
    if not type(owner).__module__.startswith("torch.nn.modules.") or isinstance(owner, nn.MultiheadAttention):
        alike = [name for name, m in model.named_modules() if type(m) is type(owner)]
    prefixes = tuple(f"{name}." if name else "" for name in alike)

    def hit(group: CoupledGroup) -> bool:
        inside = [s.param.startswith(prefixes) for s in group.slices]
        return any(inside) if widely or not module else all(inside)

    chosen = [g for g in graph.prunable_groups if hit(g)]
    ties = {g.tie for g in chosen if g.tie}
    names = {g.name for g in graph.prunable_groups if g in chosen or g.tie in ties}
    if not module and not names:
        names = {g.name for g in graph.prunable_groups}
    if not names:
        if widely:  # nothing reaches the module itself: what its parent shares with it
            return _freeze_around(graph, model, module.rpartition(".")[0], widely=True)
        return _freeze_around(graph, model, module, widely=True)
    reason = f"{module or 'the model'} holds a size that could not be repaired"
    groups = [replace(g, prunable=False, reason=reason) if g.name in names else g for g in graph.groups]
    return replace(graph, groups=tuple(groups), _by_name={})


def cost(
    model: nn.Module, example_inputs: Any, plan: PrunePlan | None = None, graph: ChannelGraph | None = None
) -> Cost:
    """What one forward costs, dense or under a plan; the pruned model is not built.

    Args:
        model: The model.
        example_inputs: Tensor, tuple of arguments or dict of keyword arguments; the costs are for this input.
        plan: Kept channels; None for the model as it is.
        graph: The model's graph at ``example_inputs``, if at hand: saves the trace.

    Returns:
        Parameters, MACs and activation bytes, exact integers; under a plan equal to those of the compacted model.

    Raises:
        PlanError: If the plan belongs to another model.
        TraceError: If the forward fails on the example inputs.

    Example:
        >>> import torch, cpd_fast as cpd
        >>> cpd.cost(torch.nn.Linear(4, 2), torch.zeros(1, 4))
        Cost(params=10, macs=8, activation_bytes=8)
    """
    if graph is None:
        graph = comb(model, example_inputs, on_unknown="error" if plan is not None else "freeze")
    if plan is not None:
        plan.check(graph)
    return plan_cost(graph, plan)

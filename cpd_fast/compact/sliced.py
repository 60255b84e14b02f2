"""Compaction without the proof, for the thousand candidates of a search: weights are cut and nothing is replayed."""

from __future__ import annotations

from torch import nn

from cpd_fast.adapters import adapt
from cpd_fast.compact.compact import _check_model, _copy_cut, cut_on_meta, drop_mask_hooks
from cpd_fast.compact.repair import repair_known
from cpd_fast.compact.replay import Replayer
from cpd_fast.compact.shrink import make_cut
from cpd_fast.types import ChannelGraph, PrunePlan
from cpd_fast.wrappers import unwrap


def can_slice(model: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> bool:
    """Whether cutting weights is all that compaction of this model takes.

    It is where the layers' own sizes (which follow from their weights) are the only ones in the forward, and nothing
    has to be rescaled. A forward that stands the test under ``plan`` holds no size of a group that ``plan`` shrinks.

    Args:
        model: The model that ``graph`` was combed from.
        graph: Its coupled channel groups.
        plan: A plan that shrinks every prunable group, by different shares.
    """
    alive = graph.alive(plan)
    if any(not alive[s.channels].all() for s in graph.scale_sites):
        return False
    model = unwrap(model)
    small = cut_on_meta(model, graph, alive)
    repair_known(small, graph, alive)
    result = Replayer(small, graph, alive, frozenset()).run()
    return result.error is None and not result.scales and not result.resizes


def sliced(model: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> nn.Module:
    """What :func:`compact` returns for models that :func:`can_slice`, without its proof.

    Args:
        model: The model that ``graph`` was combed from.
        graph: Its coupled channel groups.
        plan: Kept channels.

    Returns:
        A smaller copy, in the mode of ``model``.

    Raises:
        PlanError: If plan, graph and model do not fit together.
    """
    model = unwrap(model)
    plan.check(graph)
    _check_model(model, graph)
    alive = graph.alive(plan)
    cuts = {n: c for n, t in graph.tensors.items() if (c := make_cut(t, alive)) is not None}
    small = _copy_cut(model, graph, cuts, {})
    adapt(small, lambda name: any(not name or n.startswith(f"{name}.") for n in cuts))
    drop_mask_hooks(small)
    repair_known(small, graph, alive)
    return small

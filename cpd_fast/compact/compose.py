"""Two compactions, one after the other, as one plan for the original."""

from __future__ import annotations

import numpy as np

from cpd_fast.compact.shrink import box_shape
from cpd_fast.errors import PlanError
from cpd_fast.types import ChannelGraph, PrunePlan, TensorMap


def compose_plans(first: ChannelGraph, plan: PrunePlan, second: ChannelGraph, then: PrunePlan) -> PrunePlan:
    """The plan for the original network that does at once what two compactions did one after the other.

    A network that was compacted, trained and combed again has groups and channel numbers of its own. The composed plan
    is in terms of the original, so that :func:`cpd_fast.save` and :func:`cpd_fast.load` need nothing in between.

    Args:
        first: Graph of the original.
        plan: What the first compaction kept of it.
        second: Graph of the network that the first compaction left.
        then: What the second compaction kept of that.

    Returns:
        Kept channels of the original's groups; checked to keep exactly the elements of every tensor that the two
        compactions keep.

    Raises:
        PlanError: If a plan does not fit its graph, ``second`` is not the graph of what the first compaction left, or
            the second compaction removed something that no channel of the original owns.

    Example:
        >>> import torch, cpd_fast as cpd
        >>> x = torch.zeros(1, 4)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> first = cpd.comb(net, x)
        >>> plan = cpd.PrunePlan({"0": [1, 3, 5, 7]}, first.fingerprint)
        >>> second = cpd.comb(cpd.compact(net, first, plan), x)
        >>> then = cpd.PrunePlan({"0": [0, 3]}, second.fingerprint)
        >>> compose_plans(first, plan, second, then)["0"]
        (1, 7)
    """
    plan.check(first)
    then.check(second)
    alive, alive_then = first.alive(plan), second.alive(then)
    gone = ~alive
    for tensor in first.tensors.values():
        after = second.tensors.get(tensor.name)
        if after is not None:
            gone |= _removed_by_second(tensor, alive, after, alive_then)
    composed = PrunePlan(
        {
            g.name: np.flatnonzero(~gone[g.offset : g.offset + g.n_channels]).tolist()
            for g in first.groups
            if gone[g.offset : g.offset + g.n_channels].any()
        },
        first.fingerprint,
    )
    composed.check(first)
    _check_elements(first, alive, second, alive_then, first.alive(composed))
    return composed


def _removed_by_second(tensor: TensorMap, alive: np.ndarray, after: TensorMap, alive_then: np.ndarray) -> np.ndarray:
    """Channels of the original all of whose remaining elements in one tensor go: bool, one entry a channel.

    Raises:
        PlanError: If the first plan leaves another shape than the second graph has.
    """
    gone = np.zeros_like(alive)
    keep = _kept(tensor, alive)
    if tuple(box_shape(keep)) != after.shape:
        raise PlanError(
            f"{tensor.name}: the first plan leaves shape {tuple(box_shape(keep))}, the second graph has {after.shape}; "
            "comb the network that the first compaction returned"
        )
    for ids in tensor.maps:
        dims = [d for d, size in enumerate(ids.shape) if size > 1]
        left = np.broadcast_to(ids, tensor.shape)[keep].reshape(after.shape)
        stays = np.ones(after.shape, bool)
        for m in after.maps:
            if all(size == 1 or d in dims for d, size in enumerate(m.shape)):
                stays &= alive_then[m]
        kept = np.zeros_like(alive)
        kept[left[stays]] = True
        touched = np.zeros_like(alive)
        touched[left] = True
        gone |= touched & ~kept
    gone[-1] = False  # answers for elements without a channel
    return gone


def _check_elements(
    first: ChannelGraph, alive: np.ndarray, second: ChannelGraph, alive_then: np.ndarray, composed: np.ndarray
) -> None:
    """Hold the elements that the composed plan keeps of every tensor against those of the two compactions.

    Raises:
        PlanError: If they differ.
    """
    for tensor in first.tensors.values():
        wanted = _kept(tensor, alive)
        after = second.tensors.get(tensor.name)
        if after is not None:
            wanted[wanted] = _kept(after, alive_then).reshape(-1)
        if not np.array_equal(wanted, _kept(tensor, composed)):
            raise PlanError(
                f"{tensor.name}: the second compaction removed elements that no channel of the original owns; "
                "the two plans cannot be one: keep both files, or prune the original once"
            )
    for name, after in second.tensors.items():
        if name not in first.tensors and not _kept(after, alive_then).all():
            raise PlanError(f"{name}: no channel of the original runs through it, but the second compaction cut it")


def _kept(tensor: TensorMap, alive: np.ndarray) -> np.ndarray:
    keep = np.ones(tensor.shape, bool)
    for m in tensor.maps:
        keep &= alive[m]
    return keep

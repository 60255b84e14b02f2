"""Plans that are made to be tried: whether sizes can be repaired shows on them."""

from __future__ import annotations

from collections.abc import Callable

from cpd_fast.types import ChannelGraph, PrunePlan


def trial_plan(graph: ChannelGraph, share: Callable[[int], float]) -> PrunePlan:
    """Group number ``n`` keeps the first ``share(n)`` of every block, at least one channel; tied groups keep alike.

    Shares that differ let no size stand in for another by chance; equal ones leave sizes equal that were.
    """
    kept: dict[str, list[int]] = {}
    shares: dict[str, float] = {}
    for n, group in enumerate(graph.prunable_groups):
        keep = shares.setdefault(group.tie or group.name, share(n))
        kept[group.name] = sorted(int(c) for b in group.blocks for c in b[: max(1, int(len(b) * keep))])
    return PrunePlan(kept, graph.fingerprint)

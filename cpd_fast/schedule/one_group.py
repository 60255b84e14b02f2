"""The schedule of CPD's released code: at the end of an interval, a few channels of the one least important group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from cpd_fast.errors import PlanError
from cpd_fast.schedule.plan import _build, _score_arrays, _units, holds
from cpd_fast.types import ChannelGraph, CoupledGroup, PrunePlan, Scores, Target

_OPTIONS = {"max_pruning_ratio": 0.95, "min_channels": 1, "normalize": "auto"}


@dataclass(frozen=True)
class OneGroup:
    """Every ``interval`` iterations remove the k lowest channels of the single group where these sum to the least.

    k is what the release uses: for a plain group the largest power of two up to a sixteenth of what it still has,
    from 1 to 4; for grouped convolutions and attention one channel of every conv group or head; 32 for the hidden
    channels of a feed-forward network (one matrix in, one out); as many as there are heads for the embedding of a
    transformer. Sums are compared as they are, so a group with a large k goes late. There is no ramp: it ends at the
    first removal after which the target holds, and how long that takes depends on the network.

    Attributes:
        interval: Training iterations between two removals, at least 1.
        k: Channels a removal by ``fnmatch`` pattern of group names, where the rule above is not wanted, e.g.
            ``{"decode_head.psp*": 16}`` as in the released DeiT-S configuration.
        warmup: Iterations before the first interval begins.

    Raises:
        PlanError: If an argument is out of range.

    Source: code released with arXiv:2408.03046 (pruning hook and pruners).

    Example:
        >>> OneGroup().interval
        50
    """

    interval: int = 50
    k: Mapping[str, int] = field(default_factory=dict)
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.interval < 1 or self.warmup < 0 or any(v < 1 for v in self.k.values()):
            raise PlanError(
                f"OneGroup: interval and every k must be at least 1 and warmup at least 0, got {self.interval}, "
                f"{dict(self.k)} and {self.warmup}"
            )

    def is_over(
        self, events: int, graph: ChannelGraph, now: PrunePlan, final: Target, options: Mapping[str, Any]
    ) -> bool:
        """Whether the target holds."""
        return holds(graph, final, now, options.get("latency"))

    def next_plan(
        self,
        event: int,
        graph: ChannelGraph,
        scores: Scores | Mapping[str, Tensor],
        final: Target,
        dense: Mapping[str, float],
        start: PrunePlan,
        options: Mapping[str, Any],
    ) -> PrunePlan:
        """What one more removal leaves of ``start``.

        Raises:
            PlanError: If no group has channels left to give, or an option is none of this schedule's.
        """
        chosen = {**_OPTIONS, **{k: v for k, v in options.items() if k != "latency"}}
        if set(chosen) != set(_OPTIONS):
            raise PlanError(
                f"OneGroup: {', '.join(sorted(set(chosen) - set(_OPTIONS)))}: the released rule knows only "
                f"{', '.join(_OPTIONS)}; use Greedy for the rest"
            )
        arrays = _score_arrays(graph, scores, chosen["normalize"])
        ratio, least = chosen["max_pruning_ratio"], chosen["min_channels"]
        units = _units(graph, arrays, graph.alive(start), 1, ratio, least)
        sums = []
        for unit in units:
            steps = min(self.channels_of(graph, unit.blocks[0].group, unit.counts[0]), len(unit.counts) - 1)
            sums.append((sum(unit.keys[:steps]) if steps else math.inf, steps))
        lowest = min(range(len(units)), key=lambda i: sums[i][0])
        if math.isinf(sums[lowest][0]):
            raise PlanError(
                f"OneGroup: every group is down to min_channels={least} or max_pruning_ratio={ratio} and the target "
                f"{final} does not hold yet; raise the target or loosen these"
            )
        taken = [(u, u.counts[sums[i][1] if i == lowest else 0]) for i, u in enumerate(units)]
        return _build(graph, taken, start)

    def channels_of(self, graph: ChannelGraph, group: CoupledGroup, left: int) -> int:
        """k of a group whose blocks have ``left`` channels each, counted a block."""
        for pattern, k in self.k.items():
            if fnmatchcase(group.name, pattern):
                return k
        if group.balance is not None:
            return 1
        weights = [s for s in group.slices if len(graph.tensors[s.param].shape) > 1]
        made, read = [s for s in weights if s.produces], [s for s in weights if not s.produces]
        matrices = [s for s in weights if len(graph.tensors[s.param].shape) == 2]
        if len(made) == 1 and len(read) == 1 and len(matrices) == 2:
            return 32
        if len(made) > 1 and any(s.produces for s in matrices):
            return max((len(g.blocks) for g in graph.groups if g.tie is not None), default=1)
        return min(max(2 ** int(math.log2(max(left, 1) / 16)), 1) if left >= 16 else 1, 4)

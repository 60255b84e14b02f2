"""When channels go: a few per interval of ordinary training, along a ramp that ends at the target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cpd_fast.errors import PlanError
from cpd_fast.schedule.plan import plan
from cpd_fast.types import ChannelGraph, PrunePlan, Scores, Target

_RAMPS = ("cubic", "linear", "cosine")


@dataclass(frozen=True)
class Greedy:
    r"""Every ``interval`` training iterations remove the lowest channels of all, until the target holds.

    After event i of n, what remains of each cost is at most 1 - (1 - target) * r(i / n), with r(t) = 1 - (1 - t)^3
    (cubic: much at first, when the network is redundant, little at the end), r(t) = t (linear) or
    r(t) = (1 - cos(pi t)) / 2 (cosine: slow at both ends).

    Attributes:
        interval: Training iterations between two removals, at least 1; scores accumulate over them.
        steps: Number of removals n, at least 1.
        ramp: ``"cubic"``, ``"linear"`` or ``"cosine"``.
        warmup: Iterations before the first interval begins, at least 0; nothing is scored in them.

    Raises:
        PlanError: If an argument is out of range.

    Source: interval pruning of arXiv:2408.03046 (CPD; 50 iterations in its released DeiT-S config); the cubic ramp is
    that of Zhu & Gupta, arXiv:1710.01878, eq. 1, from 0.

    Example:
        >>> [round(Greedy(steps=4).progress(i), 3) for i in range(5)]
        [0.0, 0.578, 0.875, 0.984, 1.0]
    """

    interval: int = 50
    steps: int = 10
    ramp: str = "cubic"
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.interval < 1 or self.steps < 1:
            raise PlanError(f"Greedy: interval and steps must be at least 1, got {self.interval} and {self.steps}")
        if self.warmup < 0:
            raise PlanError(f"Greedy: warmup must be at least 0 iterations, got {self.warmup}")
        if self.ramp not in _RAMPS:
            raise PlanError(f"Greedy: ramp={self.ramp!r}: expected one of {', '.join(_RAMPS)}")

    def progress(self, event: int) -> float:
        """Share of the way to the target after ``event`` removals, in [0, 1]."""
        t = min(max(event / self.steps, 0.0), 1.0)
        return {"cubic": 1 - (1 - t) ** 3, "linear": t, "cosine": (1 - math.cos(math.pi * t)) / 2}[self.ramp]

    def is_over(
        self, events: int, graph: ChannelGraph, now: PrunePlan, final: Target, options: Mapping[str, Any]
    ) -> bool:
        """Whether nothing more will be removed after ``events`` removals."""
        return events >= self.steps

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
        """What removal number ``event`` (from 1) leaves of ``start``; ``options`` are those of :func:`plan`.

        Raises:
            PlanError: If the target cannot be reached.
        """
        return plan(graph, scores, self.target(event, final, dense), start=start, **options)

    def target(self, event: int, final: Target, dense: Mapping[str, float]) -> Target:
        """What must hold after ``event`` removals.

        Args:
            event: Removals including this one.
            final: The target at the end.
            dense: The dense model's value of every limit in ``final``, by its name.

        Returns:
            ``final`` itself at the end; fractions of the dense model before.
        """
        share = self.progress(event)
        if share >= 1:
            return final
        left = {name: min(v if v <= 1 else v / dense[name], 1.0) for name, v in final.given.items()}
        return Target(**{name: 1 - (1 - fraction) * share for name, fraction in left.items()})

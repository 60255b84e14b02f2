"""Candidates of a search: any keep ratios become the plan on a target's limit that has their proportions.

A *unit* is a group, or tied groups, which keep equally many channels in each of their blocks. One ratio a unit says how
wide the units are relative to each other; one common scale is solved for such that the limits hold, and then every
channel that still fits is given back. No draw is thrown away, whatever the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil

import numpy as np
from torch import Tensor

from cpd_fast.errors import PlanError
from cpd_fast.schedule.cost import counter
from cpd_fast.schedule.plan import (
    Latency,
    _build,
    _check_arguments,
    _limits,
    _score_arrays,
    _Unit,
    _units,
)
from cpd_fast.types import ChannelGraph, Cost, PrunePlan, Scores, Target

_BISECTIONS = 50  # of the common scale: to the last bit of what can move a channel


class CandidateSpace:
    r"""All plans of a graph that lie on a target's limit, by keep ratios.

    A plan of this space is *tight*: it holds every limit, and one more step of any unit (a channel a block, or
    ``round_to`` of them) would break one, except for units that keep everything.

    Args:
        graph: The channel graph.
        scores: Importance of every channel, fp32 ``(n_channels,)`` by group: which channels a unit keeps.
        target: What may remain: fractions of the dense model up to 1, absolute numbers above 1.
        max_pruning_ratio: Most that a block may lose, in [0, 1]; a number or group name -> number.
        min_channels: Fewest channels that a block may keep, a number or a share below 1; or group name -> that.
        round_to: Kept channels of a touched block are a multiple of this.
        latency: ``plan -> milliseconds``, needed by ``Target(latency_ms=)``; must not grow when channels go.

    Attributes:
        names: Name of each unit: of its first group.
        lowest: Smallest keep ratio of each unit, in (0, 1].

    Raises:
        PlanError: If nothing is prunable or the target cannot be reached; says the range that can.
        ScoreError: If scores are missing, not finite, of the wrong shape, or of another model.

    Source: the random strategies of EagleEye (Li et al., arXiv:2007.02491, section 3.2). The paper draws until a draw
    lies within 0.5 % of the target; here the common scale is solved for.

    Example:
        >>> import torch, cpd_fast as cpd
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> graph = cpd.comb(net, torch.zeros(1, 4))
        >>> space = CandidateSpace(graph, cpd.score(net, graph, criterion=cpd.Magnitude()), Target(macs=0.5))
        >>> space.counts([1.0, 0.4])  # of the wanted shape, and at most half of the 112 MACs
        (7, 3)
        >>> cpd.cost(net, torch.zeros(1, 4), space.plan((7, 3)), graph).macs
        55
    """

    def __init__(
        self,
        graph: ChannelGraph,
        scores: Scores | Mapping[str, Tensor],
        target: Target,
        *,
        max_pruning_ratio: float | Mapping[str, float] = 0.95,
        min_channels: float | Mapping[str, float] = 1,
        round_to: int = 1,
        latency: Latency | None = None,
    ) -> None:
        if not isinstance(target, Target):
            raise PlanError(f"target: expected a Target such as Target(macs=0.5), got {target!r}")
        _check_arguments(round_to, "none", None)
        self.graph, self.target = graph, target
        arrays = _score_arrays(graph, scores, "none")
        self._whole = graph.alive(None)
        self._units: list[_Unit] = _units(graph, arrays, self._whole, round_to, max_pruning_ratio, min_channels)
        self._limits = _limits(graph, target, latency)
        self._needs_plan = any(limit.latency is not None for limit in self._limits)
        self.names = tuple(u.blocks[0].group.name for u in self._units)
        self.sizes = tuple(u.size for u in self._units)
        self.lowest = tuple(u.counts[-1] / u.size for u in self._units)
        self._steps = [np.array(u.counts[::-1], np.int64) for u in self._units]  # what each may keep, rising
        floor = tuple(int(s[0]) for s in self._steps)
        if not self.holds(floor):
            raise PlanError(self._unreachable(floor))

    # ------------------------------------------------------------------------------------------------------- plans
    def counts(self, ratios: Sequence[float], shrink: float = 1.0) -> tuple[int, ...]:
        """Channels that a block of each unit keeps: the tight counts of the proportions ``ratios``.

        Args:
            ratios: One number above 0 a unit, in the order of ``names``; only their proportions matter, except that
                no unit keeps less than ``lowest`` or more than everything.
            shrink: Factor in (0, 1] on all widths once the limit is met; below 1 the plan is not tight, but cheaper.

        Raises:
            PlanError: If there are not as many as units, or one is not a positive number.
        """
        wanted = np.asarray(ratios, np.float64)
        if wanted.shape != (len(self._units),) or not np.isfinite(wanted).all() or (wanted <= 0).any():
            raise PlanError(
                f"ratios: expected {len(self._units)} positive numbers, one a unit ({', '.join(self.names[:3])} ...), "
                f"got {list(ratios)!r}"
            )
        wanted = wanted / wanted.max()
        top = float((1 / wanted).max())  # every unit keeps everything
        found = self._solve(lambda scale: self._at(wanted * scale), 0.0, top)
        tight = self._fill(found, wanted)
        if shrink == 1:
            return tight
        return self._at(shrink * np.array(tight) / np.array(self.sizes))

    def _solve(self, at: Callable[[float], tuple[int, ...]], low: float, high: float) -> tuple[int, ...]:
        """The counts of the largest number in [low, high] whose counts hold; those of ``low`` do."""
        if self.holds(at(high)):
            return at(high)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.holds(at(middle)) else (low, middle)
            if at(low) == at(high):
                break
        return at(low)

    def _at(self, ratios: np.ndarray) -> tuple[int, ...]:
        """The largest counts that do not exceed ``ratios``, within the bounds of each unit."""
        return tuple(
            int(steps[max(0, int(np.searchsorted(steps, r * size + 1e-9, side="right")) - 1)])
            for steps, r, size in zip(self._steps, ratios.tolist(), self.sizes, strict=True)
        )

    def _fill(self, counts: tuple[int, ...], wanted: np.ndarray) -> tuple[int, ...]:
        """Give back single steps, the unit that is furthest below its ratio first, until none fits."""
        kept = list(counts)
        open_units = set(range(len(kept)))
        while open_units:
            # what a unit would have of its wanted share after the step: the least first, the later unit on a draw
            share = {}
            for u in list(open_units):
                at = int(np.searchsorted(self._steps[u], kept[u])) + 1
                if at >= len(self._steps[u]):
                    open_units.discard(u)
                else:
                    share[u] = (self._steps[u][at] / self.sizes[u] / wanted[u], -u, int(self._steps[u][at]))
            for u in sorted(share, key=share.__getitem__):
                more = [*kept[:u], share[u][2], *kept[u + 1 :]]
                if self.holds(tuple(more)):
                    kept = more
                    break
                open_units.discard(u)  # costs only grow: it will not fit later either
            else:
                break
        return tuple(kept)

    def draw(self, rng: np.random.Generator) -> tuple[float, ...]:
        """Ratios uniform between ``lowest`` and 1, as EagleEye draws them; not solved yet."""
        low = np.array(self.lowest)
        return tuple((low + (1 - low) * rng.random(len(low))).tolist())

    def plan(self, counts: Sequence[int]) -> PrunePlan:
        """The plan that keeps ``counts`` channels a block: those with the highest scores."""
        return _build(self.graph, list(zip(self._units, counts, strict=True)), None)

    def cost(self, counts: Sequence[int]) -> Cost:
        """What the plan of ``counts`` costs; the plan is not built."""
        return counter(self.graph).cost(self._alive(counts))

    def holds(self, counts: Sequence[int]) -> bool:
        """Whether the plan of ``counts`` is within every limit."""
        cost = self.cost(counts)
        candidate = self.plan(counts) if self._needs_plan else PrunePlan({}, self.graph.fingerprint)
        return all(limit.holds(cost, candidate) for limit in self._limits)

    def _alive(self, counts: Sequence[int]) -> np.ndarray:
        alive = self._whole.copy()
        for unit, count in zip(self._units, counts, strict=True):
            for b in unit.blocks:
                alive[b.group.offset + b.order[: unit.size - count]] = False
        return alive

    def _unreachable(self, floor: tuple[int, ...]) -> str:
        cost, least = self.cost(floor), self.plan(floor)
        parts = []
        for limit in self._limits:
            value = limit.value(cost, least)
            if value > limit.most:
                low = value / limit.dense if limit.dense else 0.0
                ends = f"{ceil(low * 1e4) / 1e4:g} to 1" if limit.given <= 1 else f"{value:g} to {limit.dense:g}"
                parts.append(f"{limit.name}={limit.given:g} cannot be reached: the range is {ends}")
        return (
            f"{'; '.join(parts)} with these groups, max_pruning_ratio, min_channels and round_to; "
            "raise the target or loosen these"
        )

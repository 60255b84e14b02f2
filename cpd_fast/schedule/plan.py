"""Which channels go: a global threshold over the scores of all groups, exact about cost and balance.

Groups that are tied shrink together and form one *unit*. A unit shrinks in *steps*: a step removes from every block
of every group of the unit its lowest remaining channels, equally many from each. Steps of all units are ranked by
what their channels are worth, and the fewest steps are taken, lowest first, that meet every limit of the target. Then
steps are given back, highest first, where the limits still hold without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from cpd_fast.describe import matching
from cpd_fast.errors import PlanError, ScoreError
from cpd_fast.schedule.cost import counter, plan_cost
from cpd_fast.types import ChannelGraph, Cost, CoupledGroup, PrunePlan, Scores, Target

_COST_FIELD = {"params": "params", "macs": "macs", "memory": "activation_bytes"}
_NORMALIZE = ("auto", "none", "mean", "max")
Latency = Callable[[PrunePlan], float]


@dataclass(frozen=True)
class _Block:
    """One balance block of one group: its channels, those worth least first."""

    group: CoupledGroup
    order: np.ndarray  # (block size,)
    values: np.ndarray  # their scores, same order


@dataclass(frozen=True)
class _Unit:
    """Tied groups, which keep the same number of channels in each of their blocks."""

    blocks: tuple[_Block, ...]
    size: int  # channels a block
    counts: tuple[int, ...]  # what a block keeps after 0, 1, 2 ... steps
    keys: tuple[float, ...]  # rank of each step, non-decreasing


def plan(
    graph: ChannelGraph,
    scores: Scores | Mapping[str, Tensor],
    target: Target,
    round_to: int = 1,
    max_pruning_ratio: float | Mapping[str, float] = 0.95,
    min_channels: float | Mapping[str, float] = 1,
    normalize: str = "auto",
    per_cost: str | None = None,
    start: PrunePlan | None = None,
    latency: Latency | None = None,
) -> PrunePlan:
    r"""Remove the fewest lowest-scored channels such that every limit of the target holds.

    One threshold for the whole network (as HAP): channels of all groups are ranked together. Balance and ties are
    honoured by removing the lowest channel of every block at once, ranked by the *sum* of their scores; with
    ``round_to > 1`` several at once, ranked by the mean of these sums. What the last step saved beyond the target goes
    to the highest-ranked ones that were taken, where they fit. Equal inputs give equal plans: ties in rank go
    to the group that comes first in the graph.

    Args:
        graph: The channel graph.
        scores: Importance of every channel of every prunable group, fp32 ``(n_channels,)``, larger = keep.
        target: What may remain: fractions of the dense model up to 1, absolute numbers above 1.
        round_to: The kept channels of every block (layer, head, conv group) are a multiple of this, where the block is
            touched; smaller blocks stay whole.
        max_pruning_ratio: Most that a block may lose, in [0, 1]; a number, or names -> numbers: names and ``fnmatch``
            patterns of groups, else of modules, whose groups are meant. Of several the strictest holds.
        min_channels: Fewest channels that a block keeps, at least 1, or the least fraction of it, below 1; or names ->
            numbers, as above.
        normalize: ``"none"``; ``"mean"`` or ``"max"`` divide a group's scores by their mean or largest magnitude;
            ``"auto"`` does what the criterion recommends (``scores.info["normalize"]``; none where it says nothing).
        per_cost: ``"params"``, ``"macs"`` or ``"memory"``: rank by score per unit of what a step saves at ``start``;
            scores must not be negative then.
        start: A plan whose removed channels stay removed.
        latency: ``plan -> milliseconds``, needed by ``Target(latency_ms=)``; must not grow when channels go.

    Returns:
        The plan; only groups that lose channels are in it.

    Raises:
        ScoreError: If scores are missing, not finite, of the wrong shape, of another model, or negative with
            ``per_cost``.
        PlanError: If nothing is prunable, the target cannot be reached, or an argument is out of range.

    Source: global threshold as in Yu et al., arXiv:2101.08940 (HAP); balance as a removal unit is ours.

    Example:
        >>> import cpd_fast as cpd
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = cpd.comb(model, torch.zeros(1, 4))
        >>> plan(graph, {"0": torch.arange(8.0)}, Target(macs=0.5))["0"]
        (4, 5, 6, 7)
    """
    if not isinstance(target, Target):
        raise PlanError(f"target: expected a Target such as Target(macs=0.5), got {target!r}")
    _check_arguments(round_to, normalize, per_cost)
    if start is not None:
        start.check(graph)
    arrays = _score_arrays(graph, scores, normalize)
    alive = graph.alive(start)
    units = _units(graph, arrays, alive, round_to, max_pruning_ratio, min_channels)
    if per_cost is not None:
        _refuse_negative(graph, arrays, alive, per_cost)
        units = [_per_cost(graph, u, alive, per_cost) for u in units]
    steps = _rank(units)
    limits = _limits(graph, target, latency)

    def left(done: np.ndarray) -> PrunePlan:
        return _build(graph, [(u, u.counts[k]) for u, k in zip(units, done, strict=True)], start)

    def holds(done: np.ndarray) -> bool:
        candidate = left(done)
        cost = counter(graph).cost(graph.alive(candidate))
        return all(limit.holds(cost, candidate) for limit in limits)

    def lowest(n: int) -> np.ndarray:  # steps taken of each unit
        return np.bincount(steps[:n], minlength=len(units))

    low, high = 0, len(steps)  # lowest(high) holds, lowest(low) does not
    if holds(lowest(low)):
        return left(lowest(low))
    if not holds(lowest(high)):
        raise PlanError(_unreachable(graph, limits, left(lowest(high)), round_to))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(lowest(middle)) else (middle, high)
    return left(_given_back(lowest(high), steps[:high], holds))


def _given_back(done: np.ndarray, steps: np.ndarray, holds: Callable[[np.ndarray], bool]) -> np.ndarray:
    """Undo steps, highest rank first, where the target holds without: the last one taken may save more than is due."""
    done, is_open = done.copy(), done > 0
    for unit in steps[::-1]:
        if not is_open[unit]:
            continue
        done[unit] -= 1
        if not holds(done):
            done[unit] += 1
            is_open[unit] = False
            if not is_open.any():
                break
    return done


def uniform_plan(
    graph: ChannelGraph,
    scores: Scores | Mapping[str, Tensor],
    keep: float = 0.5,
    round_to: int = 1,
    max_pruning_ratio: float | Mapping[str, float] = 1.0,
    min_channels: float | Mapping[str, float] = 1,
) -> PrunePlan:
    """Keep the same fraction of every prunable group: in each block the channels with the highest scores.

    Args:
        graph: The channel graph.
        scores: Importance of every channel of every prunable group, fp32 ``(n_channels,)``, larger = keep.
        keep: Fraction kept, in (0, 1].
        round_to: The kept channels of every block are a multiple of this; smaller blocks stay whole.
        max_pruning_ratio: Most that a block may lose, as in :func:`plan`.
        min_channels: Least that a block keeps, as in :func:`plan`.

    Returns:
        The plan; only groups that lose channels are in it.

    Raises:
        ScoreError: If scores are missing, not finite, of the wrong shape, or of another model.
        PlanError: If nothing is prunable or an argument is out of range.

    Example:
        >>> import cpd_fast as cpd
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = cpd.comb(model, torch.zeros(1, 4))
        >>> uniform_plan(graph, {"0": torch.arange(8.0)}, keep=0.25)["0"]
        (6, 7)
    """
    _check_arguments(round_to, "none", None)
    arrays = _score_arrays(graph, scores, "none")
    units = _units(graph, arrays, graph.alive(None), round_to, max_pruning_ratio, min_channels)
    kept = [(u, _kept(u, keep, round_to)) for u in units]
    if keep < 1 and all(u.size <= round_to for u in units):
        raise PlanError(
            f"round_to={round_to}: nothing can go, the largest block (of a layer, head or conv group) has "
            f"{max(u.size for u in units)} channels; use a smaller round_to"
        )
    return _build(graph, kept, None)


def random_plan(
    graph: ChannelGraph,
    keep: float = 0.5,
    generator: torch.Generator | None = None,
    round_to: int = 1,
    max_pruning_ratio: float | Mapping[str, float] = 1.0,
    min_channels: float | Mapping[str, float] = 1,
) -> PrunePlan:
    """Keep the same fraction of every prunable group, at random positions.

    Args:
        graph: The channel graph.
        keep: Fraction kept, in (0, 1]; a block of b channels keeps ``max(1, round(keep * b))``.
        generator: Source of the positions (CPU); ``None`` is a fresh one with seed 0, so that the call is repeatable.
        round_to: The kept channels of every block are a multiple of this; smaller blocks stay whole.
        max_pruning_ratio: Most that a block may lose, as in :func:`plan`.
        min_channels: Least that a block keeps, as in :func:`plan`.

    Returns:
        The plan; only groups that lose channels are in it.

    Raises:
        PlanError: If nothing is prunable or an argument is out of range.

    Example:
        >>> import cpd_fast as cpd
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = cpd.comb(model, torch.zeros(1, 4))
        >>> len(random_plan(graph, keep=0.5)["0"])
        4
    """
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    noise = torch.rand(graph.n_channels, generator=generator, dtype=torch.float64)
    scores = {g.name: noise[g.offset : g.offset + g.n_channels] for g in graph.groups}
    return uniform_plan(graph, scores, keep, round_to, max_pruning_ratio, min_channels)


# ---------------------------------------------------------------------------------------------------- units and steps


def _units(
    graph: ChannelGraph,
    arrays: Mapping[str, np.ndarray],
    alive: np.ndarray,
    round_to: int,
    max_ratio: float | Mapping[str, float],
    min_channels: float | Mapping[str, float],
) -> list[_Unit]:
    ratios = _by_group(graph, "max_pruning_ratio", max_ratio, min)
    least = _by_group(graph, "min_channels", min_channels, max)
    members: dict[str, list[CoupledGroup]] = {}
    for g in graph.groups:
        members.setdefault(f"tie:{g.tie}" if g.tie is not None else f"group:{g.name}", []).append(g)
    units = []
    for groups in members.values():
        if not all(g.prunable for g in groups):
            continue
        blocks = tuple(
            _block(g, b, arrays[g.name], alive[g.offset : g.offset + g.n_channels]) for g in groups for b in g.blocks
        )
        size = len(blocks[0].order)
        left = int(alive[groups[0].offset + blocks[0].order].sum())
        floor = max(
            1,
            *(size - int(ratios.get(g.name, 1.0) * size + 1e-9) for g in groups),
            *(_least(least.get(g.name, 1), size) for g in groups),
        )
        counts = _counts(left, min(floor, left), round_to)
        total = np.sum([b.values for b in blocks], axis=0)  # (size,): what removing the j-th lowest of all is worth
        units.append(_Unit(blocks, size, counts, _keys(total, counts, size)))
    if not units:
        why = sorted({g.reason or "no reason given" for g in graph.groups if not g.prunable})
        raise PlanError(
            f"nothing is prunable: all {len(graph.groups)} groups are frozen ({'; '.join(why[:5]) or 'no groups'}); "
            "print(graph) shows them"
        )
    return units


def _keys(total: np.ndarray, counts: tuple[int, ...], size: int) -> tuple[float, ...]:
    """Mean worth of the channels that each step from one count to the next removes."""
    if counts[0] - counts[-1] == len(counts) - 1:  # one at a time: nothing to average
        return tuple(total[size - counts[0] : size - counts[-1]].tolist())
    return tuple(float(np.mean(total[size - a : size - b])) for a, b in zip(counts, counts[1:], strict=False))


def _block(group: CoupledGroup, channels: np.ndarray, values: np.ndarray, alive: np.ndarray) -> _Block:
    """Channels already removed first, then the lowest scores; equal scores: the later channel goes first."""
    order = channels[np.lexsort((-channels, values[channels], alive[channels]))]
    return _Block(group, order, values[order])


def _counts(left: int, floor: int, round_to: int) -> tuple[int, ...]:
    """``left``, then every multiple of ``round_to`` below it, down to ``floor``."""
    low = ceil(floor / round_to) * round_to
    return (left, *range((left - 1) // round_to * round_to, low - 1, -round_to))


def _by_group(
    graph: ChannelGraph, what: str, given: float | Mapping[str, float], strictest: Callable[[float, float], float]
) -> dict[str, float]:
    """An option a group: one number for all, or by names and patterns.

    Raises:
        PlanError: If a number is out of range or a name matches nothing.
    """
    high = 1.0 if what == "max_pruning_ratio" else float("inf")
    values = given if isinstance(given, Mapping) else {"*": given}
    found: dict[str, float] = {}
    for pattern, value in values.items():
        good = not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= high
        if not good or (what == "min_channels" and (value == 0 or (value > 1 and value != int(value)))):
            expected = "in [0, 1]" if high == 1 else "a whole number from 1, or a fraction between 0 and 1"
            raise PlanError(f"{what}: expected {expected} for {pattern!r}, got {value!r}")
        for g in graph.groups if pattern == "*" else matching(graph, pattern, what):
            found[g.name] = strictest(found.get(g.name, value), value)
    return found


def _least(value: float, size: int) -> int:
    """Fewest channels of a block: a number, or a fraction of its size."""
    return int(value) if value >= 1 else ceil(value * size - 1e-9)


def _per_cost(graph: ChannelGraph, unit: _Unit, alive: np.ndarray, per_cost: str) -> _Unit:
    """Divide a unit's keys by what one channel a block saves at the start."""
    if len(unit.counts) == 1:
        return unit
    fewer = alive.copy()
    gone = unit.size - unit.counts[-1]
    for b in unit.blocks:
        fewer[b.group.offset + b.order[:gone]] = False
    table, name = counter(graph), _COST_FIELD[per_cost]
    saved = getattr(table.cost(alive), name) - getattr(table.cost(fewer), name)
    each = max(saved, 1) / (unit.counts[0] - unit.counts[-1])
    return _Unit(unit.blocks, unit.size, unit.counts, tuple(k / each for k in unit.keys))


def _refuse_negative(graph: ChannelGraph, arrays: Mapping[str, np.ndarray], alive: np.ndarray, per_cost: str) -> None:
    """A negative score divided by a large saving comes out near zero: the best removals would go last.

    Raises:
        ScoreError: If a channel that is still there has a negative score.
    """
    left = {g.name: arrays[g.name][alive[g.offset : g.offset + g.n_channels]] for g in graph.prunable_groups}
    bad = {name: int((v < 0).sum()) for name, v in left.items() if (v < 0).any()}
    if bad:
        raise ScoreError(
            f"per_cost={per_cost!r}: {sum(bad.values())} of {sum(map(len, left.values()))} scores are negative (first "
            f"in {next(iter(bad))}) and cannot be divided by a cost; use a criterion without negative scores, such as "
            "HessianTrace(signed=False), or per_cost=None"
        )


def _rank(units: list[_Unit]) -> np.ndarray:
    """Unit number of every step, lowest key first; the steps of a unit keep their order."""
    owner = np.repeat(np.arange(len(units)), [len(u.keys) for u in units])
    keys = np.array([k for u in units for k in np.maximum.accumulate(u.keys or (0.0,))[: len(u.keys)]])
    return owner[np.argsort(keys, kind="stable")].astype(np.int64)


def _build(graph: ChannelGraph, kept: Iterable[tuple[_Unit, int]], start: PrunePlan | None) -> PrunePlan:
    chosen: dict[str, list[int]] = {}
    for unit, count in kept:
        if count < unit.size:
            for b in unit.blocks:
                chosen.setdefault(b.group.name, []).extend(b.order[unit.size - count :].tolist())
    made = {g.name: sorted(chosen[g.name]) for g in graph.groups if g.name in chosen}
    if start is not None:  # groups that cannot shrink now but did before
        made |= {k: list(v) for k, v in start.items() if k not in made and len(v) < graph[k].n_channels}
    return PrunePlan(made, graph.fingerprint)


def _kept(unit: _Unit, keep: float, round_to: int) -> int:
    """The count that is nearest to a fraction of a block, among those that the unit may keep.

    Raises:
        PlanError: If the fraction is none.
    """
    if not 0 < keep <= 1:
        raise PlanError(f"keep={keep}: expected a fraction in (0, 1] of each group that is kept")
    if keep == 1 or unit.size <= round_to:
        return unit.size
    wanted = max(1, round(keep * unit.size))
    target = max(round_to, round(wanted / round_to) * round_to)
    counts = np.array(unit.counts)  # falling: of two that are equally near the larger comes first
    return int(counts[np.argmin(np.abs(counts - target))])


# ------------------------------------------------------------------------------------------------------------- target


@dataclass(frozen=True)
class _Limit:
    name: str
    given: float
    most: float
    dense: float
    latency: Latency | None = None

    def value(self, cost: Cost, candidate: PrunePlan) -> float:
        if self.latency is not None:
            return float(self.latency(candidate))
        return int(getattr(cost, _COST_FIELD[self.name]))

    def holds(self, cost: Cost, candidate: PrunePlan) -> bool:
        return self.value(cost, candidate) <= self.most


def _limits(graph: ChannelGraph, target: Target, latency: Latency | None) -> list[_Limit]:
    dense, empty = plan_cost(graph), PrunePlan({}, graph.fingerprint)
    limits = []
    for name, given in target.given.items():
        if name == "latency_ms" and latency is None:
            raise PlanError(
                "Target(latency_ms=): no latency table; pass latency=cpd.LatencyTable(model, graph, example_inputs), "
                "or any plan -> milliseconds, or use Target(macs=)"
            )
        table = latency if name == "latency_ms" else None
        full = _Limit(name, given, 0, 0, table).value(dense, empty)
        # 1e-9: a fraction such as 0.1 + 0.2 must not lose a channel to its last bit
        limits.append(_Limit(name, given, full * given * (1 + 1e-9) if given <= 1 else given, full, table))
    return limits


def _unreachable(graph: ChannelGraph, limits: list[_Limit], least: PrunePlan, round_to: int) -> str:
    cost = plan_cost(graph, least)
    parts = []
    for limit in limits:
        value = limit.value(cost, least)
        if value > limit.most:
            can = f"{value:g}" if limit.given > 1 or not limit.dense else f"{ceil(value / limit.dense * 1e4) / 1e4:g}"
            parts.append(f"{limit.name}={limit.given:g} cannot be reached: {can} is the least")
    frozen = [g.name for g in graph.groups if not g.prunable]
    note = " (numbers above 1 are absolute, fractions at most 1)" if any(v.given > 1 for v in limits) else ""
    held = f"; frozen groups: {', '.join(frozen[:5])}{' ...' if len(frozen) > 5 else ''}" if frozen else ""
    return (
        f"{', '.join(parts)}{note} with these groups, max_pruning_ratio, min_channels and round_to={round_to}{held}; "
        "raise the target or loosen these"
    )


def holds(graph: ChannelGraph, target: Target, candidate: PrunePlan, latency: Latency | None = None) -> bool:
    """Whether a plan meets every limit of a target.

    Raises:
        PlanError: If the target limits latency and there is no table.
    """
    cost = plan_cost(graph, candidate)
    return all(limit.holds(cost, candidate) for limit in _limits(graph, target, latency))


# -------------------------------------------------------------------------------------------------------------- checks


def _check_arguments(round_to: int, normalize: str, per_cost: str | None) -> None:
    if round_to < 1:
        raise PlanError(f"round_to must be at least 1, got {round_to}")
    if normalize not in _NORMALIZE:
        raise PlanError(f"normalize={normalize!r}: expected one of {', '.join(_NORMALIZE)}")
    if per_cost is not None and per_cost not in _COST_FIELD:
        raise PlanError(f"per_cost={per_cost!r}: expected None or one of {', '.join(_COST_FIELD)}")


def _score_arrays(graph: ChannelGraph, scores: Scores | Mapping[str, Tensor], normalize: str) -> dict[str, np.ndarray]:
    """The scores of prunable groups, checked and normalised, float64 ``(n_channels,)``.

    Raises:
        ScoreError: If scores are missing, not finite, of the wrong shape, or of another model.
    """
    info: Mapping[str, object] = {}
    if isinstance(scores, Scores):
        if scores.fingerprint != graph.fingerprint:
            raise ScoreError(
                f"scores of another model: scores have fingerprint {scores.fingerprint}, the graph has "
                f"{graph.fingerprint}; score this model with this graph"
            )
        info = scores.info
    if normalize == "auto":
        normalize = str(info.get("normalize", "none"))
    missing = [g.name for g in graph.prunable_groups if g.name not in scores]
    if missing:
        raise ScoreError(
            f"no scores for {len(missing)} of {len(graph.prunable_groups)} prunable groups: {', '.join(missing[:5])}; "
            "score every group, or ignore these in comb"
        )
    arrays = {}
    for g in graph.prunable_groups:
        value = scores[g.name].detach().double().cpu().numpy()
        if value.shape != (g.n_channels,):
            raise ScoreError(f"scores of {g.name}: expected shape ({g.n_channels},), got {value.shape}")
        if not np.isfinite(value).all():
            raise ScoreError(
                f"scores of {g.name}: {int((~np.isfinite(value)).sum())} of {g.n_channels} are not finite; "
                "check the loss and the batches for NaN"
            )
        scale = {"none": 1.0, "mean": np.abs(value).mean(), "max": np.abs(value).max()}[normalize]
        arrays[g.name] = value / (scale or 1.0)
    return arrays

"""A recipe's target: whether it can be reached, and plans on its limit; those for a latency are measured."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cpd_fast.config import ConfigError
from cpd_fast.schedule import CandidateSpace, Greedy
from cpd_fast.schedule import plan as make_plan
from cpd_fast.score import Magnitude, score
from cpd_fast.timing import Latency, LatencyPlan, LatencyTable, meet_latency
from cpd_fast.timing.table import machine
from cpd_fast.timing.target import TOLERANCE
from cpd_fast.types import ChannelGraph, PrunePlan, Scores, Target

if TYPE_CHECKING:
    from cpd_fast.recipes.run import Run

RECORD = "latency.json"
PlanOf = Callable[[Target], PrunePlan]


def latency_table(run: Run, model: nn.Module, graph: ChannelGraph) -> LatencyTable | None:
    """The table of the original's layers where the target limits latency, else None; made once a run.

    Raises:
        BackendError: If latency cannot be measured here.
        ConfigError: If the preset is ``released``, whose rule knows no latency.
    """
    c = run.config
    if c.target().latency_ms is None:
        return None
    if c.preset == "released":
        raise ConfigError(
            "preset=released: its rule leaves odd widths, on which kernels are slow, and takes a few channels at a "
            "time, so that it passes a latency long after it could have met it; use preset=best, published or events"
        )
    if run.table is None:
        run.talk.say("Time the layers of the network")
        model = _on_cpu(model)
        known = _read(run)
        x = run.task.example_inputs()
        run.table = LatencyTable(model, graph, x, _backend(run), c.latency_threads, dense_ms=known.get("dense_ms"))
        _write(run, {**known, "dense_ms": run.table.dense_ms})
    return run.table


def check_target(run: Run, model: nn.Module, graph: ChannelGraph) -> None:
    """See to it that the target can be reached, before anything is trained.

    Raises:
        PlanError: If it cannot.
        BackendError: If the target limits latency, which cannot be measured here.
    """
    table = latency_table(run, model, graph)
    _space(run, graph, score(model, graph, criterion=Magnitude()), run.config.target(), table)


def proportional(run: Run, graph: ChannelGraph, scores: Scores, plan: PrunePlan, table: LatencyTable | None) -> PlanOf:
    """``target -> plan`` on the target's limit, with widths in the proportions of ``plan``."""
    kept = {g.name: len(plan.get(g.name, range(g.n_channels))) / g.n_channels for g in graph.groups}

    def plan_of(target: Target) -> PrunePlan:
        plans = _space(run, graph, scores, target, table)
        return plans.plan(plans.counts([kept[name] for name in plans.names]))

    return plan_of


def _space(run: Run, graph: ChannelGraph, scores: Scores, target: Target, table: LatencyTable | None) -> CandidateSpace:
    """All plans on a target's limit, within the run's settings."""
    c = run.config
    return CandidateSpace(
        graph, scores, target, round_to=c.round_to, max_pruning_ratio=c.max_pruning_ratio,
        min_channels=c.min_channels, latency=table,
    )  # fmt: skip


def measured_plan(
    run: Run, model: nn.Module, graph: ChannelGraph, plan_of: PlanOf, stage: str, start: PrunePlan | None = None
) -> PrunePlan:
    """The plan of the run's target; where it limits latency, one whose network was measured to meet it.

    Such a plan is kept in the run folder: measured again, it would be another.

    Args:
        run: Whose target and folder.
        model: The original.
        graph: Its coupled channel groups.
        plan_of: A plan on the limit of a target, by the table.
        stage: What the plan is kept under.
        start: What is removed already; a kept plan that removes less, from a run whose bits were others, is dropped.

    Raises:
        PlanError: If no plan meets the target.
    """
    c, table = run.config, latency_table(run, model, graph)
    target = c.target()
    if table is None:
        return plan_of(target)
    known = _read(run)
    if stage in known:
        plan = PrunePlan.from_json(known[stage]["plan"], RECORD)
        if start is None or not (graph.alive(plan) & ~graph.alive(start)).any():
            return plan
    x = run.task.example_inputs()
    found = meet_latency(_on_cpu(model), graph, plan_of, target, x, table, _backend(run), c.latency_threads)
    run.talk.say(_told(found))
    tries = [{k: round(getattr(t, k), 5) for k in ("predicted_ms", "measured_ms", "dense_ms", "goal_ms")}
             for t in found.tries]  # fmt: skip
    _write(run, {**known, stage: {"plan": found.plan.to_json(), "chosen": found.chosen, "tries": tries}})
    return found.plan


@dataclass(frozen=True)
class MeasuredGreedy(Greedy):
    """A ramp to a latency that the real network has: planned with the table, and measured twice.

    A table may be off by a third, so that a ramp to what it promises would leave the last removal much to do, or
    nothing to give back. Before the first removal a plan of the whole target is measured: the ramp leads to 5 % above
    what the table says of that one. The last removal is a measured plan within what is kept by then.

    Attributes:
        run: Whose target and folder.
        model: The original.
    """

    run: Run = field(kw_only=True, repr=False)
    model: nn.Module = field(kw_only=True, repr=False)

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
        """What removal number ``event`` leaves of ``start``; ``options`` hold the table, as ``latency``.

        Raises:
            PlanError: If the target cannot be met; says what was measured.
        """

        def plan_of(target: Target) -> PrunePlan:
            return make_plan(graph, scores, target, start=start, **options)

        if event >= self.steps:
            return measured_plan(self.run, self.model, graph, plan_of, "prune", start)
        measured_plan(self.run, self.model, graph, plan_of, "aim")
        aim = _read(self.run)["aim"]
        one = aim["tries"][aim["chosen"]]
        predicted = (1 + TOLERANCE) * one["predicted_ms"] * one["goal_ms"] / one["measured_ms"]
        limit = min(predicted / options["latency"](None), 1.0)
        return plan_of(self.target(event, replace(final, latency_ms=limit), dense))


def _told(found: LatencyPlan) -> str:
    return (
        f"Latency {found.measured_ms:.3f} ms, asked were {found.goal_ms:.3f}: {len(found.tries)} "
        f"network{'s' if len(found.tries) > 1 else ''} measured"
    )


def latency_notes(target: Target, before: Latency, after: Latency) -> list[str]:
    """For the report: what latency was asked for, and what the finished network has."""
    asked = target.latency_ms
    if asked is None:
        return []
    goal = asked * before.median_ms if asked <= 1 else asked
    off = after.median_ms / goal - 1
    if abs(off) <= TOLERANCE:
        verdict = f"within {TOLERANCE:.0%} of it"
    elif off < 0:
        verdict = f"{-off:.0%} below it"
    else:
        verdict = f"{off:.0%} above it; measure again on a quieter machine (cpd-fast bench), or ask for less"
    share = f" ({asked:.0%} of the original's)" if asked <= 1 else ""
    return [
        f"Asked for a latency of {goal:.3f} ms{share}: the finished network takes {after.median_ms:.3f} ms, {verdict}."
    ]


def _backend(run: Run) -> str:
    return "onnxruntime" if run.config.latency_backend == "auto" else run.config.latency_backend


def _on_cpu(model: nn.Module) -> nn.Module:
    """Latency is planned for on the CPU, wherever the model is trained."""
    is_there = all(p.device.type == "cpu" for p in model.parameters())
    return model if is_there else copy.deepcopy(model).cpu()


def _about(run: Run) -> dict[str, str]:
    return machine(_backend(run), run.config.latency_threads)


def _read(run: Run) -> dict[str, Any]:
    """What is known of this run's latency on this machine."""
    if not (run.folder.path / RECORD).exists():
        return {}
    known = run.folder.read_json(RECORD)
    return known if known.get("machine") == _about(run) else {}


def _write(run: Run, known: dict[str, Any]) -> None:
    run.folder.write(RECORD, json.dumps({**known, "machine": _about(run)}, indent=1))

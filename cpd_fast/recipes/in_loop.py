"""The pruning of :func:`recipes.cpd` by a preset: :class:`cpd_fast.Pruner` gathers importance over all iterations."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cpd_fast.errors import PlanError
from cpd_fast.presets import preset
from cpd_fast.pruner import Pruner
from cpd_fast.recipes.target import MeasuredGreedy
from cpd_fast.recipes.training import stage_seed
from cpd_fast.schedule import OneGroup, plan_cost
from cpd_fast.score import Magnitude, score
from cpd_fast.types import ChannelGraph, PrunePlan, Scores, Target

if TYPE_CHECKING:
    from cpd_fast.recipes.run import Place, Run

_HEAD, _MOMENTS, _AVERAGES, _GENERATOR = "pruner.head", "pruner.moments.", "pruner.ema.", "pruner.generator"
_HASTE = 0.8  # of the steps are planned for removals whose number was guessed


def prune_in_loop(
    run: Run,
    teacher: nn.Module,
    student: nn.Module,
    optimizer: Optimizer,
    graph: ChannelGraph,
    at: Place,
    target: Target,
    limits: dict[str, Any],
    write_scores: Callable[[Scores], None],
    must_measure: bool,
) -> tuple[PrunePlan, nn.Module]:
    """Train the student with distillation while a :class:`cpd_fast.Pruner` removes channels.

    Args:
        run: Whose settings, folder and data.
        teacher: Imitated.
        student: Pruned and trained.
        optimizer: Over its parameters; follows the removal.
        graph: Its groups.
        at: Where the run is.
        target: What may remain.
        limits: ``round_to``, ``max_pruning_ratio``, ``min_channels`` and ``latency`` of the plans.
        write_scores: Gets the scores of the first removal.
        must_measure: Whether the last plan is to meet the run's latency on the real network.

    Returns:
        The plan, and the compacted student.

    Raises:
        PlanError: If the target does not hold after all steps, or a latency cannot be met.
        MemoryLimitError: If the criterion's own forwards do not fit into the memory limit.
    """
    c = run.config
    interval = max(c.prune_steps // c.prune_events, 1)
    settings = preset(c.preset, interval, c.prune_events)
    if isinstance(settings["schedule"], OneGroup):
        limits = {k: v for k, v in limits.items() if k != "round_to"}  # the released rule knows none
        removals = _removals(student, graph, target, settings["schedule"], limits)
        settings = preset(c.preset, max(int(_HASTE * c.prune_steps / removals), 1))
    elif must_measure:
        settings["schedule"] = MeasuredGreedy(**vars(settings["schedule"]), run=run, model=teacher)
    torch.manual_seed(stage_seed(c.seed, "prune"))  # where probes come from
    pruner = Pruner(student, run.task.example_inputs(), target, graph=graph, **settings, **limits)
    trainer = run.trainer("prune", student, optimizer, run.distil_loss(), teacher)
    if at.step:
        pruner.load_state_dict(unpack(at.tensors))
        trainer.restore(at.tensors)
    dense, loss_of = plan_cost(graph, None).macs, run.task_loss()
    divides = bool(c.memory_limit) and pruner.criterion.data == "loss"
    keep = {"plan": pruner.plan.to_json()}

    def one(step: int) -> float:
        batch = run.batch("prune", step)

        def look() -> None:
            closure: Callable[[], Tensor] = partial(loss_of, student, batch)
            if divides and not pruner.done:
                closure = pruner.divided(batch, loss_of, c.memory_limit)
            if not pruner.step(closure):
                return
            if not run.events and pruner.scores is not None:
                write_scores(pruner.scores)
            keep["plan"] = pruner.plan.to_json()
            run.events.append((step, plan_cost(graph, pruner.plan).macs / dense))

        lr = c.student_lr * min(1.0, (step + 1) / (0.2 * c.prune_steps))
        return trainer.step(batch, lr, stage_seed(c.seed, "prune", step), look)

    run.loop("prune", "Prune and distil", at.step, c.prune_steps, one, trainer, keep, lambda: pack(pruner.state_dict()))
    if not pruner.done:
        left = run.events[-1][1] if run.events else 1.0
        raise PlanError(
            f"preset={c.preset}: after {len(run.events)} removals in prune_steps={c.prune_steps} steps {left:.0%} of "
            f"the MACs remain, {target} was asked for; raise prune_steps"
        )
    small = pruner.compact(optimizer)
    pruner.remove()
    return pruner.plan, small


def _removals(
    model: nn.Module, graph: ChannelGraph, target: Target, schedule: OneGroup, options: dict[str, Any]
) -> int:
    """How many removals the released rule takes, by magnitudes in place of scores that are not known yet."""
    scores, plan, count = score(model, graph, criterion=Magnitude()), PrunePlan({}, graph.fingerprint), 0
    while not schedule.is_over(count, graph, plan, target, options):
        count += 1
        plan = schedule.next_plan(count, graph, scores, target, {}, plan, options)
    return max(count, 1)


def pack(state: dict[str, Any]) -> dict[str, Tensor]:
    """A pruner's state as tensors alone, for a checkpoint."""
    plain = {k: v for k, v in state.items() if k not in ("moments", "ema", "generator")}
    return {
        _HEAD: torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8),
        _GENERATOR: state["generator"],
        **{f"{_MOMENTS}{k}": v for k, v in state["moments"].items()},
        **{f"{_AVERAGES}{k}": v for k, v in state["ema"].items()},
    }


def unpack(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Undo :func:`pack`."""
    state = json.loads(bytes(tensors[_HEAD].tolist()))
    state["probes"] = tuple(state["probes"])
    for name, prefix in (("moments", _MOMENTS), ("ema", _AVERAGES)):
        state[name] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return {**state, "generator": tensors[_GENERATOR]}

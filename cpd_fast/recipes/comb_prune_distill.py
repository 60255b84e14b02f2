"""Comb, Prune, Distill (arXiv 2408.03046) as one resumable run.

    teacher -> comb -> (score, mask, train with distillation) x events -> compact -> fine-tune with distillation
            -> measure, export, report

Departures from the paper: channels are scored by the curvature along a gate on each, which ranked better than the
Hessian trace of its text (docs/scores.md; ``criterion="HessianTrace"`` and its code's ``"Taylor"`` can be asked for),
the schedule reaches the target in a few events instead of removing one group's channels every few iterations, and the
distillation runs on compacted weights once the target is reached.

Two parts of other papers can be put in: a search (EagleEye) before the pruning that picks how many channels each group
keeps, and a teacher whose weights were pruned in rounds (Prune, then Distill).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cpd_fast.compact import compact
from cpd_fast.masking import attach_masks
from cpd_fast.recipes.in_loop import prune_in_loop
from cpd_fast.recipes.outcome import training_note
from cpd_fast.recipes.progress import Talk
from cpd_fast.recipes.ranking import best_plan, search_note
from cpd_fast.recipes.rounds import pruned_note
from cpd_fast.recipes.run import Place, Result, Run, run_recipe
from cpd_fast.recipes.target import latency_table, measured_plan
from cpd_fast.recipes.tasks import Task
from cpd_fast.recipes.training import adamw, batch_of, stage_seed, training_state
from cpd_fast.schedule import Greedy, plan_cost
from cpd_fast.schedule import plan as make_plan
from cpd_fast.score import Criterion, GateHessian, GroupFisher, HessianTrace, Taylor, score
from cpd_fast.types import ChannelGraph, PrunePlan, Scores, Target

SCORES, SEARCH_SCORES = "scores.safetensors", "search_scores.safetensors"


def cpd(
    task: str | Task = "climate",
    *,
    target: Target | float = 0.5,
    run_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    command: str | None = None,
    talk: Talk | None = None,
    **settings: Any,
) -> Result:
    """Compress a network by Comb, Prune, Distill and leave everything in a run folder.

    Killed at any moment, the same call goes on where it was and ends with the same plan and, on the same CPU and
    number of threads, the same weights.

    Args:
        task: ``"climate"``, ``"fashion-mnist"`` or a :class:`Task` of your own.
        target: Fraction of the MACs that remains, or a ``Target`` of fractions and of a latency, which is measured
            (``preset="released"`` refuses a latency).
        run_dir: Folder of the run: created, or resumed if it was made with the same settings.
        data_dir: Folder of the data, for tasks that can be read from one.
        command: What the report names as the command that repeats the run.
        talk: Where progress goes; default: bars on stderr.
        **settings: Fields of :class:`cpd_fast.config.CompressConfig`, e.g. ``teacher_steps=40``. ``search_ratios=1``
            lets a search of ``candidates`` plans pick how many channels each group keeps; ``prune_teacher=1`` prunes
            the teacher's weights in ``rounds`` first, and the student starts from that network and imitates it.

    Returns:
        Plan, networks, numbers and the report's path.

    Raises:
        RunFolderError: If the folder cannot be written, is in use, or was made with other settings.
        DataError: If data or pretrained weights are missing or corrupt.
        ConfigError: If settings are unknown or out of range.
        PlanError: If the target cannot be reached.
        SearchError: If a search was asked for and no candidate could be evaluated.
        KeyboardInterrupt: After Ctrl-C, once the checkpoint is written.

    Source: Schmitt et al., arXiv:2408.03046.

    Example:
        >>> import tempfile, cpd_fast as cpd
        >>> result = cpd.recipes.cpd("climate", target=0.5, run_dir=tempfile.mkdtemp(), seed=0)  # doctest: +SKIP
        >>> result.results.student.miou  # doctest: +SKIP
    """
    return run_recipe("cpd", CpdRun, task, target, run_dir, data_dir, command, talk, settings)


class CpdRun(Run):
    """One run of Comb, Prune, Distill."""

    def between(self) -> tuple[str, ...]:
        """Rounds and search where they are asked for, then the pruning."""
        c = self.config
        return (*(("rounds",) if c.prune_teacher else ()), *(("search",) if c.search_ratios else ()), "prune")

    def shape(self, mentor: nn.Module, graph: ChannelGraph, at: Place) -> tuple[PrunePlan, nn.Module, Optimizer]:
        """Prune under masks, at the ratios that a search found or at those of one ranking over all groups."""
        if at.stage == "search":
            if not (self.folder.path / SEARCH_SCORES).exists():  # other threads, other bits: another study
                self._write_scores(SEARCH_SCORES, self._score(mentor, graph, "search", 0, None))
            found = best_plan(self, mentor, graph, self._read_scores(SEARCH_SCORES, graph))
            self.go_on(at, keep={"found": found.to_json()})
        student = copy.deepcopy(mentor)
        optimizer: Optimizer = adamw(student, self.config.weight_decay)
        if at.stage == "prune":
            return self._prune(mentor, student, optimizer, graph, at)
        plan = PrunePlan.from_json(at.state["plan"])
        small = compact(student, graph, plan)
        return plan, small, adamw(small, self.config.weight_decay)

    def remarks(self, graph: ChannelGraph, plan: PrunePlan) -> tuple[str, ...]:
        """How long, and with which parts of other papers."""
        c = self.config
        parts = (*((pruned_note(self),) if c.prune_teacher else ()), *((search_note(self),) if c.search_ratios else ()))
        return (*parts, training_note(c))

    def scores(self, graph: ChannelGraph) -> Scores:
        """Of the first scoring under masks."""
        return self._read_scores(SCORES, graph)

    def _read_scores(self, name: str, graph: ChannelGraph) -> Scores:
        tensors, head = self.read_tensors(name)
        return Scores(tensors, criterion=head["criterion"], fingerprint=graph.fingerprint, info=head["info"])

    def _write_scores(self, name: str, scores: Scores) -> None:
        info = {k: v for k, v in scores.info.items() if isinstance(v, (str, int, float, bool))}
        self.write_tensors(name, dict(scores), {"criterion": scores.criterion, "info": info})

    # ------------------------------------------------------------------------------------------------------- pruning
    def _prune(
        self, teacher: nn.Module, student: nn.Module, optimizer: Optimizer, graph: ChannelGraph, at: Place
    ) -> tuple[PrunePlan, nn.Module, Optimizer]:
        """Mask with distillation, a preset's way or in a few events; then remove the channels for good."""
        found = {k: v for k, v in at.state.items() if k == "found"}
        if self.config.preset != "events":
            widths = PrunePlan.from_json(found["found"]) if found else None
            target, limits = self._limits(teacher, graph, widths)
            plan, small = prune_in_loop(
                self, teacher, student, optimizer, graph, at, target, limits, partial(self._write_scores, SCORES),
                must_measure=limits["latency"] is not None and widths is None,
            )  # fmt: skip
        else:
            plan, small = self._prune_in_events(teacher, student, optimizer, graph, at, found)
        self.go_on(at, training_state(small, optimizer), {"plan": plan.to_json()})
        return plan, small, optimizer

    def _limits(
        self, teacher: nn.Module, graph: ChannelGraph, found: PrunePlan | None
    ) -> tuple[Target, dict[str, Any]]:
        """What may remain at the end, and the options of every plan on the way.

        No group gets narrower than in ``found``, whose latency was measured: the table's word for it is the limit.
        """
        c, target, table = self.config, self.config.target(), latency_table(self, teacher, graph)
        limits: dict[str, Any] = {
            "round_to": c.round_to, "max_pruning_ratio": c.max_pruning_ratio, "min_channels": c.min_channels,
            "latency": table,
        }  # fmt: skip
        if found is not None:
            limits |= {"max_pruning_ratio": 1.0, "min_channels": _widths(graph, found)}
            if table is not None:
                target = replace(target, latency_ms=min(table(found) / table(None), 1.0))
        return target, limits

    def _prune_in_events(
        self,
        teacher: nn.Module,
        student: nn.Module,
        optimizer: Optimizer,
        graph: ChannelGraph,
        at: Place,
        found: dict[str, Any],
    ) -> tuple[PrunePlan, nn.Module]:
        """Score on a few batches and mask, ``prune_events`` times."""
        c = self.config
        plan = PrunePlan({}, graph.fingerprint)
        handle = attach_masks(student, graph, plan)
        trainer = self.trainer("prune", student, optimizer, self.distil_loss(), teacher)  # chosen at full width
        if "plan" in at.state:
            plan = PrunePlan.from_json(at.state["plan"])
            handle.update(plan)
        trainer.restore(at.tensors)
        event_at = {c.prune_steps * k // c.prune_events: k for k in range(c.prune_events)}
        dense = plan_cost(graph, None).macs
        keep = {**found, "plan": plan.to_json()}
        widths = PrunePlan.from_json(found["found"]) if found else None

        def one(step: int) -> float:
            nonlocal plan
            if step in event_at:
                plan = self._event(teacher, student, graph, step, event_at[step] + 1, plan, widths)
                handle.update(plan)
                keep["plan"] = plan.to_json()
                self.events.append((step, plan_cost(graph, plan).macs / dense))
            lr = c.student_lr * min(1.0, (step + 1) / (0.2 * c.prune_steps))
            return trainer.step(self.batch("prune", step), lr, stage_seed(c.seed, "prune", step))

        self.loop("prune", "Prune and distil", at.step, c.prune_steps, one, trainer, keep)
        handle.remove()
        return plan, compact(student, graph, plan, optimizer=optimizer)

    def _event(
        self,
        teacher: nn.Module,
        student: nn.Module,
        graph: ChannelGraph,
        step: int,
        number: int,
        before: PrunePlan,
        found: PrunePlan | None,
    ) -> PrunePlan:
        """Score the masked student and remove channels, on a straight line to the target.

        The latency of the last plan is measured, where the target limits it; that of ``found`` was.
        """
        c, (target, limits) = self.config, self._limits(teacher, graph, found)
        scores = self._score(student, graph, "prune", step, before)
        if step == 0:  # later scores know nothing of what is gone by then; the report shows the first
            self._write_scores(SCORES, scores)
        per_cost = next((n for n in ("macs", "params", "memory") if n in target.given), "macs")

        def plan_of(what: Target) -> PrunePlan:
            return make_plan(graph, scores, what, start=before, per_cost=per_cost, **limits)

        if found is None and number == c.prune_events:
            return measured_plan(self, teacher, graph, plan_of, "prune", before)
        dense = {} if limits["latency"] is None else {"latency_ms": limits["latency"].dense_ms}
        return plan_of(Greedy(steps=c.prune_events, ramp="linear").target(number, target, dense))

    def _score(self, model: nn.Module, graph: ChannelGraph, stage: str, step: int, before: PrunePlan | None) -> Scores:
        """Scores by the configured criterion on a few training batches."""
        c, seed = self.config, stage_seed(self.config.seed, stage, step)
        draw = partial(batch_of, self.task, c.batch_size, seed % 2**31, stage)
        model.eval()
        with self.talk.bar(f"  score by {c.criterion}", c.score_batches) as bar:

            def batches() -> Iterator[tuple[Tensor, Tensor]]:
                for i in range(c.score_batches):
                    yield self.machine.place(draw(i))
                    bar.advance()

            limit, criterion = c.memory_limit or None, self._criterion(seed)
            return score(
                model, graph, batches(), self.task_loss(), criterion=criterion, plan=before, memory_limit=limit
            )

    def _criterion(self, seed: int) -> Criterion:
        """What channels are scored by; ``bench/experiments/recipe_criteria.py`` compares them."""
        c, generator = self.config, torch.Generator().manual_seed(seed)
        if c.criterion in ("HessianTrace", "GateHessian"):
            kind = HessianTrace if c.criterion == "HessianTrace" else GateHessian
            return kind(num_probes=c.num_probes, generator=generator)
        return GroupFisher() if c.criterion == "GroupFisher" else Taylor()


def _widths(graph: ChannelGraph, plan: PrunePlan) -> dict[str, float]:
    """Channels that a block of each prunable group keeps."""
    return {g.name: len(plan.get(g.name, range(g.n_channels))) // len(g.blocks) for g in graph.prunable_groups}

"""Comb, Prune, Distill (arXiv 2408.03046) as one resumable run.

    teacher -> comb -> (score, mask, train with distillation) x events -> compact -> fine-tune with distillation
            -> measure, export, report

Departures from the paper: channels are scored by Hessian trace (its text) and not by its code's Taylor term, the
schedule reaches the target in a few events instead of removing one group's channels every few iterations, and the
distillation runs on compacted weights once the target is reached.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cpd_fast import store
from cpd_fast.compact import compact
from cpd_fast.config import CompressConfig
from cpd_fast.data import Split
from cpd_fast.distill import ChannelWiseKL, LogitKL
from cpd_fast.errors import FileFormatError, RunFolderError, TrainingError
from cpd_fast.pipeline import comb
from cpd_fast.prune import attach_masks
from cpd_fast.recipes.evaluate import evaluate, reestimate_batch_norm
from cpd_fast.recipes.outcome import finish, training_note
from cpd_fast.recipes.progress import StopRequest, Talk
from cpd_fast.recipes.run_folder import CHOICE, RunFolder
from cpd_fast.recipes.tasks import Task, builtin, default_config
from cpd_fast.recipes.training import (
    adamw,
    advance_bar,
    batch_of,
    listen,
    one_cycle,
    restore_training_state,
    stage_seed,
    train_step,
    training_state,
)
from cpd_fast.report import GROUPS, Results, groups_figure
from cpd_fast.schedule import plan as make_plan
from cpd_fast.schedule import plan_cost
from cpd_fast.score import HessianTrace, score
from cpd_fast.types import ChannelGraph, PrunePlan, Scores, Target

TEACHER, SCORES = "teacher.safetensors", "scores.safetensors"
TENSORS_VERSION = 1
GLANCE = 256  # pictures of the val split that are looked at during training


@dataclass(frozen=True, eq=False)
class Result:
    """What a recipe returns.

    Attributes:
        run_dir: The run folder.
        plan: Which channels were kept.
        teacher: The trained original, eval mode.
        student: The compacted network, eval mode.
        results: Every number of the report.
        report: Path of the HTML report.
    """

    run_dir: Path
    plan: PrunePlan
    teacher: nn.Module
    student: nn.Module
    results: Results
    report: Path


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
        target: Fraction of the MACs that remains, or a ``Target(macs=...)``.
        run_dir: Folder of the run: created, or resumed if it was made with the same settings.
        data_dir: Folder of the data, for tasks that can be read from one.
        command: What the report names as the command that repeats the run.
        talk: Where progress goes; default: bars on stderr.
        **settings: Fields of :class:`cpd_fast.config.CompressConfig`, e.g. ``teacher_steps=40``.

    Returns:
        Plan, networks, numbers and the report's path.

    Raises:
        RunFolderError: If the folder cannot be written, is in use, or was made with other settings.
        DataError: If data or pretrained weights are missing or corrupt.
        ConfigError: If settings are unknown or out of range.
        PlanError: If the target cannot be reached.
        KeyboardInterrupt: After Ctrl-C, once the checkpoint is written.

    Source: Schmitt et al., arXiv:2408.03046.

    Example:
        >>> import tempfile, cpd_fast as cpd
        >>> result = cpd.recipes.cpd("climate", target=0.5, run_dir=tempfile.mkdtemp(), seed=0)  # doctest: +SKIP
        >>> result.results.student.miou  # doctest: +SKIP
    """
    return run_recipe("cpd", CompressRun, task, target, run_dir, data_dir, command, talk, settings)


def run_recipe(
    recipe: str,
    run_class: type[CompressRun],
    task: str | Task,
    target: Target | float,
    run_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None,
    command: str | None,
    talk: Talk | None,
    settings: Mapping[str, Any],
    choice: str | None = None,
) -> Result:
    """Open the run folder and go through the stages of a recipe; see :func:`cpd` for arguments and errors.

    ``choice`` is a JSON record of why the recipe was chosen, for the folder.

    Raises:
        RunFolderError: If the target is not one of MACs alone, or the folder cannot be used.
        KeyboardInterrupt: After Ctrl-C.
    """
    if isinstance(target, Target):
        if set(target.given) != {"macs"}:
            raise RunFolderError(f"recipes.{recipe}: expected Target(macs=...) alone, got {target}")
        target = float(target.given["macs"])
    config = default_config(task if isinstance(task, str) else task.name, target_macs=float(target), **settings)
    config = dataclasses.replace(config, **run_class.defaults(config, settings))
    loaded = builtin(task, data_dir) if isinstance(task, str) else task
    asked = {"recipe": recipe, "task": loaded.name, **loaded.origin, **config.of_recipe(recipe)}
    with RunFolder(run_dir, asked) as folder, StopRequest() as stop:
        with talk or Talk() as voice:
            run = run_class(loaded, config, folder, voice, stop, command or f"python {' '.join(sys.argv)}")
            if choice is not None:
                folder.write(CHOICE, choice)
            if (folder.path / CHOICE).exists():
                run.why = str(folder.read_json(CHOICE).get("why", ""))
                voice.say(run.why)
            try:
                return run.go()
            except KeyboardInterrupt:
                voice.say(
                    f"\nStopped. The checkpoint is in {folder.path}; run the same command again to continue from there."
                )
                raise


@dataclass(eq=False)
class CompressRun:
    """One run of Comb, Prune, Distill: the stages in order; each either does its work or finds it done."""

    task: Task
    config: CompressConfig
    folder: RunFolder
    talk: Talk
    stop: StopRequest
    command: str
    curve: list[tuple[str, int, float]] = field(default_factory=list)
    events: list[tuple[int, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    quality: list[tuple[str, int, float, float]] = field(default_factory=list)
    why: str = ""  # it was chosen
    after_teacher: ClassVar[str] = "prune"  # the stage

    @classmethod
    def defaults(cls, config: CompressConfig, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of this recipe that follow from others, where they were not given."""
        return {}

    def go(self) -> Result:
        """All stages."""
        torch.manual_seed(stage_seed(self.config.seed, "teacher"))
        teacher = self.task.build()
        stage, step, tensors, state = self._resume()
        teacher = self._teacher(teacher, step if stage == "teacher" else None, tensors)
        if stage == "teacher":
            stage, step, tensors = "prune", 0, {}
        graph = comb(teacher, self.task.example_inputs())
        self.folder.write(GROUPS, groups_figure(graph))
        student = copy.deepcopy(teacher)
        optimizer: Optimizer = adamw(student, self.config.weight_decay)
        if stage == "prune":
            plan, small, optimizer = self._prune(teacher, student, optimizer, graph, step, tensors, state)
            stage, step, tensors = "finetune", 0, {}
        else:
            plan = PrunePlan.from_json(state["plan"])
            small = compact(student, graph, plan)
            optimizer = adamw(small, self.config.weight_decay)
        self.folder.write("plan.json", plan.to_json())
        if stage == "finetune":
            self._finetune(teacher, small, optimizer, plan, step, tensors)
            self._batch_norm(small)
            self._save_student(small, graph, plan)
        return self._end(stage, teacher, graph, plan, self._scores(graph) if stage != "done" else None)

    def _end(
        self,
        stage: str,
        teacher: nn.Module,
        graph: ChannelGraph,
        plan: PrunePlan,
        scores: Scores | None,
        remarks: tuple[str, ...] | None = None,
    ) -> Result:
        """Measure and report, or find that it is done."""
        small = store.load(self.folder.path / "student.safetensors", teacher, graph=graph).eval()
        if stage == "done":
            text = (self.folder.path / "results.json").read_text()
            results = Results.from_json(text, str(self.folder.path / "results.json"))
        else:
            if self.why:
                remarks = (self.why, *((training_note(self.config),) if remarks is None else remarks))
            results = finish(
                self.task, self.config, self.folder, self.talk, graph, plan, teacher.eval(), small,
                scores, self.curve, self.events, self.quality, self.seconds, self.command, remarks,
            )  # fmt: skip
            self._checkpoint("done", 0, {}, {"plan": plan.to_json()})
        return Result(self.folder.path, plan, teacher, small, results, self.folder.path / "report.html")

    # ------------------------------------------------------------------------------------------------------ stages
    def _teacher(self, teacher: nn.Module, step: int | None, tensors: dict[str, Tensor]) -> nn.Module:
        """Train the teacher, or (``step`` is None) load it."""
        if step is None:
            saved, _ = self._read(TEACHER)
            teacher.load_state_dict(saved)
            return teacher.eval()
        c, loss_of = self.config, self.task.loss()
        optimizer = adamw(teacher, c.weight_decay)
        if step:
            restore_training_state(teacher, optimizer, tensors)

        def one(step: int) -> float:
            x, y = batch_of(self.task, c.batch_size, c.seed, "teacher", step)
            lr = one_cycle(c.teacher_lr, step, c.teacher_steps)
            return train_step(
                teacher, optimizer, lr, stage_seed(c.seed, "teacher", step), lambda: loss_of(teacher(x), y)
            )

        self._loop("teacher", "Train the teacher", step, c.teacher_steps, one, teacher, optimizer, {})
        self._write_tensors(TEACHER, teacher.state_dict(), {})
        self._checkpoint(self.after_teacher, 0, {}, {})
        return teacher.eval()

    def _prune(
        self,
        teacher: nn.Module,
        student: nn.Module,
        optimizer: Optimizer,
        graph: ChannelGraph,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
    ) -> tuple[PrunePlan, nn.Module, Optimizer]:
        """Score and mask in a few events, with distillation in between; then remove the channels for good."""
        c = self.config
        plan = PrunePlan.from_json(state["plan"]) if "plan" in state else PrunePlan({}, graph.fingerprint)
        handle = attach_masks(student, graph, plan)
        if step:
            restore_training_state(student, optimizer, tensors)
        event_at = {c.prune_steps * k // c.prune_events: k for k in range(c.prune_events)}
        dense = plan_cost(graph, None).macs
        distil = self._distil_loss(teacher, student)
        keep = {"plan": plan.to_json()}

        def one(step: int) -> float:
            nonlocal plan
            if step in event_at:
                share = (event_at[step] + 1) / c.prune_events
                plan = self._event(student, graph, step, plan, 1 - (1 - c.target_macs) * share)
                handle.update(plan)
                keep["plan"] = plan.to_json()
                self.events.append((step, plan_cost(graph, plan).macs / dense))
            batch = batch_of(self.task, c.batch_size, c.seed, "prune", step)
            lr = c.student_lr * min(1.0, (step + 1) / (0.2 * c.prune_steps))
            return train_step(student, optimizer, lr, stage_seed(c.seed, "prune", step), lambda: distil(*batch))

        self._loop("prune", "Prune and distil", step, c.prune_steps, one, student, optimizer, keep)
        handle.remove()
        small = compact(student, graph, plan, optimizer=optimizer)
        self._checkpoint("finetune", 0, training_state(small, optimizer), {"plan": plan.to_json()})
        return plan, small, optimizer

    def _event(self, student: nn.Module, graph: ChannelGraph, step: int, before: PrunePlan, macs: float) -> PrunePlan:
        """Score the masked student and remove channels until ``macs`` (a share) remains."""
        c, loss_of = self.config, self.task.loss()
        seed = stage_seed(c.seed, "prune", step)
        batches = [batch_of(self.task, c.batch_size, seed % 2**31, "prune", i) for i in range(c.score_batches)]
        student.eval()
        with self.talk.bar("  score by Hessian trace", c.score_batches) as bar:

            def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
                bar.advance()
                return loss_of(model(batch[0]), batch[1])

            probes = torch.Generator().manual_seed(seed)
            criterion = HessianTrace(num_probes=c.num_probes, generator=probes)
            scores = score(student, graph, batches, loss, criterion=criterion, plan=before)
        if step == 0:  # later scores know nothing of what is gone by then; the report shows the first
            info = {k: v for k, v in scores.info.items() if isinstance(v, (str, int, float, bool))}
            self._write_tensors(SCORES, dict(scores), {"criterion": scores.criterion, "info": info})
        most, least = c.max_pruning_ratio, c.min_channels
        return make_plan(graph, scores, Target(macs=macs), c.round_to, most, least, start=before, per_cost="macs")

    def _finetune(
        self,
        teacher: nn.Module,
        small: nn.Module,
        optimizer: Optimizer,
        plan: PrunePlan,
        step: int,
        tensors: dict[str, Tensor],
    ) -> None:
        """Train the compacted network with distillation, in place."""
        c = self.config
        if tensors:
            restore_training_state(small, optimizer, tensors)
        distil = self._distil_loss(teacher, small)

        def one(step: int) -> float:
            batch = batch_of(self.task, c.batch_size, c.seed, "finetune", step)
            lr = one_cycle(c.student_lr, step, c.finetune_steps, warm_up=0.0)
            return train_step(small, optimizer, lr, stage_seed(c.seed, "finetune", step), lambda: distil(*batch))

        self._loop(
            "finetune", "Fine-tune and distil", step, c.finetune_steps, one, small, optimizer, {"plan": plan.to_json()}
        )

    def _batch_norm(self, small: nn.Module) -> None:
        """Re-estimate batch norm statistics; keep them if the val split says so."""
        data, c = self.task.data, self.config
        before = evaluate(small, data, data.val).main
        other = copy.deepcopy(small)
        reestimate_batch_norm(other, data, c.batch_size, stage_seed(c.seed, "finetune", c.finetune_steps) % 2**31)
        if evaluate(other, data, data.val).main > before:
            small.load_state_dict(other.state_dict())

    def _save_student(self, small: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> None:
        try:
            store.save(self.folder.path / "student.safetensors", small, graph, plan, self.task.example_inputs())
        except FileFormatError as e:
            raise RunFolderError(f"{e}; run the same command again, it continues from the last checkpoint") from e
        self._checkpoint("measure", 0, {}, {"plan": plan.to_json()})

    # --------------------------------------------------------------------------------------------------------- parts
    def _distil_loss(self, teacher: nn.Module, student: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """``loss(x, y)`` of the student: the task's own plus imitation of the teacher."""
        c, loss_of, at = self.config, self.task.loss(), self.task.distill_at
        imitate: nn.Module
        if self.task.data.is_segmentation:
            imitate = ChannelWiseKL(tau=c.tau, loss_weight=c.distill_weight)
        else:
            imitate = LogitKL(temperature=c.tau, loss_weight=c.distill_weight)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad(), listen(teacher, at) as wanted:
                teacher(x)
            with listen(student, at) as heard:
                logits = student(x)
            return loss_of(logits, y) + imitate(heard[-1], wanted[-1])

        return loss

    def _loop(
        self,
        stage: str,
        title: str,
        start: int,
        steps: int,
        one: Callable[[int], float],
        model: nn.Module,
        optimizer: Optimizer,
        keep: dict[str, Any],
    ) -> None:
        """Run steps ``start`` to ``steps``, with checkpoints, progress and Ctrl-C at the end of a step.

        Raises:
            KeyboardInterrupt: If Ctrl-C was pressed; the checkpoint is written by then.
            TrainingError: If the loss is not finite.
        """
        began, spent = time.monotonic(), self.seconds.get(stage, 0.0)
        with self.talk.bar(title, steps, start) as bar, self.stop.polite():
            for step in range(start, steps):
                try:
                    loss = one(step)
                except TrainingError as e:
                    raise TrainingError(
                        f"{stage}, step {step}: {e}; the last checkpoint in {self.folder.path} is from before, but the "
                        "same settings will come here again: start anew in another --run-dir"
                    ) from e
                advance_bar(bar, loss)
                self.curve.append((stage, step, round(loss, 5)))
                self.seconds[stage] = round(spent + time.monotonic() - began, 2)
                is_due = (step + 1) % self.config.checkpoint_every == 0 and step + 1 < steps
                if is_due or step + 1 == steps:
                    self._look(stage, step + 1, model)
                if is_due or self.stop.asked:
                    self._checkpoint(stage, step + 1, training_state(model, optimizer), keep)
                if self.stop.asked:
                    raise KeyboardInterrupt

    def _look(self, stage: str, step: int, model: nn.Module) -> None:
        """How good the network is by now, on some pictures of the val split."""
        val = self.task.data.val
        some = Split(val.images[:GLANCE], val.labels[:GLANCE])
        share = 1.0 if stage == "teacher" or not self.events else self.events[-1][1]
        self.quality.append((stage, step, round(evaluate(model, self.task.data, some).main, 5), round(share, 5)))

    def _resume(self) -> tuple[str, int, dict[str, Tensor], dict[str, Any]]:
        found = self.folder.load_checkpoint()
        if found is None:
            return "teacher", 0, {}, {}
        stage, step, tensors, state = found
        self.curve = [(str(s), int(i), float(v)) for s, i, v in state["curve"]]
        self.events = [(int(i), float(v)) for i, v in state["events"]]
        self.seconds = dict(state["seconds"])
        self.quality = [(str(s), int(i), float(q), float(m)) for s, i, q, m in state.get("quality", ())]
        where = "is finished" if stage == "done" else f"continues at stage {stage}, step {step}"
        self.talk.say(f"The run in {self.folder.path} {where}")
        return stage, step, tensors, state

    def _checkpoint(self, stage: str, step: int, tensors: dict[str, Tensor], keep: dict[str, Any]) -> None:
        record = {"curve": self.curve, "events": self.events, "seconds": self.seconds, "quality": self.quality}
        self.folder.save_checkpoint(stage, step, tensors, {**record, **keep})

    def _write_tensors(self, name: str, tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
        self.folder.write(name, store.pack_tensors(tensors, head, "cpd_fast.tensors", TENSORS_VERSION))

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            return store.read_tensors(self.folder.path / name, "cpd_fast.tensors", TENSORS_VERSION)
        except FileFormatError as e:
            raise RunFolderError(f"{e}; delete {self.folder.path} to start this run over") from e

    def _scores(self, graph: ChannelGraph) -> Scores:
        tensors, head = self._read(SCORES)
        return Scores(tensors, criterion=head["criterion"], fingerprint=graph.fingerprint, info=head["info"])

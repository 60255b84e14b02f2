"""What the recipes share: a run goes from stage to stage, each of which does its work or finds it done."""

from __future__ import annotations

import copy
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cpd_fast import store
from cpd_fast.config import CompressConfig
from cpd_fast.data import DataSplits, Split
from cpd_fast.distill import ChannelWiseKL, LogitKL
from cpd_fast.errors import BackendError, FileFormatError, RunFolderError, TrainingError
from cpd_fast.packages import ONNX, PICTURES, SEARCH, require
from cpd_fast.pipeline import comb
from cpd_fast.recipes.evaluate import evaluate, reestimate_batch_norm
from cpd_fast.recipes.outcome import finish
from cpd_fast.recipes.progress import StopRequest, Talk
from cpd_fast.recipes.rounds import PRUNED, prune_in_rounds
from cpd_fast.recipes.run_folder import CHECKPOINT, CHOICE, RunFolder
from cpd_fast.recipes.target import check_target
from cpd_fast.recipes.tasks import Task, builtin, default_config
from cpd_fast.recipes.training import Machine, Trainer, adamw, advance_bar, batch_of, listen, one_cycle, stage_seed
from cpd_fast.report import GROUPS, Results, groups_figure
from cpd_fast.timing import LatencyTable
from cpd_fast.types import ChannelGraph, PrunePlan, Scores, Target

TEACHER = "teacher.safetensors"
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


def run_recipe(
    recipe: str,
    run_class: type[Run],
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
        RunFolderError: If the folder cannot be used.
        KeyboardInterrupt: After Ctrl-C.
    """
    limits = target.given if isinstance(target, Target) else {"macs": float(target)}
    limits = {f"target_{name}": value for name, value in limits.items()}
    config = default_config(task if isinstance(task, str) else task.name, **{**limits, **settings})
    config = dataclasses.replace(config, **run_class.defaults(config, settings))
    loaded = builtin(task, data_dir) if isinstance(task, str) else task
    asked = {"recipe": recipe, "task": loaded.name, **loaded.origin, **config.of_recipe(recipe)}
    command = command or f"python {shlex.join(sys.argv)}"
    with RunFolder(run_dir, asked, command) as folder, StopRequest() as stop:
        with talk or Talk() as voice:
            run = run_class(loaded, config, folder, voice, stop, folder.command)
            voice.say(f"Run folder: {folder.path}")
            voice.say(_told(loaded.data))
            if choice is not None:
                folder.write(CHOICE, choice)
            if (folder.path / CHOICE).exists():
                run.why = str(folder.read_json(CHOICE).get("why", ""))
                voice.say(run.why)
            try:
                return run.go()
            except KeyboardInterrupt:
                if (folder.path / CHECKPOINT).exists():
                    said = f"The checkpoint is in {folder.path}; run the same command again to continue from there."
                else:
                    said = "There is no checkpoint yet; the same command begins anew."
                voice.say(f"\nStopped. {said}")
                raise


def _told(data: DataSplits) -> str:
    """What the data are, in a line: a folder that was taken for another layout shows here."""
    layout = f" ({data.source['layout']})" if "layout" in data.source else ""
    counts = ", ".join(f"{len(getattr(data, s).images):,} {s}" for s in ("train", "val", "test"))
    shape = "x".join(map(str, data.train.images.shape[1:]))
    more = f" and {len(data.classes) - 8} more" if len(data.classes) > 8 else ""
    classes = f"{len(data.classes)} classes: {', '.join(data.classes[:8])}{more}"
    return f"{data.name}{layout}: {counts} pictures of {shape}; {classes}"


@dataclass
class Place:
    """Where a run is.

    Attributes:
        stage: What it does next.
        step: Step of the stage.
        tensors: Training state at that step; empty at the start of a stage.
        state: What else the checkpoint holds, JSON-able.
    """

    stage: str = "teacher"
    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Run:
    """One run of a recipe. Subclasses name the stages between teacher and fine-tuning, and find the plan in them."""

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
    machine: Machine = field(init=False)
    table: LatencyTable | None = None

    def __post_init__(self) -> None:
        self.machine = Machine.of(self.config.device, self.config.precision, self.config.memory_limit)

    @classmethod
    def defaults(cls, config: CompressConfig, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of this recipe that follow from others, where they were not given."""
        return {}

    # ------------------------------------------------------------------------------------- what a recipe has to say
    def between(self) -> tuple[str, ...]:
        """Names of the stages between the teacher's and the student's training."""
        raise NotImplementedError

    def shape(self, mentor: nn.Module, graph: ChannelGraph, at: Place) -> tuple[PrunePlan, nn.Module, Optimizer]:
        """Go through the stages but the rounds; the plan, the compacted student and its optimizer."""
        raise NotImplementedError

    def remarks(self, graph: ChannelGraph, plan: PrunePlan) -> tuple[str, ...]:
        """How the two networks were trained, for the report."""
        raise NotImplementedError

    def finetune_lr(self, step: int) -> float:
        """Learning rate of the compacted network, which is trained already."""
        return one_cycle(self.config.student_lr, step, self.config.finetune_steps, warm_up=0.0)

    def scores(self, graph: ChannelGraph) -> Scores | None:
        """Scores of channels that the report shows."""
        return None

    # -------------------------------------------------------------------------------------------------------- stages
    def go(self) -> Result:
        """All stages."""
        torch.manual_seed(stage_seed(self.config.seed, "teacher"))
        if self.machine.half and self.machine.device.type == "cpu":
            self.talk.say("precision=fp16 on the CPU takes many times as long as fp32: for trying things out only")
        teacher = self.task.build().to(self.machine.device)
        at = self._resume()
        if at.stage != "done":
            self._check_packages()
        graph = self._comb(teacher)
        if at.stage == "teacher":
            check_target(self, teacher, graph)
        self._teacher(teacher, at)
        mentor = self._mentor(teacher, at)
        plan, small, optimizer = self.shape(mentor, graph, at)
        self.folder.write("plan.json", plan.to_json())
        if at.stage == "finetune":
            self._finetune(mentor, small, optimizer, plan, at)
            self._batch_norm(small)
            self._save_student(small, graph, plan)
        return self._end(at.stage, teacher, graph, plan)

    def go_on(self, at: Place, tensors: dict[str, Tensor] | None = None, keep: dict[str, Any] | None = None) -> None:
        """A stage is done: a checkpoint says that the next one begins, with these tensors and this state."""
        stages = ("teacher", *self.between(), "finetune")
        at.stage = stages[stages.index(at.stage) + 1]
        at.step, at.tensors, at.state = 0, {}, keep or {}
        self.checkpoint(at.stage, 0, tensors or {}, at.state)

    def _check_packages(self) -> None:
        """See to it that what the run uses after its training can be imported, or say what it does without it.

        Raises:
            BackendError: If it cannot; says what to install.
        """
        in_onnx = self.config.latency_backend == "onnxruntime"
        require(PICTURES, *((SEARCH,) if "search" in self.between() else ()), *(ONNX if in_onnx else ()))
        try:
            require(*ONNX)
        except BackendError as e:
            self.talk.say(f"There will be no ONNX files, and latency in eager PyTorch alone: {e}, before the run ends")

    def _comb(self, teacher: nn.Module) -> ChannelGraph:
        """The groups, steered by the settings, and their drawing in the folder."""
        c = self.config
        graph = comb(
            teacher, self.task.example_inputs(), c.listed("ignore"), c.on_unknown, c.granularity, c.conv_groups,
            c.listed("protect"),
        ).freeze(*c.listed("freeze"))  # fmt: skip
        self.folder.write(GROUPS, groups_figure(graph))
        return graph

    def _mentor(self, teacher: nn.Module, at: Place) -> nn.Module:
        """Who teaches: the teacher, or its copy with pruned weights where the recipe has rounds."""
        if "rounds" not in self.between():
            return teacher
        pruned = copy.deepcopy(teacher)
        if at.stage == "rounds":
            prune_in_rounds(self, pruned, at)
            self.go_on(at)
        else:
            pruned.load_state_dict(self.read_tensors(PRUNED)[0])
        return pruned.eval()

    def _teacher(self, teacher: nn.Module, at: Place) -> None:
        """Train the teacher, or load it, in place."""
        if at.stage != "teacher":
            teacher.load_state_dict(self.read_tensors(TEACHER)[0])
            teacher.eval()
            return
        c = self.config
        if c.teacher_steps:
            trainer = self.trainer("teacher", teacher, adamw(teacher, c.weight_decay), self.task_loss())
            trainer.restore(at.tensors)

            def one(step: int) -> float:
                lr = one_cycle(c.teacher_lr, step, c.teacher_steps)
                return trainer.step(self.batch("teacher", step), lr, stage_seed(c.seed, "teacher", step))

            self.loop("teacher", "Train the teacher", at.step, c.teacher_steps, one, trainer, {})
        self.write_tensors(TEACHER, teacher.state_dict(), {})
        teacher.eval()
        self.go_on(at)

    def _finetune(self, teacher: nn.Module, small: nn.Module, optimizer: Optimizer, plan: PrunePlan, at: Place) -> None:
        """Train the compacted network with distillation, in place."""
        c = self.config
        trainer = self.trainer("finetune", small, optimizer, self.distil_loss(), teacher)
        trainer.restore(at.tensors)

        def one(step: int) -> float:
            seed = stage_seed(c.seed, "finetune", step)
            return trainer.step(self.batch("finetune", step), self.finetune_lr(step), seed)

        keep = {"plan": plan.to_json()}
        self.loop("finetune", "Fine-tune and distil", at.step, c.finetune_steps, one, trainer, keep)

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
        self.checkpoint("measure", 0, {}, {"plan": plan.to_json()})

    def _end(self, stage: str, teacher: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> Result:
        """Measure and report, or find that it is done."""
        small = store.load(self.folder.path / "student.safetensors", teacher, graph=graph).eval()
        if stage == "done":
            text = (self.folder.path / "results.json").read_text()
            results = Results.from_json(text, str(self.folder.path / "results.json"))
        else:
            remarks = (*((self.why,) if self.why else ()), *self.remarks(graph, plan))
            results = finish(
                self.task, self.config, self.folder, self.talk, graph, plan, teacher.eval(), small,
                self.scores(graph), self.curve, self.events, self.quality, self.seconds, self.command, remarks,
                self.machine.device,
            )  # fmt: skip
            self.checkpoint("done", 0, {}, {"plan": plan.to_json()})
        return Result(self.folder.path, plan, teacher, small, results, self.folder.path / "report.html")

    # --------------------------------------------------------------------------------------------------------- parts
    def batch(self, stage: str, step: int) -> tuple[Tensor, Tensor]:
        """Augmented training batch of one step, on the device."""
        return self.machine.place(batch_of(self.task, self.config.batch_size, self.config.seed, stage, step))

    def trainer(
        self, stage: str, model: nn.Module, optimizer: Optimizer, loss: Callable[..., Tensor],
        teacher: nn.Module | None = None,
    ) -> Trainer:  # fmt: skip
        """What trains a model in a stage; says how it stays within the memory limit."""
        trainer = Trainer(model, optimizer, loss, self.machine, self.batch(stage, 0), teacher)
        if trainer.choice is not None:
            self.talk.say(f"Memory, {stage}: {trainer.choice}")
        return trainer

    def task_loss(self) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
        """``loss(model, batch)``, the task's own."""
        loss_of = self.task.loss()
        return lambda model, batch: loss_of(model(batch[0]), batch[1])

    def distil_loss(self) -> Callable[[nn.Module, nn.Module, tuple[Tensor, Tensor]], Tensor]:
        """``loss(student, teacher, batch)``: the task's own plus imitation of the teacher."""
        c, loss_of, at = self.config, self.task.loss(), self.task.distill_at
        imitate: nn.Module
        if self.task.data.is_segmentation:
            imitate = ChannelWiseKL(tau=c.tau, loss_weight=c.distill_weight)
        else:
            imitate = LogitKL(temperature=c.tau, loss_weight=c.distill_weight)

        def loss(student: nn.Module, teacher: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            with torch.no_grad(), listen(teacher, at) as wanted:
                teacher(x)
            with listen(student, at) as heard:
                logits = student(x)
            return loss_of(logits, y) + imitate(heard[-1], wanted[-1].to(heard[-1].dtype))

        return loss

    def loop(
        self,
        stage: str,
        title: str,
        start: int,
        steps: int,
        one: Callable[[int], float],
        trainer: Trainer,
        keep: dict[str, Any],
        extra: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:
        """Run steps ``start`` to ``steps``, with checkpoints, progress and Ctrl-C at the end of a step.

        Checkpoints hold the training state, the tensors ``extra()`` and the state ``keep``.

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
                    self._look(stage, step + 1, trainer.model)
                if is_due or self.stop.asked:
                    self.checkpoint(stage, step + 1, {**trainer.state(), **extra()}, keep)
                if self.stop.asked:
                    raise KeyboardInterrupt

    def _look(self, stage: str, step: int, model: nn.Module) -> None:
        """How good the network is by now, on some pictures of the val split."""
        val = self.task.data.val
        some = Split(val.images[:GLANCE], val.labels[:GLANCE])
        share = 1.0 if stage == "teacher" or not self.events else self.events[-1][1]
        self.quality.append((stage, step, round(evaluate(model, self.task.data, some).main, 5), round(share, 5)))

    def _resume(self) -> Place:
        found = self.folder.load_checkpoint()
        if found is None:
            return Place()
        stage, step, tensors, state = found
        self.curve = [(str(s), int(i), float(v)) for s, i, v in state["curve"]]
        self.events = [(int(i), float(v)) for i, v in state["events"]]
        self.seconds = dict(state["seconds"])
        self.quality = [(str(s), int(i), float(q), float(m)) for s, i, q, m in state.get("quality", ())]
        where = "is finished" if stage == "done" else f"continues at stage {stage}, step {step}"
        self.talk.say(f"The run in {self.folder.path} {where}")
        return Place(stage, step, tensors, state)

    def checkpoint(self, stage: str, step: int, tensors: dict[str, Tensor], keep: dict[str, Any]) -> None:
        """Replace the checkpoint, with the curves so far."""
        record = {"curve": self.curve, "events": self.events, "seconds": self.seconds, "quality": self.quality}
        self.folder.save_checkpoint(stage, step, tensors, {**record, **keep})

    def write_tensors(self, name: str, tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
        """Write tensors and a JSON-able head into the run folder."""
        self.folder.write(name, store.pack_tensors(tensors, head, "cpd_fast.tensors", TENSORS_VERSION))

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and head of a file of the run folder.

        Raises:
            RunFolderError: If it is missing or corrupt.
        """
        try:
            return store.read_tensors(self.folder.path / name, "cpd_fast.tensors", TENSORS_VERSION)
        except FileFormatError as e:
            raise RunFolderError(f"{e}; delete {self.folder.path} to start this run over") from e

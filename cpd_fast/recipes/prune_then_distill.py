"""Prune, then Distill (arXiv 2109.14960) as one resumable run.

    teacher -> (prune a fifth of its weights, train again) x rounds -> student with as many weights a layer
            -> distil from the pruned teacher -> measure, export, report

Departures from the paper: AdamW instead of SGD, as in the other recipes; and where the student shaped by the teacher's
weights has more MACs than the target, its widths are scaled down together until it meets it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cpd_fast.compact import compact
from cpd_fast.config import CompressConfig
from cpd_fast.distill import LogitKL
from cpd_fast.recipes.progress import Talk
from cpd_fast.recipes.rounds import FRACTION, PRUNED
from cpd_fast.recipes.run import Place, Result, Run, run_recipe
from cpd_fast.recipes.target import latency_table, measured_plan, proportional
from cpd_fast.recipes.tasks import Task
from cpd_fast.recipes.training import adamw, one_cycle, stage_seed, training_state
from cpd_fast.schedule import holds, match_plan, plan_cost
from cpd_fast.score import Magnitude, score
from cpd_fast.types import ChannelGraph, PrunePlan, Target


def prune_then_distill(
    task: str | Task = "fashion-mnist",
    *,
    target: Target | float = 0.5,
    run_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    command: str | None = None,
    talk: Talk | None = None,
    **settings: Any,
) -> Result:
    """Compress a network by Prune, then Distill: single weights of the teacher first, then a student of its shape.

    Each of ``rounds`` takes a fifth of the weights that are left, over all convolutions and linears together, and
    trains the rest for ``round_steps`` with the learning rate started anew. The student has the teacher's
    architecture, at widths at which its layers hold as many weights; it learns from the pruned teacher.

    Args:
        task: ``"climate"``, ``"fashion-mnist"`` or a :class:`Task` of your own.
        target: Fraction of the MACs that may remain at most, or a ``Target`` of fractions and of a latency, which
            is measured.
        run_dir: Folder of the run: created, or resumed if it was made with the same settings.
        data_dir: Folder of the data, for tasks that can be read from one.
        command: What the report names as the command that repeats the run.
        talk: Where progress goes; default: bars on stderr.
        **settings: Fields of :class:`cpd_fast.config.CompressConfig`, e.g. ``rounds=7``; ``finetune_steps`` are the
            student's.

    Returns:
        Plan, networks, numbers and the report's path. ``teacher`` is the unpruned one.

    Raises:
        RunFolderError: If the folder cannot be written, is in use, or was made with other settings.
        DataError: If data or pretrained weights are missing or corrupt.
        ConfigError: If settings are unknown or out of range.
        PlanError: If the target cannot be reached.
        KeyboardInterrupt: After Ctrl-C, once the checkpoint is written.

    Source: Park and No, arXiv:2109.14960.

    Example:
        >>> import tempfile, cpd_fast as cpd
        >>> cpd.recipes.prune_then_distill("fashion-mnist", run_dir=tempfile.mkdtemp())  # doctest: +SKIP
    """
    return run_recipe(
        "prune_then_distill", PruneThenDistillRun, task, target, run_dir, data_dir, command, talk, settings
    )


class PruneThenDistillRun(Run):
    """One run of Prune, then Distill."""

    @classmethod
    def defaults(cls, config: CompressConfig, given: Mapping[str, Any]) -> dict[str, Any]:
        """The student starts from scratch: it gets the steps that teacher and student of :func:`cpd` take together."""
        steps = config.teacher_steps + config.prune_steps + config.finetune_steps
        return {} if "finetune_steps" in given else {"finetune_steps": steps}

    def between(self) -> tuple[str, ...]:
        """The rounds, and the student's widths."""
        return ("rounds", "match")

    def shape(self, mentor: nn.Module, graph: ChannelGraph, at: Place) -> tuple[PrunePlan, nn.Module, Optimizer]:
        """The student that the pruned teacher's weights ask for."""
        is_new = at.stage == "match"
        plan = self._plan(mentor, graph) if is_new else PrunePlan.from_json(at.state["plan"])
        small, optimizer = self._student(mentor, graph, plan)
        if is_new:
            self.go_on(at, training_state(small, optimizer), {"plan": plan.to_json()})
        return plan, small, optimizer

    def _plan(self, pruned: nn.Module, graph: ChannelGraph) -> PrunePlan:
        """Widths at which layers hold as many weights, scaled down together where that is above the target."""
        matched = match_plan(graph, self.read_tensors(PRUNED)[1]["nonzeros"])
        table = latency_table(self, pruned, graph)
        scaled = proportional(self, graph, score(pruned, graph, criterion=Magnitude(p=1)), matched, table)

        def plan_of(target: Target) -> PrunePlan:
            return matched if holds(graph, target, matched, table) else scaled(target)

        plan = measured_plan(self, pruned, graph, plan_of, "match")
        if plan != matched:
            self.talk.say("The student that the pruned teacher shapes is above the target; its widths are scaled down.")
        return plan

    def _student(self, pruned: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> tuple[nn.Module, Optimizer]:
        """The student before training: from scratch as in the paper, or with what it can keep of the teacher."""
        if self.config.inherit:
            small = compact(copy.deepcopy(pruned), graph, plan)
        else:
            torch.manual_seed(stage_seed(self.config.seed, "finetune"))
            small = compact(self.task.build().to(self.machine.device), graph, plan)
            for module in small.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()  # the starting weights that a layer of this size gets
        return small, adamw(small, self.config.weight_decay)

    def finetune_lr(self, step: int) -> float:
        """From scratch the student learns at the teacher's rate."""
        c = self.config
        return super().finetune_lr(step) if c.inherit else one_cycle(c.teacher_lr, step, c.finetune_steps)

    def distil_loss(self) -> Callable[[nn.Module, nn.Module, tuple[Tensor, Tensor]], Tensor]:
        """``alpha * T^2 KL(teacher || student) + (1 - alpha) * the task's own``."""
        c, loss_of = self.config, self.task.loss()
        imitate = LogitKL(temperature=c.kd_temperature, loss_weight=c.alpha)

        def loss(student: nn.Module, teacher: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            with torch.no_grad():
                wanted = teacher(x)
            logits = student(x)
            return imitate(logits, wanted.to(logits.dtype)) + (1 - c.alpha) * loss_of(logits, y)

        return loss

    def remarks(self, graph: ChannelGraph, plan: PrunePlan) -> tuple[str, ...]:
        """What the rounds left, and how long was trained."""
        c = self.config
        share = plan_cost(graph, plan).params / plan_cost(graph).params
        start = "from the pruned teacher's weights" if c.inherit else "from scratch"
        return (
            f"Prune, then Distill: {c.rounds} rounds left {(1 - FRACTION) ** c.rounds:.0%} of the teacher's weights; "
            f"the student has {share:.0%} of its parameters.",
            f"One seed. The teacher was trained for {c.teacher_steps} steps and {c.rounds} x {c.round_steps} while it "
            f"was pruned, the student for {c.finetune_steps}, {start}.",
        )

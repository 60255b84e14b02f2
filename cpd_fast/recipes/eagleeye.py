"""EagleEye (arXiv 2007.02491) as one resumable run.

    teacher -> comb -> search with adaptive batch norm -> compact the best -> fine-tune with distillation
            -> measure, export, report

Departures from the paper: candidates are drawn on the target instead of rejected, ranked on the val split (pictures
that were not trained on) instead of training pictures, and the best one is fine-tuned with distillation from the
teacher.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from cpd_fast.compact import compact
from cpd_fast.config import CompressConfig
from cpd_fast.data import Split
from cpd_fast.pipeline import comb
from cpd_fast.recipes.comb_prune_distill import CompressRun, Result, run_recipe
from cpd_fast.recipes.evaluate import evaluate
from cpd_fast.recipes.progress import Talk
from cpd_fast.recipes.tasks import Task
from cpd_fast.recipes.training import adamw, batch_of, stage_seed, training_state
from cpd_fast.report import GROUPS, groups_figure
from cpd_fast.search import adapt_batch_norm, materialise, search
from cpd_fast.types import ChannelGraph, PrunePlan, Target

STUDY = "search.sqlite3"


def eagleeye(
    task: str | Task = "climate",
    *,
    target: Target | float = 0.5,
    run_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    command: str | None = None,
    talk: Talk | None = None,
    **settings: Any,
) -> Result:
    """Compress a network by EagleEye: evaluate many plans after adaptive batch norm, fine-tune the best.

    The run folder also holds the search's study, ``search.sqlite3``. Killed at any moment, the same call goes on.

    Args:
        task: ``"climate"``, ``"fashion-mnist"`` or a :class:`Task` of your own.
        target: Fraction of the MACs that remains, or a ``Target(macs=...)``.
        run_dir: Folder of the run: created, or resumed if it was made with the same settings.
        data_dir: Folder of the data, for tasks that can be read from one.
        command: What the report names as the command that repeats the run.
        talk: Where progress goes; default: bars on stderr.
        **settings: Fields of :class:`cpd_fast.config.CompressConfig`, e.g. ``candidates=300``.

    Returns:
        Plan, networks, numbers and the report's path.

    Raises:
        RunFolderError: If the folder cannot be written, is in use, or was made with other settings.
        DataError: If data or pretrained weights are missing or corrupt.
        ConfigError: If settings are unknown or out of range.
        PlanError: If the target cannot be reached.
        SearchError: If no candidate could be evaluated.
        KeyboardInterrupt: After Ctrl-C, once the checkpoint is written.

    Source: Li et al., arXiv:2007.02491.

    Example:
        >>> import tempfile, cpd_fast as cpd
        >>> result = cpd.recipes.eagleeye("climate", target=0.5, run_dir=tempfile.mkdtemp())  # doctest: +SKIP
    """
    return run_recipe("eagleeye", EagleEyeRun, task, target, run_dir, data_dir, command, talk, settings)


class EagleEyeRun(CompressRun):
    """One run of EagleEye: the stages in order; each either does its work or finds it done."""

    after_teacher: ClassVar[str] = "search"

    @classmethod
    def defaults(cls, config: CompressConfig, given: Mapping[str, Any]) -> dict[str, Any]:
        """As many steps after the search as :func:`cpd` takes under masks and afterwards."""
        return {} if "finetune_steps" in given else {"finetune_steps": config.prune_steps + config.finetune_steps}

    def go(self) -> Result:
        """All stages."""
        torch.manual_seed(stage_seed(self.config.seed, "teacher"))
        teacher = self.task.build()
        stage, step, tensors, state = self._resume()
        teacher = self._teacher(teacher, step if stage == "teacher" else None, tensors)
        if stage == "teacher":
            stage, step, tensors = self.after_teacher, 0, {}
        graph = comb(teacher, self.task.example_inputs())
        self.folder.write(GROUPS, groups_figure(graph))
        if stage == "search":
            plan = self._search(teacher, graph)
            small = compact(copy.deepcopy(teacher), graph, plan)
            adapt_batch_norm(small, materialise(self._calibration(), graph, torch.device("cpu")))
            optimizer = adamw(small, self.config.weight_decay)
            self._checkpoint("finetune", 0, training_state(small, optimizer), {"plan": plan.to_json()})
            stage, step, tensors = "finetune", 0, {}
        else:
            plan = PrunePlan.from_json(state["plan"])
            small = compact(copy.deepcopy(teacher), graph, plan)
            optimizer = adamw(small, self.config.weight_decay)
        self.folder.write("plan.json", plan.to_json())
        if stage == "finetune":
            self._finetune(teacher, small, optimizer, plan, step, tensors)
            self._batch_norm(small)
            self._save_student(small, graph, plan)
        return self._end(stage, teacher, graph, plan, None, self._remarks())

    def _calibration(self) -> list[torch.Tensor]:
        c = self.config
        return [batch_of(self.task, c.batch_size, c.seed, "search", i)[0] for i in range(c.calibration_batches)]

    def _search(self, teacher: nn.Module, graph: ChannelGraph) -> PrunePlan:
        """The best plan; the study in the run folder knows the candidates of earlier calls.

        Raises:
            KeyboardInterrupt: If Ctrl-C was pressed, after the candidate that was being evaluated.
        """
        c, data = self.config, self.task.data
        held_out = Split(data.val.images[: c.search_images], data.val.labels[: c.search_images])
        began, spent = time.monotonic(), self.seconds.get("search", 0.0)
        with self.talk.bar("Search", c.candidates) as bar, self.stop.polite():

            def told(_number: int, value: float | None) -> None:
                bar.advance(note="failed" if value is None else f"val {value:.3f}")
                if self.stop.asked:
                    raise KeyboardInterrupt

            found = search(
                teacher, graph, Target(macs=c.target_macs), self._calibration(),
                lambda model: evaluate(model, data, held_out).main,
                num_candidates=c.candidates, storage=self.folder.path / STUDY, seed=c.seed, round_to=c.round_to,
                alone=True, on_candidate=told,
            )  # fmt: skip
        self.seconds["search"] = round(spent + time.monotonic() - began, 2)
        values = sorted(x.value for x in found.candidates if x.value is not None)
        self.talk.say(
            f"Best of {len(values)} candidates: {values[-1]:.3f} on val; the median has {values[len(values) // 2]:.3f}"
        )
        return found.plan

    def _remarks(self) -> tuple[str, ...]:
        c = self.config
        return (
            f"EagleEye: the best of {c.candidates} candidates by {c.search_images} val pictures after adaptive batch "
            f"norm on {c.calibration_batches} batches.",
            f"One seed. The teacher was trained for {c.teacher_steps} steps, the student for {c.finetune_steps} more "
            "from there: a gain over the teacher comes from these steps, not from removing channels.",
        )

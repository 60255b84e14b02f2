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
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from cpd_fast.compact import compact
from cpd_fast.config import CompressConfig
from cpd_fast.recipes.progress import Talk
from cpd_fast.recipes.ranking import best_plan, calibration, search_note
from cpd_fast.recipes.rounds import pruned_note
from cpd_fast.recipes.run import Place, Result, Run, run_recipe
from cpd_fast.recipes.tasks import Task
from cpd_fast.recipes.training import adamw, training_state
from cpd_fast.search import adapt_batch_norm, materialise
from cpd_fast.types import ChannelGraph, PrunePlan, Target


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
        target: Fraction of the MACs that remains, or a ``Target`` of fractions and of a latency, which is measured.
        run_dir: Folder of the run: created, or resumed if it was made with the same settings.
        data_dir: Folder of the data, for tasks that can be read from one.
        command: What the report names as the command that repeats the run.
        talk: Where progress goes; default: bars on stderr.
        **settings: Fields of :class:`cpd_fast.config.CompressConfig`, e.g. ``candidates=300``. ``prune_teacher=1``
            prunes the teacher's weights in ``rounds`` first; candidates then come from that network, and it teaches.

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


class EagleEyeRun(Run):
    """One run of EagleEye."""

    @classmethod
    def defaults(cls, config: CompressConfig, given: Mapping[str, Any]) -> dict[str, Any]:
        """As many steps after the search as :func:`cpd` takes under masks and afterwards."""
        return {} if "finetune_steps" in given else {"finetune_steps": config.prune_steps + config.finetune_steps}

    def between(self) -> tuple[str, ...]:
        """Rounds where they are asked for, then the search."""
        return ("rounds", "search") if self.config.prune_teacher else ("search",)

    def shape(self, mentor: nn.Module, graph: ChannelGraph, at: Place) -> tuple[PrunePlan, nn.Module, Optimizer]:
        """Search, and compact the best."""
        is_new = at.stage == "search"
        plan = best_plan(self, mentor, graph) if is_new else PrunePlan.from_json(at.state["plan"])
        small = compact(copy.deepcopy(mentor), graph, plan)
        optimizer = adamw(small, self.config.weight_decay)
        if is_new:
            adapt_batch_norm(small, materialise(calibration(self), graph, self.machine.device))
            self.go_on(at, training_state(small, optimizer), {"plan": plan.to_json()})
        return plan, small, optimizer

    def remarks(self, graph: ChannelGraph, plan: PrunePlan) -> tuple[str, ...]:
        """What was searched, and how long was trained."""
        c = self.config
        return (
            *((pruned_note(self),) if c.prune_teacher else ()),
            search_note(self),
            f"One seed. The teacher was trained for {c.teacher_steps} steps, the student for {c.finetune_steps} more "
            "from there: a gain over the teacher comes from these steps, not from removing channels.",
        )

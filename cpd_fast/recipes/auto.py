"""Which recipe, in the minutes there are, and why."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpd_fast.config import ConfigError
from cpd_fast.errors import RunFolderError
from cpd_fast.recipes.comb_prune_distill import CpdRun
from cpd_fast.recipes.eagleeye import EagleEyeRun
from cpd_fast.recipes.progress import Talk
from cpd_fast.recipes.prune_then_distill import PruneThenDistillRun
from cpd_fast.recipes.run import Result, Run, run_recipe
from cpd_fast.recipes.run_folder import CHOICE
from cpd_fast.recipes.tasks import Task, builtin, default_config
from cpd_fast.recipes.training import Machine, Trainer, adamw, batch_of
from cpd_fast.types import Target

RUNS: dict[str, type[Run]] = {
    "cpd": CpdRun,
    "eagleeye": EagleEyeRun,
    "prune_then_distill": PruneThenDistillRun,
}
PARTS = ("search_ratios", "prune_teacher")  # of other recipes, which take time that is not counted here
TRAINING_SHARE = 0.8  # of the minutes; the rest is for measuring, exporting and the report
FORWARDS_A_STEP = 3.0  # a training step costs about as much as three forwards of its batch
MASKED_FROM = 400  # steps from which CPD is as good as a search, measured: docs/search.md
LONG = 6.0  # times the teacher's training, from which there is time to train both anew; behind at 1.5 times, measured


@dataclass(frozen=True)
class Choice:
    """A recipe with its steps.

    Attributes:
        recipe: Name of the recipe.
        settings: Its settings that follow from the time.
        why: In one or two sentences.
    """

    recipe: str
    settings: dict[str, int]
    why: str


def choose(
    steps: float, teacher_steps: int, batch_size: int, val_images: int, calibration_batches: int = 19, rounds: int = 4
) -> Choice:
    """The recipe for a number of training steps.

    With little time, choosing must not need training: a search costs forwards only, and all steps go into fine-tuning.
    With more, CPD's masks let the network settle while channels go. Only where there is time to train the teacher
    several times over is there time for Prune, then Distill, whose student starts from scratch.

    Args:
        steps: Training steps of the dense network that there is time for, its own training included.
        teacher_steps: Steps of the original; 0 where it is trained already.
        batch_size: Pictures a step.
        val_images: Pictures of the val split.
        calibration_batches: Of the search.
        rounds: Of pruning the teacher.

    Returns:
        The choice; its steps fit into ``steps``.

    Raises:
        ConfigError: If there is no time to train at all.

    Example:
        >>> [choose(n, 200, 16, 50).recipe for n in (150, 700, 5000)]
        ['eagleeye', 'cpd', 'prune_then_distill']
    """
    teacher = min(teacher_steps, int(steps / 2))
    rest = int(steps) - teacher
    if rest < 4:
        raise ConfigError(f"auto: there is time for {int(steps)} training steps; give more minutes")
    left = f"{rest} training steps are left after {teacher} of the teacher" if teacher else f"{rest} training steps fit"
    if teacher_steps and rest >= LONG * teacher_steps:
        round_steps = max(1, int(0.5 * rest / rounds))
        settings = {"teacher_steps": teacher, "rounds": rounds, "round_steps": round_steps}
        settings["finetune_steps"] = rest - rounds * round_steps
        return Choice("prune_then_distill", settings, f"{left}, {LONG:g} times its training or more: time enough to "
                      "prune its weights in rounds and to train a student from scratch.")  # fmt: skip
    if rest >= MASKED_FROM:
        settings = {"teacher_steps": teacher, "prune_steps": int(0.4 * rest), "finetune_steps": int(0.5 * rest)}
        return Choice("cpd", settings, f"{left}: time for masks and fine-tuning, too little to train a student from "
                      "scratch.")  # fmt: skip
    images = min(val_images, 2500)
    one = (calibration_batches + images / batch_size) / FORWARDS_A_STEP  # steps that a candidate costs
    candidates = max(1, int(rest / 3 / one))
    settings = {"teacher_steps": teacher, "candidates": candidates, "search_images": images}
    settings["finetune_steps"] = max(1, int(rest - candidates * one))
    return Choice("eagleeye", settings, f"{left}, too few for masks to settle: {candidates} candidates are ranked "
                  "without training, and the rest fine-tunes the best.")  # fmt: skip


def auto(
    task: str | Task = "climate",
    *,
    minutes: float,
    target: Target | float = 0.5,
    run_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    command: str | None = None,
    talk: Talk | None = None,
    **settings: Any,
) -> Result:
    """Compress a network by the recipe that suits the time there is, and say why.

    A few training steps are timed on this machine, then :func:`choose` decides. The choice and its reason are kept in
    the run folder and the report; a run that was stopped goes on with the choice it was made with.

    Args:
        task: ``"climate"``, ``"fashion-mnist"`` or a :class:`Task` of your own.
        minutes: Wall time that training may take, about.
        target: Fraction of the MACs that remains, or a ``Target`` of fractions and of a latency, which is measured.
        run_dir: Folder of the run: created, or resumed.
        data_dir: Folder of the data, for tasks that can be read from one.
        command: What the report names as the command that repeats the run.
        talk: Where progress goes; default: bars on stderr.
        **settings: Fields of :class:`cpd_fast.config.CompressConfig`; steps that are given are not changed.

    Returns:
        What the chosen recipe returns.

    Raises:
        ConfigError: If ``minutes`` is no positive number, or too few for a few training steps, or ``search_ratios`` or
            ``prune_teacher`` are asked for.
        RunFolderError: If the folder cannot be used, or was made for other minutes.

    Example:
        >>> import tempfile, cpd_fast as cpd
        >>> cpd.recipes.auto("fashion-mnist", minutes=5, run_dir=tempfile.mkdtemp())  # doctest: +SKIP
    """
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes < float("inf"):
        raise ConfigError(f"minutes={minutes!r}: expected a positive number of minutes")
    parts = [name for name in PARTS if settings.get(name)]
    if parts:
        raise ConfigError(
            f"auto: {', '.join(parts)} is not in what it shares the minutes out to; name a recipe instead"
        )
    loaded = builtin(task, data_dir) if isinstance(task, str) else task
    folder = Path(run_dir)
    if (folder / "run.json").is_file():
        choice = _made(folder, minutes)
    else:
        config = default_config(loaded.name, **settings)
        seconds = seconds_a_step(
            loaded, config.batch_size, Machine.of(config.device, config.precision, config.memory_limit)
        )
        choice = choose(
            TRAINING_SHARE * 60 * minutes / seconds, config.teacher_steps, config.batch_size, len(loaded.data.val),
            config.calibration_batches, config.rounds,
        )  # fmt: skip
        why = f"auto, {minutes:g} minutes: {choice.recipe}. {1 / seconds:.1f} steps a second here; {choice.why}"
        choice = Choice(choice.recipe, choice.settings, why)
    record = json.dumps({"minutes": minutes, "recipe": choice.recipe, "settings": choice.settings, "why": choice.why})
    return run_recipe(
        choice.recipe, RUNS[choice.recipe], loaded, target, run_dir, None, command, talk,
        {**choice.settings, **settings}, record,
    )  # fmt: skip


def _made(folder: Path, minutes: float) -> Choice:
    """The choice that a run folder was made with.

    Raises:
        RunFolderError: If there is none, or it was for other minutes.
    """
    try:
        made = json.loads((folder / CHOICE).read_text())
        if made["minutes"] == minutes:
            return Choice(made["recipe"], made["settings"], made["why"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RunFolderError(f"{folder}: was not made by recipe auto; resume it with its own recipe") from e
    raise RunFolderError(
        f"{folder}: was made for {made['minutes']:g} minutes, this command asks for {minutes:g}; "
        "use the same to resume, or another --run-dir"
    )


def seconds_a_step(task: Task, batch_size: int, machine: Machine, steps: int = 3) -> float:
    """Wall time of one training step of the dense network, the least of a few."""
    torch.manual_seed(0)
    model: nn.Module = task.build().to(machine.device)
    loss_of = task.loss()
    batches = [machine.place(batch_of(task, batch_size, 0, "teacher", step)) for step in range(steps)]
    trainer = Trainer(model, adamw(model, 0.0), lambda m, b: loss_of(m(b[0]), b[1]), machine, batches[0])
    taken = []
    for batch in batches:
        began = time.perf_counter()
        trainer.step(batch, 0.0, 0)  # reads the loss: a GPU is waited for
        taken.append(time.perf_counter() - began)
    return min(taken)

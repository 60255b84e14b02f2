"""EagleEye's part of a recipe: rank many plans on the val split after adaptive batch norm."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cpd_fast.data import Split
from cpd_fast.recipes.evaluate import evaluate
from cpd_fast.recipes.target import latency_table, measured_plan, proportional
from cpd_fast.score import Magnitude, score
from cpd_fast.search import search
from cpd_fast.types import ChannelGraph, PrunePlan, Scores

if TYPE_CHECKING:
    from cpd_fast.recipes.run import Run

STUDY = "search.sqlite3"


def calibration(run: Run) -> list[Tensor]:
    """Batches of adaptive batch norm, the same for all candidates."""
    return [run.batch("search", i)[0] for i in range(run.config.calibration_batches)]


@torch.no_grad()
def best_plan(run: Run, model: nn.Module, graph: ChannelGraph, scores: Scores | None = None) -> PrunePlan:
    """The best plan; the study in the run folder knows the candidates of earlier calls.

    Args:
        run: Whose settings, folder and data.
        model: The dense network.
        graph: Its coupled channel groups.
        scores: Which channels stay inside a group; default: the L1 norm.

    Raises:
        KeyboardInterrupt: If Ctrl-C was pressed, after the candidate that was being evaluated.
    """
    c, data = run.config, run.task.data
    table = latency_table(run, model, graph)
    scores = score(model, graph, criterion=Magnitude(p=1)) if scores is None else scores
    held_out = Split(data.val.images[: c.search_images], data.val.labels[: c.search_images])
    began, spent = time.monotonic(), run.seconds.get("search", 0.0)
    with run.talk.bar("Search", c.candidates) as bar, run.stop.polite():

        def told(_number: int, value: float | None) -> None:
            bar.advance(note="failed" if value is None else f"val {value:.3f}")
            if run.stop.asked:
                raise KeyboardInterrupt

        found = search(
            model, graph, c.target(), calibration(run),
            lambda candidate: evaluate(candidate, data, held_out).main,
            num_candidates=c.candidates, scores=scores, storage=run.folder.path / STUDY, seed=c.seed,
            round_to=c.round_to, max_pruning_ratio=c.max_pruning_ratio, min_channels=c.min_channels,
            latency=table, alone=True, on_candidate=told,
        )  # fmt: skip
    run.seconds["search"] = round(spent + time.monotonic() - began, 2)
    values = sorted(x.value for x in found.candidates if x.value is not None)
    run.talk.say(
        f"Best of {len(values)} candidates: {values[-1]:.3f} on val; the median has {values[len(values) // 2]:.3f}"
    )
    if table is None:
        return found.plan
    return measured_plan(run, model, graph, proportional(run, graph, scores, found.plan, table), "search")


def search_note(run: Run) -> str:
    """How the plan was found, for the report."""
    c = run.config
    return (
        f"EagleEye: the best of {c.candidates} candidates by {c.search_images} val pictures after adaptive batch "
        f"norm on {c.calibration_batches} batches."
    )

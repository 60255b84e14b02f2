"""The recipes from one teacher on Fashion-MNIST, each with the same CPU seconds.

    python -m bench.experiments.three_recipes run CELLS.jsonl         # resumable; run folders beside CELLS.jsonl
    python -m bench.experiments.three_recipes summarise CELLS.jsonl   # bench/results/three_recipes.json and .png

The teacher (SmallResNet 16/32/64, 2.6 M MACs) is trained for two epochs, once a seed. A recipe then has BUDGETS CPU
seconds for everything but measuring: what one step, candidate and scoring costs was timed once (``speed`` cells, of a
seed of its own), and the steps follow from it. A quarter of the MACs remains.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench.experiments.common import RESULTS, Cells, load, spread, train
from cpd_fast import recipes
from cpd_fast.config import CLASSIFICATION
from cpd_fast.errors import BackendError
from cpd_fast.models import SmallResNet
from cpd_fast.recipes import outcome, ranking
from cpd_fast.recipes import run as recipe_run

SEEDS, BUDGETS, TARGET, TEACHER_STEPS = (0, 1, 2), (6, 20, 60), 0.25, 860
IMAGES, CALIBRATION, EVENTS, ROUNDS = 1000, 10, 4, 4
RECIPES = {
    "cpd": {},
    "eagleeye": {},
    "prune_then_distill": {},
    "prune_then_distill, inherited": {"inherit": 1},
    "cpd, ratios searched": {"search_ratios": 1},
}
FIXED: dict[str, Any] = {
    **CLASSIFICATION, "teacher_steps": 0, "round_to": 1, "latency_runs": 10, "search_images": IMAGES,
    "calibration_batches": CALIBRATION, "prune_events": EVENTS, "rounds": ROUNDS,
}  # fmt: skip


def run(path: Path) -> None:
    data, cells = load(), Cells(path)

    def task(seed: int) -> recipes.Task:
        saved = path.parent / f"three{seed}.pt"
        if not saved.exists():
            torch.manual_seed(seed)
            torch.save(train(network(), data, TEACHER_STEPS, 0.2, 500 + seed).state_dict(), saved)

        def build() -> torch.nn.Module:
            net = network()
            net.load_state_dict(torch.load(saved, weights_only=True))
            return net

        return recipes.Task(f"fashion-mnist teacher {seed}", "ResNet, widths 16/32/64", data, build)

    few = {"prune_steps": 8, "finetune_steps": 24, "candidates": 6, "round_steps": 8}
    many = {"prune_steps": 40, "finetune_steps": 24, "candidates": 6, "round_steps": 8}
    names = ("cpd", "eagleeye", "prune_then_distill")
    timed = {n: cells.get(f"speed {n}", lambda n=n: one(n, task(99), path.parent, 99, few))["seconds"] for n in names}
    more = cells.get("speed cpd more", lambda: one("cpd", task(99), path.parent, 99, many))["seconds"]["prune"]
    masked = (more - timed["cpd"]["prune"]) / (many["prune_steps"] - few["prune_steps"])
    speed = {
        "masked step": masked,
        "event": (timed["cpd"]["prune"] - few["prune_steps"] * masked) / EVENTS,
        "small step": timed["cpd"]["finetune"] / few["finetune_steps"],
        "candidate": timed["eagleeye"]["search"] / few["candidates"],
        "round step": timed["prune_then_distill"]["rounds"] / (ROUNDS * few["round_steps"]),
        "student step": timed["prune_then_distill"]["finetune"] / few["finetune_steps"],
    }
    cells.get("speed", lambda: speed)
    speed = cells.rows["speed"]
    for budget in BUDGETS:
        for seed in SEEDS:
            for name in RECIPES:
                steps = shared_out(name, budget, speed)
                if steps is not None:
                    cells.get(
                        f"{name} {budget} {seed}",
                        lambda n=name, s=seed, steps=steps: one(n, task(s), path.parent, s, steps),
                    )


def network() -> torch.nn.Module:
    return SmallResNet(10, widths=(16, 32, 64), blocks=1)


def shared_out(name: str, budget: float, speed: dict[str, float]) -> dict[str, int] | None:
    """Steps that take ``budget`` seconds; None where not even the scoring fits."""
    if name == "eagleeye":  # a third for choosing
        found = {"candidates": budget / 3 / speed["candidate"], "finetune_steps": budget * 2 / 3 / speed["small step"]}
    elif name.startswith("prune_then_distill"):  # half for the teacher
        found = {
            "round_steps": budget / 2 / ROUNDS / speed["round step"],
            "finetune_steps": budget / 2 / speed["student step"],
        }
    else:  # half under masks; a searched one spends a quarter on that before, with one more scoring
        searching = budget / 4 if "searched" in name else 0.0
        masked = (budget - searching) / 2 - EVENTS * speed["event"]
        found = {
            "prune_steps": masked / speed["masked step"],
            "finetune_steps": (budget - searching) / 2 / speed["small step"],
        }
        if searching:
            found["candidates"] = (searching - speed["event"]) / speed["candidate"]
    steps = {k: int(v) for k, v in found.items()}
    return steps if min(steps.values()) >= 4 else None


def one(name: str, task: recipes.Task, folder: Path, seed: int, steps: dict[str, int]) -> dict[str, Any]:
    """One run; the seconds of its stages are CPU seconds."""

    def no_export(*_: Any) -> None:
        raise BackendError("not exported here")

    where = folder / f"three-{name.replace(', ', '-').replace(' ', '-')}-{seed}-{sum(steps.values())}"
    shutil.rmtree(where, ignore_errors=True)  # the rest of a killed run: its seconds were another process's
    clock = SimpleNamespace(monotonic=time.process_time)
    recipe = name.split(",")[0]
    settings = {**FIXED, **RECIPES.get(name, {}), **steps}
    with (
        mock.patch.object(outcome, "export_onnx", no_export),
        mock.patch.object(recipe_run, "time", clock),
        mock.patch.object(ranking, "time", clock),
    ):
        r = getattr(recipes, recipe)(
            task, target=TARGET, run_dir=where, seed=seed, talk=recipes.Talk(quiet=True), **settings
        ).results
    return {
        "teacher": r.teacher.accuracy, "student": r.student.accuracy, "macs": r.student.macs / r.teacher.macs,
        "params": r.student.params / r.teacher.params, "seconds": dict(r.seconds), "steps": steps,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- summary
def summarise(path: Path) -> None:
    rows = Cells(path).rows
    out: dict[str, Any] = {"what": __doc__.splitlines()[0], "target": TARGET, "speed": rows["speed"], "recipes": {}}
    for budget in BUDGETS:
        for name in RECIPES:
            own = [rows[key] for s in SEEDS if (key := f"{name} {budget} {s}") in rows]
            if own:
                out["recipes"][f"{name} {budget}"] = {
                    **{k: spread([r[k] for r in own]) for k in ("teacher", "student", "macs", "params")},
                    "cpu seconds": spread([sum(r["seconds"].values()) for r in own]),
                    "steps": own[0]["steps"], "seeds": [r["student"] for r in own],
                }  # fmt: skip
    (RESULTS / "three_recipes.json").write_text(json.dumps(out, indent=1) + "\n")
    plot(out["recipes"])


def plot(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.6), constrained_layout=True)
    for name in RECIPES:
        cells = [found[key] for b in BUDGETS if (key := f"{name} {b}") in found]
        axis.errorbar(
            [c["cpu seconds"]["mean"] for c in cells], [100 * c["student"]["mean"] for c in cells],
            [100 * c["student"]["stderr"] for c in cells], marker="o", ms=4, label=name,
        )  # fmt: skip
    teacher = next(iter(found.values()))["teacher"]["mean"]
    axis.axhline(100 * teacher, color="#999999", lw=1, ls="--", label="teacher")
    axis.set(xscale="log", xlabel="CPU seconds after the teacher", ylabel="test accuracy, %")
    axis.legend(fontsize=7)
    figure.savefig(RESULTS / "three_recipes.png", dpi=80)


if __name__ == "__main__":
    {"run": run, "summarise": summarise}[sys.argv[1]](Path(sys.argv[2]))

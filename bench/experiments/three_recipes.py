"""The three recipes from one teacher on Fashion-MNIST, each with the same number of training steps.

    python -m bench.experiments.three_recipes run CELLS.jsonl         # resumable; run folders beside CELLS.jsonl
    python -m bench.experiments.three_recipes summarise CELLS.jsonl   # bench/results/three_recipes.json

The teacher (SmallResNet 32/64/128, 10.2 M MACs) is trained once a seed. A recipe then has STEPS training steps, with
what it spends on choosing: a search spends a third of them as forwards (three make a step), the rounds of the teacher
a half; CPD's Hessian traces come on top. The CPU seconds show what each took.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.experiments.common import RESULTS, Cells, load, spread, train
from cpd_fast import recipes
from cpd_fast.config import CLASSIFICATION
from cpd_fast.errors import BackendError
from cpd_fast.models import SmallResNet
from cpd_fast.recipes import outcome

SEEDS, TARGETS, STEPS, TEACHER_STEPS, BATCH = (0, 1, 2), (0.5, 0.25), 240, 300, 128
IMAGES, CALIBRATION = 1000, 10
CANDIDATES = int(STEPS / 3 / ((CALIBRATION + IMAGES / BATCH) / 3))
SETTINGS: dict[str, dict[str, Any]] = {
    "cpd": {"prune_steps": STEPS // 2, "finetune_steps": STEPS // 2},
    "eagleeye": {
        "candidates": CANDIDATES, "search_images": IMAGES, "calibration_batches": CALIBRATION,
        "finetune_steps": STEPS - STEPS // 3,
    },
    "prune_then_distill": {"rounds": 4, "round_steps": STEPS // 8, "finetune_steps": STEPS // 2},
}  # fmt: skip
SETTINGS["prune_then_distill, inherited"] = {**SETTINGS["prune_then_distill"], "inherit": 1}


def run(path: Path) -> None:
    data, cells = load(), Cells(path)
    for seed in SEEDS:
        saved = path.parent / f"three{seed}.pt"
        if not saved.exists():
            torch.manual_seed(seed)
            torch.save(train(SmallResNet(10), data, TEACHER_STEPS, 0.2, 500 + seed).state_dict(), saved)

        def build(saved: Path = saved) -> torch.nn.Module:
            net = SmallResNet(10)
            net.load_state_dict(torch.load(saved, weights_only=True))
            return net

        task = recipes.Task(f"fashion-mnist teacher {seed}", "ResNet, widths 32/64/128", data, build)
        for target in TARGETS:
            for name in SETTINGS:
                folder = path.parent / f"three-{name.replace(', ', '-')}-{target}-{seed}"
                cells.get(
                    f"{name} {target} {seed}", lambda n=name, t=target, k=task, f=folder, s=seed: one(n, t, k, f, s)
                )


def one(name: str, target: float, task: recipes.Task, folder: Path, seed: int) -> dict[str, Any]:
    def no_export(*_: Any) -> None:
        raise BackendError("not exported here")

    settings = {**CLASSIFICATION, "teacher_steps": 0, "round_to": 1, "latency_runs": 10, **SETTINGS[name]}
    with mock.patch.object(outcome, "export_onnx", no_export):
        r = getattr(recipes, name.split(",")[0])(
            task, target=target, run_dir=folder, seed=seed, talk=recipes.Talk(quiet=True), **settings
        ).results
    return {
        "teacher": r.teacher.accuracy, "student": r.student.accuracy, "macs": r.student.macs / r.teacher.macs,
        "params": r.student.params / r.teacher.params,
    }  # fmt: skip


def summarise(path: Path) -> None:
    rows = Cells(path).rows
    out: dict[str, Any] = {"what": __doc__.splitlines()[0], "steps": STEPS, "candidates": CANDIDATES, "recipes": {}}
    for target in TARGETS:
        for name in SETTINGS:
            own = [rows[key] for s in SEEDS if (key := f"{name} {target} {s}") in rows]
            if own:
                out["recipes"][f"{name} {target}"] = {
                    **{k: spread([r[k] for r in own]) for k in ("teacher", "student", "macs", "params", "cpu_s")},
                    "seeds": [r["student"] for r in own],
                }
    (RESULTS / "three_recipes.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    {"run": run, "summarise": summarise}[sys.argv[1]](Path(sys.argv[2]))

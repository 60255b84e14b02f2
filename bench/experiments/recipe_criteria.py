"""How should the recipe remove channels? ``recipes.cpd`` as it ships, with only the criterion changed, or the preset.

All runs of a task and seed share one teacher; batches, probes, schedule and losses are the recipe's. One JSON line a
finished run; a killed experiment goes on with the run that it was in.

Run: ``python -m bench.experiments.recipe_criteria WORK_FOLDER``, then with ``--collect FILE.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

import cpd_fast as cpd
from bench.experiments.common import Cells
from cpd_fast.recipes.comb_prune_distill import CpdRun
from cpd_fast.recipes.evaluate import evaluate
from cpd_fast.recipes.progress import Talk
from cpd_fast.recipes.run import TEACHER, run_recipe

SEEDS = (0, 1, 2)
CRITERIA = {
    "HessianTrace": lambda n, seed: cpd.HessianTrace(n, generator=torch.Generator().manual_seed(seed)),
    "GateHessian": lambda n, seed: cpd.GateHessian(n, generator=torch.Generator().manual_seed(seed)),
    "GroupFisher": lambda n, seed: cpd.GroupFisher(),
    "Taylor": lambda n, seed: cpd.Taylor(),
}
PRESETS = ("best", "released")  # in place of events


def run_class(criterion, teachers):
    class Run(CpdRun):
        def _criterion(self, seed):
            return CRITERIA[criterion](self.config.num_probes, seed)

        def _teacher(self, teacher, at):
            shared = teachers / f"{self.task.name}-{self.config.seed}.safetensors"
            own = self.folder.path / TEACHER
            if shared.exists() and at.stage == "teacher":
                shutil.copy(shared, own)
                self.go_on(at)
            super()._teacher(teacher, at)
            if not shared.exists():
                shutil.copy(own, shared)

        def _end(self, stage, teacher, graph, plan):  # the report would cost more than the run
            student = cpd.load(self.folder.path / "student.safetensors", teacher, graph=graph).eval()
            before, after = (evaluate(m, self.task.data, self.task.data.test).main for m in (teacher, student))
            macs = (
                cpd.cost(student, self.task.example_inputs()).macs / cpd.cost(teacher, self.task.example_inputs()).macs
            )
            return {"teacher": before, "student": after, "macs_left": macs}

    return Run


def measure(folder, task, seed, criterion, target):
    where = folder / f"{task}-{seed}-{criterion}-{target}"
    settings = {"seed": seed, "preset": criterion if criterion in PRESETS else "events"}
    found = run_recipe("cpd", run_class(criterion, folder), task, target, where, None, "", Talk(), settings)
    shutil.rmtree(where)
    return {"task": task, "seed": seed, "criterion": criterion, "target": target, **found}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", default="climate")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--only", nargs="+", default=[*CRITERIA, *PRESETS], choices=[*CRITERIA, *PRESETS])
    parser.add_argument("--collect", type=Path, help="write all finished runs as one JSON file and stop")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    cells = Cells(asked.folder / "runs.jsonl")
    if asked.collect:
        asked.collect.write_text(json.dumps(list(cells.rows.values()), indent=1) + "\n")
        return
    for seed in SEEDS:
        for criterion in asked.only:
            name = f"{asked.task} macs={asked.target:g} {criterion} seed={seed}"
            cells.get(name, lambda: measure(asked.folder, asked.task, seed, criterion, asked.target))  # noqa: B023


if __name__ == "__main__":
    main()

"""Does second order pay? Criteria compared on real tasks at equal MACs, after compaction and after short fine-tuning.

For every task and seed a teacher is trained once; every criterion then scores it on the same batches, one plan a ratio
is made (one-shot, global, score per MAC), the network is compacted, its batch norms are re-estimated, it is measured,
fine-tuned for a few steps on the task's loss alone and measured again, always on the test split. Torch-Pruning prunes
the same teacher to the same MACs by its own ranking. One JSON line a cell; a killed run goes on where it was.

Run: ``python bench/experiments/criteria.py WORK_FOLDER`` and, at the end, ``... WORK_FOLDER --collect FILE.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import cpd_fast as cpd
from cpd_fast.recipes.evaluate import evaluate, reestimate_batch_norm
from cpd_fast.recipes.tasks import builtin, default_config
from cpd_fast.recipes.training import Machine, Trainer, adamw, batch_of, one_cycle, stage_seed

SEEDS = (0, 1, 2)
REMOVED = (0.3, 0.5, 0.7)
SCORE_BATCHES, PROBES, NORM_BATCHES = 4, 4, 8
FINETUNE = {"fashion-mnist": 43, "climate": 22}  # steps: a tenth of an epoch, and one epoch (of 365 tiles)
TORCH_PRUNING = "torch_pruning_group_taylor"  # the best of its own table for DeiT/ViT; see its README
SAVED_BY_BATCH = 8_000_003  # seed of the scoring batches: never seen in training in this order


def criteria(seed):
    def generator():
        return torch.Generator().manual_seed(seed)

    return {
        "HessianTrace": cpd.HessianTrace(PROBES, generator=generator()),
        "GateHessian": cpd.GateHessian(PROBES, generator=generator()),
        "Taylor": cpd.Taylor(),
        "GroupFisher": cpd.GroupFisher(),
        "Magnitude": cpd.Magnitude(),
        "Random": cpd.Random(generator()),
    }


class Cells:
    """One task and seed: the teacher, the batches that all criteria see, and how a pruned network is judged."""

    def __init__(self, folder, name, seed):
        self.task, self.config, self.seed = builtin(name), default_config(name, seed=seed), seed
        self.loss_of = self.task.loss()
        self.teacher = self._teacher(folder / f"teacher-{name}-{seed}.safetensors").eval()
        self.graph = cpd.comb(self.teacher, self.task.example_inputs())
        self.dense = cpd.cost(self.teacher, self.task.example_inputs()).macs
        self.batches = [
            batch_of(self.task, self.config.batch_size, seed + SAVED_BY_BATCH, "prune", i) for i in range(SCORE_BATCHES)
        ]
        self.scores = {}

    def _teacher(self, path):
        c = self.config
        torch.manual_seed(stage_seed(self.seed, "teacher"))
        model = self.task.build()
        if path.exists():
            model.load_state_dict(load_file(path))
            return model
        self._train(model, "teacher", c.teacher_steps, c.teacher_lr)
        save_file(model.state_dict(), path)
        return model

    def _train(self, model, stage, steps, peak):
        c = self.config
        trainer = Trainer(model, adamw(model, c.weight_decay), self.loss, Machine(), None)
        for step in range(steps):
            batch = batch_of(self.task, c.batch_size, self.seed, stage, step)
            trainer.step(batch, one_cycle(peak, step, steps), stage_seed(self.seed, stage, step))

    def loss(self, model, batch):
        return self.loss_of(model(batch[0]), batch[1])

    def pruned(self, criterion, removed):
        """The compacted network, and the CPU seconds that scoring took."""
        if criterion == TORCH_PRUNING:
            return self._by_torch_pruning(removed)
        if criterion not in self.scores:
            start = time.process_time()
            scores = cpd.score(self.teacher, self.graph, self.batches, self.loss, criteria(self.seed)[criterion])
            self.scores[criterion] = (scores, time.process_time() - start)
        scores, seconds = self.scores[criterion]
        plan = cpd.plan(self.graph, scores, cpd.Target(macs=1 - removed), per_cost="macs")
        return cpd.compact(self.teacher, self.graph, plan), seconds

    def _by_torch_pruning(self, removed):
        import torch_pruning as tp

        model, start = copy.deepcopy(self.teacher), time.process_time()
        importance = tp.importance.GroupTaylorImportance()
        last = [m for n, m in model.named_modules() if n in ("classify",)]
        pruner = tp.pruner.BasePruner(
            model, self.task.example_inputs(), importance=importance, global_pruning=True, pruning_ratio=0.95,
            max_pruning_ratio=0.95, iterative_steps=200, ignored_layers=last,
        )  # fmt: skip
        for batch in self.batches:
            (self.loss(model, batch) / len(self.batches)).backward()
        seconds = time.process_time() - start
        for _ in range(200):
            pruner.step()
            if cpd.cost(model, self.task.example_inputs()).macs <= (1 - removed) * self.dense:
                break
        model.zero_grad()
        return model, seconds

    def measure(self, criterion, removed):
        model, seconds = self.pruned(criterion, removed)
        macs = cpd.cost(model, self.task.example_inputs()).macs / self.dense
        c, data = self.config, self.task.data
        reestimate_batch_norm(model, data, c.batch_size, self.seed, NORM_BATCHES)
        before = evaluate(model, data, data.test).main
        self._train(model, "finetune", FINETUNE[self.task.name], c.student_lr)
        after = evaluate(model, data, data.test).main
        return {"macs_left": macs, "compacted": before, "fine_tuned": after, "score_cpu_s": seconds}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--collect", type=Path, help="write all cells as one JSON file and stop")
    parser.add_argument("--teachers", action="store_true", help="train the teachers and stop")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    lines = asked.folder / "cells.jsonl"
    cells = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    if asked.collect:
        setting = {"score_batches": SCORE_BATCHES, "probes": PROBES, "finetune_steps": FINETUNE, "per_cost": "macs"}
        asked.collect.write_text(json.dumps({"setting": setting, "cells": cells}, indent=1) + "\n")
        return
    torch.set_num_threads(1)
    done = {(c["task"], c["seed"], c["criterion"], c["removed"]) for c in cells}
    for seed in SEEDS:
        for name in FINETUNE:
            run = Cells(asked.folder, name, seed)
            if asked.teachers:
                continue
            everything = [("dense", 0.0)] + [(c, r) for c in [*criteria(seed), TORCH_PRUNING] for r in REMOVED]
            for criterion, removed in everything:
                if (name, seed, criterion, removed) in done:
                    continue
                if criterion == "dense":
                    result = {"compacted": evaluate(run.teacher, run.task.data, run.task.data.test).main}
                else:
                    result = run.measure(criterion, removed)
                cell = {"task": name, "seed": seed, "criterion": criterion, "removed": removed, **result}
                with lines.open("a") as file:
                    file.write(json.dumps(cell) + "\n")
                print(cell, flush=True)


if __name__ == "__main__":
    main()

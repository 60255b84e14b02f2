"""Does it work? CPD's presets against their rivals, all with the same number of training iterations.

    python bench/experiments/cpd.py run STUDY --out runs/cpd --minutes 60   # resumable: a line a finished cell
    python bench/experiments/cpd.py tables --out runs/cpd                   # bench/results/cpd.json and cpd.png

Methods are in ``methods.py``, networks and data in ``studies.py``. A cell is (method, MACs that remain, distillation,
seed). From one teacher a seed every cell gets the same iterations along one learning rate curve: methods that prune
while training do it in the first ``prune`` of them, methods that prune at once do it before the first. Choices
between our own variants are made on the val split of study ``small``; the test split is measured on.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cpd_fast as cpd
from bench.experiments.methods import make, variants
from bench.experiments.studies import ABLATED_AT, RIVALS, SEEDS, STUDIES, Study
from cpd_fast.data import DataSplits, Split, augmented_batch
from cpd_fast.recipes.evaluate import evaluate, reestimate_batch_norm
from cpd_fast.recipes.training import Machine, Trainer, adamw, listen, one_cycle, stage_seed
from cpd_fast.timing import compare_latency

QUICK = 2500  # val pictures that are measured on during fine-tuning; all at the end
CELL = ("method", "keep", "distil")  # and the seed
ROOT = Path(__file__).resolve().parents[2]


# --------------------------------------------------------------------------------------------------------------- cells
class Student:
    """One model in training: the loss of its distillation, which follows a compaction."""

    def __init__(self, study: Study, task: Any, teacher: nn.Module, distil: str) -> None:
        self.teacher, self.distil, self.at, self.task_loss = teacher, distil, task.distill_at, task.loss()
        imitation = cpd.losses.ChannelWiseKL if task.data.is_segmentation else cpd.losses.LogitKL
        self.logits: nn.Module = imitation(study.temperature, loss_weight=study.weight)
        self.relations: nn.Module | None = None
        if distil == "pixel KL":
            self.logits = cpd.losses.LogitKL(temperature=1.0)
        elif distil == "CIRKD":  # on the logits, whose width pruning leaves alone
            k = len(task.data.classes)
            self.relations = cpd.losses.CIRKD(k, k, k, contrast_pixels=512, contrast_regions=128, pixel_slots=500,
                                              region_slots=100)  # fmt: skip
        self.features: nn.Module | None = None
        if "features" in distil:
            width = teacher.classify.in_features
            self.features = cpd.losses.FeatureCWD(width, width, tau=1.0, loss_weight=5.0)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, fine_tuning: bool) -> Tensor:
        if self.distil == "none" or (self.distil.endswith("only") and not fine_tuning):
            return self.task_loss(model(x), y)
        maps: list[str | None] = [self.at] + (["layers"] if self.features is not None else [])
        with contextlib.ExitStack() as stack:
            wanted = [stack.enter_context(listen(self.teacher, at)) for at in maps]
            heard = [stack.enter_context(listen(model, at)) for at in maps]
            with torch.no_grad():
                self.teacher(x)
            total = self.task_loss(model(x), y)
        if self.relations is not None:
            logits_S, logits_T = heard[0][-1], wanted[0][-1]
            total = total + self.relations(logits_S, logits_T, y, logits_S, logits_T)
        elif "logits" in self.distil or self.distil == "pixel KL":
            total = total + self.logits(heard[0][-1], wanted[0][-1])
        if self.features is not None:
            total = total + self.features(heard[-1][-1], wanted[-1][-1])
        return total


def task_loss(loss: nn.Module, model: nn.Module, x: Tensor, y: Tensor, each: bool = False) -> Tensor:
    """Of the batch, or of each of its pictures."""
    out = model(x)
    return torch.stack([loss(out[[i]], y[[i]]) for i in range(len(x))]) if each else loss(out, y)


def quality(model: nn.Module, data: DataSplits, split: Any, batch: int, seed: int) -> float:
    """Accuracy or mIoU with batch norm re-estimated, in percent."""
    other = copy.deepcopy(model)
    reestimate_batch_norm(other, data, batch, seed, batches=8)
    return percent(other, data, split)


def percent(model: nn.Module, data: DataSplits, split: Any) -> float:
    return round(100 * evaluate(model, data, split).main, 3)


def run_cell(
    study: Study, task: Any, method: str, keep: float, distil: str, seed: int, teacher: nn.Module
) -> dict[str, Any]:
    began, stage, data = time.process_time(), stage_seed(seed, "finetune"), task.data
    quick = Split(data.val.images[:QUICK], data.val.labels[:QUICK])
    model = copy.deepcopy(teacher).train()
    optimizer: torch.optim.Optimizer = adamw(model, 1e-2)
    torch.manual_seed(stage)
    student = Student(study, task, teacher, distil)
    learnt = student.features or student.relations
    extra = None if learnt is None else torch.optim.AdamW(learnt.parameters(), lr=study.lr)
    execution = "auto" if student.features is None else "full_width"
    pruning, out = make(study, method, model, optimizer, keep, execution), {}
    model, average, first = pruning.model, None, study.total
    for it in range(study.total):
        if average is None and pruning.is_done(it):
            first, model = it, pruning.finish()
            if student.features is not None:
                kept = pruning.pruner.plan.get(model_group(pruning), range(student.features.adapter[0].in_channels))
                student.features.keep_channels(kept)
                extra = torch.optim.AdamW(student.features.parameters(), lr=study.lr)
            average = torch.optim.swa_utils.AveragedModel(
                model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
            )
        if it - first in study.looks:
            out[study.looks[it - first]] = quality(model, data, quick, study.batch, stage)
        x, y = augmented_batch(data, study.batch, stage, it)
        model.train()
        optimizers = [pruning.optimizer] + ([extra] if extra is not None else [])
        for each in optimizers:
            each.zero_grad()
        student.loss(model, x, y, it >= first).backward()
        if it < first:
            pruning.step(partial(task_loss, student.task_loss, model, x, y), it)
            optimizers[0] = pruning.optimizer
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = one_cycle(study.lr, it, study.total, 0.1)
            each.step()
        if average is not None:
            average.update_parameters(model)
    assert average is not None
    cost, dense = cpd.cost(model, study.picture), cpd.cost(teacher, study.picture)
    timed = compare_latency([teacher, model], study.picture, runs=300, threads=1, seconds=3.0)
    return {
        **out,
        "pruned until": first,
        "end": quality(model, data, data.val, study.batch, stage),
        "end, no BN re-estimation": percent(model, data, data.val),
        "end, EMA of weights": quality(average.module, data, data.val, study.batch, stage),
        "test": quality(model, data, data.test, study.batch, stage),
        "macs": round(cost.macs / dense.macs, 4),
        "params": round(cost.params / dense.params, 4),
        "latency": round(timed[1].median_ms / timed[0].median_ms, 4),
        "cpu_s": round(time.process_time() - began, 1),
    }


def model_group(pruning: Any) -> str:
    """The group that the last feature map runs over."""
    return next(
        g.name
        for g in pruning.pruner.graph.groups
        if any(s.param == "classify.weight" and not s.produces for s in g.slices)
    )


class Runner:
    """The cells of one study, each a line in a file; what the file holds is not run again."""

    def __init__(self, name: str, folder: Path, minutes: float) -> None:
        self.name, self.folder, self.minutes = name, folder, minutes
        self.study, self.task = STUDIES[name], STUDIES[name].task()
        self.file = folder / f"{name}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = read(self.file)
        self.spent = sum(line["cpu_s"] for line in self.lines)

    def run(self) -> None:
        """The most telling cells first, should the time run out."""
        torch.set_num_threads(1)
        study = self.study
        for seed in SEEDS:
            self.teacher_line(seed)
        keeps = sorted(study.keeps, key=lambda k: abs(k - ABLATED_AT))
        methods = ("best", *study.rivals, *(("published", "magnitude at once") if study.is_ablated else ()))
        for keep in keeps:
            for seed in SEEDS:
                for method in methods:
                    self.cell(method, keep, "logits", seed)
        for seed in SEEDS:
            for distil in study.losses:
                self.cell("best", keeps[0], distil, seed)
            for method in variants(study) if study.is_ablated else ():
                self.cell(method, ABLATED_AT, "logits", seed)

    def cell(self, method: str, keep: float, distil: str, seed: int) -> None:
        """Run a cell that is not there yet, while there is time."""
        key = {"method": method, "keep": keep, "distil": distil, "seed": seed}
        if any(all(line[k] == v for k, v in key.items()) for line in self.lines) or self.spent > 60 * self.minutes:
            return
        try:
            found = run_cell(self.study, self.task, method, keep, distil, seed, self.teacher(seed))
        except Exception as e:
            if not method.startswith("Torch-Pruning"):
                raise
            found = {"failed": repr(e), "cpu_s": 0.0}
        self.add({**key, **found})

    def add(self, line: dict[str, Any]) -> None:
        """Write a finished cell."""
        self.lines.append(line)
        self.spent += line["cpu_s"]
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{self.spent:6.0f} s", json.dumps(line), flush=True)

    def teacher_line(self, seed: int) -> None:
        """How good the teacher of a seed is."""
        if any(line["method"] == "teacher" and line["seed"] == seed for line in self.lines):
            return
        began, data = time.process_time(), self.task.data
        teacher = self.teacher(seed)
        found = {name: percent(teacher, data, split) for name, split in (("end", data.val), ("test", data.test))}
        key = {"method": "teacher", "keep": 1.0, "distil": "none", "seed": seed}
        self.add({**key, **found, "cpu_s": round(time.process_time() - began, 1)})

    def teacher(self, seed: int) -> nn.Module:
        """Trained, or read."""
        study, task = self.study, self.task
        torch.manual_seed(seed)
        model, path = task.build(), self.folder / f"{self.name}-teacher-{seed}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
            return model.eval()
        trainer = Trainer(model, adamw(model, 1e-2), lambda m, b: task.loss()(m(b[0]), b[1]), Machine(), None)
        for it in range(study.teacher):
            stage = stage_seed(seed, "teacher")
            trainer.step(
                augmented_batch(task.data, study.batch, stage, it), one_cycle(study.lr_teacher, it, study.teacher), it
            )
        save_file(model.state_dict(), path)
        return model.eval()


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# -------------------------------------------------------------------------------------------------------------- tables
def tables(folder: Path) -> None:
    """Write the rows of the cells in a folder; rows of cells that are not there stay as they were."""
    path = ROOT / "bench/results/cpd.json"
    doc = json.loads(path.read_text())
    doc["torch"] = torch.__version__
    doc["studies"] = {name: study for name, study in doc["studies"].items() if name in STUDIES}
    for name, study in STUDIES.items():
        if not (lines := read(folder / f"{name}.jsonl")):
            continue
        task, cells = study.task(), {}
        for line in lines:
            cells.setdefault((line["method"], line["keep"], line["distil"]), []).append(line)
        known = {tuple(r[k] for k in CELL): r for r in doc["studies"].get(name, {}).get("rows", [])}
        known.update({key: row(key, parts) for key, parts in cells.items()})
        doc["studies"][name] = {
            "data": task.name,
            "network": task.model_name,
            "figure": "mIoU" if task.data.is_segmentation else "accuracy",
            "iterations": {k: getattr(study, k) for k in ("teacher", "prune", "finetune", "epoch", "batch")},
            "rows": [known[key] for key in sorted(known)],
        }
    path.write_text(json.dumps(doc, indent=1) + "\n")
    plot(doc["studies"], ROOT / "bench/results/cpd.png")


def row(key: tuple[str, float, str], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of a cell over the seeds."""
    found: dict[str, Any] = dict(zip(CELL, key, strict=True), seeds=sum("failed" not in p for p in parts))
    if failed := [p["failed"] for p in parts if "failed" in p]:
        found["failed"] = failed
    for name in sorted({k for p in parts for k, v in p.items() if isinstance(v, float) and k not in ("keep", "cpu_s")}):
        values = torch.tensor([p[name] for p in parts if name in p], dtype=torch.float64)
        spread = float(values.std()) if len(values) > 1 else 0.0
        found[name] = {"mean": round(float(values.mean()), 3), "std": round(spread, 3)}
    return found


def plot(studies: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(name, "test") for name in studies] + [("small", "removal")] * ("small" in studies)
    rows_of_four = math.ceil(len(panels) / 4)
    figure, grid = plt.subplots(rows_of_four, 4, figsize=(18.4, 4.2 * rows_of_four), squeeze=False)
    axes = grid.flatten()
    for axis in axes[len(panels) :]:
        axis.remove()
    seen: dict[str, Any] = {}
    for axis, (name, column) in zip(axes, panels, strict=False):
        rows = [r for r in studies[name]["rows"] if r["distil"] == "logits" and column in r]
        for number, method in enumerate(("best", *RIVALS, "published", "magnitude at once")):
            mine = sorted((r for r in rows if r["method"] == method and r["keep"] in STUDIES[name].keeps),
                          key=lambda r: r["keep"])  # fmt: skip
            if mine:
                seen[method] = axis.errorbar([r["macs"]["mean"] for r in mine], [r[column]["mean"] for r in mine],
                                             [r[column]["std"] for r in mine], marker="o", capsize=3,
                                             color=f"C{number}")  # fmt: skip
        when = "after fine-tuning, test" if column == "test" else "right after removal, BN re-estimated, val"
        axis.set(title=f"{studies[name]['network']}\n{when}", xlabel="share of the MACs that remains",
                 ylabel=f"{studies[name]['figure']}, %")  # fmt: skip
        axis.title.set_fontsize(9)
        axis.set_xlim(0, 0.8)
        axis.grid(alpha=0.3)
    axes[0].legend(seen.values(), seen, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tables"])
    parser.add_argument("studies", nargs="*", help=f"of run, one after the other: {', '.join(STUDIES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "cpd", help="folder of teachers and finished cells")
    parser.add_argument("--minutes", type=float, default=60, help="CPU minutes a study after which no cell begins")
    arguments = parser.parse_args()
    if arguments.what == "tables":
        tables(arguments.out)
    if unknown := set(arguments.studies) - set(STUDIES):
        parser.error(f"no such study: {', '.join(sorted(unknown))}; choose from {', '.join(STUDIES)}")
    for name in arguments.studies:
        Runner(name, arguments.out, arguments.minutes).run()

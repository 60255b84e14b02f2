"""EagleEye's claims on Fashion-MNIST: does accuracy after adaptive BN rank candidates, and what does a search cost?

    python -m bench.experiments.eagleeye run CELLS.jsonl         # resumable: kill it and run it again
    python -m bench.experiments.eagleeye cost CELLS.jsonl
    python -m bench.experiments.eagleeye summarise CELLS.jsonl   # bench/results/eagleeye.json and .png

Teacher: SmallResNet 16/32/64, one block a stage, 78k parameters, 2.6 M MACs, two epochs. A candidate's accuracy before
fine-tuning is taken on 3,000 held-in training pictures, after it on 5,000 test pictures; fine-tuning is the same 60
batches of 64 for all.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cpd_fast as cpd
from bench.experiments.common import RESULTS, Cells, accuracy, augmented, batches, load, spread, train
from cpd_fast.compact import sliced
from cpd_fast.data import DataSplits
from cpd_fast.models import SmallResNet
from cpd_fast.schedule import CandidateSpace, plan_cost
from cpd_fast.search import PAPER_BATCHES, PAPER_MOMENTUM, Batch, CandidateBuilder, adapt_batch_norm

SEEDS, TARGETS, CANDIDATES = (0, 1, 2), (0.5, 0.625, 0.75), 30
MAX_RATE = {0.5: 0.7, 0.625: 0.55, 0.75: 0.4}  # of the paper's scripts; 0.55 in between
CALIBRATION, HELD_IN = 19, 3000  # 19 batches of 128: as precise as 102 with momentum 0.1
FAST_HELD_IN = 2500
TEACHER_STEPS, TUNE_STEPS, LONG_STEPS = 860, 60, 200


class Setting:
    """One seed: teacher, groups, scores, and what all candidates share."""

    def __init__(self, data: DataSplits, seed: int, folder: Path) -> None:
        self.data, self.seed = data, seed
        torch.manual_seed(seed)
        self.teacher = SmallResNet(10, widths=(16, 32, 64), blocks=1)
        saved = folder / f"teacher{seed}.pt"
        if saved.exists():
            self.teacher.load_state_dict(torch.load(saved, weights_only=True))
        else:
            train(self.teacher, data, TEACHER_STEPS, 0.2, 1000 + seed)
            torch.save(self.teacher.state_dict(), saved)
        self.teacher.eval()
        self.graph = cpd.comb(self.teacher, torch.zeros(1, 1, 28, 28))
        self.scores = cpd.score(self.teacher, self.graph, criterion=cpd.Magnitude(p=1))
        self.calibration = tuple(Batch((x,), {}) for x, _ in batches(data, CALIBRATION, 128, 50 + seed))
        rng = np.random.default_rng(60 + seed)
        self.held_in_pick = rng.permutation(len(data.train))[:10000]
        self.held_in = augmented(data, data.train, self.held_in_pick, rng)
        self.held_in_labels = data.train.labels[torch.from_numpy(self.held_in_pick)].long()
        self.test = data.normalise(data.test.images[:5000]), data.test.labels[:5000].long()

    def space(self, target: float) -> CandidateSpace:
        return CandidateSpace(self.graph, self.scores, cpd.Target(macs=target), max_pruning_ratio=MAX_RATE[target])

    def plan(self, target: float, number: int) -> cpd.PrunePlan:
        space = self.space(target)
        return space.plan(space.counts(space.draw(np.random.default_rng([self.seed, int(target * 1000), number]))))

    def builder(self, target: float, **options: Any) -> CandidateBuilder:
        probe = cpd.uniform_plan(self.graph, self.scores, 0.6)
        return CandidateBuilder(self.teacher, self.graph, self.calibration, probe, **options)

    def before(self, model: torch.nn.Module, n: int = HELD_IN) -> float:
        return accuracy(model, self.held_in[:n], self.held_in_labels[:n])

    def tune(self, plan: cpd.PrunePlan, steps: int, lr: float = 0.02) -> float:
        """Test accuracy after adaptive BN and the fine-tuning that all plans get."""
        small = cpd.compact(self.teacher, self.graph, plan)
        adapt_batch_norm(small, self.calibration)
        train(small, self.data, steps, lr, 2000 + self.seed, batch=64, warm_up=0.05)
        return accuracy(small, *self.test)


# ------------------------------------------------------------------------------------------------------------- cells
def run(path: Path) -> None:
    data, cells = load(), Cells(path)
    for seed in SEEDS:
        s = Setting(data, seed, path.parent)
        cells.get(f"teacher {seed}", lambda s=s: {"test": accuracy(s.teacher, *s.test)})
        for target in TARGETS:
            for number in range(CANDIDATES):
                cells.get(f"candidate {seed} {target} {number}", lambda s=s, t=target, n=number: candidate(s, t, n))
            rows = [cells.rows[f"candidate {seed} {target} {n}"] for n in range(CANDIDATES)]
            found = int(np.argmax([r["adaptive"] for r in rows]))
            cells.get(f"plans {seed} {target}", lambda s=s, t=target, n=found: compare(s, t, n))


def run_cost(path: Path) -> None:
    s = Setting(load(), 0, path.parent)
    Cells(path).get("cost 0.5", lambda: cost(s, 0.5))


def candidate(s: Setting, target: float, number: int) -> dict[str, Any]:
    plan = s.plan(target, number)
    vanilla = s.before(sliced(s.teacher, s.graph, plan))
    small = sliced(s.teacher, s.graph, plan)
    adapt_batch_norm(small, s.calibration)
    macs = plan_cost(s.graph, plan).macs / plan_cost(s.graph).macs
    return {"macs": macs, "vanilla": vanilla, "adaptive": s.before(small), "tuned": s.tune(plan, TUNE_STEPS)}


def compare(s: Setting, target: float, found: int) -> dict[str, Any]:
    """The found plan against uniform width and one global ranking, all on the limit, equally fine-tuned."""
    limit = cpd.Target(macs=target)
    space = CandidateSpace(s.graph, s.scores, limit)
    hessian = cpd.score(
        s.teacher, s.graph, list(batches(s.data, 4, 128, 70 + s.seed)),
        lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]),
        criterion=cpd.HessianTrace(generator=torch.Generator().manual_seed(s.seed)),
    )  # fmt: skip
    plans = {
        "found": s.plan(target, found),
        "uniform": space.plan(space.counts([1.0] * len(space.names))),
        "global L1": cpd.plan(s.graph, s.scores, limit),
        "global Hessian trace": cpd.plan(s.graph, hessian, limit, per_cost="macs"),
    }
    dense = plan_cost(s.graph).macs
    return {
        "found_number": found,
        "macs": {k: plan_cost(s.graph, p).macs / dense for k, p in plans.items()},
        "test": {k: s.tune(p, LONG_STEPS) for k, p in plans.items()},
    }


def cost(s: Setting, target: float, n: int = 30) -> dict[str, Any]:
    """CPU seconds a candidate: the original procedure, and ours with each way of running a candidate."""
    builders = {kind: s.builder(target, execution=kind) for kind in ("sliced", "compact", "masked")}
    rows: list[dict[str, float]] = []
    for number in range(n):
        plan, row = s.plan(target, number), {}
        clock = time.process_time()
        row["draws"] = rejections(s, target, number)
        row["original draw s"], clock = time.process_time() - clock, time.process_time()
        row["original"] = original(s, plan, number)
        row["original s"], clock = time.process_time() - clock, time.process_time()
        s.plan(target, number)
        row["our draw s"] = time.process_time() - clock
        for kind, builder in builders.items():
            if kind != "sliced" and number >= 6:  # for their times alone
                continue
            clock = time.process_time()
            with builder.candidate(plan) as small:
                row[kind] = s.before(small, FAST_HELD_IN)
            row[f"{kind} s"] = time.process_time() - clock
        rows.append(row)
    return {"rows": rows}


def original(s: Setting, plan: cpd.PrunePlan, number: int) -> float:
    """EagleEye's code, step for step: thin, 102 augmented batches in train mode at momentum 0.1, 10,000 pictures."""
    small = sliced(s.teacher, s.graph, plan).train()
    with torch.no_grad():
        for x, _ in batches(s.data, PAPER_BATCHES, 128, 90 + number):
            small(x)
    assert all(m.momentum == PAPER_MOMENTUM for m in small.modules() if isinstance(m, torch.nn.BatchNorm2d))
    rng = np.random.default_rng(91 + number)
    hits = 0
    for pick in np.split(s.held_in_pick, 100):
        x = augmented(s.data, s.data.train, pick, rng)
        with torch.no_grad():
            hits += int((small.eval()(x).argmax(1) == s.data.train.labels[torch.from_numpy(pick)].long()).sum())
    return hits / len(s.held_in_pick)


def rejections(s: Setting, target: float, number: int) -> int:
    """Draws until one lies within 0.5 % of the target, counted without building (the original builds each)."""
    rng, space = np.random.default_rng([7, number]), s.space(target)
    dense = plan_cost(s.graph).macs
    for n in range(1, 100000):
        counts = [max(1, round(size * (1 - MAX_RATE[target] * rng.random()))) for size in space.sizes]
        if abs(space.cost(counts).macs / dense - target) <= 0.005:
            return n
    return n


# ----------------------------------------------------------------------------------------------------------- summary
def correlations(x: np.ndarray, y: np.ndarray, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """Pearson, Spearman and Kendall with 95 % bootstrap intervals."""
    from scipy import stats

    kinds = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(x), (resamples, len(x)))
    out = {}
    for name, of in kinds.items():
        sample = [float(of(x[p], y[p])[0]) for p in picks if np.ptp(x[p]) and np.ptp(y[p])]
        low, high = np.quantile(sample, [0.025, 0.975])
        out[name] = {"r": float(of(x, y)[0]), "low": float(low), "high": float(high)}
    return out


def summarise(path: Path) -> None:
    rows = Cells(path).rows
    out: dict[str, Any] = {"what": __doc__.splitlines()[0], "cells": len(rows), "correlation": {}, "plans": {}}
    out["teacher test"] = {k.split()[1]: r["test"] for k, r in rows.items() if k.startswith("teacher")}
    points: dict[str, Any] = {}
    for target in TARGETS:
        for seed in SEEDS:
            own = [r for k, r in rows.items() if k.startswith(f"candidate {seed} {target} ")]
            if len(own) < CANDIDATES:
                continue
            after = np.array([r["tuned"] for r in own])
            for kind in ("adaptive", "vanilla"):
                before = np.array([r[kind] for r in own])
                out["correlation"][f"{target} seed {seed} {kind}"] = correlations(before, after)
                points[f"{target} seed {seed} {kind}"] = (before, after)
            out.setdefault("spread", {})[f"{target} seed {seed}"] = {
                k: [float(np.min([r[k] for r in own])), float(np.max([r[k] for r in own]))]
                for k in ("vanilla", "adaptive", "tuned", "macs")
            }
        done = [rows[f"plans {seed} {target}"] for seed in SEEDS if f"plans {seed} {target}" in rows]
        if done:
            out["plans"][str(target)] = {k: spread([r["test"][k] for r in done]) for k in done[0]["test"]}
            out["plans"][str(target)]["seeds"] = [r["test"] for r in done]
    if "cost 0.5" in rows:
        out["cost"] = summarise_cost(rows["cost 0.5"]["rows"])
    (RESULTS / "eagleeye.json").write_text(json.dumps(out, indent=1) + "\n")
    plot(points)


def summarise_cost(rows: list[dict[str, float]]) -> dict[str, Any]:
    def median(key: str) -> float:
        return float(np.median([r[key] for r in rows if key in r]))

    ours, original = np.array([r["sliced"] for r in rows]), np.array([r["original"] for r in rows])
    seconds = {k: median(f"{k} s") for k in ("original", "original draw", "sliced", "compact", "masked", "our draw")}
    slow = seconds["original"]
    return {
        "cpu seconds a candidate (median)": seconds,
        "candidates a minute": {k: 60 / seconds[k] for k in ("original", "sliced", "compact", "masked")},
        "times faster, without drawing": {k: slow / seconds[k] for k in ("sliced", "compact", "masked")},
        "times faster": (slow + seconds["original draw"]) / (seconds["sliced"] + seconds["our draw"]),
        "draws until one is accepted (mean)": float(np.mean([r["draws"] for r in rows])),
        "ranking, original against ours": correlations(original, ours),
        "same in all executions": all(
            abs(r[k] - r["sliced"]) < 2e-3 for r in rows for k in ("compact", "masked") if k in r
        ),
        "candidates": len(rows),
    }


def plot(points: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(TARGETS), figsize=(9, 5), constrained_layout=True)
    for column, target in enumerate(TARGETS):
        for row, kind in enumerate(("adaptive", "vanilla")):
            axis = axes[row][column]
            for seed in SEEDS:
                if f"{target} seed {seed} {kind}" in points:
                    axis.scatter(*points[f"{target} seed {seed} {kind}"], s=9, label=f"seed {seed}")
            axis.set_title(
                f"{target:.1%} of MACs, {'adaptive BN' if kind == 'adaptive' else 'inherited BN'}", fontsize=9
            )
            axis.set_xlabel("accuracy before fine-tuning", fontsize=8)
            axis.set_ylabel("after", fontsize=8)
            axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7)
    figure.savefig(RESULTS / "eagleeye.png", dpi=80)


if __name__ == "__main__":
    {"run": run, "cost": run_cost, "summarise": summarise}[sys.argv[1]](Path(sys.argv[2]))

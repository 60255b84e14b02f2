"""EagleEye's claims on Fashion-MNIST: does accuracy after adaptive BN rank candidates, and what does a search cost?

    python -m bench.experiments.eagleeye pilot CELLS.jsonl       # how well fine-tuned accuracy can be measured at all
    python -m bench.experiments.eagleeye cost CELLS.jsonl
    python -m bench.experiments.eagleeye run CELLS.jsonl         # resumable: kill it and run it again
    python -m bench.experiments.eagleeye search CELLS.jsonl      # a larger search, as in the paper; after ``run``
    python -m bench.experiments.eagleeye summarise CELLS.jsonl   # bench/results/eagleeye.json and .png

Network: a small MobileNetV1 (the paper's figure is MobileNetV1's), 55k parameters, 1.2 M MACs, trained for five epochs.
A candidate's accuracy before fine-tuning is taken on 5,000 held-in training pictures, after it on all 10,000 test
pictures; fine-tuning is the same TUNE_STEPS batches of 64 for all. The first TWICE candidates of a row are fine-tuned
again with other batches: that says how reliable the accuracy after fine-tuning is, and so how large a correlation could
be seen at most. ``pilot`` measured that on a seed of its own, without looking at accuracies before fine-tuning, and
MAX_RATE was chosen by it.
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
from cpd_fast.schedule import CandidateSpace, plan_cost
from cpd_fast.search import PAPER_BATCHES, PAPER_MOMENTUM, Batch, CandidateBuilder, adapt_batch_norm

SEEDS, TARGETS, CANDIDATES, TWICE = (0, 1, 2), (0.75, 0.625, 0.5), 30, 10
MAX_RATE = 0.9  # the smallest of PILOT_RATES whose reliability is 0.8 or more; the paper's script has 0.7
PILOT_SEED, PILOT_TARGET, PILOT_RATES, PILOT_CANDIDATES = 99, 0.75, (0.7, 0.9), 12
SEARCHED, PAPER_RATE = 300, 0.7
CALIBRATION, HELD_IN = 19, 5000  # 19 batches of 128: as precise as 102 with momentum 0.1
COST_HELD_IN = (2500, 5000, 10000)
TEACHER_STEPS, TUNE_STEPS, LONG_STEPS = 2150, 80, 300


def mobile_network() -> torch.nn.Module:
    """MobileNetV1's layers, 28x28: a convolution, then depthwise and pointwise ones in turn, each with BN and ReLU."""
    nn, before = torch.nn, 16
    layers: list[nn.Module] = [nn.Conv2d(1, before, 3, 2, 1, bias=False), nn.BatchNorm2d(before), nn.ReLU(inplace=True)]
    for width, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1)):
        layers += [nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False), nn.BatchNorm2d(before)]
        layers += [nn.ReLU(inplace=True), nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(inplace=True)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class Setting:
    """One seed: teacher, groups, scores, and what all candidates share."""

    def __init__(self, data: DataSplits, seed: int, folder: Path) -> None:
        self.data, self.seed = data, seed
        torch.manual_seed(seed)
        self.teacher = mobile_network()
        saved = folder / f"mobile{seed}.pt"
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
        self.test = data.normalise(data.test.images), data.test.labels.long()

    def space(self, target: float, rate: float = MAX_RATE) -> CandidateSpace:
        return CandidateSpace(self.graph, self.scores, cpd.Target(macs=target), max_pruning_ratio=rate)

    def plan(self, target: float, number: int, rate: float = MAX_RATE) -> cpd.PrunePlan:
        space = self.space(target, rate)
        return space.plan(space.counts(space.draw(np.random.default_rng([self.seed, int(target * 1000), number]))))

    def builder(self, target: float, **options: Any) -> CandidateBuilder:
        probe = cpd.uniform_plan(self.graph, self.scores, 0.6)
        return CandidateBuilder(self.teacher, self.graph, self.calibration, probe, **options)

    def before(self, model: torch.nn.Module, n: int = HELD_IN) -> float:
        return accuracy(model, self.held_in[:n], self.held_in_labels[:n])

    def tune(self, plan: cpd.PrunePlan, steps: int, repeat: int = 0, lr: float = 0.02) -> float:
        """Test accuracy after adaptive BN and the fine-tuning that all plans get; ``repeat`` has other batches."""
        small = cpd.compact(self.teacher, self.graph, plan)
        adapt_batch_norm(small, self.calibration)
        train(small, self.data, steps, lr, 2000 + self.seed + 500 * repeat, batch=64, warm_up=0.05)
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


def run_search(path: Path) -> None:
    """The best of SEARCHED candidates within the paper's rate, fine-tuned as ``compare`` does it."""
    data, cells = load(), Cells(path)
    for target in reversed(TARGETS):
        for seed in SEEDS:
            s = Setting(data, seed, path.parent)
            cells.get(f"search {seed} {target}", lambda s=s, t=target: searched(s, t))


def searched(s: Setting, target: float) -> dict[str, Any]:
    builder = s.builder(target)
    values = []
    for number in range(SEARCHED):
        with builder.candidate(s.plan(target, number, PAPER_RATE)) as small:
            values.append(s.before(small))
    plan = s.plan(target, int(np.argmax(values)), PAPER_RATE)
    macs = plan_cost(s.graph, plan).macs / plan_cost(s.graph).macs
    return {"values": values, "macs": macs, "test": s.tune(plan, LONG_STEPS)}


def run_pilot(path: Path) -> None:
    """Only what fine-tuned accuracies say about themselves; nothing about how they are predicted."""
    s, cells = Setting(load(), PILOT_SEED, path.parent), Cells(path)
    for rate in PILOT_RATES:
        for number in range(PILOT_CANDIDATES):
            cells.get(
                f"pilot {rate} {number}",
                lambda n=number, r=rate: {"tuned": [s.tune(s.plan(PILOT_TARGET, n, r), TUNE_STEPS, k) for k in (0, 1)]},
            )
        tuned = np.array([cells.rows[f"pilot {rate} {n}"]["tuned"] for n in range(PILOT_CANDIDATES)])
        print(rate, "range", tuned.mean(1).min(), tuned.mean(1).max(), "reliability", reliability(tuned))


def run_cost(path: Path) -> None:
    s = Setting(load(), 0, path.parent)
    Cells(path).get("cost 0.5", lambda: cost(s, 0.5))


def candidate(s: Setting, target: float, number: int) -> dict[str, Any]:
    plan = s.plan(target, number)
    vanilla = s.before(sliced(s.teacher, s.graph, plan))
    small = sliced(s.teacher, s.graph, plan)
    adapt_batch_norm(small, s.calibration)
    macs = plan_cost(s.graph, plan).macs / plan_cost(s.graph).macs
    tuned = [s.tune(plan, TUNE_STEPS, repeat) for repeat in range(2 if number < TWICE else 1)]
    return {"macs": macs, "vanilla": vanilla, "adaptive": s.before(small), "tuned": tuned}


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
            for n in COST_HELD_IN if kind == "sliced" else COST_HELD_IN[:1]:
                clock = time.process_time()
                with builder.candidate(plan) as small:
                    row[f"{kind} {n}"] = s.before(small, n)
                row[f"{kind} {n} s"] = time.process_time() - clock
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
        counts = [max(1, round(size * (1 - MAX_RATE * rng.random()))) for size in space.sizes]
        if abs(space.cost(counts).macs / dense - target) <= 0.005:
            return n
    return n


# ----------------------------------------------------------------------------------------------------------- summary
def reliability(tuned: np.ndarray) -> float:
    """Of one fine-tuning: 1 - variance of its noise / its variance, from pairs ``(candidates, 2)`` of one seed."""
    return float(1 - np.var(tuned[:, 0] - tuned[:, 1], ddof=1) / 2 / np.mean(np.var(tuned, 0, ddof=1)))


def correlations(groups: list[tuple[np.ndarray, np.ndarray]], seed: int = 0, resamples: int = 1000) -> dict[str, Any]:
    """Pearson, Spearman and Kendall of pairs, with 95 % bootstrap intervals.

    Several groups (seeds) are pooled after centring each: a better teacher must not look like a better candidate. For
    the two rank coefficients that means centred ranks and the mean of the groups' own tau.
    """
    from scipy import stats

    def pooled(of: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
        if of == "kendall":
            return float(np.mean([stats.kendalltau(x, y)[0] for x, y in pairs]))
        ranked = [tuple(stats.rankdata(v) if of == "spearman" else v for v in pair) for pair in pairs]
        x, y = (np.concatenate([pair[side] - pair[side].mean() for pair in ranked]) for side in (0, 1))
        return float(stats.pearsonr(x, y)[0])

    rng, out = np.random.default_rng(seed), {}
    samples = [[(x[p], y[p]) for (x, y) in groups for p in [rng.integers(0, len(x), len(x))]] for _ in range(resamples)]
    samples = [g for g in samples if all(np.ptp(x) and np.ptp(y) for x, y in g)]
    for name in ("pearson", "spearman", "kendall"):
        low, high = np.quantile([pooled(name, g) for g in samples], [0.025, 0.975])
        out[name] = {"r": pooled(name, groups), "low": float(low), "high": float(high)}
    return out


def summarise(path: Path) -> None:
    rows = Cells(path).rows
    out: dict[str, Any] = {"what": __doc__.splitlines()[0], "cells": len(rows), "max_pruning_ratio": MAX_RATE}
    out["teacher test"] = {k.split()[1]: r["test"] for k, r in rows.items() if k.startswith("teacher")}
    out["pilot"] = {}
    for rate in PILOT_RATES:
        pilot = [r["tuned"] for k, r in rows.items() if k.startswith(f"pilot {rate} ")]
        if pilot:
            out["pilot"][str(rate)] = {"reliability": reliability(np.array(pilot)), "tuned": pilot}
    out["correlation"], out["spread"], out["plans"], out["lost by the choice"] = {}, {}, {}, {}
    points: dict[str, Any] = {}
    for target in TARGETS:
        complete = {
            seed: own
            for seed in SEEDS
            if len(own := [r for k, r in rows.items() if k.startswith(f"candidate {seed} {target} ")]) == CANDIDATES
        }
        for kind in ("adaptive", "vanilla"):
            for seed, own in complete.items():
                pair = np.array([r[kind] for r in own]), np.array([r["tuned"][0] for r in own])
                lost = float(pair[1].max() - pair[1][pair[0].argmax()])  # by choosing by accuracy before fine-tuning
                out["lost by the choice"][f"{target} seed {seed} {kind}"] = lost
                points[f"{target} seed {seed} {kind}"] = pair
                out["correlation"][f"{target} seed {seed} {kind}"] = correlations([pair])
            if complete:
                groups = [points[f"{target} seed {seed} {kind}"] for seed in complete]
                out["correlation"][f"{target} pooled {kind}"] = correlations(groups)
        for seed, own in complete.items():
            columns = {k: np.array([r[k] for r in own]) for k in ("vanilla", "adaptive", "macs")}
            columns["tuned"] = np.array([r["tuned"][0] for r in own])
            pairs = np.array([r["tuned"] for r in own if len(r["tuned"]) == 2])
            out["spread"][f"{target} seed {seed}"] = {
                **{k: [float(v.min()), float(v.max())] for k, v in columns.items()}, "reliability": reliability(pairs),
            }  # fmt: skip
        done = [rows[f"plans {seed} {target}"] for seed in SEEDS if f"plans {seed} {target}" in rows]
        if done:
            out["plans"][str(target)] = {k: spread([r["test"][k] for r in done]) for k in done[0]["test"]}
            many = [r for seed in SEEDS if (r := rows.get(f"search {seed} {target}"))]
            if len(many) == len(done):
                for r, more in zip(done, many, strict=True):
                    r["test"][f"best of {SEARCHED}"], r["macs"][f"best of {SEARCHED}"] = more["test"], more["macs"]
                out["plans"][str(target)][f"best of {SEARCHED}"] = spread([r["test"] for r in many])
                for other in ("uniform", "global L1", "global Hessian trace"):
                    gains = [r["test"][f"best of {SEARCHED}"] - r["test"][other] for r in done]
                    out["plans"][str(target)][f"best of {SEARCHED} - {other}"] = spread(gains)
            for other in ("uniform", "global L1", "global Hessian trace"):
                gains = [r["test"]["found"] - r["test"][other] for r in done]
                out["plans"][str(target)][f"found - {other}"] = spread(gains)
            out["plans"][str(target)]["seeds"] = [{"macs": r["macs"], "test": r["test"]} for r in done]
    if "cost 0.5" in rows:
        out["cost"] = summarise_cost(rows["cost 0.5"]["rows"])
    (RESULTS / "eagleeye.json").write_text(json.dumps(out, indent=1) + "\n")
    if points:
        plot(points)


def summarise_cost(rows: list[dict[str, float]]) -> dict[str, Any]:
    def median(key: str) -> float:
        return float(np.median([r[key] for r in rows if key in r]))

    original = np.array([r["original"] for r in rows])
    slow, draw, our_draw = (median(f"{k} s") for k in ("original", "original draw", "our draw"))
    ours = {}
    for key in [*(f"sliced {n}" for n in COST_HELD_IN), f"compact {COST_HELD_IN[0]}", f"masked {COST_HELD_IN[0]}"]:
        own = [r for r in rows if key in r]
        seconds = median(f"{key} s")
        ours[key] = {
            "cpu seconds a candidate (median)": seconds, "candidates a minute": 60 / (seconds + our_draw),
            "times faster": (slow + draw) / (seconds + our_draw), "times faster, without drawing": slow / seconds,
            "candidates": len(own),
        }  # fmt: skip
        if len(own) == len(rows):
            pair = np.array([r[key] for r in rows]), original
            ours[key]["ranking, original against ours"] = correlations([pair])
    least = COST_HELD_IN[0]
    return {
        "original": {
            "cpu seconds a candidate (median)": slow, "candidates a minute": 60 / (slow + draw),
            "draws until one is accepted (mean)": float(np.mean([r["draws"] for r in rows])),
            "cpu seconds a draw that is accepted (median)": draw,
        },
        "ours": ours,
        "largest difference between executions": max(
            abs(r[f"{k} {least}"] - r[f"sliced {least}"])
            for r in rows for k in ("compact", "masked") if f"{k} {least}" in r
        ),
        "candidates": len(rows),
    }  # fmt: skip


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
    {"run": run, "pilot": run_pilot, "cost": run_cost, "search": run_search, "summarise": summarise}[sys.argv[1]](
        Path(sys.argv[2])
    )

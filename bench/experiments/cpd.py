"""Does it work? CPD's presets against their rivals on Fashion-MNIST, all with the same number of training iterations.

    python bench/experiments/cpd.py run --out runs/cpd.jsonl --minutes 60   # resumable: a line a finished cell
    python bench/experiments/cpd.py tables --out runs/cpd.jsonl             # bench/results/cpd.json and cpd.png

A cell is (method, MACs that remain, seed). From a teacher of nine short epochs (three whole ones) every cell gets TOTAL
iterations of batch 128 along one learning rate curve: methods that prune while training do it in the first PRUNE of
them, methods that prune at once do it before the first. Choices between our own variants are made on the val split; the
test split is measured on.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd_fast as cpd
from cpd_fast.data import DataSplits, Split, augmented_batch, fashion_mnist
from cpd_fast.models import SmallResNet
from cpd_fast.recipes.evaluate import evaluate, reestimate_batch_norm
from cpd_fast.recipes.training import adamw, one_cycle, stage_seed

WIDTHS, BATCH, EPOCH = (16, 32, 64), 128, 143  # a short epoch: a third of the pictures
TEACHER, PRUNE, FINETUNE = 9 * EPOCH, 60, EPOCH
TOTAL = PRUNE + FINETUNE
LR_TEACHER, LR = 4e-3, 2e-3
KEEP = (0.7, 0.5, 0.3, 0.2)  # of the MACs
ABLATED_AT = 0.3
SEEDS = (0, 1, 2)
AFTER = {0: "removal", EPOCH // 10: "0.1 epochs", 3 * EPOCH // 10: "0.3 epochs"}  # of fine-tuning
QUICK = 2500  # val pictures that these are measured on; all 5,000 at the end
PICTURE = torch.zeros(1, 1, 28, 28)
ROOT = Path(__file__).resolve().parents[2]

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def task_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, label_smoothing=0.05)


# ------------------------------------------------------------------------------------------------------------ methods
@dataclass
class Prune:
    """What prunes a model: ``step`` after every backward of the first PRUNE iterations, then ``finish``."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, closure: Callable[[], Tensor], iteration: int) -> None:
        """Nothing, for methods that prune at once."""

    def is_done(self, iteration: int) -> bool:
        return iteration >= PRUNE

    def finish(self) -> nn.Module:
        return self.model


class InLoop(Prune):
    """``cpd.Pruner``; ``OneGroup`` may need more than PRUNE iterations, and takes them from the fine-tuning."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, keep: float, **how: Any) -> None:
        super().__init__(model, optimizer)
        criterion, schedule = how.pop("criterion"), how.pop("schedule")
        cap = how.pop("cap", None)
        if cap is not None:  # no layer below this share of the uniform width
            how["max_pruning_ratio"] = 1 - cap * keep**0.5
        self.pruner = cpd.Pruner(model, PICTURE, cpd.Target(macs=keep), criterion, schedule, **how)

    def step(self, closure: Callable[[], Tensor], iteration: int) -> None:
        self.pruner.step(closure)

    def is_done(self, iteration: int) -> bool:
        return iteration >= PRUNE and self.pruner.done

    def finish(self) -> nn.Module:
        return self.pruner.compact(self.optimizer)


class AtOnce(Prune):
    """A plan made before the first iteration."""

    def is_done(self, iteration: int) -> bool:
        return True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, make: Callable[..., cpd.PrunePlan]) -> None:
        graph = cpd.comb(model, PICTURE)
        super().__init__(cpd.compact(model, graph, make(graph), optimizer=optimizer), optimizer)


@torch.no_grad()
def macs_of(model: nn.Module) -> int:
    """MACs of convolutions and linears by running the model: quick, and blind to who built it."""
    total, mode = 0, model.training

    def count(layer: nn.Module, _inputs: Any, out: Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * (out.shape[2] * out.shape[3] if out.dim() == 4 else 1)

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_hook(count) for m in layers]
    model.eval()(PICTURE)
    model.train(mode)
    for hook in hooks:
        hook.remove()
    return total


class TorchPruning(Prune):
    """Torch-Pruning's pruner, global and iterative, along the same cubic ramp to the same MACs.

    It replaces parameters, so the optimizer starts anew after every removal.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, keep: float, events: int) -> None:
        import torch_pruning as tp

        super().__init__(model, optimizer)
        self.keep, self.events = keep, events
        self.pruner = tp.pruner.MetaPruner(
            model,
            PICTURE,
            importance=tp.importance.GroupTaylorImportance(),
            global_pruning=True,
            pruning_ratio=0.95,
            iterative_steps=400,
            ignored_layers=[model.classify],
        )
        self.dense = macs_of(model)

    def step(self, closure: Callable[[], Tensor], iteration: int) -> None:
        every = PRUNE // self.events
        if (iteration + 1) % every:
            return
        share = 1 - (1 - (iteration + 1) // every / self.events) ** 3
        most = self.dense * (1 - (1 - self.keep) * share)
        while macs_of(self.model) > most:
            self.pruner.step()
        self.optimizer = adamw(self.model, 1e-2)


def greedy(events: int = 10, ramp: str = "cubic") -> cpd.Greedy:
    return cpd.Greedy(interval=PRUNE // events, steps=events, ramp=ramp)


ONCE = cpd.Greedy(interval=8, steps=1)
GLOBAL_TAYLOR = cpd.Taylor(normalize_cost=False)
VARIANTS: dict[str, dict[str, Any]] = {
    "taylor": dict(criterion=GLOBAL_TAYLOR, schedule=greedy()),
    "taylor, groups alike": dict(criterion=GLOBAL_TAYLOR, schedule=greedy(), normalize="mean"),
    "taylor/macs": dict(criterion=GLOBAL_TAYLOR, schedule=greedy(), per_cost="macs"),
    "taylor/macs, linear": dict(criterion=GLOBAL_TAYLOR, schedule=greedy(ramp="linear"), per_cost="macs"),
    "taylor/macs, cosine": dict(criterion=GLOBAL_TAYLOR, schedule=greedy(ramp="cosine"), per_cost="macs"),
    "taylor/macs, once": dict(criterion=GLOBAL_TAYLOR, schedule=ONCE, per_cost="macs"),
    "taylor/macs, averaged": dict(criterion=GLOBAL_TAYLOR, schedule=greedy(), per_cost="macs", score_ema=0.5),
    "taylor/macs, capped": dict(criterion=GLOBAL_TAYLOR, schedule=greedy(), per_cost="macs", cap=0.6),
    "taylor/macs, near uniform": dict(criterion=GLOBAL_TAYLOR, schedule=greedy(), per_cost="macs", cap=0.9),
    "fisher/macs": dict(criterion=cpd.GroupFisher(), schedule=greedy(), per_cost="macs"),
    "fisher/macs, near uniform": dict(criterion=cpd.GroupFisher(), schedule=greedy(), per_cost="macs", cap=0.9),
    "gate hessian/macs": dict(criterion=cpd.GateHessian(), schedule=greedy(), per_cost="macs"),
    "gate hessian/macs, near uniform": dict(criterion=cpd.GateHessian(), schedule=greedy(), per_cost="macs", cap=0.9),
    "hessian trace/macs": dict(criterion=cpd.HessianTrace(), schedule=greedy(), per_cost="macs"),
}
FIRST = ("taylor/macs", "taylor/macs, near uniform", "gate hessian/macs, near uniform")  # best is one of these
DISTIL = ("none", "logits", "features", "logits+features", "logits, fine-tuning only")


def uniform(graph: cpd.ChannelGraph, model: nn.Module, keep: float) -> cpd.PrunePlan:
    """The widest plan of one width for all groups that meets the MACs; channels by magnitude."""
    scores, dense = cpd.score(model, graph, criterion=cpd.Magnitude()), cpd.cost(model, PICTURE).macs
    for width in torch.linspace(1, 0.02, 197).tolist():
        plan = cpd.uniform_plan(graph, scores, width)
        if cpd.cost(model, PICTURE, plan, graph).macs <= keep * dense:
            return plan
    raise AssertionError(f"no uniform width has {keep} of the MACs")


def make(
    method: str, model: nn.Module, optimizer: torch.optim.Optimizer, keep: float, execution: str = "auto"
) -> Prune:
    if method in VARIANTS:
        return InLoop(model, optimizer, keep, execution=execution, **VARIANTS[method])
    if method == "published":  # Hessian trace over all groups; linear, at the end of intervals
        return InLoop(model, optimizer, keep, criterion=cpd.HessianTrace(), schedule=greedy(ramp="linear"))
    if method == "released":  # one group an event; its 50 iterations an interval would not end within PRUNE
        return InLoop(model, optimizer, keep, criterion=cpd.Taylor(), schedule=cpd.OneGroup(interval=1))
    if method == "uniform width":
        return AtOnce(model, optimizer, lambda graph: uniform(graph, model, keep))
    if method == "magnitude at once":
        return AtOnce(
            model,
            optimizer,
            lambda g: cpd.plan(g, cpd.score(model, g, criterion=cpd.Magnitude()), cpd.Target(macs=keep)),
        )
    assert method == "Torch-Pruning taylor", method
    return TorchPruning(model, optimizer, keep, events=10)


# --------------------------------------------------------------------------------------------------------------- cells
class Student:
    """One model in training: the loss of its distillation, which follows a compaction."""

    def __init__(self, teacher: nn.Module, distil: str) -> None:
        self.teacher, self.distil = teacher, distil
        width = teacher.classify.in_features
        self.features = cpd.losses.FeatureCWD(width, width, tau=1.0, loss_weight=5.0)
        self.logits = cpd.losses.LogitKL(temperature=4.0, loss_weight=1.0)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, fine_tuning: bool) -> Tensor:
        if self.distil == "none" or (self.distil.endswith("only") and not fine_tuning):
            return task_loss(model, x, y)
        with torch.no_grad():
            map_T = self.teacher.layers(self.teacher.stem(x))
            logits_T = self.teacher.classify(map_T.mean((2, 3)))
        maps: list[Tensor] = []
        hook = model.layers.register_forward_hook(lambda _m, _i, out: maps.append(out))
        logits = model(x)
        hook.remove()
        total = F.cross_entropy(logits, y, label_smoothing=0.05)
        if "logits" in self.distil:
            total = total + self.logits(logits, logits_T)
        if "features" in self.distil:
            total = total + self.features(maps[-1], map_T)
        return total


def accuracy(model: nn.Module, data: DataSplits, split: Any, seed: int) -> float:
    """With batch norm re-estimated, in percent."""
    other = copy.deepcopy(model)
    reestimate_batch_norm(other, data, BATCH, seed, batches=8)
    return round(100 * evaluate(other, data, split).accuracy, 3)


def run_cell(method: str, keep: float, distil: str, seed: int, teacher: nn.Module, data: DataSplits) -> dict[str, Any]:
    began, stage = time.process_time(), stage_seed(seed, "finetune")
    model = copy.deepcopy(teacher).train()
    optimizer: torch.optim.Optimizer = adamw(model, 1e-2)
    torch.manual_seed(stage)
    student = Student(teacher, distil)
    extra = torch.optim.AdamW(student.features.parameters(), lr=LR)
    pruning, out = make(method, model, optimizer, keep, "full_width" if "features" in distil else "auto"), {}
    model, average, first = pruning.model, None, TOTAL
    for it in range(TOTAL):
        if average is None and pruning.is_done(it):
            first, model = it, pruning.finish()
            if "features" in distil:
                kept = pruning.pruner.plan.get(model_group(pruning), range(student.features.adapter[0].in_channels))
                student.features.keep_channels(kept)
                extra = torch.optim.AdamW(student.features.parameters(), lr=LR)
            average = torch.optim.swa_utils.AveragedModel(
                model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
            )
        if it - first in AFTER:
            quick = Split(data.val.images[:QUICK], data.val.labels[:QUICK])
            out[AFTER[it - first]] = accuracy(model, data, quick, stage)
        x, y = augmented_batch(data, BATCH, stage, it)
        model.train()
        pruning.optimizer.zero_grad()
        extra.zero_grad()
        student.loss(model, x, y, it >= first).backward()
        if it < first:
            pruning.step(lambda: F.cross_entropy(model(x), y), it)  # noqa: B023
        for group in (*pruning.optimizer.param_groups, *extra.param_groups):
            group["lr"] = one_cycle(LR, it, TOTAL, 0.1)
        pruning.optimizer.step()
        if "features" in distil:
            extra.step()
        if average is not None:
            average.update_parameters(model)
    assert average is not None
    cost, dense = cpd.cost(model, PICTURE), cpd.cost(teacher, PICTURE)
    return {
        **out,
        "pruned until": first,
        "end": accuracy(model, data, data.val, stage),
        "end, no BN re-estimation": round(100 * evaluate(model, data, data.val).accuracy, 3),
        "end, EMA of weights": accuracy(average.module, data, data.val, stage),
        "test": accuracy(model, data, data.test, stage),
        "macs": round(cost.macs / dense.macs, 4),
        "params": round(cost.params / dense.params, 4),
        "cpu_s": round(time.process_time() - began, 1),
    }


def model_group(pruning: Any) -> str:
    """The group that the last feature map runs over."""
    return next(
        g.name
        for g in pruning.pruner.graph.groups
        if any(s.param == "classify.weight" and not s.produces for s in g.slices)
    )


def trained_teacher(seed: int, data: DataSplits, folder: Path) -> nn.Module:
    torch.manual_seed(seed)
    model, path = SmallResNet(10, WIDTHS), folder / f"teacher-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    optimizer = adamw(model, 1e-2)
    for it in range(TEACHER):
        x, y = augmented_batch(data, BATCH, stage_seed(seed, "teacher"), it)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(LR_TEACHER, it, TEACHER)
        model.train()
        optimizer.zero_grad()
        task_loss(model, x, y).backward()
        optimizer.step()
    torch.save(model.state_dict(), path)
    return model.eval()


def best_variant(lines: list[dict[str, Any]]) -> str:
    """Of FIRST, the variant with the highest mean val accuracy at ABLATED_AT."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if line["method"] in FIRST and line["keep"] == ABLATED_AT and line["distil"] == "logits":
            found.setdefault(line["method"], []).append(line["end"])
    return max(found, key=lambda m: sum(found[m]) / len(found[m]))


def run(out: Path, minutes: float) -> None:
    torch.set_num_threads(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    data = fashion_mnist()
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    spent = sum(line["cpu_s"] for line in lines)

    def cell(method: str, keep: float, distil: str, seed: int) -> None:
        nonlocal spent
        key = {"method": method, "keep": keep, "distil": distil, "seed": seed}
        if any(all(line[k] == v for k, v in key.items()) for line in lines) or spent > 60 * minutes:
            return
        teacher = trained_teacher(seed, data, out.parent)
        lines.append({**key, **run_cell(method, keep, distil, seed, teacher, data)})
        spent += lines[-1]["cpu_s"]
        with out.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(f"{spent:6.0f} s", json.dumps(lines[-1]), flush=True)

    for seed in SEEDS:
        if not any(line["method"] == "teacher" and line["seed"] == seed for line in lines):
            began = time.process_time()
            teacher = trained_teacher(seed, data, out.parent)
            quality = {
                name: round(100 * evaluate(teacher, data, s).accuracy, 3)
                for name, s in (("end", data.val), ("test", data.test))
            }
            lines.append({
                "method": "teacher", "keep": 1.0, "distil": "none", "seed": seed, **quality,
                "cpu_s": round(time.process_time() - began, 1),
            })  # fmt: skip
            spent += lines[-1]["cpu_s"]
            with out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    for seed in SEEDS:  # the most telling first, should the time run out
        for method in ("uniform width", *FIRST, "released", "Torch-Pruning taylor"):
            cell(method, ABLATED_AT, "logits", seed)
    best = best_variant(lines)
    for keep in (0.2, 0.5, 0.7):
        for seed in SEEDS:
            for method in (best, "uniform width", "released", "Torch-Pruning taylor"):
                cell(method, keep, "logits", seed)
    for seed in SEEDS:
        for distil in DISTIL:
            cell(best, ABLATED_AT, distil, seed)
        for method in ("published", "magnitude at once", *VARIANTS):
            cell(method, ABLATED_AT, "logits", seed)
    for seed in SEEDS:
        for keep in KEEP:
            for method in ("published", "magnitude at once"):
                cell(method, keep, "logits", seed)


# -------------------------------------------------------------------------------------------------------------- tables
def tables(out: Path) -> None:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    cells: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for line in lines:
        cells.setdefault((line["method"], line["keep"], line["distil"]), []).append(line)
    rows = []
    for (method, keep, distil), parts in sorted(cells.items()):
        numbers = {k for p in parts for k, v in p.items() if isinstance(v, float) and k not in ("keep", "cpu_s")}
        row: dict[str, Any] = {"method": method, "keep": keep, "distil": distil, "seeds": len(parts)}
        for name in sorted(numbers):
            values = torch.tensor([p[name] for p in parts if name in p], dtype=torch.float64)
            spread = float(values.std()) if len(values) > 1 else 0.0
            row[name] = {"mean": round(float(values.mean()), 3), "std": round(spread, 3)}
        rows.append(row)
    doc = {
        "data": "Fashion-MNIST, Debian dataset-fashion-mnist",
        "network": f"SmallResNet {WIDTHS}",
        "iterations": {"teacher": TEACHER, "prune": PRUNE, "fine-tune": FINETUNE, "batch": BATCH},
        "command": "python bench/experiments/cpd.py run",
        "torch": torch.__version__,
        "best": best_variant(lines),
        "rows": rows,
    }
    (ROOT / "bench/results/cpd.json").write_text(json.dumps(doc, indent=1) + "\n")
    plot(rows, doc["best"], ROOT / "bench/results/cpd.png")


def plot(rows: list[dict[str, Any]], best: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    methods = [best, "uniform width", "released", "published", "magnitude at once"]
    methods += [r["method"] for r in rows if r["method"].startswith("Torch-Pruning") and r["keep"] == KEEP[0]]
    for axis, name, title in ((axes[0], "removal", "right after the last removal, BN re-estimated (val)"),
                              (axes[1], "test", "after fine-tuning (test)")):  # fmt: skip
        for method in methods:
            mine = [r for r in rows if r["method"] == method and r["distil"] == "logits" and name in r]
            mine = sorted((r for r in mine if r["keep"] in KEEP), key=lambda r: r["keep"])
            label = f"best: {method}" if method == best else method
            if mine:
                axis.errorbar([r["macs"]["mean"] for r in mine], [r[name]["mean"] for r in mine],
                              [r[name]["std"] for r in mine], marker="o", capsize=3, label=label)  # fmt: skip
        axis.set(title=title, xlabel="share of the MACs that remains", ylabel="accuracy, %")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tables"])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "cpd.jsonl")
    parser.add_argument("--minutes", type=float, default=60, help="CPU minutes after which no further cell begins")
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.out, arguments.minutes)
    else:
        tables(arguments.out)

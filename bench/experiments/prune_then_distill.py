"""Prune, then Distill on Fashion-MNIST: does a pruned teacher teach better than an unpruned one, or than none?

    python -m bench.experiments.prune_then_distill run CELLS.jsonl         # resumable: kill it and run it again
    python -m bench.experiments.prune_then_distill summarise CELLS.jsonl   # bench/results/prune_then_distill.json, .png

Teacher: SmallResNet 16/32/64, one block a stage, three epochs; four rounds of 20 % of what remains (59 % gone), 322
steps each with the learning rate rewound. The rounds are three more epochs of training; a third teacher has these
without the pruning. Students, all from scratch for one epoch with the same batches: the teacher's own architecture
(self-distillation), the one that the pruned teacher shapes, and a plain convolutional network that somebody drew.
alpha = 0.95, T = 10 as in the paper, and T = 4 to see how much hangs on it.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd_fast as cpd
from bench.experiments.common import RESULTS, Cells, accuracy, cross_entropy, load, sgd, spread, train
from cpd_fast.data import DataSplits
from cpd_fast.losses import LogitKL
from cpd_fast.models import SmallResNet
from cpd_fast.prune import WeightMasks
from cpd_fast.schedule import match_plan, plan_cost

SEEDS, ROUNDS, FRACTION = (0, 1, 2), 4, 0.2
TEACHER_STEPS, ROUND_STEPS, STUDENT_STEPS = 1290, 322, 430
ALPHA, TEMPERATURES = 0.95, (10.0, 4.0)
WIDTHS = (16, 32, 64)
LR = 0.1


def teacher_network() -> nn.Module:
    return SmallResNet(10, widths=WIDTHS, blocks=1)


def drawn_network() -> nn.Module:
    """The smaller network of another architecture: four convolutions."""
    layers: list[nn.Module] = []
    before = 1
    for width, stride in ((12, 2), (24, 1), (24, 2), (48, 2)):
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def matched_network(masks: WeightMasks) -> nn.Module:
    """The teacher's architecture at the widths that its pruned weights leave, with weights of its own."""
    fresh = teacher_network()
    graph = cpd.comb(fresh, torch.zeros(1, 1, 28, 28))
    small = cpd.compact(fresh, graph, match_plan(graph, masks.nonzeros()))
    for m in small.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()  # the starting weights that a layer of this size gets
    return small


def run(path: Path) -> None:
    data, cells = load(), Cells(path)
    test = data.normalise(data.test.images), data.test.labels.long()
    for temperature in TEMPERATURES:
        for seed in SEEDS:
            taught, masks = teachers(data, seed, path.parent, cells, test)
            students: dict[str, Callable[[], nn.Module]] = {
                "self": teacher_network,
                "matched": lambda masks=masks: matched_network(masks),
                "drawn": drawn_network,
            }
            for name, build in students.items():
                for teacher_name, teacher in (
                    taught.items() if temperature == TEMPERATURES[0] else [*taught.items()][1:3]
                ):
                    cells.get(
                        f"student {seed} {name} {teacher_name} T{temperature:g}",
                        lambda b=build, t=teacher, s=seed, T=temperature: student(data, b, t, s, T, test),
                    )


def teachers(
    data: DataSplits, seed: int, folder: Path, cells: Cells, test: tuple[Tensor, Tensor]
) -> tuple[dict[str, nn.Module | None], WeightMasks]:
    """No teacher, the trained one, the same after all rounds, and after as many steps without pruning."""
    torch.manual_seed(seed)
    saved = folder / f"ptd{seed}.pt"
    if not saved.exists():
        dense = train(teacher_network(), data, TEACHER_STEPS, LR, 100 + seed)
        pruned, longer, after = copy.deepcopy(dense), copy.deepcopy(dense), []
        masks = WeightMasks(pruned)
        for k in range(ROUNDS):
            masks.prune(FRACTION)
            optimizer = sgd(pruned, LR)
            masks.attach(optimizer)
            train(pruned, data, ROUND_STEPS, LR, 200 + 10 * seed + k, optimizer=optimizer)
            masks.remove()
            after.append(accuracy(pruned, *test))
            train(longer, data, ROUND_STEPS, LR, 200 + 10 * seed + k)
        back = [n for n, count in masks.nonzeros().items() if int((pruned.get_parameter(n) != 0).sum()) > count]
        assert not back, f"masked weights came back: {back}"
        states = [m.state_dict() for m in (dense, pruned, longer)]
        torch.save([*states, masks.state_dict(), after], saved)
    *states, mask_state, after = torch.load(saved, weights_only=True)
    networks = [teacher_network() for _ in states]
    for network, state in zip(networks, states, strict=True):
        network.load_state_dict(state)
    dense, pruned, longer = (n.eval() for n in networks)
    masks = WeightMasks(pruned)
    masks.load_state_dict(mask_state)
    x = torch.zeros(1, 1, 28, 28)
    graph = cpd.comb(dense, x)
    small = plan_cost(graph, match_plan(graph, masks.nonzeros()))
    cells.get(
        f"teachers {seed}",
        lambda: {
            "dense": accuracy(dense, *test), "pruned": accuracy(pruned, *test), "longer": accuracy(longer, *test),
            "rounds": after, "density": masks.density,
            "params": plan_cost(graph).params, "macs": plan_cost(graph).macs,
            "matched_params": small.params, "matched_macs": small.macs,
            "drawn_params": cpd.cost(drawn_network(), x).params, "drawn_macs": cpd.cost(drawn_network(), x).macs,
        },
    )  # fmt: skip
    return {"none": None, "dense": dense, "pruned": pruned, "longer": longer}, masks


def student(
    data: DataSplits,
    build: Callable[[], nn.Module],
    teacher: nn.Module | None,
    seed: int,
    temperature: float,
    test: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """A student from scratch: the same first weights and batches whoever teaches."""
    torch.manual_seed(300 + seed)
    net = build()
    imitate = LogitKL(temperature=temperature, loss_weight=ALPHA)

    def loss(x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        if teacher is None:
            return cross_entropy(x, logits, labels)
        with torch.no_grad():
            wanted = teacher(x)
        return imitate(logits, wanted) + (1 - ALPHA) * F.cross_entropy(logits, labels)

    train(net, data, STUDENT_STEPS, LR, 400 + seed, loss=loss)
    row: dict[str, Any] = {"test": accuracy(net, *test)}
    if teacher is not None:
        with torch.no_grad():
            same = sum(int((net(x).argmax(1) == teacher(x).argmax(1)).sum()) for x in test[0].split(500))
        row["agreement"] = same / len(test[1])
    return row


# ----------------------------------------------------------------------------------------------------------- summary
def summarise(path: Path) -> None:
    rows = Cells(path).rows
    out: dict[str, Any] = {"what": __doc__.splitlines()[0], "teachers": {}, "students": {}}
    seeds = [s for s in SEEDS if f"teachers {s}" in rows]
    for key in ("dense", "pruned", "longer", "density"):
        out["teachers"][key] = spread([rows[f"teachers {s}"][key] for s in seeds])
    out["teachers"]["sizes"] = [
        {k: v for k, v in rows[f"teachers {s}"].items() if k.endswith(("params", "macs"))} for s in seeds
    ]
    out["teachers"]["rounds"] = [rows[f"teachers {s}"]["rounds"] for s in seeds]
    for temperature in TEMPERATURES:
        for name in ("self", "matched", "drawn"):
            cell = {}
            for teacher in ("none", "dense", "pruned", "longer"):
                t = TEMPERATURES[0] if teacher == "none" else temperature
                values = [r["test"] for s in SEEDS if (r := rows.get(f"student {s} {name} {teacher} T{t:g}"))]
                if values:
                    cell[teacher] = {**spread(values), "seeds": values}
            for other in ("none", "dense", "longer"):
                if other in cell and "pruned" in cell:
                    pairs = zip(cell["pruned"]["seeds"], cell[other]["seeds"], strict=False)
                    cell[f"pruned - {other}"] = spread([a - b for a, b in pairs])
            if cell:
                out["students"][f"{name} T{temperature:g}"] = cell
    (RESULTS / "prune_then_distill.json").write_text(json.dumps(out, indent=1) + "\n")
    plot(out["students"])


def plot(students: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.4), constrained_layout=True)
    for n, (teacher, colour) in enumerate((
        ("none", "#999999"),
        ("dense", "#4c78a8"),
        ("pruned", "#f58518"),
        ("longer", "#54a24b"),
    )):
        for x, cell in enumerate(students.values()):
            if teacher in cell:
                axis.errorbar(
                    x + (n - 1.5) * 0.2, 100 * cell[teacher]["mean"], 100 * cell[teacher]["stderr"], fmt="o", ms=5,
                    color=colour, label=f"teacher: {teacher}" if x == 0 else None,
                )  # fmt: skip
                axis.scatter(
                    [x + (n - 1.5) * 0.2] * len(cell[teacher]["seeds"]), [100 * v for v in cell[teacher]["seeds"]], s=6,
                    color=colour, alpha=0.5,
                )  # fmt: skip
    axis.set_xticks(range(len(students)), list(students), fontsize=8)
    axis.set_ylabel("test accuracy, %")
    axis.legend(fontsize=8)
    figure.savefig(RESULTS / "prune_then_distill.png", dpi=80)


if __name__ == "__main__":
    {"run": run, "summarise": summarise}[sys.argv[1]](Path(sys.argv[2]))

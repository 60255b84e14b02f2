"""Comb, plan and compact beside Torch-Pruning, one thread; and how comb grows with depth and width.

    pytest bench/bench_comb.py --benchmark-enable --benchmark-only
    python bench/bench_comb.py [--sweep]   # writes bench/results/comb.json: CPU seconds, minima of interleaved runs

Before anything is timed, masked equals compacted.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import linear_regression
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "comb.json"
NETWORKS = ("resnet50", "deit_small_patch16_224", "resnet18", "mobilenetv2_100", "vgg11_bn", "densenet121")
GIANT = "vit_giant_patch14_clip_224"
RUNS = 5
DEPTHS, WIDTHS = (4, 8, 16, 32, 64), (64, 256, 1024, 4096)


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A timm network with random weights, and its input."""
    import timm

    return timm.create_model(name, pretrained=False).eval(), torch.randn(1, 3, 224, 224)


def chain(depth: int, width: int) -> tuple[nn.Module, torch.Tensor]:
    """``depth`` pointwise convolutions of ``width`` channels, with norms and a residual sum each: all of one kind."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm, self.conv2 = (
                nn.Conv2d(width, width, 1),
                nn.BatchNorm2d(width),
                nn.Conv2d(width, width, 1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv2(self.norm(self.conv1(x)).relu())

    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(3, width, 1), *(Block() for _ in range(depth))), torch.zeros(1, 3, 8, 8)


def ours(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, dict[str, float]]:
    """The compacted network, and CPU seconds of each stage."""
    from cpd_fast import comb, compact, random_plan

    t0 = time.process_time()
    graph = comb(model, x)
    t1 = time.process_time()
    plan = random_plan(graph, keep=0.5)
    t2 = time.process_time()
    small = compact(model, graph, plan)
    t3 = time.process_time()
    return small, {"comb": t1 - t0, "plan": t2 - t1, "compact": t3 - t2, "total": t3 - t0}


def torch_pruning(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, dict[str, float]]:
    """The same by Torch-Pruning, as its README uses it: graph, importance by magnitude, half of the channels."""
    import torch_pruning as tp

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    t0 = time.process_time()
    pruner = tp.pruner.BasePruner(
        model, x, tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=layers[-1:],
        num_heads=heads,
    )  # fmt: skip
    pruner.step()
    return model, {"total": time.process_time() - t0}


def checked(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network whose compaction equals its masked forward."""
    from cpd_fast import comb, compact, masked, random_plan

    model, x = network(name)
    graph = comb(model, x)
    plan = random_plan(graph, keep=0.5)
    with torch.no_grad(), masked(model, graph, plan, execution="full_width") as m:
        torch.testing.assert_close(m(x), compact(model, graph, plan)(x), rtol=1e-3, atol=1e-4)
    return model, x


# -------------------------------------------------------------------------------------------------------------- pytest
@pytest.mark.parametrize("name", NETWORKS[:2])
@pytest.mark.parametrize("library", [ours, torch_pruning])
def bench_network(benchmark: Any, name: str, library: Callable[..., Any]) -> None:
    pytest.importorskip("timm")
    if library is torch_pruning:
        pytest.importorskip("torch_pruning")
    model, x = checked(name)
    import copy

    benchmark.pedantic(library, setup=lambda: ((copy.deepcopy(model), x), {}), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("depth", DEPTHS)
def bench_depth(benchmark: Any, depth: int) -> None:
    from cpd_fast import comb

    benchmark.pedantic(comb, chain(depth, 64), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("width", WIDTHS)
def bench_width(benchmark: Any, width: int) -> None:
    from cpd_fast import comb

    benchmark.pedantic(comb, chain(8, width), rounds=3, warmup_rounds=1)


# ---------------------------------------------------------------------------------------------------------------- main
def _best(runs: list[dict[str, float]]) -> dict[str, float]:
    return {k: round(min(r[k] for r in runs), 4) for k in runs[0]}


def side_by_side(name: str) -> dict[str, Any]:
    """Minima of interleaved runs of both libraries."""
    import copy

    model, x = checked(name)
    runs: dict[str, list[dict[str, float]]] = {"cpd_fast": [], "torch_pruning": []}
    for _ in range(RUNS):
        for library, key in ((ours, "cpd_fast"), (torch_pruning, "torch_pruning")):
            runs[key].append(library(copy.deepcopy(model), x)[1])
    row: dict[str, Any] = {key: _best(found) for key, found in runs.items()}
    row["ratio"] = round(row["torch_pruning"]["total"] / row["cpd_fast"]["total"], 2)
    return row


def sweep() -> dict[str, Any]:
    """CPU seconds of comb by depth and by width."""
    from cpd_fast import comb

    def seconds(depth: int, width: int) -> float:
        model, x = chain(depth, width)
        found = []
        for _ in range(3):
            start = time.process_time()
            comb(model, x)
            found.append(time.process_time() - start)
        return round(min(found), 4)

    seconds(DEPTHS[0], WIDTHS[0])  # first calls import
    found = {
        "depth at width 64": {str(d): seconds(d, 64) for d in DEPTHS},
        "width at depth 8": {str(w): seconds(8, w) for w in WIDTHS},
    }
    return found | {"exponents": {name: _exponent(row) for name, row in found.items()}}


def _exponent(row: dict[str, float]) -> float:
    """Slope of log seconds over log size, least squares: 1 where time grows in proportion, 2 where with the square."""
    x, y = ([math.log(float(v)) for v in values] for values in (row.keys(), row.values()))
    return round(linear_regression(x, y).slope, 2)


def giant() -> dict[str, Any]:
    """Comb of a network of a thousand million parameters that has no weights, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--giant"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _peak_kib() -> int:
    """Largest resident memory of this program; ``ru_maxrss`` would include the process that started it."""
    line = next(v for v in Path("/proc/self/status").read_text().splitlines() if v.startswith("VmHWM"))
    return int(line.split()[1])


def _giant() -> None:
    import timm

    from cpd_fast import comb

    with torch.device("meta"):
        model = timm.create_model(GIANT, pretrained=False).eval()
    comb(nn.Linear(2, 2), torch.zeros(1, 2))
    before = _peak_kib()
    start = time.process_time()
    graph = comb(model, torch.zeros(1, 3, 224, 224))
    seconds = time.process_time() - start
    grown = _peak_kib() - before
    total = sum(p.numel() for p in model.parameters())
    print(json.dumps({
        "network": GIANT, "parameters": total, "weights_mib": round(total * 4 / 2**20), "comb": round(seconds, 3),
        "grown_mib": round(grown / 1024), "prunable_groups": len(graph.prunable_groups),
    }))  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {"torch": torch.__version__, "unit": "CPU seconds, one thread, minima", "networks": {}}
    for name in [] if "--sweep" in sys.argv else NETWORKS:
        results["networks"][name] = side_by_side(name)
        print(name, results["networks"][name], flush=True)
    if "--sweep" in sys.argv:  # the rest as it was measured
        results = json.loads(RESULTS.read_text())
    results["sweep"] = sweep()
    if "--sweep" not in sys.argv:
        results["giant"] = giant()
    print(results["sweep"], results.get("giant"), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import_module("conftest")  # a CUDA build of torchvision imports beside a CPU torch
    _giant() if "--giant" in sys.argv else main()

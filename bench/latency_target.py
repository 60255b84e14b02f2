"""Real networks planned for a real latency: bench/results/latency_target.json.

    python bench/latency_target.py [--shares 0.8 0.6 0.4] [--threads 1]

For each network a table of its layers is measured in ONNX Runtime; for each share of the dense latency a plan is made,
whose network is measured in turns with the dense one. Afterwards both are exported anew and measured again, several
times: these figures did not choose the plan, and say whether it holds. Everything is kept, with the machine's name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
AGAIN, SECONDS = 3, 6.0  # measurements after the plan is chosen, and seconds that a network has in each
RESULTS = ROOT / "bench/results/latency_target.json"


def _off(model: torch.nn.Module, small: torch.nn.Module, x: torch.Tensor, share: float, threads: int) -> dict:
    """Both networks in turns, and by how much the small one misses the share."""
    import cpd_fast as cpd

    dense, less = cpd.compare_latency([model, small], x, "onnxruntime", 1000, threads, SECONDS)
    off = less.median_ms / (share * dense.median_ms) - 1
    left_out = dense.left_out + less.left_out
    return {
        "dense_ms": round(dense.median_ms, 4),
        "ms": round(less.median_ms, 4),
        "off": round(off, 4),
        "left_out": left_out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6, 0.4], help="of the dense latency")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    import conftest  # noqa: F401
    import cpd_fast as cpd
    from cpd_fast.models import EfficientNetLite0FPN, SmallResNet
    from cpd_fast.timing.table import machine

    networks = {
        "SmallResNet(32, 64, 128)": (SmallResNet(10).eval(), torch.zeros(1, 1, 28, 28)),
        "EfficientNet-Lite0 + FPN": (EfficientNetLite0FPN(5, pretrained=False).eval(), torch.zeros(1, 3, 96, 96)),
    }
    rows = []
    for name, (model, x) in networks.items():
        graph = cpd.comb(model, x)
        scores = cpd.score(model, graph, criterion=cpd.Magnitude())
        start = time.perf_counter()
        table = cpd.LatencyTable(model, graph, x, threads=args.threads, cache=False)
        seconds = time.perf_counter() - start
        for share in args.shares:
            found = cpd.plan_for_latency(model, graph, scores, share, x, threads=args.threads, table=table)
            tries = [{k: round(getattr(t, k), 4) for k in ("predicted_ms", "measured_ms", "dense_ms", "goal_ms")}
                     | {"off": round(t.off, 4)} for t in found.tries]  # fmt: skip
            small = cpd.compact(model, graph, found.plan)
            again = [_off(model, small, x, share, args.threads) for _ in range(AGAIN)]
            rows.append({
                "network": name, "input": list(x.shape), "share": share, "layers": table.measured,
                "table_s": round(seconds, 1), "tries": tries, "chosen": found.chosen, "again": again,
                "macs": round(cpd.cost(small, x).macs / cpd.cost(model, x).macs, 3), "load": os.getloadavg()[0],
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    doc = {"machine": machine("onnxruntime", args.threads), "rows": rows}
    RESULTS.write_text(json.dumps(doc, indent=1) + "\n")


if __name__ == "__main__":
    main()

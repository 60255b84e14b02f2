"""Real networks planned for a real latency: bench/results/latency_target.json.

    python bench/latency_target.py [--share 0.6] [--threads 1]

For each network a table of its layers is measured in ONNX Runtime, a plan is made for a share of the dense latency, and
the compacted network is measured in turns with the dense one. All tries are kept, with the machine's name.
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
RESULTS = ROOT / "bench/results/latency_target.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.6, help="of the dense latency that remains")
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
        found = cpd.plan_for_latency(model, graph, scores, args.share, x, threads=args.threads, table=table)
        tries = [{k: round(getattr(t, k), 4) for k in ("predicted_ms", "measured_ms", "dense_ms", "goal_ms")}
                 | {"off": round(t.off, 4)} for t in found.tries]  # fmt: skip
        rows.append({"network": name, "input": list(x.shape), "layers": table.measured, "table_s": round(seconds, 1),
                     "tries": tries, "chosen": found.chosen})  # fmt: skip
        print(rows[-1], file=sys.stderr)
    doc = {
        "share": args.share,
        "machine": machine("onnxruntime", args.threads),
        "load": os.getloadavg()[0],
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(doc, indent=1) + "\n")


if __name__ == "__main__":
    main()

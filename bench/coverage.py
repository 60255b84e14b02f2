"""What comb reaches on every network of the zoo, beside Torch-Pruning on the same networks: docs/coverage.md.

    python bench/coverage.py [--peer] [--only NAME ...]

Each network runs in its own process with a time limit. Results go to bench/results/coverage.json one by one, so a
stopped run goes on where it was; docs/coverage.md is written from that file at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "bench" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
LIMIT_S = 180


def ours(entry: dict) -> dict:
    """Share of parameters in prunable groups, and masked against compacted at half of every group, float64."""
    import torch

    from cpd_fast import comb, compact, masked, random_plan
    from tests.nets import relative_error
    from tests.zoo.networks import build, example_input

    model, output = build(entry)
    model, x = model.double(), example_input(entry).double()
    total = sum(p.numel() for p in model.parameters())
    start = time.process_time()
    graph = comb(model, x)
    comb_s = time.process_time() - start
    reached = {s.param for g in graph.prunable_groups for s in g.slices}
    share = sum(p.numel() for n, p in model.named_parameters() if n in reached) / total
    plan = random_plan(graph, keep=0.5, generator=torch.Generator().manual_seed(0))
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan) as m:
        error = relative_error(output(m(x)), output(small(x)))
    left = sum(p.numel() for p in small.parameters()) / total
    reasons: dict[str, int] = defaultdict(int)
    for g in graph.groups:
        if not g.prunable:
            reasons[(g.reason or "").split(" (in ")[0]] += g.n_channels
    frozen = max(reasons, key=lambda r: reasons[r], default="")
    return {"share": share, "left": left, "error": error, "comb_s": comb_s, "frozen": frozen}


def peer(entry: dict) -> dict:
    """Torch-Pruning as its README uses it: global group magnitude, half of the channels, rounded to 8."""
    import torch
    import torch_pruning as tp
    from torch import nn

    from tests.zoo.networks import build, example_input

    model, output = build(entry)
    x = example_input(entry)
    total = sum(p.numel() for p in model.parameters())
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    start = time.process_time()
    pruner = tp.pruner.BasePruner(
        model, x, tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True, pruning_ratio=0.5, round_to=8,
        ignored_layers=layers[-1:],
    )  # fmt: skip
    pruner.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        output(model(x))
    return {"peer_left": sum(p.numel() for p in model.parameters()) / total, "peer_s": seconds}


def in_process(kind: str, name: str) -> dict:
    """Run one network in a process of its own; an error becomes its last line."""
    command = [sys.executable, __file__, "--worker", kind, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {f"{kind}_failed": f"more than {LIMIT_S} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {f"{kind}_failed": last[:160]}


def write_page(results: dict[str, dict]) -> None:
    """docs/coverage.md: a row a network."""
    good = [r for r in results.values() if r.get("error", 1) < 1e-6]
    shares = [r["share"] for r in good] or [0.0]
    lines = [
        "# Coverage",
        "",
        "Written by `python bench/coverage.py --peer` (needs the `zoo` extra); random weights and statistics, float64,",
        "half of every prunable group removed at random. *Share*: parameters that lie in prunable groups. *Error*:",
        "largest difference of masked and compacted output, relative to the largest output. *Left*: parameters after",
        "compaction. *Torch-Pruning*: parameters left by its README's use, where its model still runs; exactness is",
        "not checked there.",
        "An empty cell was not run.",
        "",
        f"{len(good)} of {len(results)} networks compact exactly; the median share is {median(shares):.1%}.",
        "",
        "| network | family | share | left | error | comb, CPU s | most channels frozen because | Torch-Pruning |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        if "ours_failed" in r:
            cells = ["", "", "", "", r["ours_failed"].replace("|", "/")]
        else:
            cells = [f"{r['share']:.1%}", f"{r['left']:.1%}", f"{r['error']:.0e}", f"{r['comb_s']:.1f}", r["frozen"]]
        other = r.get("peer_failed", f"{r['peer_left']:.1%}" if "peer_left" in r else "").replace("|", "/")
        lines.append(f"| {name} | {r['family']} | {' | '.join(cells)} | {other[:80]} |")
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning too")
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    import conftest  # noqa: F401  (lets a CUDA build of torchvision import beside a CPU torch)
    from tests.zoo.networks import ENTRIES

    if args.worker:
        kind, name = args.worker
        entry = next(e for e in ENTRIES if f"{e['src']}/{e['name']}" == name)
        print(json.dumps({"ours": ours, "peer": peer}[kind](entry)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for entry in ENTRIES:
        name = f"{entry['src']}/{entry['name']}"
        if args.only and entry["name"] not in args.only:
            continue
        row = results.setdefault(name, {"family": entry["family"]})
        if not row.keys() & {"share", "ours_failed"}:
            row |= in_process("ours", name)
        if args.peer and not row.keys() & {"peer_left", "peer_failed"}:
            row |= in_process("peer", name)
        print(name, {k: v for k, v in row.items() if k != "family"}, file=sys.stderr)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)


if __name__ == "__main__":
    main()

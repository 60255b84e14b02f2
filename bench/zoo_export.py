"""Which compacted networks of the zoo export, to ONNX and with torch.export: docs/export.md.

    python bench/zoo_export.py [--only NAME ...] [--again] [--page]

Each network runs in its own process with a limit of CPU time: half of every group removed at random, compacted,
exported with a dynamic batch and compared with PyTorch at two batch sizes. Where the compacted one fails, the original
is exported too: what it cannot do either is the exporter's limit and not compaction's. Results go to
bench/results/zoo_export.json one by one, so a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS, PAGE = ROOT / "bench/results/zoo_export.json", ROOT / "docs" / "export.md"
LIMIT_S = 900  # CPU time of a network: the same on a busy machine
FORMATS = ("onnx", "pt2")
MARK = "<!-- table: bench/zoo_export.py -->"


def _try(model: Any, x: Any, kind: str, dynamic: bool) -> dict[str, Any]:
    import cpd_fast as cpd

    export = {"onnx": cpd.export_onnx, "pt2": cpd.export_pt2}[kind]
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            error = export(model, x, Path(folder) / f"net.{kind}", dynamic)
        except cpd.CpdError as e:
            return {"failed": str(e).replace(folder, "")[:300]}
    return {"error": error, "cpu_s": round(time.process_time() - start, 1), "dynamic": dynamic}


def measure(entry: dict[str, Any]) -> dict[str, Any]:
    """Export the compacted network; where that fails, the original as well, and then both with a fixed batch."""
    import torch

    import cpd_fast as cpd
    from tests.zoo.networks import build, example_input

    model, _ = build(entry)
    x = example_input(entry)
    graph = cpd.comb(model, x)
    small = cpd.compact(model, graph, cpd.random_plan(graph, keep=0.5, generator=torch.Generator().manual_seed(0)))
    row: dict[str, Any] = {}
    for kind in FORMATS:
        row[kind] = _try(small, x, kind, dynamic=True)
        if "failed" in row[kind]:
            row[f"{kind} original"] = _try(model, x, kind, dynamic=True)
            if "failed" in row[f"{kind} original"]:
                row[f"{kind} fixed batch"] = _try(small, x, kind, dynamic=False)
    return row


def in_process(name: str) -> dict[str, Any]:
    """Run one network in a process of its own; an error becomes its last line."""
    done = subprocess.run([sys.executable, __file__, "--worker", name], capture_output=True, text=True)
    if done.returncode == -signal.SIGXCPU:
        return {"failed": f"more than {LIMIT_S} s of CPU time"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    errors = [line for line in done.stderr.splitlines() if "Error" in line or "Exception" in line]
    return {"failed": (errors or [f"exit code {done.returncode}"])[-1][:300]}


def verdict(row: dict[str, Any], kind: str) -> str:
    """One cell of the table."""
    if "failed" in row:
        return row["failed"].replace("|", "/")[:90]
    got, original, fixed = row[kind], row.get(f"{kind} original"), row.get(f"{kind} fixed batch")
    if "error" in got:
        return f"{got['error']:.0e}"
    if original is not None and "failed" not in original:
        return "**compaction breaks it**: " + got["failed"].replace("|", "/")[:90]
    if fixed is not None and "error" in fixed:
        return f"{fixed['error']:.0e}, fixed batch (as the original)"
    return "the original does not export either: " + got["failed"].replace("|", "/").split(": ", 1)[-1][:90]


def write_page(rows: dict[str, dict[str, Any]]) -> None:
    """Put the table under its mark in docs/export.md."""
    ran = [r for r in rows.values() if "failed" not in r]
    counts = []
    for kind, title in (("onnx", "ONNX"), ("pt2", "torch.export")):
        fine = sum("error" in r[kind] for r in ran)
        fixed = sum("error" in r.get(f"{kind} fixed batch", {}) for r in ran)
        broken = sum("failed" in r[kind] and "failed" not in r.get(f"{kind} original", {"failed": ""}) for r in ran)
        counts.append(
            f"{title}: {fine} of {len(rows)} compacted networks with a dynamic batch, {fixed} more with a fixed one "
            f"(as the original); {broken} that the original exports for and the compacted one does not."
        )
    lines = [
        MARK,
        "",
        *counts,
        "",
        "| network | ONNX, difference to PyTorch | .pt2, difference |",
        "|---|---|---|",
        *(f"| {name} | {verdict(r, 'onnx')} | {verdict(r, 'pt2')} |" for name, r in rows.items()),
    ]
    PAGE.write_text(PAGE.read_text().split(MARK)[0] + "\n".join(lines) + "\n")


def _families_first(names: dict[str, dict[str, Any]], done: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same networks, one of every family that has no result in front."""
    known = {names[n]["family"] for n in done if n in names}
    first: dict[str, str] = {}
    for name, entry in names.items():
        if entry["family"] not in known:
            first.setdefault(entry["family"], name)
    return {n: names[n] for n in (*first.values(), *(n for n in names if n not in first.values()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    import conftest  # noqa: F401  (lets a CUDA build of torchvision import beside a CPU torch)
    from tests.zoo.networks import ENTRIES

    names = {f"{e['src']}/{e['name']}": e for e in ENTRIES}
    if args.worker:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 60))
        print(json.dumps(measure(names[args.worker])))
        return
    rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, entry in _families_first(names, rows).items():
        if args.page or (args.only and entry["name"] not in args.only) or (name in rows and not args.again):
            continue
        rows[name] = in_process(name)
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(part, RESULTS)
        print(name, rows[name], file=sys.stderr, flush=True)
    write_page({n: rows[n] for n in names if n in rows})


if __name__ == "__main__":
    main()

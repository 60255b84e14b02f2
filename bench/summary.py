"""Shorten results of pytest-benchmark: a table to read, and a small JSON with versions, date and commit to commit.

``python bench/summary.py --json bench/results/gpu.json raw.json ...``; a row is one provider of one group.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def rows(path: Path) -> list[dict[str, Any]]:
    """One dict a benchmark: what ran, least time in ms, and what the benchmark noted about itself."""
    found = []
    for b in json.loads(path.read_text())["benchmarks"]:
        noted = b["extra_info"]
        name = (b["params"] or {}).get("provider") or b["name"]
        best = noted.get("best_ms", round(b["stats"]["min"] * 1e3, 3))
        found.append(
            {"run": path.stem.removeprefix("raw_"), "group": b["group"] or b["name"], "provider": name} | noted
        )
        found[-1]["best_ms"] = best
    return sorted(found, key=lambda r: (r["run"], r["group"], r["best_ms"]))


def machine() -> dict[str, Any]:
    """Device, driver and versions; the commit, and whether files differ from it."""
    import torch

    from cpd_fast.recipes.environment import environment

    found: dict[str, Any] = environment()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    found["cuda"] = torch.version.cuda
    for key, command in {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        "date": ["date", "--utc", "+%Y-%m-%dT%H:%MZ"],
        "commit": ["git", "describe", "--always", "--dirty", "--abbrev=12"],
    }.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[key] = done.stdout.strip().splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            found[key] = None
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The rows as text, one group after another; the factor is the time over that of "ours"."""
    lines = []
    for run, group in dict.fromkeys((r["run"], r["group"]) for r in results):
        members = [r for r in results if (r["run"], r["group"]) == (run, group)]
        ours = next((r["best_ms"] for r in members if r["provider"] == "ours"), None)
        lines.append(f"{run}: {group}")
        for r in members:
            factor = f"{r['best_ms'] / ours:6.2f}x" if ours else " " * 7
            more = [f"{k} {r[k]}" for k in ("gb_per_s", "times_floor", "of_dense", "peak_units") if k in r]
            lines.append(f"  {r['provider']:24} {r['best_ms']:10.3f} ms {factor}  {'  '.join(more)}".rstrip())
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print the table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("raw", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    results = [row for path in given.raw for row in rows(path)]
    given.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])

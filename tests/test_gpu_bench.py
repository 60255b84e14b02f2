"""bench/gpu.sh and its table, as far as they go without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_script_builds_tests_and_measures_twice(tmp_path):
    environment = os.environ | {"DRY_RUN": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", "bench/gpu.sh"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    steps = [line.removeprefix("== ") for line in done.stderr.splitlines() if line.startswith("== ")]
    kinds = ["pip install" if "pip install" in s else "bench" if "pytest bench" in s else "other" for s in steps]
    assert kinds == ["other", "pip install", "other", "bench", "pip install", "other", "bench", "pip install", "other"]
    assert "CPD_CUDA_ARCHS=75-virtual" in steps[4] and "CPD_EMULATE=2080ti" in steps[6]
    assert "CPD_CUDA_ARCHS" not in steps[1] + steps[7]
    assert steps[-1].endswith(f"--json {tmp_path}/gpu.json {tmp_path}/raw_gpu.json {tmp_path}/raw_2080ti.json")


def test_it_stops_where_there_is_no_gpu(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", "bench/gpu.sh"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "no GPU here" in done.stderr and "pip install" not in done.stderr


def test_the_table_and_the_json(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("summary", ROOT / "bench" / "summary.py")
    summary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summary)
    benchmarks = [
        {"name": n, "group": "channel_kl a", "params": {"provider": p}, "stats": {"min": m}, "extra_info": extra}
        for n, p, m, extra in [
            ("x", "eager", 0.004, {}),
            ("y", "ours", 0.9, {"best_ms": 0.5, "times_floor": 1.2}),
        ]
    ]
    raw = tmp_path / "raw_gpu.json"
    raw.write_text(json.dumps({"benchmarks": benchmarks}))
    summary.main(["--json", str(tmp_path / "gpu.json"), str(raw)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "gpu: channel_kl a"
    assert lines[1].split() == ["ours", "0.500", "ms", "1.00x", "times_floor", "1.2"]
    assert lines[2].split() == ["eager", "4.000", "ms", "8.00x"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [r["provider"] for r in written["results"]] == ["ours", "eager"]
    assert {"torch", "date", "commit", "device", "driver", "cuda"} <= set(written["machine"])

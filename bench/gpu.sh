#!/usr/bin/env bash
# On a machine with a GPU: build, run the GPU tests, benchmark, print the short table, write bench/results/gpu.json.
# Needs nvcc, torch with CUDA, and what build isolation would install (setuptools, cmake, ninja, pybind11): no network.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
CPD_CUDA=ON "$python" -m pip install --quiet --no-build-isolation --no-deps -e .
"$python" -c "import torch; assert torch.cuda.is_available(), 'no GPU here'; print(torch.cuda.get_device_name())"
"$python" -m pytest tests/ops tests/distill -q
mkdir -p bench/results
"$python" -m pytest bench/ops -q --benchmark-enable --benchmark-only --benchmark-json=bench/results/gpu.json
"$python" - <<'PY'
import json

rows = json.load(open("bench/results/gpu.json"))["benchmarks"]
for row in sorted(rows, key=lambda r: (r["group"] or "", r["extra_info"].get("best_ms", 0))):
    info = row["extra_info"]
    print(f"{row['group']}  {row['params']['provider']:24}", "  ".join(f"{k} {v}" for k, v in info.items() if k != "device"))
PY

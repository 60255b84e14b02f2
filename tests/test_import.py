"""Importing the package is cheap and touches no device."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, time
import torch
start = time.process_time()  # others may share the machine
import cpd_fast, cpd_fast.ops
seconds = time.process_time() - start
assert not torch.cuda.is_initialized(), "a CUDA context was started"
names = "triton timm torchvision matplotlib onnx onnxruntime optuna pandas jinja2".split()
heavy = {m for m in names if m in sys.modules}
before = {m for m in sys.argv[1].split(",") if m}
print(seconds, ",".join(sorted(heavy - before)))
"""


def fresh(script: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_import_is_light():
    """Under 1.5 s of CPU beyond torch's own import, no CUDA context, nothing heavy that torch has not loaded itself."""
    torch_alone = fresh("import torch, sys; print(','.join(m for m in ('triton', 'torchvision') if m in sys.modules))")
    results = [fresh(SCRIPT, torch_alone).split(" ") for _ in range(2)]
    assert min(float(r[0]) for r in results) < 1.5
    assert all(r[1:] in ([], [""]) for r in results), results

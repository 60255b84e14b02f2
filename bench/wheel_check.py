"""What an installed wheel must be able to do, in an environment that has nothing else: wheel_check.py cpu|cuda."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import cpd_fast as cpd
from cpd_fast import _native
from cpd_fast.models import SmallResNet

assert "site-packages" in cpd.__file__, cpd.__file__
assert cpd.__version__ == metadata.version("cpd_fast")
assert _native.has_cuda == (sys.argv[1] == "cuda")
assert any("LICENSE" in str(f) for f in metadata.files("cpd_fast") or ())
model, x = SmallResNet(10).eval(), torch.randn(2, 1, 28, 28)
graph = cpd.comb(model, x)
plan = cpd.plan(graph, cpd.score(model, graph, criterion=cpd.Magnitude()), cpd.Target(macs=0.5))
small = cpd.compact(model, graph, plan)
cpd.save("small.safetensors", small, graph, plan)
assert torch.equal(cpd.load("small.safetensors", SmallResNet(10).eval())(x), small(x))
student, teacher = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8)
cpd.losses.ChannelWiseKL()(student, teacher).backward()
assert student.grad.isfinite().all()
doctor = json.loads(subprocess.check_output([Path(sys.executable).with_name("cpd-fast"), "doctor", "--json"]))
print("compiled for:", doctor["compiled for"])
for name in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90"):
    assert (name in doctor["compiled for"]) == _native.has_cuda, name
print(
    f"cpd_fast {cpd.__version__} ({sys.argv[1]}): works on Python {sys.version.split()[0]}, torch {torch.__version__}"
)

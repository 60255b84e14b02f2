"""Peak memory of a training step on the CPU, beside eager's: high-water marks of fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys, torch
import torch.nn.functional as F
from cpd_fast.losses import ChannelWiseKL, LogitKL
torch.set_num_threads(1)
shape = (2, 64, 256, 256)  # 32 MiB: much more than libraries grow by

def mmrazor(s, t):
    n, c = s.shape[:2]
    s, t = (x.reshape(n * c, -1) / 4 for x in (s, t))
    pt = F.softmax(t, 1)
    return (pt * F.log_softmax(t, 1) - pt * F.log_softmax(s, 1)).sum() * (16 / (n * c))

def classes(s, t):
    log_s, log_t = (F.log_softmax(x / 4, 1) for x in (s, t))
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1).mean() * 16

loss = {"channel": ChannelWiseKL(4.0), "channel.eager": mmrazor, "class": LogitKL(4.0), "class.eager": classes}
loss = loss[sys.argv[1]]

def field(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

small = torch.randn(1, 4, 64, 64, requires_grad=True)
loss(small, small.detach()).backward()  # what is loaded once
student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
before = field("VmRSS")
loss(student, teacher).backward()
print((field("VmHWM") - before) / student.nbytes)
"""


def peak_units(name: str) -> float:
    """Peak extra memory of forward and backward, in activation tensors; the gradient itself is 1."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
@pytest.mark.parametrize("op", ["channel", "class"])
def test_a_step_needs_one_activation_tensor(op, record_property):
    pytest.importorskip("cpd_fast._native")
    ours, eager = peak_units(op), peak_units(f"{op}.eager")
    record_property("peak_units", {"ours": ours, "eager": eager})
    print(f"{op}: ours {ours:.3f}, eager {eager:.2f} activation tensors")
    assert ours <= 1.05
    assert eager >= 3

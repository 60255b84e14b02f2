"""Rows that several programs share, and indices that leave 16 and 32 bits."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from cpd_fast.errors import BackendError
from cpd_fast.ops import _dispatch, channel_kl, class_kl
from tests.ops.test_channel_kl import DTYPES, GRAD_TOLERANCE, device_of, exact


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize(("dtype", "length"), [("fp32", 16385), ("fp16", 33000)])
def test_rows_above_16384(backend, dtype, length, fresh_memory_is_nan):
    student, teacher = ((torch.randn(1, 2, 1, length) * 2).to(device_of(backend), DTYPES[dtype]) for _ in range(2))
    try:
        _dispatch.choose("channel_kl", student, backend)
    except BackendError as e:
        pytest.skip(str(e))
    student.requires_grad_()
    loss = channel_kl(student, teacher, 2.0, backend=backend)
    loss.sum().backward()
    expected, gradient = exact("channel_kl", student, teacher, 2.0)
    torch.testing.assert_close(loss.detach().double().cpu(), expected, rtol=1e-5, atol=1e-6)
    error = (student.grad.double().cpu() - gradient).abs().max()
    assert error <= GRAD_TOLERANCE[dtype] * max(gradient.abs().max().item(), 1e-3)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_special_values_in_long_rows(backend):
    student, teacher = (torch.randn(1, 4, 1, 16390).to(device_of(backend)) for _ in range(2))
    try:
        _dispatch.choose("channel_kl", student, backend)
    except BackendError as e:
        pytest.skip(str(e))
    teacher[0, 0, 0, :16385] = -math.inf  # a chunk with nothing in it
    student[0, 1] = -math.inf
    student[0, 2, 0, 3] = math.nan
    student[0, 3, 0, 5] = -math.inf
    student.requires_grad_()
    loss = channel_kl(student, teacher, 1.0, backend=backend)
    loss.sum().backward()
    log_s, log_t = student[0, 0, 0].detach().double().log_softmax(0)[16385:], teacher[0, 0, 0, 16385:].double()
    log_t = log_t.log_softmax(0)
    assert loss[0, 0].item() == pytest.approx((log_t.exp() * (log_t - log_s)).sum().item(), rel=1e-5)
    assert loss[0, 1].item() == 0.0 and student.grad[0, 1].abs().max() == 0
    assert loss[0, 2].isnan() and student.grad[0, 2].isnan().any()
    assert loss[0, 3].item() == math.inf and student.grad[0, 3].isfinite().all()


@pytest.mark.parametrize("op", [channel_kl, class_kl])
def test_more_maps_than_16_bits_count(op):
    """N C > 65535: a grid's y and z end there."""
    student, teacher = torch.randn(2, 1, 70001, 1, 3)
    student, teacher = student.requires_grad_(), teacher.clone()
    if op is class_kl:
        student, teacher = (x.detach()[0, :, 0, :] for x in (student, teacher))
        student.requires_grad_()
    loss = op(student, teacher, 2.0)
    loss.sum().backward()
    expected, gradient = exact(op.__name__, student, teacher, 2.0)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), gradient, rtol=1e-4, atol=1e-6)


# bf16 zeros that are never written take no memory; only the last row holds something.
BEYOND = """
import mmap, torch
from cpd_fast.ops import _dispatch
length, rows = 2**21, 1025
spaces = [mmap.mmap(-1, 2 * length * rows) for _ in range(2)]
student, teacher = (torch.frombuffer(m, dtype=torch.bfloat16) for m in spaces)
last = slice((rows - 1) * length, rows * length)
torch.manual_seed(0)
student[last], teacher[last] = torch.randn(2, length).bfloat16()
s, t = (x[last].double().log_softmax(0) for x in (student, teacher))
expected = (t.exp() * (t - s)).sum().item()
for outer, reduce, inner in ((rows, length, 1), (rows * 2**17, 16, 1), (rows, 16, 2**17)):
    loss = torch.full((outer * inner,), float("nan"))
    _dispatch._native().channel_kl(
        3, student.data_ptr(), teacher.data_ptr(), 0, loss.data_ptr(), 0, outer, reduce, inner, 1.0, 1.0, 1.0, 1
    )
    s, t = (x[last].double().reshape(-1, reduce, inner).log_softmax(1) for x in (student, teacher))
    expected = (t.exp() * (t - s)).sum(1).flatten()
    ours = loss[-expected.numel():].double()
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5), (outer, reduce, inner)
    assert loss[: -expected.numel()].abs().max() < 1e-5
print("right")
"""


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    """The last row lies beyond 2^31 elements, as a long row, as short rows and as columns."""
    if isinstance(_dispatch._native(), str):
        pytest.skip("needs the compiled library")
    done = subprocess.run([sys.executable, "-c", BEYOND], capture_output=True, text=True, check=False, env=os.environ)
    assert done.stdout.strip() == "right", done.stderr[-2000:]

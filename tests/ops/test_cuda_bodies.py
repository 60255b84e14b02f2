"""The CUDA kernel bodies, run on the CPU by a model of CUDA's execution (tests/host_model), against float64.

They run with the threads of a block in forward, reverse and random order: a result that depends on an order that the
program does not fix shows as a difference.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.host_model.build import ORDERS, Builder

CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(scope="module")
def model(host_model: Builder) -> ctypes.CDLL:
    library = host_model.library("channel_kl_host")
    for name in ("channel_kl", "scale_rows"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def run(model, student, teacher, sizes, temperature, grad=None, scale=1.0) -> tuple[Tensor, Tensor]:
    accumulate = torch.float64 if student.dtype == torch.float64 else torch.float32
    outer, reduce, inner = sizes
    loss = torch.full((outer, inner), math.nan, dtype=accumulate)
    dstudent = torch.full_like(student, math.nan)
    pointers = [address(x) for x in (student, teacher, grad, loss, dstudent)]
    numbers = [ctypes.c_double(x) for x in (1 / temperature, scale * temperature**2, scale * temperature)]
    message = model.channel_kl(CODES[student.dtype], *pointers, *map(ctypes.c_int64, sizes), *numbers)
    assert message is None, message
    return loss, dstudent


def check(model, sizes, dtype, scale=2.0, temperature=2.0) -> None:
    student, teacher = ((torch.randn(sizes) * scale).to(dtype) for _ in range(2))
    grad = torch.rand(sizes[0], sizes[2], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    loss, dstudent = run(model, student, teacher, sizes, temperature, grad)
    log_s, log_t = (F.log_softmax(x.double() / temperature, 1) for x in (student, teacher))
    expected = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(1)
    gradient = temperature * grad.double().unsqueeze(1) * (log_s.exp() - log_t.exp())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-12 if dtype == torch.float64 else 5e-6)
    assert (dstudent.double() - gradient).abs().max() <= TOLERANCE[dtype] * gradient.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", CODES, ids=str)
# In registers: one element, a prime, whole packs, one past a block's packs, the next two block sizes; columns: a prime
# across two tiles, and enough rows for 32 threads a column.
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 37, 1), (2, 64, 1), (2, 2049, 1), (1, 8200, 1), (2, 19, 37), (1, 1030, 5)]
)
def test_bodies_match_float64_in_every_thread_order(model, sizes, dtype, order):
    model.set_order(ORDERS[order], 5)
    check(model, sizes, dtype)


@pytest.mark.parametrize(
    ("sizes", "dtype", "order"),
    [
        ((1, 16385, 1), torch.float32, "random"),  # scalar loads, a chunk of one element
        ((2, 32768 + 8, 1), torch.float16, "reverse"),  # whole packs
        ((1, 33001, 1), torch.bfloat16, "forward"),
        ((1, 16386, 1), torch.float64, "forward"),
    ],
    ids=str,
)
def test_rows_that_several_blocks_share(model, sizes, dtype, order):
    model.set_order(ORDERS[order], 6)
    check(model, sizes, dtype)


def test_shared_rows_have_the_same_bits_in_every_order(model):
    student, teacher = (torch.randn(2, 20000) * 2 for _ in range(2))
    results = []
    for number in ORDERS.values():
        model.set_order(number, 7)
        results.append(run(model, student, teacher, (2, 20000, 1), 3.0))
    for loss, dstudent in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(dstudent, results[0][1])


def test_misaligned_rows(model):
    """Rows that start off a 16-byte boundary take the scalar loads."""
    model.set_order(ORDERS["forward"], 0)
    student, teacher = (torch.randn(2 * 64 + 1)[1:] for _ in range(2))
    loss, dstudent = run(model, student, teacher, (2, 64, 1), 1.0)
    log_s, log_t = (F.log_softmax(x.double().view(2, 64), 1) for x in (student, teacher))
    torch.testing.assert_close(loss[:, 0].double(), (log_t.exp() * (log_t - log_s)).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dstudent.view(2, 64).double(), log_s.exp() - log_t.exp(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", ["row", "long_row", "column"])
def test_special_values(model, form):
    """-inf and NaN mean what channel_kl's text says, in each of the three bodies."""
    inf = math.inf
    length = 16400 if form == "long_row" else 40
    s, t = torch.randn(5, length), torch.randn(5, length)
    t[0, :3] = -inf  # adds nothing
    s[1, 4] = -inf  # infinite loss, finite gradient
    s[2], t[3] = -inf, -inf  # no distribution
    s[4, 5] = math.nan
    model.set_order(ORDERS["reverse"], 0)
    if form == "column":
        loss, d = run(model, s.T.contiguous(), t.T.contiguous(), (1, length, 5), 1.0)
        loss, d = loss[0], d.T
    else:
        loss, d = run(model, s, t, (5, length, 1), 1.0)
        loss = loss[:, 0]
    log_s, log_t = s[0].double().log_softmax(0), t[0].double().log_softmax(0)
    expected = (log_t.exp() * (log_t - log_s)).nan_to_num(0.0)[3:].sum()
    assert loss[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss[1].item() == inf and d[1].isfinite().all()
    assert d[1, 4].item() == pytest.approx(-t[1].softmax(0)[4].item(), rel=1e-4)
    assert loss[2:4].tolist() == [0.0, 0.0] and d[2:4].abs().max() == 0
    assert loss[4].isnan() and d[4].isnan().any()


@pytest.mark.parametrize("sizes", [(5, 300, 1), (2, 7, 300)])
def test_scaling_by_the_incoming_gradient(model, sizes):
    model.set_order(ORDERS["random"], 1)
    dstudent = torch.randn(sizes)
    grad = torch.rand(sizes[0], sizes[2])
    grad[0, 0] = 1.0
    expected = dstudent * grad.unsqueeze(1)
    assert model.scale_rows(0, address(grad), address(dstudent), *map(ctypes.c_int64, sizes)) is None
    torch.testing.assert_close(dstudent, expected)

"""The CUDA bodies for pixel weights and two sizes, run by the host model of CUDA against the reference in float64."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from cpd_fast.ops._softmax_kl import reference_resized
from tests.host_model.build import ORDERS, Builder
from tests.ops.test_cuda_bodies import CODES, TOLERANCE, address

# student's and teacher's (H, W)
SIZES = [
    ((5, 6), (9, 13)),
    ((9, 13), (4, 6)),
    ((1, 1), (3, 4)),
    ((7, 5), (7, 9)),
    ((2, 3), (64, 9)),
    ((4, 6), (4, 6)),
]


@pytest.fixture(scope="module")
def model(host_model: Builder) -> ctypes.CDLL:
    library = host_model.library("resized_kl_host")
    library.resized_kl.restype = ctypes.c_char_p
    return library


def run(model, student, teacher, weight, over, corners, temperature, grad):
    accumulate = grad.dtype
    loss, dstudent = torch.full_like(grad, math.nan), torch.full_like(student, math.nan)
    weight = None if weight is None else weight.to(accumulate).contiguous()
    sizes = (ctypes.c_int64 * 6)(*student.shape, *teacher.shape[2:])
    pointers = [address(x) for x in (student, teacher, weight, grad, loss, dstudent)]
    numbers = [ctypes.c_double(x) for x in (1 / temperature, temperature**2, temperature)]
    message = model.resized_kl(CODES[student.dtype], *pointers, sizes, int(over == "classes"), int(corners), *numbers)
    assert message is None, message
    return loss, dstudent


def check(model, op, student, teacher, weight, corners, dtype) -> None:
    over = {"channel_kl": "space", "class_kl": "classes"}[op]
    n, c = student.shape[:2]
    pixels = [max(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.rand((n, c) if over == "space" else (n, *pixels), dtype=accumulate)
    loss, dstudent = run(model, student, teacher, weight, over, corners, 2.0, grad)
    own = student.double().requires_grad_()
    expected = reference_resized(own, teacher.double(), weight, 2.0, 1.0, over, corners)
    (gradient,) = torch.autograd.grad(expected, own, grad.double())
    exact = 1e-12 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=exact, equal_nan=True)
    error = (dstudent.double() - gradient).abs().max()
    assert error <= 2 * TOLERANCE[dtype] * gradient.abs().max().clamp(min=0.1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("corners", [False, True], ids=["half_pixels", "corners"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("op", ["channel_kl", "class_kl"])
def test_bodies_match_the_reference_in_every_thread_order(model, op, sizes, corners, dtype, order):
    model.set_order(ORDERS[order], 4)
    student, teacher = ((torch.randn(2, 3, *size) * 2).to(dtype) for size in sizes)
    pixels = [max(a, b) for a, b in zip(*sizes, strict=True)]
    weight = None if corners else (torch.rand(2, *pixels) - 0.3).clamp(min=0).index_fill(2, torch.tensor([0]), 1.0)
    check(model, op, student, teacher, weight, corners, dtype)


def test_maps_of_several_chunks_have_the_same_bits_in_every_order(model):
    student, teacher = torch.randn(1, 2, 40, 61), torch.randn(1, 2, 140, 119)
    results = []
    for number in ORDERS.values():
        model.set_order(number, 7)
        torch.manual_seed(1)
        results.append(run(model, student, teacher, None, "space", False, 3.0, torch.rand(1, 2)))
        check(model, "channel_kl", student, teacher, None, False, torch.float32)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("op", ["channel_kl", "class_kl"])
def test_special_values(model, op):
    """-inf in a small map reaches exactly the pixels that lie at it; what the weight leaves out does not matter."""
    student, teacher = torch.randn(1, 5, 2, 3), torch.randn(1, 5, 5, 6)
    teacher[0, 0, :, :2] = -math.inf
    student[0, 1, 0, 0] = -math.inf
    if op == "channel_kl":
        student[0, 2], teacher[0, 3] = -math.inf, -math.inf
    weight = torch.ones(1, 5, 6)
    weight[0, 4, 5] = 0
    teacher[0, :, 4, 5] = math.nan
    check(model, op, student, teacher, weight, True, torch.float32)

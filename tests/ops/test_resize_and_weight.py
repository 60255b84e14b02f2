"""Pixel weights, and maps of two sizes read through bilinear interpolation, against float64 on upsampled logits."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast.errors import BackendError, ShapeError
from cpd_fast.losses import ChannelWiseKL, LogitKL
from cpd_fast.ops import _dispatch, channel_kl, class_kl

BACKENDS = ["reference", "cpu", "triton", "cuda"]
OPS = {"channel_kl": channel_kl, "class_kl": class_kl}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-12, "fp16": 1e-3, "bf16": 8e-3}
# student's and teacher's (H, W)
SIZES = [
    ((5, 6), (9, 13)),
    ((9, 13), (4, 6)),
    ((1, 1), (3, 4)),
    ((7, 5), (7, 9)),
    ((4, 6), (4, 6)),
    ((33, 40), (65, 77)),
]


def exact(op: str, s: Tensor, t: Tensor, temperature: float, weight: Tensor | None, corners: bool) -> Tensor:
    """Written from the definition in float64: upsample, weigh, compare."""
    size = [max(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)]
    s, t = (F.interpolate(x, size=size, mode="bilinear", align_corners=corners) / temperature for x in (s, t))
    w = torch.ones(s.shape[0], *size, dtype=s.dtype) if weight is None else weight.to(s.dtype)
    if op == "class_kl":
        log_s, log_t = s.log_softmax(1), t.log_softmax(1)
        return temperature**2 * w * (log_t.exp() * (log_t - log_s)).sum(1)
    es, et = ((x - x.amax((2, 3), keepdim=True)).exp() * w[:, None] for x in (s, t))
    ps, pt = (e / e.sum((2, 3), keepdim=True) for e in (es, et))
    looked_at = (w > 0)[:, None]
    ratio = torch.where(looked_at, pt, 1.0) / torch.where(looked_at, ps, 1.0)
    return temperature**2 * (pt * ratio.log()).sum((2, 3))


def backends(tensor: Tensor, backend: str) -> str:
    try:
        return _dispatch.choose("channel_kl", tensor, backend)
    except BackendError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("corners", [False, True], ids=["half_pixels", "corners"])
@pytest.mark.parametrize("weighted", ["plain", "mask", "weight"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
@pytest.mark.parametrize("op", OPS)
def test_matches_float64_on_upsampled_maps(op, backend, dtype, sizes, weighted, corners, fresh_memory_is_nan):
    check_against_float64(op, backend, dtype, sizes, weighted, corners, (2, 3))


# The interpreter needs 0.1 s a visited pixel: few maps, every feature.
@pytest.mark.parametrize(
    ("op", "dtype", "sizes", "weighted", "corners"),
    [
        ("channel_kl", "fp32", ((2, 3), (5, 7)), "weight", False),
        ("channel_kl", "fp16", ((3, 4), (3, 6)), "plain", True),
        ("channel_kl", "bf16", ((5, 7), (1, 7)), "mask", False),
        ("channel_kl", "fp32", ((91, 91), (91, 91)), "weight", False),
        ("class_kl", "fp32", ((2, 3), (4, 3)), "mask", True),
        ("class_kl", "fp16", ((9, 13), (4, 6)), "weight", False),
    ],
)
def test_triton_matches_float64(op, dtype, sizes, weighted, corners, fresh_memory_is_nan):
    check_against_float64(op, "triton", dtype, sizes, weighted, corners, (1, 2))


def check_against_float64(op, backend, dtype, sizes, weighted, corners, outer) -> None:
    device = "cuda" if torch.cuda.is_available() and backend in ("triton", "cuda") else "cpu"
    student, teacher = ((torch.randn(*outer, *size) * 2).to(device, DTYPES[dtype]) for size in sizes)
    backends(student, backend)
    n = outer[0]
    pixels = [max(a, b) for a, b in zip(*sizes, strict=True)]
    weight = {"plain": None, "mask": torch.rand(n, *pixels) > 0.4, "weight": torch.rand(n, 1, *pixels)}[weighted]
    if weight is not None:
        weight[..., 0, 0] = 1  # at least one pixel counts
        weight = weight.to(device)
    student.requires_grad_()
    loss = OPS[op](student, teacher, 2.0, weight=weight, resize=True, align_corners=corners, backend=backend)
    grad = torch.rand_like(loss)
    (gradient,) = torch.autograd.grad(loss, student, grad)
    own = student.detach().double().requires_grad_()
    flat = weight.squeeze(1) if weighted == "weight" else weight
    expected = exact(op, own, teacher.double(), 2.0, flat, corners)
    (expected_gradient,) = torch.autograd.grad(expected, own, grad.double())
    assert gradient.dtype == student.dtype and gradient.shape == student.shape
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-11 if dtype == "fp64" else 1e-5)
    error = (gradient.double() - expected_gradient).abs().max()
    assert error <= TOLERANCE[dtype] * max(expected_gradient.abs().max().item(), 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_an_ignored_pixel_does_not_matter_whatever_it_holds(op, resize, dtype, backend):
    device = "cuda" if torch.cuda.is_available() and backend in ("triton", "cuda") else "cpu"
    outer, size, large = ((2, 3), (4, 5), (8, 10)) if backend != "triton" else ((1, 2), (2, 3), (3, 4))
    student, teacher = torch.randn(*outer, *size), torch.randn(*outer, *(large if resize else size))
    student, teacher = (x.to(device, DTYPES[dtype]) for x in (student, teacher))
    backends(student, backend)
    mask = torch.ones(outer[0], *teacher.shape[2:], dtype=torch.bool, device=device)
    mask[0, 1, 2] = mask[-1, -1, -1] = False
    results = []
    for junk in (0.0, math.nan, -math.inf) if backend == "triton" else (0.0, math.nan, math.inf, -math.inf, 1e4):
        teacher = teacher.masked_fill(~mask[:, None], junk)
        own = student.clone() if resize else student.masked_fill(~mask[:, None], junk)
        own.requires_grad_()
        loss = OPS[op](own, teacher, weight=mask, resize=resize, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), own)))
    for loss, gradient in results:
        assert loss.isfinite().all() and gradient.isfinite().all()
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=0, atol=0)


def test_a_weight_of_two_is_the_pixel_twice():
    student, teacher = torch.randn(2, 2, 3, 1, 5)
    weight = torch.tensor([[[1.0, 2.0, 0.0, 1.0, 1.0]]]).expand(2, 1, 5)
    repeated = [torch.cat([x[..., :2], x[..., 1:2], x[..., 3:]], -1) for x in (student, teacher)]
    torch.testing.assert_close(channel_kl(student, teacher, weight=weight), channel_kl(*repeated))


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    teacher, weight = torch.randn(1, 2, 4, 5, dtype=torch.float64), torch.rand(1, 4, 5)
    student = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return OPS[op](x, teacher, 2.0, weight=weight, resize=True)

    assert torch.autograd.gradcheck(function, (student,))
    assert torch.autograd.gradgradcheck(function, (student,))


def test_same_bits_for_any_number_of_threads():
    student, teacher = torch.randn(2, 5, 13, 17, requires_grad=True), torch.randn(2, 5, 31, 40)
    before = torch.get_num_threads()
    for op in OPS.values():
        results = []
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            loss = op(student, teacher, resize=True)
            results.append((loss.detach(), *torch.autograd.grad(loss.square().sum(), student)))
        torch.set_num_threads(before)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_compiles_without_graph_breaks():
    student, teacher = torch.randn(1, 3, 4, 5, requires_grad=True), torch.randn(1, 3, 8, 9)
    weight = torch.rand(1, 8, 9)
    for op in OPS.values():

        def function(s: Tensor, t: Tensor, op=op) -> Tensor:
            return op(s, t, weight=weight, resize=True).sum()

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(student, teacher), function(student, teacher))


def test_modules():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 8, 10)
    big = F.interpolate(student, size=(8, 10), mode="bilinear")
    mask = torch.rand(2, 8, 10) > 0.3
    torch.testing.assert_close(ChannelWiseKL(2.0, resize=True)(student, teacher), ChannelWiseKL(2.0)(big, teacher))
    torch.testing.assert_close(LogitKL(2.0, resize=True)(student, teacher), LogitKL(2.0)(big, teacher))
    expected = class_kl(big, teacher, 2.0)[mask].mean()  # a mean over the pixels that count
    torch.testing.assert_close(LogitKL(2.0, resize=True)(student, teacher, mask), expected)
    assert LogitKL()(big, teacher, torch.zeros(2, 8, 10)).item() == 0.0
    torch.testing.assert_close(
        LogitKL()(student[:, :, 0, 0], teacher[:, :, 0, 0], torch.tensor([1.0, 0.0])),
        LogitKL()(student[:1, :, 0, 0], teacher[:1, :, 0, 0]),
    )


def test_messages():
    x, large = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8)
    with pytest.raises(ShapeError, match="pass resize=True if H and W differ"):
        channel_kl(x, large)
    with pytest.raises(ShapeError, match=r"N and C must be the same, got \(2, 3, 4, 4\) and \(2, 4, 8, 8\)"):
        channel_kl(x, torch.zeros(2, 4, 8, 8), resize=True)
    with pytest.raises(ShapeError, match="neither of .* is the larger in both"):
        channel_kl(x, torch.zeros(2, 3, 3, 8), resize=True)
    with pytest.raises(ShapeError, match=r"resize needs maps \(N, C, H, W\)"):
        class_kl(torch.zeros(2, 3), torch.zeros(2, 3), resize=True)
    with pytest.raises(ShapeError, match=r"one value a pixel, shape \(2, 8, 8\), got \(2, 4, 4\)"):
        class_kl(x, large, resize=True, weight=torch.ones(2, 4, 4))
    with pytest.raises(ShapeError, match="weight must be on the student's device cpu, got meta"):
        class_kl(x, x, weight=torch.ones(2, 4, 4, device="meta"))
    if importlib.util.find_spec("triton"):
        long = torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 40000)
        with pytest.raises(BackendError, match=r"'triton' needs maps of at most 2\^30 pixels, and 32767 a side"):
            channel_kl(x[:1, :1, :1], long, resize=True, backend="triton")

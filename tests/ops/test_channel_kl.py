"""channel_kl and class_kl: every backend against float64, extreme values, autograd, registration and messages."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast.errors import BackendError, ShapeError
from cpd_fast.ops import _dispatch, channel_kl, class_kl, explain_backend

OPS = {"channel_kl": channel_kl, "class_kl": class_kl}
INF = math.inf
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BACKENDS = ["reference", "cpu", "triton", "cuda"]

# Largest error of a gradient of temperature 2 relative to its float64 value's largest: one rounding of the result in
# half types, a few in fp32.
GRAD_TOLERANCE = {"fp32": 2e-6, "fp64": 1e-13, "fp16": 1e-3, "bf16": 8e-3}

CHANNEL_SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (1, 2, 1, 1025), (2, 5, 33, 32), (3, 2, 4), (1, 2, 3, 2, 5)]
CLASS_SHAPES = [(1, 1), (4, 7), (2, 1000), (2, 19, 3, 5), (1, 150, 9, 8), (1, 4, 1, 131)]


def device_of(backend: str) -> str:
    return "cuda" if "cuda" in DEVICES and backend in ("cuda", "triton") else "cpu"


def skip_unless_runs(op: str, tensor: Tensor, backend: str) -> None:
    try:
        _dispatch.choose(op, tensor, backend)
    except BackendError as e:
        pytest.skip(str(e))


def exact(op: str, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient of its sum, in float64, written independently of the reference."""
    s, t = student.detach().double().cpu(), teacher.detach().double().cpu()
    dim = 1
    if op == "channel_kl":
        s, t, dim = s.flatten(2), t.flatten(2), 2
    ls, lt = F.log_softmax(s / temperature, dim), F.log_softmax(t / temperature, dim)
    loss = temperature**2 * (lt.exp() * (lt - ls)).sum(dim)
    return loss, (temperature * (ls.exp() - lt.exp())).reshape(student.shape)


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 2.0, device: str = "cpu"):
    g = torch.Generator().manual_seed(3)
    return tuple((torch.randn(shape, generator=g) * scale).to(device, dtype) for _ in range(2))


def cases() -> list[tuple[str, tuple[int, ...]]]:
    return [("channel_kl", s) for s in CHANNEL_SHAPES] + [("class_kl", s) for s in CLASS_SHAPES]


def layouts() -> list[tuple[str, tuple[int, ...], str]]:
    return [
        (op, shape, layout)
        for op, shape in cases()
        for layout in ("contiguous", "channels_last", "strided")
        if len(shape) == 4 or layout == "contiguous"
    ]


def case_id(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "shape", "layout"), layouts(), ids=case_id)
def test_loss_and_gradient_match_float64(op, shape, backend, dtype, layout, fresh_memory_is_nan):
    student, teacher = pair(shape, DTYPES[dtype], device=device_of(backend))
    skip_unless_runs(op, student, backend)
    if layout == "channels_last":
        student, teacher = (x.contiguous(memory_format=torch.channels_last) for x in (student, teacher))
    if layout == "strided":
        student, teacher = (torch.stack([x, x], -1)[..., 0] for x in (student, teacher))
    student.requires_grad_()
    loss = OPS[op](student, teacher, 2.0, backend=backend)
    expected, gradient = exact(op, student, teacher, 2.0)
    assert loss.dtype == (torch.float64 if dtype == "fp64" else torch.float32)
    torch.testing.assert_close(
        loss.detach().double().cpu().reshape(expected.shape),
        expected,
        rtol=1e-5,
        atol=1e-12 if dtype == "fp64" else 5e-6,
    )
    loss.sum().backward()
    assert student.grad is not None and student.grad.dtype == student.dtype
    error = (student.grad.double().cpu() - gradient).abs().max()
    assert error <= GRAD_TOLERANCE[dtype] * max(gradient.abs().max().item(), 1e-3)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "shape"), cases(), ids=case_id)
def test_every_instruction_set_agrees(op, shape, dtype, isa):
    native = _dispatch._native()
    if isinstance(native, str) or isa not in native.supported_isas():
        pytest.skip(f"no {isa} here")
    student, teacher = pair(shape, DTYPES[dtype])
    student.requires_grad_()
    before = native.current_isa()
    native.set_isa(isa)
    try:
        loss = OPS[op](student, teacher, 2.0, backend="cpu")
        loss.sum().backward()
    finally:
        native.set_isa(before)
    expected, gradient = exact(op, student, teacher, 2.0)
    torch.testing.assert_close(
        loss.detach().double().reshape(expected.shape), expected, rtol=1e-5, atol=1e-12 if dtype == "fp64" else 5e-6
    )
    error = (student.grad.double() - gradient).abs().max()
    assert error <= GRAD_TOLERANCE[dtype] * max(gradient.abs().max().item(), 1e-3)


@pytest.mark.parametrize("shift", [0.0, -3e4])
def test_class_columns_of_extreme_values(shift):
    """The quick sums of the CPU's columns give way to the exact ones where values leave their range."""
    student, teacher = (x + shift for x in pair((1, 7, 9, 23), scale=3.0))
    student[0, 1, 0, 0] = -INF  # infinite loss, finite gradient
    teacher[0, :3, 1] = -INF  # adds nothing
    student[0, :, 2], teacher[0, :, 3] = -INF, -INF  # no distribution
    student[0, 4, 4, 5] = math.nan
    teacher[0, 2, 5, 6], student[0, 2, 6, 7] = INF, INF
    student[0, 3, 7], teacher[0, 3, 7] = -3e38, 1e38  # overflow of differences
    student[0, :2, 8], teacher[0, 1:3, 8] = -INF, -INF
    teacher[0, 0, 8] = -INF  # where both are: adds nothing
    results = []
    for backend in ("reference", "cpu"):
        skip_unless_runs("class_kl", student, backend)
        own = student.clone().requires_grad_()
        loss = class_kl(own, teacher, 1.0, backend=backend)
        loss.nan_to_num(0.0, 0.0, 0.0).sum().backward()
        results.append((loss.detach(), own.grad))
    (loss, gradient), (ours, our_gradient) = results
    assert ours[0, 0, 0] == INF and our_gradient[0, :, 0, 0].isfinite().all()
    assert ours[0, 4, 5].isnan() and ours[0, 5, 6].isnan() and ours[0, 6, 7].isnan()
    assert ours[0, 2:4].abs().max() == 0 and our_gradient[0, :, 2:4].abs().max() == 0
    assert ours[0, 8].isfinite().all()
    torch.testing.assert_close(ours[:, 8], loss[:, 8], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[:, :7], loss[:, :7], rtol=1e-4, atol=1e-4, equal_nan=True)
    rest = [0, 1, 2, 3, 8]
    torch.testing.assert_close(our_gradient[:, :, rest, 1:], gradient[:, :, rest, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "shape"), [("channel_kl", (2, 3, 40, 41)), ("class_kl", (2, 150, 5, 7))], ids=case_id)
def test_error_is_at_most_twice_pytorchs_own(op, shape, backend, dtype, scale, temperature):
    student, teacher = pair(shape, DTYPES[dtype], scale=scale, device=device_of(backend))
    skip_unless_runs(op, student, backend)
    student.requires_grad_()
    dim = 2 if op == "channel_kl" else 1

    def pytorchs(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        own = student.detach().to("cpu", kind).requires_grad_()
        s, t = (x.flatten(2) for x in (own, teacher.to("cpu", kind)))
        log_s, log_t = (F.log_softmax(x / temperature, dim) for x in (s, t))
        theirs = temperature**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim)
        return theirs.detach(), torch.autograd.grad(theirs.sum(), own)[0]

    kinds = {DTYPES[dtype], torch.float32}
    loss = OPS[op](student, teacher, temperature, backend=backend)
    loss.sum().backward()
    expected, gradient = exact(op, student, teacher, temperature)
    # The floor is one rounding of the exact value: two lucky results are not compared. Half types are rounded once at
    # the end; a loss below fp32's resolution (logits of 1e-3, T = 20) is 0 in PyTorch's half types, so that its
    # fp32 counts as well; where PyTorch's half computation overflows there is nothing to be compared with.
    epsilon = torch.finfo(DTYPES[dtype]).eps
    ours = loss.detach().double().cpu().reshape(expected.shape), student.grad.double().cpu()
    for i, value in enumerate((expected, gradient)):
        others = [pytorchs(kind)[i].double().reshape(value.shape) for kind in kinds]
        reference = max((x - value).abs().max().nan_to_num(INF) for x in others)
        assert (ours[i] - value).abs().max() <= 2 * max(reference, value.abs().max() * epsilon)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_logits_have_a_meaning(backend, memory_format):
    student, teacher = pair((1, 6, 2, 3), device=device_of(backend))
    skip_unless_runs("channel_kl", student, backend)
    teacher[0, 0, 0] = -INF  # adds nothing
    student[0, 1, 1, 1] = -INF  # infinite loss, finite gradient
    student[0, 2], teacher[0, 3] = -INF, -INF  # no distribution
    student[0, 4, 0, 0] = math.nan
    student[0, 5], teacher[0, 5] = 7.0, 7.0
    student, teacher = (x.contiguous(memory_format=memory_format) for x in (student, teacher))
    student.requires_grad_()
    loss = channel_kl(student, teacher, 1.0, backend=backend)
    loss.sum().backward()
    left = student[0, 0].detach().flatten().log_softmax(0)[3:]
    log_pt = teacher[0, 0, 1].log_softmax(0)
    assert loss[0, 0].item() == pytest.approx((log_pt.exp() * (log_pt - left)).sum().item(), rel=1e-5)
    assert loss[0, 1].item() == INF
    assert student.grad[0, 1].isfinite().all()
    assert student.grad[0, 1, 1, 1].item() == pytest.approx(-teacher[0, 1].flatten().softmax(0)[4].item(), rel=1e-5)
    assert loss[0, 2:4].tolist() == [0.0, 0.0]
    assert student.grad[0, 2:4].abs().sum().item() == 0.0
    assert loss[0, 4].isnan() and student.grad[0, 4].isnan().any()
    assert loss[0, 5].item() == 0.0 and student.grad[0, 5].abs().max().item() < 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_maxima_that_rise_along_a_row(backend):
    """Running maxima are raised in every block; the first block underflows relative to the last."""
    ramp = torch.linspace(-300, 300, 5000).reshape(1, 1, 50, 100)
    student, teacher = ramp.to(device_of(backend)).requires_grad_(), ramp.flip(3).to(device_of(backend))
    skip_unless_runs("channel_kl", student, backend)
    loss = channel_kl(student, teacher, 0.5, backend=backend)
    loss.sum().backward()
    expected, gradient = exact("channel_kl", student, teacher, 0.5)
    torch.testing.assert_close(loss.detach().double().cpu(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(student.grad.double().cpu(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_gradient_survives_loss_scaling(backend, dtype):
    """The unscaled gradient, 1e-9 here, is 0 in fp16; with a loss scale of 2^16 it must not be."""
    student, teacher = pair((2, 3, 32, 32), DTYPES[dtype], scale=0.5, device=device_of(backend))
    skip_unless_runs("channel_kl", student, backend)
    student.requires_grad_()
    (channel_kl(student, teacher, 1.0, scale=1e-6, backend=backend).sum() * 2.0**16).backward()
    _, gradient = exact("channel_kl", student, teacher, 1.0)
    gradient = gradient * 1e-6 * 2.0**16
    error = (student.grad.double().cpu() - gradient).abs().max()
    assert error <= (2.0**-10 if dtype == "fp16" else 2.0**-7) * gradient.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "shape"), [("channel_kl", (2, 3, 5, 7)), ("class_kl", (2, 5, 3, 7))], ids=case_id)
def test_incoming_gradient_and_scale_multiply(op, shape, backend):
    student, teacher = pair(shape, device=device_of(backend))
    skip_unless_runs(op, student, backend)
    student.requires_grad_()
    loss = OPS[op](student, teacher, 2.0, scale=3.0, backend=backend)
    weight = torch.linspace(-1, 2, loss.numel(), device=loss.device).reshape(loss.shape)
    loss.backward(weight, retain_graph=True)
    first = student.grad.clone()
    expected, gradient = exact(op, student, teacher, 2.0)
    w = weight.double().cpu()
    w = w.reshape(w.shape + (1, 1)) if op == "channel_kl" else w.unsqueeze(1)
    torch.testing.assert_close(first.double().cpu(), 3 * w * gradient, rtol=1e-4, atol=1e-6)
    student.grad = None
    loss.backward(weight)  # a second backward pass of one graph gives the same
    torch.testing.assert_close(student.grad, first, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(weight)


@pytest.mark.parametrize(("op", "shape"), [("channel_kl", (2, 3, 4)), ("class_kl", (2, 5, 3))], ids=case_id)
@pytest.mark.parametrize("route", ["reference", "cpu", "registered"])
def test_gradcheck(op, shape, route):
    student, teacher = pair(shape, torch.float64)
    skip_unless_runs(op, student, "reference" if route == "registered" else route)
    student.requires_grad_()

    def function(x: Tensor) -> Tensor:
        if route == "registered":
            return getattr(torch.ops.cpd_fast, op)(x, teacher, 2.0, 1.5)
        return OPS[op](x, teacher, 2.0, scale=1.5, backend=route)

    assert torch.autograd.gradcheck(function, (student,))
    assert torch.autograd.gradgradcheck(function, (student,))


@pytest.mark.parametrize(
    ("op", "shape"), [("channel_kl", (2, 3, 4, 5)), ("class_kl", (2, 5, 3, 2)), ("class_kl", (3, 4))]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_opcheck(op, shape, memory_format):
    student, teacher = pair(shape)
    if len(shape) == 4:
        student, teacher = (x.contiguous(memory_format=memory_format) for x in (student, teacher))
    student.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.cpd_fast, op).default, (student, teacher, 2.0, 1.0))
    grad = torch.rand_like(OPS[op](student, teacher)).requires_grad_()
    torch.library.opcheck(getattr(torch.ops.cpd_fast, f"{op}_backward").default, (grad, student, teacher, 2.0, 1.0))


@pytest.mark.parametrize(("op", "shape"), [("channel_kl", (2, 3, 4, 5)), ("class_kl", (2, 5, 3, 2))])
def test_compiles_without_graph_breaks(op, shape):
    student, teacher = pair(shape)
    student.requires_grad_()

    def function(s: Tensor, t: Tensor) -> Tensor:
        return (OPS[op](s * 2, t, 3.0) * 0.5).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(function(student, teacher), student)
    (gradient,) = torch.autograd.grad(compiled(student, teacher), student)
    torch.testing.assert_close(compiled(student, teacher), function(student, teacher))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_vmap_runs_the_reference_and_refuses_kernels():
    student, teacher = pair((4, 2, 3, 5))
    mapped = torch.func.vmap(lambda s, t: channel_kl(s[None], t[None])[0])(student, teacher)
    torch.testing.assert_close(mapped, channel_kl(student, teacher))
    if not isinstance(_dispatch._native(), str):
        with pytest.raises(BackendError, match="'cpu' does not run inside torch.func transforms"):
            torch.func.vmap(lambda s, t: channel_kl(s[None], t[None], backend="cpu")[0])(student, teacher)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(op, layout):
    student, teacher = (x.contiguous(memory_format=layout) for x in pair((3, 5, 37, 41)))
    student.requires_grad_()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        loss = OPS[op](student, teacher)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), student)[0]))
    torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_teacher_receives_no_gradient_and_inputs_are_untouched():
    student, teacher = pair((2, 3, 4, 5))
    copies = student.clone(), teacher.clone()
    student.requires_grad_()
    teacher.requires_grad_()
    for backend in ("reference", None):
        channel_kl(student, teacher, backend=backend).sum().backward()
    assert teacher.grad is None
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])


def test_dtypes_that_differ_meet_in_the_wider():
    student, teacher = pair((2, 3, 4, 5))
    loss = channel_kl(student.half().requires_grad_(), teacher)
    torch.testing.assert_close(loss, channel_kl(student.half().float(), teacher))


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_the_loss_in_fp32(op):
    """The loss of a half-precision output is the fp32 loss of it, and the gradient reaches the layer."""
    layer = torch.nn.Conv2d(3, 3, 1)
    x, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(x)
        assert logits.dtype == torch.bfloat16
        loss = OPS[op](logits, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, OPS[op](logits.detach().float(), teacher))
    loss.sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("op", "shape"), [("channel_kl", (2, 3, 4, 5)), ("class_kl", (2, 5, 3, 2))])
def test_compiles_with_inductor(op, shape):
    student, teacher = pair(shape)
    student.requires_grad_()

    def function(s: Tensor, t: Tensor) -> Tensor:
        return (OPS[op](s * 2, t, 3.0) * 0.5).sum()

    compiled = torch.compile(function, fullgraph=True)
    (expected,) = torch.autograd.grad(function(student, teacher), student)
    (gradient,) = torch.autograd.grad(compiled(student, teacher), student)
    torch.testing.assert_close(compiled(student, teacher), function(student, teacher))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_empty_batch():
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = channel_kl(student, torch.zeros(0, 3, 4, 4))
    assert loss.shape == (0, 3)
    loss.sum().backward()
    assert student.grad.shape == student.shape
    assert class_kl(torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 0, 4)).shape == (2, 0, 4)


def test_messages():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ShapeError, match=r"same shape, got \(2, 3, 4, 4\) and \(2, 3, 4, 5\); align channels"):
        channel_kl(x, torch.zeros(2, 3, 4, 5))
    with pytest.raises(ShapeError, match=r"channel_kl: expected activations \(N, C, H, W\).*use class_kl"):
        channel_kl(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="at least one pixel"):
        channel_kl(torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 0, 4))
    with pytest.raises(ShapeError, match="at least one class"):
        class_kl(torch.zeros(2, 0), torch.zeros(2, 0))
    with pytest.raises(ShapeError, match=r"expected logits \(N, K\)"):
        class_kl(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ShapeError, match="floating-point activations, got torch.int64"):
        channel_kl(x.long(), x)
    with pytest.raises(ShapeError, match="on one device, got cpu and meta"):
        channel_kl(x, x.to("meta"))
    for bad in (0.0, -1.0, math.nan, INF):
        with pytest.raises(ValueError, match="temperature must be a positive finite number"):
            class_kl(x, x, bad)
    with pytest.raises(BackendError, match="unknown backend 'gpu'; choose one of cuda, cpu, triton, reference"):
        channel_kl(x, x, backend="gpu")
    with pytest.raises(BackendError, match="backend 'cuda' needs CUDA tensors, got cpu"):
        channel_kl(x, x, backend="cuda")
    with pytest.raises(BackendError, match="backend 'triton' computes in float32"):
        channel_kl(x.double(), x.double(), backend="triton")
    with pytest.raises(ValueError, match="at least one of them a tensor"):
        explain_backend("channel_kl", 3)


def test_explain_backend_names_the_one_that_runs_and_reasons():
    text = explain_backend("channel_kl", torch.zeros(1, 2, 3, 3))
    assert text.splitlines()[0].startswith("channel_kl: ")
    assert "not cuda: needs CUDA tensors, got cpu" in text
    assert "not reference: comes later" in text


def test_runs_without_the_compiled_library(monkeypatch):
    student, teacher = pair((2, 3, 4, 5))
    expected = channel_kl(student, teacher)
    monkeypatch.setattr(_dispatch, "_native", lambda: "the compiled library cannot be loaded (test)")
    assert explain_backend("channel_kl", student).startswith("channel_kl: reference")
    torch.testing.assert_close(channel_kl(student, teacher), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(BackendError, match="cannot be loaded"):
        channel_kl(student, teacher, backend="cpu")

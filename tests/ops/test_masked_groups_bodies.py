"""GPU bodies of masked_conv2d for few channels a group: CUDA in the host model, Triton in its interpreter."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools

import pytest
import torch

from cpd_fast.ops import _direct, masked_conv2d
from tests.host_model.build import ORDERS, Builder
from tests.ops.test_masked_conv import DIRECT, SETS, live, made

has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="needs Triton")
if has_triton:
    import triton
    import triton.language as tl
    from cpd_fast.kernels.masked_groups import _offset

    @triton.jit
    def offset_kernel(out_ptr, n, places, pixels, place, pixel, LAST: tl.constexpr):
        tl.store(out_ptr, _offset(n, places, pixels, place.to(tl.int64), pixel, LAST))


SMALL = [name for name in DIRECT if name not in ("grouped_tall", "depthwise_long", "grouped_wide")]


@pytest.fixture(scope="module")
def library(host_model: Builder) -> ctypes.CDLL:
    found = host_model.library("masked_groups_host")
    found.masked_groups.restype = ctypes.c_char_p
    found.masked_groups_offset.restype = ctypes.c_int64
    return found


@pytest.fixture
def run(library, monkeypatch):
    """masked_conv2d(..., backend="cpu") with the CUDA bodies in place of the native ones."""

    def call(backend, which, tensors, table, numbers):
        pointers = (ctypes.c_void_p * 8)(*(None if t is None else t.data_ptr() for t in tensors))
        numbers = (ctypes.c_int64 * 24)(*numbers)
        message = library.masked_groups(which, pointers, ctypes.c_void_p(table.data_ptr()), numbers)
        assert message is None, message

    def convolve(order, *inputs, **arguments):
        library.set_order(ORDERS[order], 3)
        return masked_conv2d(*inputs, **arguments, backend="cpu")

    monkeypatch.setattr(_direct, "launch", call)
    monkeypatch.setattr("cpd_fast.ops._depthwise.is_better", lambda *a: False)
    return convolve


def compare(run, order, layer, dtype, memory_format, out, inp, **options):
    x, weight, bias, arguments = made(layer, dtype)
    x, weight = (t.contiguous(memory_format=memory_format) for t in (x, weight))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    keep = {"out_keep": out, "in_keep": inp}
    y = run(order, *inputs, **arguments, **keep, **options)
    grad = torch.randn_like(y)
    ours = (y, *torch.autograd.grad(y, inputs, grad))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = masked_conv2d(*exact, **arguments, **keep, **options, backend="reference")
    theirs = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * b.abs().max().clamp(min=1).item())
    return ours


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("layer", SMALL)
def test_values_and_gradients(run, layer, memory_format, fresh_memory_is_nan):
    _, weight, _, arguments = made(layer)
    groups = arguments.get("groups", 1)
    for out_kind, in_kind, order in zip(SETS, [*SETS[2:], *SETS[:2]], itertools.cycle(ORDERS), strict=False):
        out = live(out_kind, len(weight), groups, 1)
        inp = live(in_kind, weight.shape[1] * groups, groups, 2)
        compare(run, order, layer, torch.float32, memory_format, out, inp)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", ["grouped", "depthwise", "depth_multiplier"])
def test_other_types(run, layer, dtype, fresh_memory_is_nan):
    x, weight, _, _ = made(layer)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        compare(run, "reverse", layer, dtype, memory_format, live("some", len(weight), 1, 1), None)


@needs_triton
@pytest.mark.parametrize(
    ("layer", "dtype", "memory_format", "kinds"),
    [
        ("grouped", torch.float32, torch.contiguous_format, ("ragged", "group_dead")),
        ("grouped", torch.float16, torch.channels_last, ("some", "all")),
        ("depthwise_stride", torch.float32, torch.channels_last, ("some", "some")),
        ("depthwise", torch.bfloat16, torch.contiguous_format, ("one", "all")),
        ("depth_multiplier", torch.float32, torch.contiguous_format, ("all", "some")),  # two chunks of taps
        ("grouped_1x1", torch.float32, torch.channels_last, ("group_dead", "none")),
        ("grouped_far", torch.float32, torch.contiguous_format, ("some", "ragged")),
    ],
    ids=str,
)
def test_triton(layer, dtype, memory_format, kinds, fresh_memory_is_nan):
    _, weight, _, arguments = made(layer)
    groups = arguments.get("groups", 1)
    out, inp = live(kinds[0], len(weight), groups, 1), live(kinds[1], weight.shape[1] * groups, groups, 2)

    def run(order, *inputs, **options):
        return masked_conv2d(*inputs, **options, backend="triton")

    compare(run, None, layer, dtype, memory_format, out, inp)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("layer", [name for name in DIRECT if name != "grouped_deep"])
def test_on_a_gpu(layer, memory_format, backend):
    """What the host model and the interpreter show, on the device itself."""
    x, weight, bias, arguments = made(layer, torch.float32)
    x, weight = (t.contiguous(memory_format=memory_format) for t in (x, weight))
    keep = {"out_keep": live("some", len(weight), 1, 1), "in_keep": live("some", x.shape[1], 1, 2)}
    results = []
    for device, name in (("cuda", backend), ("cpu", "reference")):
        inputs = [t.to(device).requires_grad_() for t in (x, weight, bias)]
        y = masked_conv2d(*inputs, **arguments, **{k: t.to(device) for k, t in keep.items()}, backend=name)
        results.append([t.cpu() for t in (y, *torch.autograd.grad(y.square().sum(), inputs))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().clamp(min=1).item())


@needs_triton
def test_triton_on_compact_activations_and_shared_positions(monkeypatch):
    for name in ("SHARE_LEAST", "BLOCK", "WEIGHT_BLOCK"):  # 25 positions: several blocks, shares of several blocks
        monkeypatch.setattr(f"cpd_fast.kernels.masked_groups.{name}", 8 if name == "BLOCK" else 16)
    x, weight, bias, arguments = made("grouped", torch.float32)
    out, inp = live("ragged", 8, 4, 1), live("some", 12, 4, 2)
    small = x[:, inp].contiguous()
    options = arguments | {"out_keep": out, "in_keep": inp, "compact_input": True, "compact_output": True}
    results = []
    for backend in ("triton", "reference"):
        inputs = [t.clone().requires_grad_() for t in (small, weight, bias)]
        y = masked_conv2d(*inputs, **options, backend=backend)
        results.append((y, *torch.autograd.grad(y, inputs, torch.ones_like(y))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_same_bits_in_every_order_with_shared_positions(run, monkeypatch):
    """grouped_tall: positions of the weights' gradients are shared among blocks."""
    results = []
    for order in ORDERS:
        torch.manual_seed(1)
        results.append(
            compare(run, order, "grouped_tall", torch.float32, torch.contiguous_format, live("some", 8, 1, 1), None)
        )
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_compact_activations(run):
    keep = live("ragged", 8, 4, 1)
    x, weight, _, arguments = made("grouped", torch.float32)
    inp = live("some", 12, 4, 2)
    options = arguments | {"out_keep": keep, "in_keep": inp, "compact_input": True, "compact_output": True}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        small = x[:, inp].contiguous(memory_format=memory_format)
        expected = masked_conv2d(small, weight, **options, backend="reference")
        torch.testing.assert_close(run("random", small, weight, **options), expected, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits(library):
    """The last value of 64 x 960 x 112 x 112 and more, in both layouts; products are not cut off on the way."""
    for n, places, pixels in ((64, 960, 112 * 112), (3, 2**20, 2**12), (1, 2, 2**30)):
        for last in (0, 1):
            numbers = (places, pixels, n - 1, places - 1, pixels - 1)
            found = library.masked_groups_offset(last, *(ctypes.c_int64(i) for i in numbers))
            assert found == n * places * pixels - 1


@needs_triton
def test_offsets_of_triton_beyond_32_bits():
    for n, places, pixels in ((64, 960, 112 * 112), (3, 2**20, 2**12)):
        for last in (False, True):
            out = torch.zeros(1, dtype=torch.int64)
            offset_kernel[(1,)](out, n - 1, places, pixels, places - 1, pixels - 1, LAST=last)
            assert out.item() == n * places * pixels - 1

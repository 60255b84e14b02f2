"""masked_conv2d and masked_linear against a convolution of zeroed tensors, for live sets on purpose; messages."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast.errors import BackendError, ShapeError
from cpd_fast.ops import _dispatch, explain_backend, masked_conv2d, masked_linear
from cpd_fast.ops._direct import table_of
from cpd_fast.ops._masked_channels import channels_of

# name: C_in, C_out, kernel, H, W, arguments
LAYERS = {
    "1x1": (5, 7, 1, 3, 4, {}),
    "one_pixel": (1, 1, 1, 1, 1, {}),
    "3x3": (4, 6, 3, 7, 5, {"padding": 1}),
    "stride": (4, 6, 3, 9, 8, {"stride": 2, "padding": 1}),
    "dilated": (3, 5, 3, 9, 9, {"dilation": 2, "padding": (2, 0)}),
    "even_same": (3, 4, 4, 6, 7, {"padding": "same"}),
    "even_valid": (3, 4, 2, 6, 7, {"padding": "valid", "stride": (2, 1)}),
    "grouped": (12, 8, 3, 5, 5, {"groups": 4, "padding": 1}),
    "depthwise": (8, 8, 3, 7, 7, {"groups": 8, "padding": 1}),
    "depthwise_5x5": (3, 3, 5, 9, 11, {"groups": 3, "padding": (2, 1), "stride": (1, 2)}),
    "depthwise_stride": (5, 5, 3, 9, 8, {"groups": 5, "padding": 1, "stride": 2}),
    "depthwise_dilated": (5, 5, 3, 9, 19, {"groups": 5, "padding": 3, "dilation": 2, "stride": 3}),
    "depthwise_even": (4, 4, 2, 6, 7, {"groups": 4, "padding": 1}),
    "depthwise_1x1": (4, 4, 1, 6, 7, {"groups": 4, "padding": 1}),
    "depthwise_long": (2, 2, 7, 40, 37, {"groups": 2, "padding": 3}),
    "depth_multiplier": (6, 12, 5, 7, 7, {"groups": 6, "padding": 2, "stride": 2}),
    "grouped_1x1": (15, 10, 1, 3, 2, {"groups": 5, "stride": 2}),
    "grouped_prime": (39, 15, 3, 13, 17, {"groups": 3, "padding": (0, 1), "stride": (1, 3), "dilation": (2, 1)}),
    "grouped_even": (32, 30, 4, 9, 33, {"groups": 2, "padding": (1, 3), "stride": 2}),
    "grouped_deep": (64, 58, 3, 6, 7, {"groups": 2, "padding": 1}),
    "grouped_wide": (68, 68, 3, 5, 18, {"groups": 17, "padding": 1}),  # one place past a window of places
    "grouped_tall": (8, 8, 3, 400, 65, {"groups": 2, "padding": 1}),  # several bands of rows
    "grouped_far": (4, 4, 2, 6, 6, {"groups": 2, "padding": 4, "dilation": 5, "stride": 7}),  # rows of padding alone
}
DIRECT = [name for name in LAYERS if name.startswith(("depth", "grouped"))]
SETS = ["all", "some", "one", "none", "group_dead", "ragged"]


def live(kind: str, channels: int, groups: int, seed: int) -> Tensor | None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(channels, generator=g) < 0.6
    if kind == "all":
        return None
    if kind in ("one", "none"):
        mask.fill_(False)
        mask[channels // 2] = kind == "one"
    if kind == "group_dead":
        mask.reshape(groups, -1)[0] = False
    if kind == "ragged":
        mask.reshape(groups, -1)[:] = torch.arange(channels // groups) <= torch.arange(groups)[:, None]
    return mask


def made(layer: str, dtype: torch.dtype = torch.float64):
    c_in, c_out, k, h, w, arguments = LAYERS[layer]
    x = torch.randn(2, c_in, h, w, dtype=dtype)
    weight = torch.randn(c_out, c_in // arguments.get("groups", 1), k, k, dtype=dtype)
    return x, weight, torch.randn(c_out, dtype=dtype), arguments


def expected_of(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, inp: Tensor | None, **arguments):
    """From the definition: zero the input, convolve, zero the output."""
    if inp is not None:
        x = x * inp.to(x.dtype)[:, None, None]
    y = F.conv2d(x, weight, bias, **arguments)
    return y if out is None else y * out.to(x.dtype)[:, None, None]


def skip_unless_native(backend: str, layer: str) -> None:
    if backend == "cpu" and layer not in DIRECT:
        pytest.skip("depthwise layers and small groups only")
    if backend == "cpu" and isinstance(_dispatch._native(), str):
        pytest.skip(_dispatch._native())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("backend", ["reference", "compact", "cpu"])
@pytest.mark.parametrize("layer", LAYERS)
def test_values_and_gradients(layer, backend, memory_format):
    groups = LAYERS[layer][5].get("groups", 1)
    skip_unless_native(backend, layer)
    for out_kind, in_kind in itertools.product(SETS, SETS):
        if layer == "grouped_tall" and (out_kind != in_kind or backend != "cpu"):
            continue  # for the sake of one body
        x, weight, bias, arguments = made(layer)
        x = x.contiguous(memory_format=memory_format)
        out, inp = live(out_kind, weight.shape[0], groups, 1), live(in_kind, x.shape[1], groups, 2)
        inputs = [t.requires_grad_() for t in (x, weight, bias)]
        y = masked_conv2d(*inputs, **arguments, out_keep=out, in_keep=inp, backend=backend)
        expected = expected_of(*inputs, out, inp, **arguments)
        torch.testing.assert_close(y, expected)
        grad = torch.randn_like(y)
        ours = torch.autograd.grad(y, inputs, grad)
        theirs = torch.autograd.grad(expected, inputs, grad)
        for name, a, b in zip(("x", "weight", "bias"), ours, theirs, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, name=name, k=(out_kind, in_kind): f"{name} {k}: {m}")
        if out is not None:
            assert not ours[1][~out].any() and not ours[2][~out].any() and not y[:, ~out].any()
        if inp is not None:
            assert not ours[0][:, ~inp].any()


@pytest.mark.parametrize("backend", ["reference", "compact", "cpu"])
@pytest.mark.parametrize("layer", ["3x3", "grouped", "depth_multiplier", "depthwise"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_what_is_masked_does_not_matter(layer, backend, memory_format):
    skip_unless_native(backend, layer)
    x, weight, bias, arguments = made(layer)
    groups = arguments.get("groups", 1)
    out, inp = live("some", weight.shape[0], groups, 1), live("some", x.shape[1], groups, 2)
    expected = masked_conv2d(x, weight, bias, **arguments, out_keep=out, in_keep=inp, backend=backend)
    x[:, ~inp], weight[~out], bias[~out] = math.nan, math.inf, math.nan
    x = x.contiguous(memory_format=memory_format)
    for t in (x, weight, bias):
        t.requires_grad_()
    y = masked_conv2d(x, weight, bias, **arguments, out_keep=out, in_keep=inp, backend=backend)
    torch.testing.assert_close(y, expected, rtol=0, atol=0 if memory_format == torch.contiguous_format else 1e-12)
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, weight, bias))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("layer", ["3x3", "grouped", "grouped_wide", "depthwise", "depth_multiplier"])
def test_compact_activations_between_layers(layer, memory_format):
    x, weight, bias, arguments = made(layer)
    groups = arguments.get("groups", 1)
    x = x.contiguous(memory_format=memory_format)
    for out_kind, in_kind in itertools.product(SETS, SETS):
        out, inp = live(out_kind, weight.shape[0], groups, 1), live(in_kind, x.shape[1], groups, 2)
        full = masked_conv2d(x, weight, bias, **arguments, out_keep=out, in_keep=inp)
        small = x if inp is None else x[:, inp].contiguous(memory_format=memory_format)
        native = layer in DIRECT and not isinstance(_dispatch._native(), str)
        for backend in ["reference", "compact", *(["cpu"] if native else [])]:
            y = masked_conv2d(
                small, weight, bias, **arguments, out_keep=out, in_keep=inp, backend=backend,
                compact_input=True, compact_output=True,
            )  # fmt: skip
            torch.testing.assert_close(y, full if out is None else full[:, out])


def test_memory_format_is_kept():
    x, weight, bias, arguments = made("grouped", torch.float32)
    last = x.contiguous(memory_format=torch.channels_last)
    mask = torch.arange(8) % 3 != 0
    y = masked_conv2d(last, weight, bias, **arguments, out_keep=mask, in_keep=torch.arange(12) % 5 != 0)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layer", ["3x3", "grouped", "depthwise", "depthwise_stride", "depth_multiplier"])
def test_gradcheck(layer):
    x, weight, bias, arguments = made(layer)
    groups = arguments.get("groups", 1)
    keep = {"out_keep": live("ragged", weight.shape[0], groups, 1), "in_keep": live("some", x.shape[1], groups, 2)}
    x = x[:1, :, :3, :3].contiguous()
    inputs = tuple(t.clone().requires_grad_() for t in (x, weight, bias))
    native = ["cpu"] if layer in DIRECT and not isinstance(_dispatch._native(), str) else []
    for backend in ["reference", "compact", *native]:

        def function(x, w, b, backend=backend):
            return masked_conv2d(x, w, b, **arguments, **keep, backend=backend)

        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "compact"])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_linear(shape, backend):
    for out_kind, in_kind in itertools.product(["all", "some", "one", "none"], repeat=2):
        inputs = [torch.randn(*s, dtype=torch.float64).requires_grad_() for s in (shape, (7, 5), (7,))]
        x, weight, bias = inputs
        out, inp = live(out_kind, 7, 1, 1), live(in_kind, 5, 1, 2)
        y = masked_linear(*inputs, out_keep=out, in_keep=inp, backend=backend)
        expected = F.linear(x if inp is None else x * inp, weight, bias)
        expected = expected if out is None else expected * out
        torch.testing.assert_close(y, expected)
        grad = torch.randn_like(y)
        for a, b in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
            torch.testing.assert_close(a, b)
        small = x if inp is None else x[..., inp]
        y = masked_linear(small, weight, bias, out_keep=out, in_keep=inp, backend=backend, compact_input=True,
                          compact_output=True)  # fmt: skip
        torch.testing.assert_close(y, expected if out is None else expected[..., out])


def test_indices_masks_and_lists_mean_the_same_and_may_change_in_place():
    x, weight, bias, _ = made("3x3")
    mask = torch.tensor([True, False, True, True, False, True])
    expected = masked_conv2d(x, weight, bias, out_keep=mask)
    for keep in (mask.nonzero().flatten(), mask.nonzero().flatten().int(), [0, 2, 3, 5]):
        torch.testing.assert_close(masked_conv2d(x, weight, bias, out_keep=keep), expected)
    mask[0] = False  # what was read before is not what holds now
    assert not masked_conv2d(x, weight, bias, out_keep=mask)[:, 0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_autocast(dtype):
    x, weight, bias, arguments = made("grouped", torch.float32)
    keep = {"out_keep": live("ragged", 8, 4, 1), "in_keep": live("group_dead", 12, 4, 2)}
    exact = masked_conv2d(x, weight, bias, **arguments, **keep)
    y = masked_conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), **arguments, **keep)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            masked_conv2d(x, weight, bias, **arguments, **keep).float(), exact, rtol=0.05, atol=0.1
        )


@pytest.mark.parametrize("layer", ["3x3", "grouped", "depthwise"])
def test_a_compiler_sees_full_width_and_does_not_compile_again(layer):
    x, weight, bias, arguments = made(layer, torch.float32)
    count = 0

    def backend(module, inputs):
        nonlocal count
        count += 1
        return module.forward

    @torch.compile(fullgraph=True, backend=backend)
    def function(x, w, b, out, inp):
        return masked_conv2d(x, w, b, **arguments, out_keep=out, in_keep=inp)

    for seed in range(3):
        out, inp = live("some", len(weight), 1, seed), live("some", x.shape[1], 1, seed)
        torch.testing.assert_close(
            function(x, weight, bias, out, inp), masked_conv2d(x, weight, bias, **arguments, out_keep=out, in_keep=inp)
        )
    assert count == 1


def test_vmap_runs_the_reference():
    x, weight, _, arguments = made("grouped")
    out = live("some", 8, 4, 1)
    mapped = torch.func.vmap(lambda w: masked_conv2d(x, w, **arguments, out_keep=out))(
        torch.stack([weight, 2 * weight])
    )
    expected = masked_conv2d(x, weight, **arguments, out_keep=out)
    torch.testing.assert_close(mapped, torch.stack([expected, 2 * expected]))


def test_nothing_alive_calls_no_convolution(monkeypatch):
    x, weight, bias, _ = made("3x3")
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: pytest.fail("called"))
    weight.requires_grad_()
    y = masked_conv2d(x, weight, bias, padding=1, out_keep=[])
    assert y.shape == (2, 6, 7, 5) and not y.any()
    y.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("layer", ["grouped", "depthwise"])
def test_nothing_alive_launches_no_kernel_of_our_own(layer, monkeypatch):
    x, weight, bias, arguments = made(layer)
    monkeypatch.setattr("cpd_fast.ops._direct.launch", lambda *a: pytest.fail("launched"))
    monkeypatch.setattr("cpd_fast.ops._depthwise._call", lambda *a: pytest.fail("launched"))
    x, inputs = x.contiguous(memory_format=torch.channels_last), [weight.requires_grad_(), bias.requires_grad_()]
    for images in (x, x.contiguous()):
        y = masked_conv2d(images, *inputs, **arguments, out_keep=[], in_keep=[0])
        assert not y.any()
        assert all(not g.any() for g in torch.autograd.grad(y.sum(), inputs))


def test_the_binding_refuses_what_would_read_wild_memory():
    native = _dispatch._native()
    if isinstance(native, str):
        pytest.skip(native)
    channels = channels_of(None, None, 4, 4, 2, False, False)
    table, lengths = table_of(channels, torch.device("cpu"))
    numbers = [0, 0, 2, *lengths, 4, 18, 9, 1, 1, 5, 5, 3, 3, 3, 3, 1, 1, 0, 0, 1, 1]
    memory = torch.zeros(1000)
    pointers = [memory.data_ptr()] * 8
    native.masked_groups(pointers, table.data_ptr(), numbers, 1)
    with pytest.raises(ValueError, match="pointers must not be null"):
        native.masked_groups([0, *pointers[1:]], table.data_ptr(), numbers, 1)
    with pytest.raises(ValueError, match="the output is too large"):
        native.masked_groups(pointers, table.data_ptr(), [*numbers[:14], 4, *numbers[15:]], 1)
    with pytest.raises(ValueError, match="dtype must be 0 to 3"):
        native.masked_groups_input(pointers, table.data_ptr(), [9, *numbers[1:]], 1)
    for at, value, text in ((6, 4, "a place is out of range"), (11, 2, "an index is out of range"), (0, 1, "add up")):
        wrong = table.clone()
        wrong[at] = value
        with pytest.raises(ValueError, match=text):
            native.masked_groups_weight(pointers, wrong.data_ptr(), numbers, 1)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("layer", [name for name in DIRECT if name != "grouped_tall"])
def test_every_instruction_set_and_dtype_of_the_native_body(layer, memory_format, dtype, isa, fresh_memory_is_nan):
    native = _dispatch._native()
    if isinstance(native, str) or isa not in native.supported_isas():
        pytest.skip(f"no {isa} here")
    x, weight, bias, arguments = made(layer, dtype)
    x = x.contiguous(memory_format=memory_format)
    if memory_format == torch.channels_last:
        weight = weight.contiguous(memory_format=memory_format)
    out, inp = live("some", len(weight), 1, 1), live("some", x.shape[1], 1, 2)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    before = native.current_isa()
    native.set_isa(isa)
    try:
        y = masked_conv2d(*inputs, **arguments, out_keep=out, in_keep=inp, backend="cpu")
        grad = torch.randn_like(y)
        ours = torch.autograd.grad(y, inputs, grad)
    finally:
        native.set_isa(before)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = expected_of(*exact, out, inp, **arguments)
    theirs = torch.autograd.grad(expected, exact, grad.double())
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for a, b in zip((y, *ours), (expected, *theirs), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * b.abs().max().clamp(min=1).item())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("layer", ["depthwise_long", "grouped_wide", "grouped_tall"])
def test_the_native_body_gives_the_same_bits_for_any_number_of_threads(layer, memory_format):
    x, weight, bias, arguments = made(layer, torch.float32)
    x = x.contiguous(memory_format=memory_format)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    results, before = [], torch.get_num_threads()
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        y = masked_conv2d(*inputs, **arguments, out_keep=[1], backend="cpu")
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), inputs)))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_explain():
    x, weight = torch.zeros(1, 2, 9, 9), torch.zeros(2, 2, 1, 1)
    assert explain_backend("masked_conv2d", x, weight).startswith("masked_conv2d: compact (the library's kernels")
    assert "not cpu: is for depthwise layers and groups of at most" in explain_backend("masked_conv2d", x, weight)
    assert "not cpu: is for convolutions" in explain_backend("masked_linear", x, weight)
    if isinstance(_dispatch._native(), str):
        pytest.skip(_dispatch._native())
    last = x.contiguous(memory_format=torch.channels_last)
    text = explain_backend("masked_conv2d", x, weight[:, :1], groups=2)
    assert text.startswith("masked_conv2d: cpu (native kernels") and "not compact: comes later in the order" in text
    text = explain_backend("masked_conv2d", last, weight[:, :1], groups=2, compact_input=True, compact_output=True)
    assert text.startswith("masked_conv2d: compact") and "not cpu: is slower than the library on channels-last" in text
    text = explain_backend("masked_conv2d", last.repeat(1, 2, 1, 1), torch.zeros(4, 2, 1, 1), groups=2)
    assert text.startswith("masked_conv2d: cpu (native kernels")
    text = explain_backend("masked_conv2d", torch.zeros(1, 2, 9, 18)[..., ::2], weight[:, :1], groups=2)
    assert text.startswith("masked_conv2d: compact") and "needs contiguous NCHW or channels-last, got strides" in text
    text = explain_backend("masked_conv2d", x[:, :, :8, :8].contiguous(), weight[:, :1], groups=2)
    assert text.startswith("masked_conv2d: compact") and "not cpu: is slower than the library on depthwise" in text
    text = explain_backend("masked_conv2d", x, weight[:, :1].double(), groups=2)
    assert "not cpu: needs one dtype for all tensors" in text


def test_messages():
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(6, 4, 3, 3)
    for backend in (None, "reference"):
        with pytest.raises(ShapeError, match=r"out_keep as a mask must have shape \(6,\), got \(4,\)"):
            masked_conv2d(x, weight, out_keep=torch.ones(4, dtype=torch.bool), backend=backend)
        with pytest.raises(ShapeError, match=r"in_keep must be a bool mask \(4,\) or increasing int64 indices"):
            masked_conv2d(x, weight, in_keep=torch.ones(4), backend=backend)
        for bad in ([0, 6], [-1, 2], [2, 1], [1, 1]):
            with pytest.raises(ShapeError, match="out_keep must be increasing channel indices from 0 to 5, got"):
                masked_conv2d(x, weight, out_keep=bad, backend=backend)
        with pytest.raises(ShapeError, match="out_keep must be on the input's device cpu, got meta"):
            masked_conv2d(x, weight, out_keep=torch.zeros(2, dtype=torch.int64, device="meta"), backend=backend)
        with pytest.raises(ShapeError, match=r"weight \(6, 4, 3, 3\) reads 4 channels, but the input has shape \(1, 3"):
            masked_conv2d(x[:, :3], weight, backend=backend)
        with pytest.raises(ShapeError, match=r"a kernel of \(3, 3\) with dilation \(3, 3\) does not fit"):
            masked_conv2d(x, weight, dilation=3, backend=backend)
        with pytest.raises(ShapeError, match="groups=4 does not divide 6 output channels"):
            masked_conv2d(x, weight, groups=4, backend=backend)
        with pytest.raises(ShapeError, match=r"bias must have shape \(6,\), got \(4,\)"):
            masked_conv2d(x, weight, torch.zeros(4), backend=backend)
        with pytest.raises(ShapeError, match="padding must be numbers, 'valid', or 'same' with stride 1"):
            masked_conv2d(x, weight, stride=2, padding="same", backend=backend)
        with pytest.raises(ShapeError, match=r"stride must be one or two numbers >= 1, got 0"):
            masked_conv2d(x, weight, stride=0, backend=backend)
        with pytest.raises(ShapeError, match="weight must be on the input's device cpu, got meta"):
            masked_conv2d(x, weight.to("meta"), backend=backend)
        with pytest.raises(ShapeError, match=r"reads 5 channels, but the input has shape \(2, 4\)"):
            masked_linear(torch.zeros(2, 4), torch.zeros(3, 5), backend=backend)
    with pytest.raises(ShapeError, match=r"reads 2 live channels \(compact_input=True\), but"):
        masked_conv2d(x, weight, in_keep=[0, 1], compact_input=True)
    with pytest.raises(ShapeError, match=r"expected input \(N, C, H, W\) and weight of 4 dims, got 3 and 4"):
        masked_conv2d(x[0], weight)
    with pytest.raises(BackendError, match="backend 'cpu' is for depthwise layers and groups of at most 32 channels"):
        masked_conv2d(x, weight, backend="cpu")
    with pytest.raises(BackendError, match="unknown backend 'cudnn'; choose one of cuda, cpu, triton, compact, ref"):
        masked_conv2d(x, weight, backend="cudnn")
    with pytest.raises(BackendError, match="'compact' does not run inside torch.func transforms"):
        torch.func.vmap(lambda w: masked_conv2d(x, w, backend="compact"))(weight[None])

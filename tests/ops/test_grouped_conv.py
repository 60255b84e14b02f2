"""Which body convolves small groups, and that it computes what the library does."""

import pytest
import torch
import torch.nn.functional as F

from cpd_fast.ops import _dispatch, explain_backend, grouped_conv2d

NATIVE = _dispatch._native()
needs_native = pytest.mark.skipif(isinstance(NATIVE, str), reason=str(NATIVE))


def layer(per_group=3, groups=4, side=9):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, per_group * groups, side, side, generator=g)
    return x.requires_grad_(), torch.randn(2 * groups, per_group, 3, 3, generator=g).requires_grad_()


@needs_native
@pytest.mark.parametrize("place", [(1, 1, 1), (2, 1, 1), ((2, 1), (0, 2), (1, 2))])
def test_native_values_and_gradients_are_the_librarys(place):
    x, weight = layer()
    bias = torch.randn(8).requires_grad_()
    assert explain_backend("grouped_conv2d", x, weight, bias, *place, 4).startswith("grouped_conv2d: cpu")
    y, wanted = grouped_conv2d(x, weight, bias, *place, 4), F.conv2d(x, weight, bias, *place, 4)
    assert "Direct" in type(y.grad_fn).__name__
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(v.square().sum(), (x, weight, bias)) for v in (y, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("change", "why"), [
    (lambda x, w: (x.double(), w.double(), 4, 0), "all but float32 images"),
    (lambda x, w: (x, torch.randn(8, 12, 3, 3), 1, 0), "2 to 16 channels a group"),
    (lambda x, w: (*layer(8), 4, 0), "multiples of 8 aside; got 8"),
    (lambda x, w: (x.to(memory_format=torch.channels_last), w, 4, 0), "channels are not first"),
    (lambda x, w: (x, w, 4, "same"), "takes padding='same'"),
])  # fmt: skip
def test_the_library_runs_the_rest_and_the_reason_is_said(change, why):
    x, weight, groups, padding = change(*layer())
    said = explain_backend("grouped_conv2d", x, weight, padding=padding, groups=groups)
    assert said.startswith("grouped_conv2d: library") and why in said
    assert torch.equal(grouped_conv2d(x, weight, padding=padding, groups=groups),
                       F.conv2d(x, weight, padding=padding, groups=groups))  # fmt: skip


def test_what_does_not_fit_is_the_librarys_error():
    x, weight = layer()
    with pytest.raises(RuntimeError, match="expected input"):
        grouped_conv2d(x[:, :9], weight, groups=4)
    with pytest.raises(RuntimeError, match="Kernel size"):
        grouped_conv2d(x[..., :1, :1], weight, groups=4)

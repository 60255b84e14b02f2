import pytest
import torch

from cpd_fast.score._double import DoubleDifferentiable

CASES = {
    "plain": (2, (2, 3, 7, 6), (4, 3, 3, 3), {}),
    "stride": (2, (2, 3, 9, 8), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "uneven": (2, (2, 3, 9, 8), (4, 3, 3, 2), {"stride": (2, 3), "padding": (0, 1), "dilation": (1, 2)}),
    "dilation": (2, (1, 2, 9, 9), (3, 2, 3, 3), {"dilation": 2, "padding": 2}),
    "groups": (2, (2, 6, 5, 5), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
    "depthwise": (2, (2, 5, 6, 6), (5, 1, 3, 3), {"groups": 5, "padding": 1, "stride": 2}),
    "multiplier": (2, (2, 3, 6, 6), (6, 1, 3, 3), {"groups": 3}),
    "pointwise": (2, (3, 4, 1, 1), (2, 4, 1, 1), {}),
    "same": (2, (2, 3, 6, 5), (4, 3, 3, 5), {"padding": "same"}),
    "valid": (2, (2, 3, 6, 5), (4, 3, 3, 5), {"padding": "valid"}),
    "same-even": (2, (2, 3, 6, 5), (4, 3, 2, 2), {"padding": "same"}),
    "unbatched": (2, (3, 6, 5), (4, 3, 3, 3), {}),
    "1d": (1, (2, 4, 11), (6, 2, 3), {"groups": 2, "stride": 2, "padding": 1}),
    "3d": (3, (1, 2, 4, 5, 4), (3, 2, 3, 2, 2), {"padding": (1, 0, 1)}),
}


def second_order(inputs, nd, options, wanted, mode):
    """Value, gradients and Hessian-vector product of a loss through one convolution."""
    x, w, b = (t.detach().clone().requires_grad_(k in wanted) for k, t in zip("xwb", inputs, strict=True))
    conv = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[nd]
    if mode:
        with DoubleDifferentiable():
            y = conv(x, w, b, **options)
    else:
        y = conv(x, w, b, **options)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    leaves = [t for k, t in zip("xwb", (x, w, b), strict=True) if k in wanted]
    grads = torch.autograd.grad((torch.tanh(y) * weight).sum(), leaves, create_graph=True)
    v = [torch.sin(torch.arange(t.numel(), dtype=t.dtype) * (i + 1.3)).reshape(t.shape) for i, t in enumerate(leaves)]
    return [y, *grads, *torch.autograd.grad(grads, leaves, v)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("wanted", ["xwb", "w", "x", "xw", "wb"])
@pytest.mark.parametrize("case", CASES)
def test_equals_pytorchs_double_backward(case, wanted):
    nd, x, w, options = CASES[case]
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.float64) for s in (x, w, (w[0],))]
    ours = second_order(inputs, nd, options, wanted, True)
    theirs = second_order(inputs, nd, options, wanted, False)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_it_is_ours_that_runs():
    x, w = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(4, 1, 3, 3)
    with DoubleDifferentiable():
        assert "ConvBackward" in type(torch.nn.functional.conv2d(x, w, groups=4).grad_fn).__name__
        unbatched = torch.conv2d(x[0], w, groups=4)
    assert "ConvolutionBackward0" in [
        type(unbatched.grad_fn).__name__,
        type(unbatched.grad_fn.next_functions[0][0]).__name__,
    ]


def test_one_gradient_without_the_other():
    """Second derivatives through the gradient of the input alone, and of the weight alone (None cotangents)."""
    for pick in (0, 1):
        results = []
        for mode in (True, False):
            torch.manual_seed(1)
            x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
            w = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
            with DoubleDifferentiable() if mode else torch.enable_grad():
                y = torch.conv2d(x, w, groups=2)
            g = torch.autograd.grad(y.pow(3).sum(), [x, w], create_graph=True)[pick]
            results.append(torch.autograd.grad(g.sin().sum(), [x, w]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_depthwise_double_backward_calls_few_operators():
    def count(mode):
        x = torch.randn(1, 32, 6, 6, requires_grad=True)
        w = torch.randn(32, 1, 3, 3, requires_grad=True)
        with DoubleDifferentiable() if mode else torch.enable_grad():
            y = torch.conv2d(x, w, groups=32)
        g = torch.autograd.grad(y.pow(2).sum(), [x, w], create_graph=True)
        with torch.profiler.profile() as profile:
            torch.autograd.grad(g, [x, w], [torch.ones_like(t) for t in g])
        return sum(e.count for e in profile.key_averages() if e.key.startswith("aten::"))

    assert count(True) * 5 < count(False)

import pytest
import torch
import torch.nn.functional as F

from cpd_fast.score._double import DoubleDifferentiable


def norm_inputs(shape):
    torch.manual_seed(0)
    channels = shape[1]
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in (shape, channels, channels))
    return x, w, b, torch.randn(channels, dtype=torch.float64), torch.rand(channels, dtype=torch.float64) + 0.3


def normalised(x, w, b, mean, var, mode, **how):
    with DoubleDifferentiable() if mode else torch.enable_grad():
        return F.batch_norm(x, mean, var, w, b, **{"eps": 1e-3, **how})


@pytest.mark.parametrize("wanted", ["xwb", "w", "x", "b", "xw", "wb", "xb"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (5, 3), (2, 3, 7), (2, 3, 2, 3, 4), (1, 1, 1, 1)], ids=str)
def test_equals_pytorchs_double_backward(shape, wanted):
    results = []
    for mode in (True, False):
        x, w, b, mean, var = norm_inputs(shape)
        leaves = [t.requires_grad_() for k, t in zip("xwb", (x, w, b), strict=True) if k in wanted]
        y = normalised(x, w, b, mean, var, mode)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        grads = torch.autograd.grad((torch.tanh(y) * weight).sum(), leaves, create_graph=True)
        v = [torch.sin(torch.arange(t.numel(), dtype=t.dtype) + 1.3 * i).reshape(t.shape) for i, t in enumerate(leaves)]
        results.append([y, *grads, *torch.autograd.grad(grads, leaves, v)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pick", [0, 1, 2])
def test_one_gradient_without_the_others(pick):
    """Second derivatives through one of the three gradients alone (None cotangents)."""
    results = []
    for mode in (True, False):
        x, w, b, mean, var = norm_inputs((3, 4, 2, 5))
        leaves = [t.requires_grad_() for t in (x, w, b)]
        g = torch.autograd.grad(normalised(x, w, b, mean, var, mode).pow(3).sum(), leaves, create_graph=True)[pick]
        results.append(torch.autograd.grad(g.sin().sum(), leaves))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_it_is_ours_that_runs_where_it_can():
    x, w, b, mean, var = norm_inputs((2, 3, 4, 4))
    x.requires_grad_()

    def node(*tensors, **how):
        return type(normalised(*tensors, True, **how).grad_fn).__name__

    assert node(x, w, b, mean, var) == "NormBackward"
    layer = torch.nn.BatchNorm2d(3).double().eval()
    with DoubleDifferentiable():
        assert type(layer(x).grad_fn).__name__ == "NormBackward"
    # statistics of the batch, no scale, mixed precision: PyTorch's own
    assert node(x, w, b, mean, var, training=True) == "NativeBatchNormBackward0"
    assert node(x, None, b, mean, var) == "NativeBatchNormBackward0"
    assert node(x.bfloat16(), w.float(), b.float(), mean.float(), var.float()) == "NativeBatchNormBackward0"


def test_channels_last_and_few_operators():
    def run(mode):
        x, w, b, mean, var = norm_inputs((2, 6, 5, 7))
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        leaves = [x, w.requires_grad_(), b.requires_grad_()]
        g = torch.autograd.grad(normalised(x, w, b, mean, var, mode).pow(2).sum(), leaves, create_graph=True)
        with torch.profiler.profile() as profile:
            product = torch.autograd.grad(g, leaves, [torch.ones_like(t) for t in g])
        return product, sum(e.count for e in profile.key_averages() if e.key.startswith("aten::"))

    (ours, few), (theirs, many) = run(True), run(False)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert few * 1.7 < many

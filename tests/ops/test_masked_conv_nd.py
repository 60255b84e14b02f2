"""Masked convolutions of one and three dims against the definition: zero the input, convolve, zero the output."""

import pytest
import torch
import torch.nn.functional as F

from cpd_fast.errors import BackendError, ShapeError
from cpd_fast.ops import explain_backend, masked_conv1d, masked_conv3d

OPS = {1: (masked_conv1d, F.conv1d, (11,)), 3: (masked_conv3d, F.conv3d, (4, 5, 6))}
PLACES = [
    {"padding": 1},
    {"stride": 2, "dilation": 2, "padding": 2, "groups": 2},
    {"padding": "same", "groups": 4},
]
KEEPS = {
    "all": (None, None),
    "ragged": ([1, 4, 5, 6], [0, 1, 3]),
    "dead_group": (range(4, 8), [2, 3]),
    "no_input": ([0, 7], []),
    "none": ([], []),
}


def made(rank, groups=1, k=2):
    g = torch.Generator().manual_seed(0)
    shape = (2, 4, *OPS[rank][2])
    x = torch.randn(shape, dtype=torch.double, generator=g)
    weight = torch.randn(8, 4 // groups, *[k] * rank, dtype=torch.double, generator=g)
    return [t.requires_grad_() for t in (x, weight, torch.randn(8, dtype=torch.double, generator=g))]


def mask(keep, n):
    return torch.ones(n, dtype=torch.bool) if keep is None else torch.isin(torch.arange(n), torch.tensor([*keep]))


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("place", PLACES, ids=["plain", "strided", "same"])
@pytest.mark.parametrize("rank", OPS)
def test_values_and_gradients(rank, place, keeps):
    op, library, _ = OPS[rank]
    tensors = made(rank, place.get("groups", 1))
    x, weight, bias = tensors
    out, inp = KEEPS[keeps]
    masks = [mask(k, n).reshape(-1, *[1] * rank) for k, n in ((out, 8), (inp, 4))]
    wanted = library(x * masks[1], weight, bias, **place) * masks[0]
    y = op(*tensors, **place, out_keep=out, in_keep=inp)
    torch.testing.assert_close(y, wanted)
    grads, expected = (torch.autograd.grad(v.square().sum(), tensors) for v in (y, wanted))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not grads[0][:, ~masks[1].flatten()].any() and not grads[1][~masks[0].flatten()].any()
    small = op(x[:, masks[1].flatten()], weight, bias, **place, out_keep=masks[0].flatten(),
               in_keep=masks[1].flatten(), compact_input=True, compact_output=True)  # fmt: skip
    torch.testing.assert_close(small, y[:, masks[0].flatten()])


@pytest.mark.parametrize("rank", OPS)
def test_gradcheck_and_masked_values_are_not_read(rank):
    op = OPS[rank][0]
    x, weight, bias = made(rank)
    x = x.detach()[:, :, :3].requires_grad_()
    call = lambda x, w, b: op(x, w, b, out_keep=[2, 5], in_keep=[1])  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight, bias))
    with torch.no_grad():
        x[:, [0, 2, 3]] = torch.nan
    assert call(x, weight, bias).isfinite().all()


@pytest.mark.parametrize("rank", OPS)
def test_bad_input(rank):
    op = OPS[rank][0]
    x, weight, bias = made(rank)
    for what, call in {
        f"expected input .* of {rank + 2} dims": lambda: op(x[0], weight),
        "groups=3 does not divide 8": lambda: op(x, weight, groups=3),
        "reads 8 channels": lambda: op(x, weight, groups=2),
        "out_keep as a mask must have shape": lambda: op(x, weight, out_keep=torch.ones(3, dtype=torch.bool)),
        "in_keep must be a bool mask": lambda: op(x, weight, in_keep=torch.ones(2)),
        "must be increasing": lambda: op(x, weight, in_keep=[2, 1]),
        "indices from 0 to 3": lambda: op(x, weight, in_keep=[4]),
        "bias must have shape": lambda: op(x, weight, bias[:2]),
        "reads 4 channels": lambda: op(x[:, :3], weight, in_keep=[0, 1], compact_input=True),
    }.items():
        with pytest.raises(ShapeError, match=what):
            call()
    with pytest.raises(BackendError, match="'cpu' is for masked_conv2d"):
        op(x, weight, backend="cpu")
    assert explain_backend(f"masked_conv{rank}d", x, weight).startswith(f"masked_conv{rank}d: reference")

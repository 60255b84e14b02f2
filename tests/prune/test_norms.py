"""Normalising functions over kept channels equal the plain function over the kept channels alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpd_fast.compact import compact
from cpd_fast.pipeline import comb
from cpd_fast.prune import masked
from cpd_fast.prune.norms import MASKED
from cpd_fast.schedule import random_plan
from cpd_fast.types import NORMALISING, PRODUCTS
from tests.nets import informative, relative_error

KEPT = torch.tensor([True, False, True, True, False, True])
X = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).double()


def test_every_function_that_comb_lets_pass_can_be_masked():
    assert MASKED.keys() == NORMALISING | PRODUCTS


@pytest.mark.parametrize(
    "name,plain,arguments",
    [
        ("mean", torch.mean, {"dim": 1}),
        ("mean", torch.mean, {"dim": (1, 2), "keepdim": True}),
        ("sum", torch.sum, {"dim": 1, "keepdim": True}),
        ("norm", torch.norm, {"p": 2, "dim": 1}),
        ("norm", torch.norm, {"p": 1, "dim": (1, 2), "keepdim": True}),
        ("var", torch.var, {"dim": 1}),
        ("var", torch.var, {"dim": 1, "unbiased": False, "keepdim": True}),
        ("std", torch.std, {"dim": (1, 2)}),
        ("var", torch.var, {"dim": 1, "correction": 2}),
    ],
)
def test_reductions(name, plain, arguments):
    keep = KEPT.double().reshape(1, 6, 1)
    seen = MASKED[name](keep, X, **arguments)
    expected = plain(X[:, KEPT], **arguments)
    assert seen.shape == expected.shape
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)


def test_layer_and_group_norm():
    last = X.transpose(1, 2)
    weight, bias = torch.rand(6).double(), torch.rand(6).double()
    seen = MASKED["layer_norm"](KEPT.double().reshape(1, 1, 6), last, (6,), weight, bias, 1e-3)
    expected = F.layer_norm(last[..., KEPT], (4,), weight[KEPT], bias[KEPT], 1e-3)
    torch.testing.assert_close(seen[..., KEPT], expected)
    keep = torch.tensor([1, 0, 1, 1, 0, 1]).double().reshape(1, 6, 1)
    seen = MASKED["group_norm"](keep, X, 2, weight, bias)
    torch.testing.assert_close(seen[:, KEPT], F.group_norm(X[:, KEPT], 2, weight[KEPT], bias[KEPT]))
    seen = MASKED["rms_norm"](KEPT.double().reshape(1, 1, 6), last, (6,), weight)
    torch.testing.assert_close(seen[..., KEPT], F.rms_norm(last[..., KEPT], (4,), weight[KEPT]))


class OwnNorms(nn.Module):
    """Norms written out by hand: mean and variance, global response, standardised weights, a cosine."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.gamma = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.standardised = nn.Conv2d(8, 6, 1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        response = x.norm(p=2, dim=(2, 3), keepdim=True)
        x = x * self.gamma * response / (response.mean(dim=1, keepdim=True) + 1e-6)
        w = self.standardised.weight
        w = F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True).reshape_as(w)
        return self.last(F.conv2d(x, w).relu()) + self.out(x)


@pytest.mark.parametrize("keep", [0.75, 0.4])
def test_norms_written_by_hand(keep):
    model, x = informative(OwnNorms()).double(), torch.randn(2, 3, 4, 4).double()
    graph = comb(model, x)
    assert {g.name for g in graph.prunable_groups} == {"conv", "standardised"}
    plan = random_plan(graph, keep=keep, generator=torch.Generator().manual_seed(0))
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan) as m:
        assert relative_error(m(x), small(x)) < 1e-10


class NoSubmodules(nn.Module):
    """Parameters and functions only: the model itself is the innermost module of every call."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(2, 8))
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x):
        h = F.linear(x, self.a)
        return F.linear(F.layer_norm(h, h.shape[-1:], self.weight), self.b)


def test_a_model_without_submodules_leaves_no_mode_behind():
    model, x = NoSubmodules().double(), torch.randn(4, 3).double()
    graph = comb(model, x)
    expected = model(x)
    depth = torch._C._len_torch_function_stack()
    with torch.no_grad(), masked(model, graph, random_plan(graph, keep=0.5)) as m:
        m(x)
    assert torch._C._len_torch_function_stack() == depth and torch.equal(model(x), expected)

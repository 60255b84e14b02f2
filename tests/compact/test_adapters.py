"""Forwards that hold sizes, given others by register_adapter; nn.MultiheadAttention has one from the start."""

import copy

import pytest
import torch
from torch import nn

from cpd_fast.adapters import Adapted, adapt
from cpd_fast.comb import register_adapter
from cpd_fast.compact import compact
from cpd_fast.pipeline import comb
from cpd_fast.prune import masked
from cpd_fast.schedule import random_plan
from cpd_fast.types import PrunePlan
from tests.nets import informative, relative_error


class Fixed(nn.Module):
    """Eight inner channels in two halves, whatever the weights say."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 4)

    def forward(self, x):
        y = self.up(x)
        gate = torch.sigmoid(y[..., 4:8])
        return self.down(y[..., :4] * gate)


class Net(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.stem, self.inner, self.out = nn.Linear(3, 4), inner, nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.inner(self.stem(x)))


def prove(model, x, granularity="dim", keep=0.5):
    model, x = informative(model).double(), x.double()
    graph = comb(model, x, granularity=granularity)
    plan = random_plan(graph, keep=keep, generator=torch.Generator().manual_seed(0))
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan) as m:
        assert relative_error(m(x), small(x)) < 1e-12
        assert relative_error(model(x), small(x)) > 1e-3
    return graph, small


def test_a_registered_forward_makes_fixed_sizes_prunable():
    class Mine(Fixed):
        pass

    before, _ = prove(Net(Mine()), torch.randn(5, 3))
    assert {g.name for g in before.prunable_groups} == {"stem", "inner.down"} and "fixed positions" in before[
        "inner.up"
    ].reason

    @register_adapter(Mine)
    def forward(self, x):
        y, gate = self.up(x).chunk(2, -1)
        return self.down(y * torch.sigmoid(gate))

    model = Net(Mine())
    graph, small = prove(model, torch.randn(5, 3))
    assert {g.name for g in graph.prunable_groups} == {"stem", "inner.up", "inner.down"}
    assert small.inner.up.out_features == 4 and isinstance(small.inner, (Adapted, Mine))
    assert type(model.inner) is Mine and "forward" not in vars(model.inner)
    assert small.state_dict().keys() == model.state_dict().keys()
    twin = copy.deepcopy(small)
    twin.train()(torch.randn(5, 3).double()).square().sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_a_module_that_loses_nothing_keeps_its_class_and_a_wrong_argument_is_named():
    class Mine(Fixed):
        pass

    register_adapter(Mine)(lambda self, x: Fixed.forward(self, x))
    model = Net(Mine())
    graph = comb(model, torch.randn(5, 3))
    small = compact(model, graph, PrunePlan({}, graph.fingerprint))
    assert type(small.inner) is Mine
    with pytest.raises(TypeError, match="register_adapter: expected a class of modules, got 3"):
        register_adapter(3)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("extra", [{}, {"batch_first": True}, {"add_bias_kv": True}, {"add_zero_attn": True},
                                   {"kdim": 12, "vdim": 10}, {"bias": False}], ids=str)  # fmt: skip
def test_the_adapter_computes_what_multihead_attention_does(extra, need_weights):
    torch.manual_seed(0)
    plain = informative(nn.MultiheadAttention(16, 4, **extra)).double()
    other = copy.deepcopy(plain)
    adapt(other)
    q, k, v = torch.randn(5, 2, 16), torch.randn(7, 2, extra.get("kdim", 16)), torch.randn(7, 2, extra.get("vdim", 16))
    padding, per_head = torch.rand(2, 7) > 0.7, torch.rand(8, 5, 7) > 0.6
    padding[:, 0] = per_head[:, :, 0] = False
    if extra.get("batch_first"):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    for mask in (None, torch.randn(5, 7).double(), per_head):
        for pad in (None, padding):
            for average in (True, False):
                kw = {"attn_mask": mask, "key_padding_mask": pad, "need_weights": need_weights}
                kw["average_attn_weights"] = average
                (y, w), (z, u) = (m(q.double(), k.double(), v.double(), **kw) for m in (plain, other))
                assert relative_error(y, z) < 1e-12 and (w is None) == (u is None) == (not need_weights)
                assert w is None or relative_error(w, u) < 1e-12
    one = (x[:, 0] if not extra.get("batch_first") else x[0] for x in (q, k, v))
    q, k, v = (x.double() for x in one)
    assert relative_error(plain(q, k, v)[0], other(q, k, v)[0]) < 1e-12
    with pytest.raises(RuntimeError, match="is_causal=True needs attn_mask, got None"):
        other(q, k, v, is_causal=True)


class Pooled(nn.Module):
    """Learned queries attend to the tokens; the weights are an input of the next layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.query = nn.Linear(3, 16), nn.Parameter(torch.randn(1, 4, 16))
        self.attention, self.out = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 2)

    def forward(self, x):
        x = self.embed(x)
        y, weights = self.attention(self.query.expand(len(x), -1, -1), x, x)
        return self.out(y) + weights.mean()


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.Sequential(nn.Linear(3, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 2))


@pytest.mark.parametrize("granularity", ["dim", "head"])
@pytest.mark.parametrize("net", [Pooled, encoder])
def test_inner_dims_and_heads_of_multihead_attention(net, granularity):
    torch.manual_seed(0)
    model = net()
    graph, small = prove(model, torch.randn(2, 5, 3), granularity)
    attention = small.attention if isinstance(small, Pooled) else small[1].layers[0].self_attn
    assert attention.in_proj_weight.shape == (24, 8) and attention.out_proj.weight.shape == (8, 8)
    assert attention.num_heads == (4 if granularity == "dim" else 2)
    x = torch.randn(2, 5, 3).double()
    fast = small.eval()(x)  # with gradients, so without PyTorch's fast path
    with torch.no_grad():
        assert relative_error(small(x), fast) < 1e-12
    compiled = torch.compile(small, backend="aot_eager")
    assert relative_error(compiled(x), fast) < 1e-12

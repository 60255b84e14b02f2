"""Rotary embeddings, grouped queries, and scales that no row can hold: groups by hand, and the proof in numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpd_fast.compact import compact
from cpd_fast.pipeline import comb
from cpd_fast.prune import masked
from cpd_fast.schedule import random_plan
from tests.nets import informative, relative_error

HEADS, HEAD_DIM = 4, 8


def interleaved(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)


def halves(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def sliced_halves(x):
    return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


class Attention(nn.Module):
    """Attention over T tokens with ``kv`` key and value heads; ``rotate`` turns pairs of q and k dims.

    The angles come from a buffer of frequencies, or lie in a buffer as a table of sines and cosines.
    """

    def __init__(self, rotate=None, kv=HEADS, share="gqa", table=False, scale=None):
        super().__init__()
        self.rotate, self.kv, self.share, self.scale, self.head_dim = rotate, kv, share, scale, HEAD_DIM
        self.embed, self.q = nn.Linear(3, 6), nn.Linear(6, HEADS * HEAD_DIM)
        self.k, self.v = nn.Linear(6, kv * HEAD_DIM), nn.Linear(6, kv * HEAD_DIM)
        self.proj, self.head = nn.Linear(HEADS * HEAD_DIM, 6), nn.Linear(6, 2)
        frequency = torch.rand(HEAD_DIM // 2)
        if table:
            angle = self.angles(torch.arange(5.0)[:, None] * frequency)
            self.register_buffer("table", torch.cat([angle.sin(), angle.cos()], -1))
        else:
            self.register_buffer("frequency", frequency)

    def angles(self, a):
        return a.repeat_interleave(2, -1) if self.rotate is interleaved else torch.cat([a, a], -1)

    def turn(self, x):
        if self.rotate is None:
            return x
        if hasattr(self, "table"):
            sin, cos = self.table.chunk(2, -1)
        else:
            angle = self.angles(torch.arange(x.shape[2], dtype=x.dtype)[:, None] * self.frequency)
            sin, cos = angle.sin(), angle.cos()
        return x * cos + self.rotate(x) * sin

    def forward(self, x):
        x = self.embed(x)
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.turn(q), self.turn(k)
        if self.share == "expand":
            times = q.shape[1] // k.shape[1]
            k, v = (y[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for y in (k, v))
        gqa = self.share == "gqa" and self.kv < HEADS
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=gqa)
        return self.head(x + self.proj(y.transpose(1, 2).flatten(2)))


def prove(model, granularity, keep):
    model, x = informative(model).double(), torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)).double()
    graph = comb(model, x, granularity=granularity)
    plan = random_plan(graph, keep=keep, generator=torch.Generator().manual_seed(0))
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan) as m:
        assert relative_error(m(x), small(x)) < 1e-12
        assert relative_error(model(x), small(x)) > 1e-3
    return graph, small


def channels(graph, param):
    """Of each prunable group: its channels, and how many rows of the parameter each one owns."""
    own = [(g, s) for g in graph.prunable_groups for s in g.slices if s.param == param and s.produces]
    return [(g.n_channels, s.index.shape[1]) for g, s in own]


@pytest.mark.parametrize("keep", [0.75, 0.5])
@pytest.mark.parametrize("table", [False, True], ids=["frequencies", "table"])
@pytest.mark.parametrize("scale", [None, 0.3], ids=["default", "stated"])
@pytest.mark.parametrize("rotate", [interleaved, halves, sliced_halves])
def test_pairs_that_turn_together_are_channels(rotate, scale, table, keep):
    graph, small = prove(Attention(rotate, table=table, scale=scale), "dim", keep)
    # a pair of dims, the same one in every head: the angles are shared by the heads
    for layer in ("q", "k"):
        assert (HEAD_DIM // 2, 2 * HEADS) in channels(graph, f"{layer}.weight")
    assert small.q.out_features == small.k.out_features == HEADS * HEAD_DIM * keep
    tables = small.table.shape[1] // 2 if table else 2 * len(small.frequency)
    assert tables == HEAD_DIM * keep


@pytest.mark.parametrize("granularity", ["dim", "head"])
@pytest.mark.parametrize("share", ["gqa", "expand"])
@pytest.mark.parametrize("kv", [1, 2])
def test_query_heads_that_share_keys(kv, share, granularity):
    graph, small = prove(Attention(kv=kv, share=share), granularity, 0.5)
    if granularity == "dim":  # dim d of a key head and of its query heads
        assert channels(graph, "k.weight") == [(kv * HEAD_DIM, 1)]
        assert channels(graph, "q.weight") == [(kv * HEAD_DIM, HEADS // kv)]
        assert (small.k.out_features, small.q.out_features) == (kv * HEAD_DIM // 2, HEADS * HEAD_DIM // 2)
    elif kv == 2:  # a key head goes with its query heads
        assert channels(graph, "q.weight") == [(2, 2 * HEAD_DIM)]
        assert channels(graph, "v.weight") == [(2, HEAD_DIM)]
        assert (small.k.out_features, small.q.out_features) == (HEAD_DIM, 2 * HEAD_DIM)


def test_heads_go_whole_past_a_rotary_table():
    graph, small = prove(Attention(halves, kv=2, table=True), "head", 0.5)
    assert channels(graph, "q.weight") == [(2, 2 * HEAD_DIM)] and small.table.shape == (5, 2 * HEAD_DIM)


def test_the_scale_goes_into_the_call_where_no_row_can_hold_it():
    _, small = prove(Attention(halves), "dim", 0.5)
    assert type(small).__name__ == "ResizedAttention" and small.scaled_calls == {0: HEAD_DIM**-0.5}
    x = torch.randn(2, 5, 3).double()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    assert relative_error(small(x), compiled(x)) < 1e-12
    exported = torch.export.export(small, (x,)).module()
    assert relative_error(small(x), exported(x)) < 1e-12
    graph = comb(small, x)
    again = compact(small, graph, random_plan(graph, keep=0.5))
    assert again.scaled_calls == {0: HEAD_DIM**-0.5} and again.q.out_features == HEADS * HEAD_DIM // 4


class FixedSlice(nn.Module):
    """A slice whose bound does not follow the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.o, self.b, self.p = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.o(self.a(x)[..., :4]) + self.p(self.b(x))


def test_a_slice_that_does_not_follow_keeps_its_axis_and_nothing_else():
    model, x = informative(FixedSlice()).double(), torch.randn(4, 3).double()
    graph = comb(model, x)
    assert "sliced at fixed positions" in graph["a"].reason and [g.name for g in graph.prunable_groups] == ["b"]

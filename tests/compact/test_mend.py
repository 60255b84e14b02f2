"""Attributes are mended where a module fails: few replays, stale caches forgotten, wrong guesses taken back."""

import importlib
import math

import pytest
import torch
from torch import nn

from cpd_fast import comb, compact, masked, random_plan
from tests.nets import relative_error

replay = importlib.import_module("cpd_fast.compact.replay")
mend = importlib.import_module("cpd_fast.compact.mend")


class Attention(nn.Module):
    """Heads and dims in attributes; a table that is cached by the first forward of an instance."""

    def __init__(self, width: int, heads: int, dim: int):
        super().__init__()
        self.heads, self.dim, self.all_dim = heads, dim, heads * dim
        self.qkv, self.proj = nn.Linear(width, 3 * heads * dim), nn.Linear(heads * dim, width)
        self.bias = nn.Parameter(torch.randn(heads, 1, 1))
        self.cache = {}

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2.0
        attention = (q @ k.transpose(-2, -1) * 0.3 + self.cache["bias"]).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(n, t, self.all_dim))


class Stack(nn.Module):
    def __init__(self, depth: int, width: int = 12, heads: int = 3, dim: int = 8):
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Attention(width, heads, dim) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.fixture
def replays(monkeypatch):
    count = []
    run = replay.Replayer.run

    def counted(self, *args):
        count.append(1)
        return run(self, *args)

    monkeypatch.setattr(replay.Replayer, "run", counted)
    return count


def build(*args):
    torch.manual_seed(0)
    return Stack(*args).double().eval(), torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_a_few_replays_mend_any_depth(depth, replays):
    model, x = build(depth)
    graph = comb(model, x)
    assert len(replays) <= 3  # one that mends, one that proves (and one more where calls are resized)
    dims = [g for g in graph.prunable_groups if g.balance is not None]
    assert len(dims) >= depth  # the head dims shrink
    replays.clear()
    for block in model.blocks:
        block.cache.clear()
    plan = random_plan(graph, keep=0.5)
    small = compact(model, graph, plan)
    assert len(replays) <= 3
    with torch.no_grad(), masked(model, graph, plan, execution="full_width") as m:
        for block in model.blocks:
            block.cache.clear()
        assert relative_error(m(x), small(x)) < 1e-10
    for block in small.blocks:
        assert (block.heads, block.dim, block.all_dim) == (3, 4, 12)


def test_equal_numbers_of_different_meaning():
    """heads == dim: only one of the two attributes may change."""
    model, x = build(2, 8, 4, 4)
    graph = comb(model, x)
    plan = random_plan(graph, keep=0.5)
    for block in model.blocks:
        block.cache.clear()
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan, execution="full_width") as m:
        for block in model.blocks:
            block.cache.clear()
        assert relative_error(m(x), small(x)) < 1e-10
    assert {(b.heads, b.dim) for b in small.blocks} == {(4, 2)}


def test_the_model_itself_is_left_alone():
    model, x = build(2)
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    graph = comb(model, x)
    compact(model, graph, random_plan(graph))
    for name, m in model.named_modules():
        assert vars(m).keys() == before[name].keys()
        assert all(vars(m)[k] is v for k, v in before[name].items())


class ScaledByAnAttribute(nn.Module):
    """The attribute that a view needs is also the one whose root the scores are divided by."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.head_size = heads, width // heads
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = (
            f(x).view(n, t, self.heads, self.head_size).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_size)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, c))


@pytest.mark.parametrize("keep", [0.5, 0.3, 0.9, 0.05])
def test_a_scale_that_follows_an_attribute_keeps_it(keep):
    """Whether the residual width and the heads' shrink alike (evenly) or not decides how far each edit gets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 48), *(ScaledByAnAttribute(48, 3) for _ in range(2)), nn.Linear(48, 2))
    model, x = model.double().eval(), torch.randn(2, 7, 5).double()
    graph = comb(model, x)
    assert sum(g.balance is not None for g in graph.prunable_groups) == 4  # q with k, and v, of two blocks
    small = compact(model, graph, plan := random_plan(graph, keep=keep))
    with torch.no_grad(), masked(model, graph, plan, execution="full_width") as m:
        assert relative_error(m(x), small(x)) < 1e-10
    assert small[1].query.out_features == 3 * max(1, round(16 * keep))
    assert isinstance(small[1], ScaledByAnAttribute) and small[1].head_size == 16


def test_a_plan_that_shrinks_everything_alike_is_rehearsed_where_calls_are_resized(monkeypatch):
    """What comb accepts must compact, evenly too: where only the even rehearsal fails, groups are frozen."""
    resize = mend._Mender._resize

    def in_uneven_plans(self, name, module, again, tracer, error):
        kept = {len(c) for c in self._sizes._plan.values()}
        if kept == {24}:
            raise error
        return resize(self, name, module, again, tracer, error)

    monkeypatch.setattr(mend._Mender, "_resize", in_uneven_plans)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 48), ScaledByAnAttribute(48, 3), nn.Linear(48, 2)), torch.randn(2, 7, 5)
    graph = comb(model, x)
    assert {g.reason for g in graph.groups if g.balance is not None} == {"1 holds a size that could not be repaired"}


def test_the_only_dim_left_of_every_head_passes_for_the_head():
    """The biases of the heads stay; v's one dim a head then lies along the dim that they run over."""
    model, x = build(1)
    graph = comb(model, x)
    small = compact(model, graph, plan := random_plan(graph, keep=0.05))
    assert small.blocks[0].qkv.out_features == 3 * 3
    model.blocks[0].cache.clear()
    with torch.no_grad(), masked(model, graph, plan, execution="full_width") as m:
        model.blocks[0].cache.clear()
        assert relative_error(m(x), small(x)) < 1e-10


class Table(nn.Module):
    """Asked by a method, not by its forward; ``fixed`` is a size that is no attribute."""

    def __init__(self, width: int, fixed: bool):
        super().__init__()
        self.width, self.fixed = width, fixed
        self.row = nn.Parameter(torch.randn(width))

    def look_up(self):
        assert len(self.row) == (16 if self.fixed else self.width)
        return self.row


class Asking(nn.Module):
    def __init__(self, fixed: bool):
        super().__init__()
        self.table = Table(16, fixed)
        self.a, self.b, self.c, self.o = nn.Linear(3, 16), nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.o(self.c(self.b(self.a(x) * self.table.look_up()).relu()))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_size_in_a_method_of_another_module_is_mended_there_or_freezes_what_reaches_it(fixed):
    torch.manual_seed(0)
    model, x = Asking(fixed).double(), torch.randn(2, 3).double()
    graph = comb(model, x)
    assert {g.name for g in graph.prunable_groups} == ({"b", "c"} if fixed else {"a", "b", "c"})
    assert not fixed or "table holds a size" in next(g.reason for g in graph.groups if g.name == "a")
    small = compact(model, graph, plan := random_plan(graph, keep=0.5))
    assert small.table.width == len(small.table.row) == (16 if fixed else 8)
    with torch.no_grad(), masked(model, graph, plan, execution="full_width") as m:
        assert relative_error(m(x), small(x)) < 1e-10

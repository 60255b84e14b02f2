"""What users steer: which groups stay, by how much blocks shrink, and what a channel is; masked equals compacted."""

import pytest
import torch
from torch import nn

from cpd_fast import Greedy, Pruner, Target, comb, compact, masked, plan, random_plan, uniform_plan
from cpd_fast.errors import PlanError
from tests.nets import FusedAttention, Grouped, Residual, relative_error


class Chain(nn.Module):
    """Three convs and a head: groups conv1, conv2, conv3."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.conv3(self.conv2(self.conv1(x).relu()).relu()).mean((2, 3)))


class WideGroups(nn.Module):
    """A convolution of 4 groups, 8 -> 12 channels each, between pointwise ones, with a norm."""

    def __init__(self):
        super().__init__()
        self.pw, self.conv, self.bn = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 48, 3, groups=4), nn.BatchNorm2d(48)
        self.out = nn.Conv2d(48, 2, 1)

    def forward(self, x):
        return self.out(self.bn(self.conv(self.pw(x).relu())).relu())


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def proven(model, graph, made, x=X):
    """The compacted model, after it gave what the masked one gives."""
    made.check(graph)
    small = compact(model, graph, made)
    with torch.no_grad(), masked(model, graph, made, execution="full_width") as m:
        assert relative_error(m(x), small(x)) < 1e-10
    return small


def net(kind, *args):
    torch.manual_seed(0)
    return kind(*args).double().eval()


def scores(graph, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.n_channels, generator=g) for group in graph.groups}


# ------------------------------------------------------------------------------------------------- freezing, protecting
@pytest.mark.parametrize(
    ("items", "left"),
    [
        (("conv1",), {"conv2", "conv3"}),
        (("conv?",), set()),
        (("conv1", "conv3"), {"conv2"}),
        (("conv2.weight",), {"conv3"}),  # a parameter: what runs over either of its dims
        (("head",), {"conv1", "conv2"}),
        ((), {"conv1", "conv2", "conv3"}),
    ],
)
def test_freeze_by_name_and_pattern(items, left):
    model = net(Chain)
    graph = comb(model, X.float().double())
    frozen = graph.freeze(*items)
    assert {g.name for g in frozen.prunable_groups} == left
    assert {g.name for g in graph.prunable_groups} == {"conv1", "conv2", "conv3"}  # the graph itself is as it was
    if left:
        made = random_plan(frozen, keep=0.5)
        assert set(made) == left
        proven(model, frozen, made)
        proven(model, graph, made)  # a plan of the frozen graph fits the model as well
        assert set(plan(frozen, scores(frozen), Target(params=0.97))) <= left
    else:
        with pytest.raises(PlanError, match="nothing is prunable"):
            random_plan(frozen)


def test_freeze_takes_modules_of_the_model():
    model = net(Chain)
    graph = comb(model, X)
    assert {g.name for g in graph.freeze(model.conv2, model=model).prunable_groups} == {"conv1", "conv3"}
    with pytest.raises(PlanError, match="pass the model too"):
        graph.freeze(model.conv2)
    with pytest.raises(PlanError, match="Conv2d is not a module of this model"):
        graph.freeze(nn.Conv2d(1, 1, 1), model=model)


def test_what_is_frozen_says_why_and_takes_its_ties_along():
    graph = comb(net(FusedAttention), torch.randn(2, 5, 3).double())
    tied = [g for g in graph.prunable_groups if g.tie]
    assert len(tied) == 2
    frozen = graph.freeze(tied[0].name)
    assert frozen[tied[0].name].reason == "frozen on request"
    assert frozen[tied[1].name].reason == f"keeps as many as {tied[0].name}, which is frozen"


def test_freezing_what_is_not_there_is_an_error():
    graph = comb(net(Chain), X)
    with pytest.raises(PlanError, match=r"freeze: 'conv9' matches no group, module or parameter .* did you mean conv"):
        graph.freeze("conv9")
    with pytest.raises(PlanError, match=r"conv1: 8 channels removed but frozen: frozen on request"):
        random_plan(graph).check(graph.freeze("conv1"))


@pytest.mark.parametrize(
    ("ends", "left"),
    [
        (("first",), {"conv2", "conv3"}),
        (("last",), {"conv1", "conv2"}),
        (("first", "last"), {"conv2"}),
        ((), {"conv1", "conv2", "conv3"}),
    ],
)
def test_protect_first_and_last(ends, left):
    model = net(Chain)
    graph = comb(model, X, protect=ends)
    assert {g.name for g in graph.prunable_groups} == left
    proven(model, graph, random_plan(graph))


def test_protect_keeps_a_residual_stream_and_refuses_other_words():
    model = net(Residual)
    graph = comb(model, X, protect="first")
    assert "stem" not in {g.name for g in graph.prunable_groups} and graph.prunable_groups
    assert graph["stem"].reason == "of the first layer, which is protected"
    with pytest.raises(PlanError, match="protect: expected some of first, last, got 'middle'"):
        comb(model, X, protect="middle")


# ----------------------------------------------------------------------------------------------------- how much may go
@pytest.mark.parametrize("maker", ["plan", "uniform", "random"])
@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"min_channels": 10}, {"conv1": 10, "conv2": 10, "conv3": 10}),
        ({"min_channels": 0.75}, {"conv1": 12, "conv2": 18, "conv3": 24}),
        ({"min_channels": {"conv1": 14, "conv[23]": 0.5}}, {"conv1": 14, "conv2": 12, "conv3": 16}),
        ({"min_channels": {"conv1": 14, "*": 2}}, {"conv1": 14, "conv2": 2, "conv3": 2}),
        ({"max_pruning_ratio": {"conv3": 0.25}}, {"conv1": 1, "conv2": 1, "conv3": 24}),
        ({"max_pruning_ratio": {"head": 0.5, "conv3": 0.25}}, {"conv1": 1, "conv2": 1, "conv3": 24}),
        ({"max_pruning_ratio": 0.5, "min_channels": {"conv2": 16}}, {"conv1": 8, "conv2": 16, "conv3": 16}),
        ({"max_pruning_ratio": 0.6, "round_to": 8}, {"conv1": 8, "conv2": 16, "conv3": 16}),
    ],
)
def test_minima_and_ratios_a_group(maker, options, least):
    model = net(Chain)
    graph = comb(model, X)
    if maker == "plan":  # as far down as it goes: the least params that the error names
        with pytest.raises(PlanError, match="cannot be reached") as e:
            plan(graph, scores(graph), Target(params=1e-3), **options)
        reach = float(str(e.value).split("cannot be reached: ")[1].split(" ")[0])
        made = plan(graph, scores(graph), Target(params=reach), **options)
    elif maker == "uniform":
        made = uniform_plan(graph, scores(graph), 0.05, **options)
    else:
        made = random_plan(graph, 0.05, **options)
    kept = {g.name: len(made.get(g.name, range(g.n_channels))) for g in graph.prunable_groups}
    ratio_only = "round_to" not in options and maker != "plan"
    for name, count in kept.items():
        assert count >= least[name]
        assert count == least[name] or (ratio_only and least[name] == 1 and count <= 2)  # 5 % of 32
    proven(model, graph, made)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"min_channels": {"conv9": 3}}, "min_channels: 'conv9' matches no group"),
        ({"max_pruning_ratio": {"nope.*": 0.5}}, "max_pruning_ratio: 'nope"),
        ({"min_channels": 1.5}, "min_channels: expected a whole number from 1, or a fraction"),
        ({"max_pruning_ratio": {"conv1": -0.1}}, r"expected in \[0, 1\] for 'conv1', got -0.1"),
        ({"round_to": 64}, "round_to=64: nothing can go, the largest block .* has 32 channels"),
    ],
)
def test_impossible_options_are_refused(options, match):
    graph = comb(net(Chain), X)
    with pytest.raises(PlanError, match=match):
        random_plan(graph, **options)


# ------------------------------------------------------------------------------------- rounding inside heads and groups
def test_rounding_inside_heads():
    model, x = net(FusedAttention, 2, 24), torch.randn(2, 5, 3).double()
    graph = comb(model, x)
    small = proven(model, graph, random_plan(graph, keep=0.7, round_to=8), x)
    assert small.head_dim == 16 and small.heads == 2  # 0.7 * 24 = 17 -> 16 dims of each head


@pytest.mark.parametrize("maker", [random_plan, lambda g, **o: plan(g, scores(g), Target(params=0.55), **o)])
def test_rounding_inside_conv_groups(maker):
    model = net(WideGroups)
    graph = comb(model, X)
    small = proven(model, graph, maker(graph, round_to=4))
    conv = small.conv
    assert conv.groups == 4 and conv.in_channels // 4 % 4 == 0 and conv.out_channels // 4 % 4 == 0
    assert conv.weight.numel() < model.conv.weight.numel()


# --------------------------------------------------------------------------------------------------------- granularity
@pytest.mark.parametrize("kind", [Grouped, WideGroups])
def test_whole_conv_groups(kind):
    model = net(kind)
    graph = comb(model, X, conv_groups="group")
    (group,) = graph.prunable_groups
    assert group.n_channels == model.conv.groups and group.balance is None
    half = model.conv.groups // 2
    small = proven(model, graph, random_plan(graph, keep=0.5))
    assert small.conv.groups == half
    assert small.conv.weight.shape == (model.conv.out_channels // 2, *model.conv.weight.shape[1:])
    one = proven(model, graph, random_plan(graph, keep=1 / model.conv.groups))
    assert one.conv.groups == 1


def test_whole_conv_groups_and_whole_heads_reach_every_door():
    model = net(WideGroups)
    pruner = Pruner(model, X, Target(params=0.6), schedule=Greedy(1, 1), conv_groups="group")
    assert pruner.graph["pw"].n_channels == 4
    model = FusedAttention(4, 4)
    pruner = Pruner(model, torch.randn(2, 5, 3), Target(params=0.7), granularity="head", ignore=["proj_in"])
    assert {g.n_channels for g in pruner.graph.prunable_groups} == {4}


def test_whole_heads():
    model, x = net(FusedAttention, 4, 4), torch.randn(2, 5, 3).double()
    graph = comb(model, x, granularity="head")
    small = proven(model, graph, random_plan(graph, keep=0.5), x)
    assert small.heads == 2 and small.head_dim == 4


def test_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match="conv_groups: expected one of channel, group, got 'all'"):
        comb(net(Grouped), X, conv_groups="all")


def test_pruner_obeys_minima_rounding_and_protection():
    model = Chain().train()
    x = X.float()
    pruner = Pruner(
        model, x, Target(params=0.6), schedule=Greedy(1, 1), protect=["first"], round_to=8, min_channels={"conv3": 24}
    )
    model(x).square().mean().backward()
    pruner.step()
    small = pruner.compact()
    assert small.conv1.out_channels == 16 and small.conv3.out_channels in (24, 32)
    assert small.conv2.out_channels % 8 == 0 and small.conv2.out_channels < 24


# -------------------------------------------------------------------------------------------------------------- reading
def test_table_and_explanation_say_what_goes_with_what():
    graph = comb(net(Residual), X)
    text = str(graph)
    assert "goes with" in text and "conv2" in text.split("stem")[1].split("\n")[0]
    told = graph.explain("conv1.weight")
    assert "conv1.weight (8x6x3x3):" in told
    assert "produces 8 channels of conv1 (prunable)" in told and "goes with bn1" in told and "is read by conv2" in told
    assert "consumes 6 channels of stem (prunable)" in told
    assert "bn1.weight (8)" in graph.explain("bn1")  # a module: all that it holds
    grouped = comb(net(WideGroups), X)
    assert "limit: 4 blocks of 12, which must all keep equally many" in grouped.explain("conv.weight")
    tied = comb(net(FusedAttention), torch.randn(2, 5, 3).double())
    assert "limit: keeps as many a block as" in tied.explain("qkv.weight")
    assert "did you mean conv1.weight" in graph.explain("conv1.wieght")


def test_as_dict_is_the_graph():
    import json

    graph = comb(net(Residual), X)
    doc = json.loads(json.dumps(graph.as_dict()))
    assert [g["name"] for g in doc["groups"]] == [g.name for g in graph.groups]
    stem = next(g for g in doc["groups"] if g["name"] == "stem")
    assert {"name": "conv1.weight", "dims": [1], "produces": False, "indices": 1} in stem["tensors"]


class WithAuxiliaryHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 8), nn.Linear(8, 2)
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), nn.Linear(8, 2)])
        self.spare = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        y = self.a(x)
        return self.o(y) + self.heads[1](y)


def test_what_the_forward_never_uses_is_said():
    """It keeps its shape; whether it fits afterwards, nobody knows."""
    graph = comb(WithAuxiliaryHead(), torch.zeros(2, 3))
    assert graph.unused == ("spare", "heads.0.0.weight", "heads.0.0.bias", "heads.0.1.weight", "heads.0.1.bias")
    assert "never used by the forward, which keeps its shape: spare, heads.0. Where" in str(graph)
    for name in ("heads.0", "heads.0.1.bias", "spare"):
        assert f"{name}: the forward on the example inputs never uses it" in graph.explain(name)
    assert "never uses" not in graph.explain("heads.1.bias") and graph.as_dict()["unused"] == list(graph.unused)

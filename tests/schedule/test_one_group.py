"""The released schedule, held against its rule written out, and Greedy's ramps."""

import math

import pytest
import torch
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import PlanError
from cpd_fast.schedule import Greedy, OneGroup, holds
from tests.helpers import grouped

X = torch.zeros(1, 3, 8, 8)
NONE = {"final": None, "dense": {}, "options": {}}


def conv_net(*widths):
    layers = []
    for a, b in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(a, b, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 4, 1))


def next_plan(schedule, graph, scores, start=None, **options):
    start = start if start is not None else cpd.PrunePlan({}, graph.fingerprint)
    return schedule.next_plan(1, graph, scores, cpd.Target(macs=0.5), {}, start, options)


def test_the_group_whose_k_lowest_sum_to_least_loses_them():
    graph = cpd.comb(conv_net(64, 16), X)
    a, b = (g.name for g in graph.prunable_groups)
    scores = {a: torch.linspace(1, 2, 64), b: torch.full((16,), 3.9)}
    assert OneGroup().channels_of(graph, graph[a], 64) == 4 and OneGroup().channels_of(graph, graph[b], 16) == 1
    # four of the first sum to 4.1, one of the second is 3.9: that one goes, although it is worth more than each
    assert sum(scores[a][:4]) > 3.9 > scores[a][0]
    plan = next_plan(OneGroup(), graph, scores)
    assert set(plan) == {b} and len(plan[b]) == 15
    scores[b] += 1
    plan = next_plan(OneGroup(), graph, scores)
    assert plan[a] == tuple(range(4, 64)) and b not in plan
    again = next_plan(OneGroup(), graph, scores, plan)
    assert again[a] == tuple(range(6, 64)) and b not in again  # 60 are left: k is 2 now


@pytest.mark.parametrize(("left", "k"), [(1, 1), (15, 1), (16, 1), (31, 1), (32, 2), (63, 2), (64, 4), (512, 4)])
def test_k_of_plain_groups(left, k):
    graph = cpd.comb(conv_net(8), X)
    assert OneGroup().channels_of(graph, graph.prunable_groups[0], left) == k
    assert k == max(1, min(2 ** math.floor(math.log2(max(left, 1) / 16)), 4))


def test_one_of_every_conv_group():
    _, graph = grouped()
    scores = {g.name: torch.rand(g.n_channels) for g in graph.groups}
    plan = next_plan(OneGroup(), graph, scores)
    plan.check(graph)
    (name,) = plan
    assert graph[name].n_channels - len(plan[name]) == 4


def test_k_of_a_transformer():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    graph = cpd.comb(model, torch.zeros(1, 3, 32, 32))
    k = {g.name: OneGroup().channels_of(graph, g, 100) for g in graph.prunable_groups}
    assert k["blocks.0.mlp.fc1"] == 32
    embedding = next(g for g in graph.prunable_groups if g.n_channels == 192 and g.balance is None)
    assert k[embedding.name] == 3  # heads
    assert all(k[g.name] == 1 for g in graph.prunable_groups if g.balance is not None)
    assert OneGroup(k={"blocks.*": 5}).channels_of(graph, graph["blocks.0.mlp.fc1"], 100) == 5


def test_in_a_training_loop_until_the_target_holds():
    model = conv_net(16, 16)
    pruner = cpd.Pruner(model, X, cpd.Target(macs=0.6), schedule=OneGroup(interval=2, warmup=3))
    before = pruner.plan
    for i in range(200):
        if pruner.done:
            break
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        changed = pruner.step()
        assert changed == (i >= 3 and (i - 3) % 2 == 1)
        if changed:
            assert (
                sum(16 - len(pruner.plan.get(g.name, range(16))) for g in pruner.graph.prunable_groups) == (i - 2) // 2
            )
    assert pruner.done and pruner.plan != before
    assert holds(pruner.graph, cpd.Target(macs=0.6), pruner.plan)
    resumed = cpd.Pruner(conv_net(16, 16), X, cpd.Target(macs=0.6), schedule=OneGroup(interval=2, warmup=3))
    assert not resumed.done
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.done


def test_messages():
    graph = cpd.comb(conv_net(4, 4), X)
    scores = {g.name: torch.rand(4) for g in graph.prunable_groups}
    with pytest.raises(PlanError, match="OneGroup: per_cost: the released rule knows only max_pruning_ratio"):
        next_plan(OneGroup(), graph, scores, per_cost="macs")
    with pytest.raises(
        PlanError, match="every group is down to min_channels=4 or .* does not hold yet; raise the target"
    ):
        next_plan(OneGroup(), graph, scores, min_channels=4)
    with pytest.raises(PlanError, match="interval and every k must be at least 1"):
        OneGroup(interval=0)
    with pytest.raises(PlanError, match="warmup must be at least 0 iterations, got -1"):
        Greedy(warmup=-1)


def test_cosine_is_slow_at_both_ends():
    ramp = [Greedy(steps=4, ramp="cosine").progress(i) for i in range(5)]
    assert ramp == pytest.approx([0, 0.14645, 0.5, 0.85355, 1], abs=1e-5)

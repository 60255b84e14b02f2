"""Candidates lie on the limit exactly, whatever is drawn."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cpd_fast as cpd
from cpd_fast.errors import PlanError
from cpd_fast.models import SmallResNet
from cpd_fast.schedule import CandidateSpace, plan_cost
from tests.nets import NETS

FIELDS = {"params": "params", "macs": "macs", "memory": "activation_bytes"}


def combed(build, shape):
    torch.manual_seed(0)
    net = build().eval()
    graph = cpd.comb(net, torch.zeros(shape))
    return net, graph, cpd.score(net, graph, criterion=cpd.Magnitude(p=1))


@pytest.fixture(scope="module")
def resnet():
    return combed(lambda: SmallResNet(10, widths=(16, 32, 64), blocks=2), (1, 1, 28, 28))


def steps_up(space, counts):
    """Every plan with one more step of one unit."""
    for u, (size, low) in enumerate(zip(space.sizes, space.lowest, strict=True)):
        ladder = [int(s) for s in space._steps[u]]
        assert ladder[0] >= round(low * size) and ladder[-1] == size
        at = ladder.index(counts[u])
        if at + 1 < len(ladder):
            yield [*counts[:u], ladder[at + 1], *counts[u + 1 :]]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([("macs",), ("params",), ("memory",), ("macs", "params")]),
    share=st.floats(0.05, 1.0),
    ratios=st.lists(st.floats(0.01, 1.0), min_size=9, max_size=9),
    round_to=st.sampled_from([1, 2, 4]),
    max_ratio=st.sampled_from([0.5, 0.8, 0.95]),
)
def test_every_candidate_is_on_the_limit_and_tight(resnet, kind, share, ratios, round_to, max_ratio):
    net, graph, scores = resnet
    target = cpd.Target(**dict.fromkeys(kind, share))
    try:
        space = CandidateSpace(graph, scores, target, round_to=round_to, max_pruning_ratio=max_ratio)
    except PlanError as e:
        assert "cannot be reached: the range is" in str(e)
        return
    counts = space.counts(ratios)
    plan = space.plan(counts)
    plan.check(graph)
    cost, dense = plan_cost(graph, plan), plan_cost(graph)
    assert cost == space.cost(counts)
    over = [getattr(cost, FIELDS[k]) > share * getattr(dense, FIELDS[k]) * (1 + 1e-9) for k in kind]
    assert not any(over)
    for more in steps_up(space, counts):
        cost = plan_cost(graph, space.plan(more))
        assert any(getattr(cost, FIELDS[k]) > share * getattr(dense, FIELDS[k]) * (1 + 1e-9) for k in kind)
    for group, kept in plan.items():
        n = graph[group].n_channels
        assert len(kept) >= n - int(max_ratio * n + 1e-9) and (len(kept) % round_to == 0 or len(kept) == n)


def test_the_cost_is_that_of_the_network_that_is_built(resnet):
    net, graph, scores = resnet
    space = CandidateSpace(graph, scores, cpd.Target(macs=0.5))
    rng = np.random.default_rng(0)
    for _ in range(3):
        counts = space.counts(space.draw(rng))
        built = cpd.compact(net, graph, space.plan(counts))
        assert cpd.cost(built, torch.zeros(1, 1, 28, 28)) == space.cost(counts)


@pytest.mark.parametrize("name", sorted(NETS))
def test_balance_and_ties_of_every_rule(name):
    build, shape, _ = NETS[name]
    net, graph, scores = combed(build, shape)
    if not graph.prunable_groups:
        pytest.skip("nothing is prunable")
    space = CandidateSpace(graph, scores, cpd.Target(params=0.9), max_pruning_ratio=1.0)
    rng = np.random.default_rng(0)
    for _ in range(4):
        plan = space.plan(space.counts(space.draw(rng)))
        plan.check(graph)  # equal blocks, equal ties
        assert plan_cost(graph, plan).params <= 0.9 * plan_cost(graph).params


def test_proportions_are_kept(resnet):
    _, graph, scores = resnet
    space = CandidateSpace(graph, scores, cpd.Target(macs=0.5))
    wanted = np.array([0.9, 0.5, 0.5, 0.9, 0.9, 0.5, 0.9, 0.9, 0.5])
    got = np.array(space.counts(wanted)) / np.array(space.sizes)
    scale = got / wanted
    assert scale.max() / scale.min() < 1.15  # whole channels
    assert space.counts(wanted) == space.counts(wanted * 0.3)


def test_channels_with_the_highest_scores_stay(resnet):
    _, graph, scores = resnet
    space = CandidateSpace(graph, scores, cpd.Target(macs=0.5))
    plan = space.plan(space.counts([1.0] * 9))
    for group, kept in plan.items():
        lost = set(range(graph[group].n_channels)) - set(kept)
        assert min(scores[group][list(kept)]) >= max(scores[group][list(lost)])


def test_latency_is_a_limit_like_any_other(resnet):
    _, graph, scores = resnet

    def latency(plan):
        return plan_cost(graph, plan).params / 1000

    space = CandidateSpace(graph, scores, cpd.Target(latency_ms=0.5, macs=0.9), latency=latency)
    counts = space.counts(space.draw(np.random.default_rng(3)))
    dense = latency(cpd.PrunePlan({}, graph.fingerprint))
    assert latency(space.plan(counts)) <= dense / 2
    for more in steps_up(space, counts):
        assert latency(space.plan(more)) > dense / 2


def test_a_target_that_everything_meets_is_the_dense_network(resnet):
    _, graph, scores = resnet
    space = CandidateSpace(graph, scores, cpd.Target(macs=1.0))
    assert space.counts([0.2, *[1.0] * 8]) == space.sizes and not len(space.plan(space.sizes))


def test_unreachable_target_says_the_range(resnet):
    _, graph, scores = resnet
    with pytest.raises(PlanError, match=r"macs=0\.01 cannot be reached: the range is 0\.2\d+ to 1 .*raise the target"):
        CandidateSpace(graph, scores, cpd.Target(macs=0.01), max_pruning_ratio=0.5)
    with pytest.raises(PlanError, match=r"params=2000 cannot be reached: the range is \d+ to 174970"):
        CandidateSpace(graph, scores, cpd.Target(params=2000), max_pruning_ratio=0.5)


@pytest.mark.parametrize("ratios", [[1.0], [0.5] * 8 + [0.0], [0.5] * 8 + [float("nan")]])
def test_wrong_ratios(resnet, ratios):
    _, graph, scores = resnet
    with pytest.raises(PlanError, match=r"ratios: expected 9 positive numbers, one a unit \(stem\.0"):
        CandidateSpace(graph, scores, cpd.Target(macs=0.5)).counts(ratios)

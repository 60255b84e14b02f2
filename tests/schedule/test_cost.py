import time

import numpy as np
import pytest
import torch

from cpd_fast.errors import PlanError
from cpd_fast.schedule.cost import plan_cost
from cpd_fast.types import Cost, CostTerm, CoupledGroup, PrunePlan, TensorMap
from tests.helpers import Grouped, build_graph, grouped, hand_graph, two_conv


def brute_force(graph, plan):
    """Every tensor's full boolean mask, counted element by element."""
    alive = graph.alive(plan)
    total = {"params": graph.untouched, "macs": 0, "activation_bytes": 0}
    for t in graph.tensors.values():
        keep = np.ones(t.shape, bool)
        for m in t.maps:
            keep &= np.broadcast_to(alive[m], t.shape)
        total["params"] += int(keep.sum()) * t.is_parameter
    for term in graph.terms:
        keep = np.ones(np.broadcast_shapes(*(m.shape for m in term.maps)) if term.maps else (), bool)
        for m in term.maps:
            keep &= alive[m]
        total[term.kind] += term.coefficient * int(keep.sum())
    return Cost(**total)


def test_dense_costs_equal_the_model():
    model, graph = two_conv()
    cost = plan_cost(graph)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.macs == 64 * 9 * 8 * 3 + 9 * 9 * 8 * 6 + 4 * 6
    assert cost.activation_bytes == 2 * 256 * 8 + 36 * 6 + 16


def test_costs_of_a_plan_by_hand():
    _, graph = two_conv()
    cost = plan_cost(graph, PrunePlan({"conv1": [0, 3, 7], "conv2": [1, 2]}, "hand"))
    conv1, bn1, conv2, fc = 3 * 3 * 9 + 3, 2 * 3, 2 * 3 * 9 + 2, 4 * 2 + 4
    assert cost.params == conv1 + bn1 + conv2 + fc
    assert cost.macs == 64 * 9 * 3 * 3 + 9 * 9 * 3 * 2 + 4 * 2
    assert cost.activation_bytes == 2 * 256 * 3 + 36 * 2 + 16


def test_grouped_convolution_counts_pairs():
    _, graph = grouped()
    plan = PrunePlan({"conv1": [0, 3, 5, 6], "conv2": [0, 1, 4, 5, 6, 7, 9, 11]}, "hand")
    small = Grouped()
    small.conv1 = torch.nn.Conv2d(3, 4, 1)
    small.conv2 = torch.nn.Conv2d(4, 8, 3, groups=4)
    small.fc = torch.nn.Linear(8, 4)
    cost = plan_cost(graph, plan)
    assert cost.params == sum(p.numel() for p in small.parameters())
    assert cost.macs == 64 * 4 * 3 + 64 * 9 * 8 + 4 * 8


@pytest.mark.parametrize("seed", range(8))
def test_random_maps_against_counting_every_element(seed):
    """Maps of any dims, several on one dim, joined, constant, of fewer dims than the tensor, with -1 inside."""
    rng = np.random.default_rng(seed)
    n, shape = 6, (3, 4, 2)
    group = CoupledGroup("g", "g", n, 0, ())

    def maps():
        kinds = [(3, 1, 1), (1, 4, 1), (3, 4, 1), (3, 1, 2), (2,), (1, 1, 1)]
        return tuple(rng.integers(-1, n, kinds[i]) for i in rng.integers(0, len(kinds), rng.integers(0, 4)))

    tensors = {f"t{i}": TensorMap(f"t{i}", shape, maps(), i % 3 > 0) for i in range(12)}
    terms = tuple(
        CostTerm(("macs", "activation_bytes")[i % 2], "m", int(rng.integers(1, 9)), maps()) for i in range(12)
    )
    graph = hand_graph((group,), tensors, terms, 5)
    for _ in range(4):
        kept = np.flatnonzero(rng.random(n) < 0.6)
        plan = PrunePlan({"g": kept}, "hand")
        assert plan_cost(graph, plan) == brute_force(graph, plan)


def test_a_group_the_graph_lacks_is_an_error():
    _, graph = two_conv()
    with pytest.raises(PlanError, match="no coupled group is named 'conv3'; did you mean conv"):
        plan_cost(graph, PrunePlan({"conv3": [0]}, "hand"))


def test_fast_enough_to_plan_with():
    """ResNet-50's size: 54 groups, 161 tensors, 400 terms; planning asks dozens of times."""
    groups = {f"g{i}": {"n": 512} for i in range(54)}
    shapes = {f"w{i}": (512, 512, 3, 3) for i in range(161)}
    axes = {f"w{i}": {0: f"g{i % 54}", 1: f"g{(i + 1) % 54}"} for i in range(161)}
    macs = [(f"m{i}", 7, (f"g{i % 54}", f"g{(i * 3) % 54}")) for i in range(400)]
    graph = build_graph(None, groups, axes, macs, shapes=shapes)
    assert plan_cost(graph).params == 161 * 512 * 512 * 9
    plan = PrunePlan({f"g{i}": range(100) for i in range(54)}, "hand")
    best = min(_timed(graph, plan) for _ in range(5))
    assert best < 0.05  # about a millisecond on an idle core


def _timed(graph, plan):
    start = time.perf_counter()
    plan_cost(graph, plan)
    return time.perf_counter() - start

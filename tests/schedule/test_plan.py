import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd_fast.errors import PlanError, ScoreError
from cpd_fast.schedule.cost import plan_cost
from cpd_fast.schedule.plan import plan, random_plan, uniform_plan
from cpd_fast.types import PrunePlan, Scores, Target
from tests.helpers import build_graph, grouped, mlp, two_conv


def scores_of(graph, values=None, seed=0, **info):
    g = torch.Generator().manual_seed(seed)
    made = {x.name: torch.rand(x.n_channels, generator=g) for x in graph.groups}
    made |= {k: torch.tensor(v, dtype=torch.float32) for k, v in (values or {}).items()}
    return Scores(made, criterion="test", fingerprint=graph.fingerprint, info=info)


def flat_graph(sizes, weights=None, **extra):
    """Independent groups; a channel of group i costs ``weights[i]`` parameters."""
    weights = weights or [1] * len(sizes)
    groups = {f"g{i}": {"n": n, **extra.get(f"g{i}", {})} for i, n in enumerate(sizes)}
    shapes = {f"p{i}": (n, w) for i, (n, w) in enumerate(zip(sizes, weights, strict=True))}
    axes = {f"p{i}": {0: f"g{i}"} for i in range(len(sizes))}
    return build_graph(None, groups, axes, shapes=shapes)


def removed(graph, made):
    return {(g.name, c) for g in graph.groups for c in range(g.n_channels) if c not in made.get(g.name, range(10**6))}


# ------------------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("seed", range(6))
def test_equal_costs_exhaustive_search_finds_nothing_better(seed):
    """Where every channel costs the same, the threshold is the optimum over all plans."""
    graph = flat_graph([3, 4, 2])
    scores = scores_of(graph, seed=seed)
    for keep in (3, 5, 7):
        best = None
        choices = [
            [c for r in range(1, g.n_channels + 1) for c in itertools.combinations(range(g.n_channels), r)]
            for g in graph.groups
        ]
        for combo in itertools.product(*choices):
            if sum(map(len, combo)) <= keep:
                lost = sum(
                    float(scores[g.name].double().sum() - scores[g.name][list(c)].double().sum())
                    for g, c in zip(graph.groups, combo, strict=True)
                )
                best = lost if best is None else min(best, lost)
        made = plan(graph, scores, Target(params=keep / 9), max_pruning_ratio=1.0)
        lost = sum(float(scores[g][c]) for g, c in removed(graph, made))
        assert sum(len(made.get(g.name, range(g.n_channels))) for g in graph.groups) == keep
        assert lost == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_is_the_highest_feasible_threshold_filled_up(seed):
    """Against trying every threshold on nets whose costs interact."""
    _, graph = mlp(widths=(5, 7, 6, 4, 3))
    scores = scores_of(graph, seed=seed)
    for macs in (0.7, 0.4, 0.15):
        made = plan(graph, scores, Target(macs=macs), max_pruning_ratio=1.0)
        ranked = sorted((float(s), g, c) for g in scores for c, s in enumerate(scores[g].tolist()))
        for n in range(len(ranked)):
            gone = {(g, c) for _, g, c in ranked[:n]}
            kept = {g: [c for c in range(len(scores[g])) if (g, c) not in gone] for g in scores}
            kept = {g: c or [int(scores[g].argmax())] for g, c in kept.items()}
            candidate = PrunePlan(kept, "hand")
            if plan_cost(graph, candidate).macs <= macs * plan_cost(graph).macs:
                break
        for _, g, c in reversed(ranked[:n]):  # what fits is given back, the highest first, a group from its top down
            above = [s for s, other, k in ranked[:n] if other == g and k not in kept[g] and s > scores[g][c]]
            more = PrunePlan({**kept, g: sorted({*kept[g], c})}, "hand")
            if not above and plan_cost(graph, more).macs <= macs * plan_cost(graph).macs:
                kept = dict(more)
        assert plan_cost(graph, made) == plan_cost(graph, PrunePlan(kept, "hand"))
        assert removed(graph, made) == removed(graph, PrunePlan(kept, "hand"))


@pytest.mark.parametrize("round_to", [1, 4])
def test_nothing_that_was_removed_would_still_fit(round_to):
    """One step of a wide layer saves much more than one of a narrow one, and the last one too much."""
    _, graph = mlp(widths=(8, 64, 8, 32, 8))
    for seed in range(6):
        scores = scores_of(graph, seed=seed)
        limit = 0.5 * plan_cost(graph).macs
        made = plan(graph, scores, Target(macs=0.5), round_to)
        assert plan_cost(graph, made).macs <= limit
        for name, kept in made.items():
            gone = sorted({*range(len(scores[name]))} - {*kept}, key=lambda c: -float(scores[name][c]))  # noqa: B023
            more = PrunePlan({**made, name: sorted({*kept, *gone[:round_to]})}, "hand")
            assert plan_cost(graph, more).macs > limit, (seed, name)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_balanced_and_tied_graphs(data):
    """Every result passes plan.check, meets the target, rounds, and respects the floors."""
    n_groups = data.draw(st.integers(1, 4))
    groups, shapes, axes = {}, {}, {}
    for i in range(n_groups):
        size, blocks = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 3))
        perm = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(np.repeat(np.arange(blocks), size))
        balance = perm if blocks > 1 else None
        tied = data.draw(st.booleans())
        for part in range(2 if tied else 1):
            name = f"g{i}.{part}"
            groups[name] = {"n": size * blocks, "balance": balance, "tie": f"t{i}" if tied else None}
            shapes[f"p{i}.{part}"], axes[f"p{i}.{part}"] = (size * blocks, 3), {0: name}
    graph = build_graph(None, groups, axes, shapes=shapes)
    scores = scores_of(graph, seed=data.draw(st.integers(0, 999)))
    fraction = data.draw(st.floats(0.05, 1))
    options = {
        "round_to": data.draw(st.integers(1, 4)),
        "min_channels": data.draw(st.integers(1, 3)),
        "max_pruning_ratio": data.draw(st.sampled_from([0.5, 0.95, 1.0])),
        "normalize": data.draw(st.sampled_from(["none", "mean", "max"])),
        "per_cost": data.draw(st.sampled_from([None, "params"])),
    }
    try:
        made = plan(graph, scores, Target(params=fraction), **options)
    except PlanError as e:
        assert "cannot be reached" in str(e)
        return
    made.check(graph)
    assert plan_cost(graph, made).params <= fraction * plan_cost(graph).params * (1 + 1e-9)
    for g in graph.groups:
        block = g.n_channels // len(g.blocks)
        count = len(made.get(g.name, range(g.n_channels))) // len(g.blocks)
        assert count == block or count % options["round_to"] == 0
        assert count >= min(block, options["min_channels"])
        assert block - count <= options["max_pruning_ratio"] * block
        for b in g.blocks:  # inside a block the kept channels are those with the highest scores
            kept = [c for c in b if c in made.get(g.name, range(g.n_channels))]
            gone = [c for c in b if c not in kept]
            assert not gone or max(scores[g.name][gone]) <= min(scores[g.name][kept])
    assert plan(graph, scores, Target(params=fraction), **options) == made
    for maker in (uniform_plan(graph, scores, fraction), random_plan(graph, fraction)):
        maker.check(graph)
    again = plan(graph, scores_of(graph, seed=1), Target(params=fraction), start=made, **options)
    assert removed(graph, again) >= removed(graph, made)


# ---------------------------------------------------------------------------------------------------- single behaviours


def test_by_hand():
    graph = flat_graph([4, 3])
    scores = scores_of(graph, {"g0": [5, 1, 6, 2], "g1": [9, 3, 1.5]})
    made = plan(graph, scores, Target(params=4))
    assert dict(made) == {"g0": (0, 2), "g1": (0, 1)}


def test_target_one_keeps_everything():
    _, graph = two_conv()
    made = plan(graph, scores_of(graph), Target(params=1.0, macs=1))
    assert dict(made) == {}


def test_every_limit_holds():
    _, graph = two_conv()
    made = plan(graph, scores_of(graph), Target(params=0.8, macs=0.6, memory=0.9))
    cost, dense = plan_cost(graph, made), plan_cost(graph)
    assert cost.params <= 0.8 * dense.params
    assert cost.macs <= 0.6 * dense.macs
    assert cost.activation_bytes <= 0.9 * dense.activation_bytes


def test_balanced_steps_remove_one_from_each_block_ranked_by_their_sum():
    graph = flat_graph([4, 4], g0={"balance": [0, 0, 1, 1]})
    scores = scores_of(graph, {"g0": [1, 7, 3, 8], "g1": [3.5, 5, 6, 7]})
    made = plan(graph, scores, Target(params=7 / 8))
    assert dict(made) == {"g1": (1, 2, 3)}  # 3.5 < 1 + 3
    made = plan(graph, scores, Target(params=5 / 8))
    assert dict(made) == {"g0": (1, 3), "g1": (1, 2, 3)}


def test_tied_groups_shrink_together_at_their_own_positions():
    graph = flat_graph([4, 4], g0={"balance": [0, 0, 1, 1], "tie": "a"}, g1={"balance": [0, 1, 0, 1], "tie": "a"})
    scores = scores_of(graph, {"g0": [1, 2, 4, 3], "g1": [1, 2, 3, 1]})
    made = plan(graph, scores, Target(params=0.5))
    assert dict(made) == {"g0": (1, 2), "g1": (1, 2)}


def test_a_tie_with_a_frozen_group_is_frozen():
    graph = flat_graph([4, 4, 4], g0={"tie": "a"}, g1={"tie": "a", "prunable": False, "reason": "output"})
    made = plan(graph, scores_of(graph, {"g0": [0, 0, 0, 0]}), Target(params=0.9))
    assert set(made) == {"g2"}


def test_round_to_keeps_multiples():
    graph = flat_graph([10, 16])
    scores = scores_of(graph, {"g0": range(10), "g1": range(100, 116)})
    assert dict(plan(graph, scores, Target(params=24 / 26), round_to=4)) == {"g0": tuple(range(2, 10))}
    assert dict(plan(graph, scores, Target(params=23 / 26), round_to=4)) == {"g0": tuple(range(6, 10))}


def test_per_cost_prefers_expensive_channels():
    graph = flat_graph([4, 4], weights=[1, 10])
    scores = scores_of(graph, {"g0": [1, 2, 3, 4], "g1": [5, 6, 7, 8]})
    assert "g0" in plan(graph, scores, Target(params=0.75))
    assert dict(plan(graph, scores, Target(params=0.75), per_cost="params")) == {"g1": (2, 3)}


def test_per_cost_refuses_negative_scores_of_channels_that_are_there():
    graph = flat_graph([4, 4], weights=[1, 10])
    scores = scores_of(graph, {"g0": [1, 2, 3, 4], "g1": [-5, 6, 7, 8]})
    message = r"per_cost='params': 1 of 8 scores are negative \(first in g1\).*HessianTrace\(signed=False\)"
    with pytest.raises(ScoreError, match=message):
        plan(graph, scores, Target(params=0.75), per_cost="params")
    assert dict(plan(graph, scores, Target(params=0.8))) == {"g1": (1, 2, 3)}
    gone = PrunePlan({"g1": [1, 2, 3]}, graph.fingerprint)
    assert dict(plan(graph, scores, Target(params=0.6), per_cost="params", start=gone)) == {"g1": (2, 3)}


def test_normalize_mean_makes_groups_comparable():
    graph = flat_graph([4, 4])
    scores = scores_of(graph, {"g0": [1, 2, 3, 4], "g1": [1000, 5000, 6000, 7000]})
    assert set(plan(graph, scores, Target(params=0.75), normalize="none")) == {"g0"}
    assert set(plan(graph, scores, Target(params=0.75), normalize="mean")) == {"g0", "g1"}
    auto = scores_of(graph, {"g0": [1, 2, 3, 4], "g1": [1000, 5000, 6000, 7000]}, normalize="mean")
    assert set(plan(graph, auto, Target(params=0.75))) == {"g0", "g1"}


def test_max_pruning_ratio_by_group():
    graph = flat_graph([10, 10])
    scores = scores_of(graph, {"g0": range(10), "g1": range(100, 110)})
    made = plan(graph, scores, Target(params=0.6), max_pruning_ratio={"g0": 0.3})
    assert len(made["g0"]) == 7 and len(made["g1"]) == 5


def test_start_plan_stays_removed_even_where_scores_disagree():
    graph = flat_graph([6])
    first = PrunePlan({"g0": [0, 1, 2, 3]}, "hand")
    made = plan(graph, scores_of(graph, {"g0": [1, 2, 3, 4, 99, 98]}), Target(params=0.5), start=first)
    assert dict(made) == {"g0": (1, 2, 3)}


def test_latency_table():
    graph = flat_graph([8])
    made = plan(
        graph,
        scores_of(graph),
        Target(latency_ms=5.5),
        latency=lambda p: 1.0 + len(p.get("g0", range(8))),
        min_channels=1,
    )
    assert len(made["g0"]) == 4


def test_random_plan_fraction_positions_and_seed():
    _, graph = grouped()
    made = random_plan(graph, 0.5, torch.Generator().manual_seed(3))
    made.check(graph)
    assert [len(made[g]) for g in ("conv1", "conv2")] == [4, 8]
    assert made == random_plan(graph, 0.5, torch.Generator().manual_seed(3))
    plans = {random_plan(graph, 0.5, torch.Generator().manual_seed(s)) for s in range(8)}
    assert len(plans) > 4
    blocks = [tuple(c % 3 for c in made["conv2"] if c // 3 == b) for b in range(4)]
    assert len(set(blocks)) > 1  # positions differ from block to block
    assert len(random_plan(graph, 0.01)["conv2"]) == 4
    assert dict(random_plan(graph, 1.0)) == {}


def test_uniform_plan_keeps_the_best():
    graph = flat_graph([4, 2])
    made = uniform_plan(graph, scores_of(graph, {"g0": [4, 1, 3, 2], "g1": [1, 2]}), 0.5)
    assert dict(made) == {"g0": (0, 2), "g1": (1,)}


# -------------------------------------------------------------------------------------------------------------- errors


def test_unreachable_says_what_is_reachable_and_what_is_frozen():
    graph = flat_graph([8, 8], g1={"prunable": False, "reason": "reaches the output"})
    with pytest.raises(
        PlanError, match=r"params=0.05 cannot be reached: 0.5625 is the least .*frozen groups: g1; raise the target"
    ):
        plan(graph, scores_of(graph), Target(params=0.05))
    plan(graph, scores_of(graph), Target(params=0.5625))
    with pytest.raises(PlanError, match="params=3 cannot be reached: 9 is the least"):
        plan(graph, scores_of(graph), Target(params=3))


def test_nothing_prunable():
    graph = flat_graph([8], g0={"prunable": False, "reason": "reaches the output"})
    for make in (lambda: plan(graph, scores_of(graph), Target(params=0.5)), lambda: random_plan(graph)):
        with pytest.raises(PlanError, match="nothing is prunable: all 1 groups are frozen .reaches the output."):
            make()


def test_bad_scores():
    graph = flat_graph([4, 4])
    good = scores_of(graph)
    other = Scores(dict(good), criterion="t", fingerprint="other")
    with pytest.raises(ScoreError, match="scores of another model: scores have fingerprint other, the graph has hand"):
        plan(graph, other, Target(params=0.5))
    with pytest.raises(ScoreError, match="no scores for 1 of 2 prunable groups: g1"):
        plan(graph, {"g0": good["g0"]}, Target(params=0.5))
    with pytest.raises(ScoreError, match=r"scores of g0: expected shape \(4,\), got \(3,\)"):
        plan(graph, dict(good) | {"g0": torch.ones(3)}, Target(params=0.5))
    with pytest.raises(ScoreError, match="scores of g0: 1 of 4 are not finite"):
        plan(graph, dict(good) | {"g0": torch.tensor([1, float("nan"), 2, 3])}, Target(params=0.5))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        ({"min_channels": 0}, "min_channels: expected a whole number from 1, or a fraction between 0 and 1 for"),
        ({"normalize": "l7"}, "normalize='l7': expected one of auto, none, mean, max"),
        ({"per_cost": "latency"}, "per_cost='latency': expected None or one of params, macs, memory"),
        ({"max_pruning_ratio": 1.5}, r"max_pruning_ratio: expected in \[0, 1\] for '\*', got 1.5"),
        ({"start": PrunePlan({}, "other")}, "plan of another model"),
    ],
)
def test_bad_arguments(options, match):
    graph = flat_graph([4])
    with pytest.raises(PlanError, match=match):
        plan(graph, scores_of(graph), Target(params=0.5), **options)


def test_latency_without_a_table():
    graph = flat_graph([4])
    with pytest.raises(PlanError, match="no latency table"):
        plan(graph, scores_of(graph), Target(latency_ms=2.0))


def test_bad_keep():
    graph = flat_graph([4])
    for keep in (0, 1.5, -1):
        with pytest.raises(PlanError, match=r"expected a fraction in \(0, 1\]"):
            random_plan(graph, keep)

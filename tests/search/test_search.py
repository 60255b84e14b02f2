"""The search as a whole: samplers, early stopping, resumption, bad input."""

import math
import sqlite3

import pytest
import torch

import cpd_fast as cpd
from cpd_fast.errors import PlanError, SearchError
from cpd_fast.schedule import plan_cost
from tests.search.nets import output_variance, setting

HALF = cpd.Target(macs=0.5)


def run(evaluate=output_variance, made=None, **options):
    net, graph, calibration = made or setting()
    options = {"num_candidates": 6, "storage": None, **options}
    target, calibration = options.pop("target", HALF), options.pop("calibration", calibration)
    return cpd.search(net, graph, target, calibration, evaluate, **options)


def values(found):
    return [c.value for c in found.candidates]


def test_the_best_is_the_best_and_every_plan_meets_the_target():
    net, graph, x = setting()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    found = run(made=(net, graph, x))
    assert found.value == max(values(found)) and found.best.value == found.value and found.front == (found.best.number,)
    dense = plan_cost(graph).macs
    assert all(plan_cost(graph, p).macs <= dense / 2 for p in found.plans.values())
    assert len(set(found.plans.values())) == 6 and all(c.state == "done" and c.seconds > 0 for c in found.candidates)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    rebuilt = cpd.compact(net, graph, found.plan)  # a candidate is what anybody gets from the plan
    from cpd_fast.search import adapt_batch_norm, materialise

    adapt_batch_norm(rebuilt, materialise(x, graph, torch.device("cpu")))
    with torch.no_grad():
        assert output_variance(rebuilt.eval()) == pytest.approx(found.value, rel=1e-5)


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "nsga2"])
def test_samplers(sampler):
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    found = run(sampler=sampler, num_candidates=14, seed=3)
    assert len(found.candidates) == 14 and len(set(found.plans.values())) == 14
    assert values(found) == values(run(sampler=sampler, num_candidates=14, seed=3))
    if sampler == "nsga2":
        best = [c for n in found.front for c in found.candidates if c.number == n]
        costs, qualities = [c.cost for c in best], [c.value for c in best]
        assert costs == sorted(costs) and qualities == sorted(qualities) and len(best) > 1
        assert all(any(b.cost <= c.cost and b.value >= c.value for b in best) for c in found.candidates)


def test_nsga2_takes_latency_as_the_cost():
    found = run(sampler="nsga2", latency=lambda plan: float(sum(map(len, plan.values()))))
    assert [c.cost for c in found.candidates] == [
        sum(map(len, found.plans[c.number].values())) for c in found.candidates
    ]


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_hopeless_candidates_are_stopped(pruner):
    seen = []

    def step_by_step(candidate):
        quality = output_variance(candidate)
        for step in range(12):
            seen.append(step)
            yield quality * (1 - 0.5**step)

    found = run(step_by_step, pruner=pruner, num_candidates=24)
    stopped = [c for c in found.candidates if c.state == "stopped"]
    assert stopped and len(seen) < 24 * 12
    assert found.best.state == "done" and all(c.value is not None for c in stopped)
    whole = run(num_candidates=24)
    assert (
        found.plan
        in sorted(whole.plans.values(), key=lambda p: -dict(zip(whole.plans.values(), values(whole), strict=True))[p])[
            :6
        ]
    )


def test_without_batch_norm_means_are_matched():
    net = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.GELU(), torch.nn.Linear(12, 10), torch.nn.Linear(10, 3))
    x = torch.randn(32, 6)
    graph = cpd.comb(net, x[:1])
    found = run(lambda m: -float((m(x).mean(0) - net(x).mean(0)).abs().max()), (net, graph, [x]))
    assert found.calibration == "matched means"
    assert found.value == pytest.approx(0, abs=1e-5)  # the last layer's means are the dense ones


def test_a_second_call_goes_on(tmp_path):
    storage = tmp_path / "study.sqlite3"
    calls = []

    def counted(candidate):
        calls.append(1)
        return output_variance(candidate)

    first = run(counted, num_candidates=4, storage=storage)
    again = run(counted, num_candidates=7, storage=storage)
    assert len(calls) == 7 and values(again)[:4] == values(first)
    assert values(again) == values(run(num_candidates=7))  # as if it had never been stopped
    run(counted, num_candidates=7, storage=f"sqlite:///{storage}")
    assert len(calls) == 7


def test_an_interrupted_candidate_is_evaluated_again(tmp_path):
    calls = []

    def interrupted(candidate):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return output_variance(candidate)

    with pytest.raises(KeyboardInterrupt):
        run(interrupted, storage=tmp_path / "s.db")
    found = run(interrupted, storage=tmp_path / "s.db")
    assert values(found) == values(run()) and len(calls) == 7


@pytest.mark.parametrize(("bad", "error"), [
    (lambda: float("nan"), "evaluate returned nan; expected a finite number"),
    (lambda: "good", "evaluate returned str; expected a finite number"),
    (lambda: iter(()), "evaluate yielded nothing"),
    (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
])  # fmt: skip
def test_a_failing_evaluation_is_kept_and_the_search_goes_on(bad, error):
    calls = []

    def sometimes(candidate):
        calls.append(1)
        return bad() if len(calls) == 2 else output_variance(candidate)

    told = []
    found = run(sometimes, on_candidate=lambda n, v: told.append((n, v)))
    (failed,) = found.failed
    assert failed.number == 1 and error in failed.error and failed.value is None and failed.counts
    assert len(found.candidates) == 6 and len(calls) == 6
    assert told == [(c.number, c.value) for c in found.candidates]


def test_when_nothing_can_be_evaluated_the_first_error_is_told():
    def broken(candidate):
        raise ValueError("no such metric")

    with pytest.raises(
        SearchError, match=r"no candidate could be evaluated: all 6 failed; candidate 0: ValueError: no such"
    ):
        run(broken)
    with pytest.raises(SearchError, match="no candidate could be evaluated: time was up"):
        run(timeout_s=0)


def test_time_limit(tmp_path):
    found = run(num_candidates=10**6, timeout_s=0.5)
    assert 0 < len(found.candidates) < 10**4


def test_a_space_with_fewer_plans_than_asked():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    graph = cpd.comb(net, torch.zeros(1, 4))
    found = run(lambda m: 1.0, (net, graph, [torch.zeros(2, 4)]), num_candidates=5, target=cpd.Target(macs=0.7))
    assert len(found.candidates) == 1


def test_another_search_in_the_same_study_is_refused(tmp_path):
    storage = tmp_path / "s.db"
    run(storage=storage, num_candidates=2)
    with pytest.raises(SearchError, match=r"study 'search' in sqlite.*is of another search \(graph: it has \w+, this"):
        run(storage=storage, made=setting(width=25))
    with pytest.raises(SearchError, match=r"is of another search \(weights: it has .*choose another study_name or"):
        run(storage=storage, made=setting(seed=1))
    with pytest.raises(SearchError, match=r"target: it has \{'macs': 0\.5\}, this search has \{'macs': 0\.6\}"):
        run(storage=storage, target=cpd.Target(macs=0.6))
    with pytest.raises(SearchError, match="calibration: it has adaptive batch norm"):
        run(storage=storage, calibration=[torch.zeros(4, 2, 6, 6)])
    with pytest.raises(SearchError, match="objectives: it has 1, this search has 2|is of another search"):
        run(storage=storage, sampler="nsga2")
    assert len(run(storage=storage, study_name="other", target=cpd.Target(macs=0.6)).candidates) == 6


def test_a_study_of_somebody_else(tmp_path):
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/s.db", study_name="search", direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(SearchError, match="was not made by cpd_fast"):
        run(storage=tmp_path / "s.db")


def test_locked_storage(tmp_path):
    storage = tmp_path / "s.db"
    run(storage=storage, num_candidates=2)
    holder = sqlite3.connect(storage, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(SearchError, match=r"database is locked; another process holds it.*candidates are kept"):
            run(storage=storage, num_candidates=3, storage_timeout_s=0.1)
    finally:
        holder.rollback()
        holder.close()
    assert len(run(storage=storage, num_candidates=3).candidates) == 3


def test_storage_that_vanishes(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    calls = []

    def evaluate(candidate):
        calls.append(1)
        if len(calls) == 2:
            other = sqlite3.connect(folder / "s.db")
            other.executescript("DROP TABLE trial_user_attributes; DROP TABLE trials;")
            other.close()
        return output_variance(candidate)

    with pytest.raises(SearchError, match=r"storage sqlite:.*no such table.*put it back or choose another storage"):
        run(evaluate, storage=folder / "s.db")
    with pytest.raises(SearchError, match="unable to open database file; put it back or choose another"):
        run(storage=tmp_path / "missing" / "s.db")


@pytest.mark.parametrize(("options", "error"), [
    ({"num_candidates": 0}, "num_candidates=0: expected a whole number of at least 1"),
    ({"evaluate": 3}, "evaluate: expected a function of a model, got int"),
    ({"sampler": "grid"}, "sampler='grid': expected one of random, tpe, cmaes, nsga2"),
    ({"pruner": "worst"}, "pruner='worst': expected None or one of median"),
    ({"pruner": "median", "sampler": "nsga2"}, "cannot be stopped early"),
    ({"calibration": []}, "calibration: expected at least one batch"),
])  # fmt: skip
def test_wrong_arguments(options, error):
    with pytest.raises(SearchError, match=error):
        run(**options)


def test_unreachable_target():
    with pytest.raises(PlanError, match=r"macs=0\.01 cannot be reached: the range is 0\.\d+ to 1"):
        run(target=cpd.Target(macs=0.01))


def test_a_value_is_a_plain_number():
    found = run(lambda m: torch.tensor(output_variance(m)))
    assert all(isinstance(v, float) and math.isfinite(v) for v in values(found))


def test_any_criterion_says_which_channels_stay():
    net, graph, calibration = setting()
    kept = []
    for criterion in (cpd.Magnitude(p=1), cpd.Random(generator=torch.Generator().manual_seed(0))):
        scores = cpd.score(net, graph, criterion=criterion)
        found = run(made=(net, graph, calibration), num_candidates=3, scores=scores)
        kept.append(found)
        for name, channels in found.plan.items():
            order = torch.argsort(scores[name], descending=True)[: len(channels)]
            assert sorted(order.tolist()) == list(channels)
    assert [c.counts for c in kept[0].candidates] == [c.counts for c in kept[1].candidates]
    assert kept[0].plans[0] != kept[1].plans[0]

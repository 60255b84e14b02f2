"""Recipes that aim at parameters, memory or latency: on a machine whose clock counts MACs."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import cpd_fast as cpd
from cpd_fast.config import ConfigError
from cpd_fast.errors import PlanError
from cpd_fast.pruner import Pruner
from cpd_fast.recipes import outcome
from cpd_fast.recipes.comb_prune_distill import CpdRun
from cpd_fast.recipes.run_folder import RunFolder, read_settings
from cpd_fast.recipes.target import MeasuredGreedy
from cpd_fast.timing import table, target
from cpd_fast.timing.layers import macs_of

X = torch.zeros(1, 1, 16, 16)
RECIPES = {
    "cpd": {"round_to": 1},
    "cpd that searches": {"round_to": 1, "search_ratios": 1, "candidates": 3, "calibration_batches": 2},
    "eagleeye": {"round_to": 1, "candidates": 3, "calibration_batches": 2},
    "prune_then_distill": {"round_to": 1, "rounds": 1, "round_steps": 2},
}


def ms_of(model):
    """What a forward takes on the machine of these tests: a fixed part that its table of layers does not see."""
    return 2.0 + cpd.cost(model, X).macs * 3e-5


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """The machine; the list holds the networks that were measured by planning."""
    measured = []

    def measurer(model, *_):
        return lambda small: measured.append(small) or (ms_of(model), ms_of(small))

    monkeypatch.setattr(table, "layer_timer", lambda backend, threads: lambda layer: macs_of(layer) * 3e-5)
    monkeypatch.setattr(table, "latency", lambda model, *_, **__: SimpleNamespace(median_ms=ms_of(model)))
    monkeypatch.setattr(target, "_measurer", measurer)
    compare = outcome.compare_latency

    def compared(models, *arguments):
        real = compare(models, *arguments)
        return [cpd.timing.Latency(ms_of(m), 0.0, 9.0, 3, r.backend, 1, ()) for m, r in zip(models, real, strict=True)]

    monkeypatch.setattr(outcome, "compare_latency", compared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return measured


@pytest.mark.parametrize("name", RECIPES)
def test_latency_is_met_by_the_finished_network(tiny, clock, tmp_path, name):
    options = {"recipe": name.split(" ")[0], **RECIPES[name], "latency_backend": "eager"}
    result = tiny.run(tmp_path / "run", target=cpd.Target(latency_ms=0.7), **options)
    goal = 0.7 * ms_of(result.teacher)
    assert ms_of(result.student) == pytest.approx(goal, rel=0.05)
    assert "(70% of the original's): the finished network takes" in " ".join(result.results.notes)
    assert "within 5% of it" in " ".join(result.results.notes)
    settings = result.results.settings
    assert (settings["target_macs"], settings["target_latency_ms"]) == (1.0, 0.7)  # MACs are not limited beside it
    kept = json.loads((tmp_path / "run/latency.json").read_text())
    (tries,) = (v["tries"] for k, v in kept.items() if k in ("prune", "search", "match"))
    assert len(tries) == len(clock) > 0
    assert tries[-1]["measured_ms"] == pytest.approx(goal, rel=0.05)


def test_milliseconds_are_met_too(tiny, clock, tmp_path):
    result = tiny.run(tmp_path / "run", target=cpd.Target(latency_ms=4.5), round_to=1, latency_backend="eager")
    assert ms_of(result.teacher) > 6 and ms_of(result.student) == pytest.approx(4.5, rel=0.05)


def test_a_measured_plan_is_kept(tiny, clock, tmp_path, monkeypatch):
    """Killed after the measurement and before the next checkpoint, a run ends with the plan that was measured."""
    event = CpdRun._event

    def dies(self, *arguments):
        found = event(self, *arguments)
        if clock:
            raise MemoryError
        return found

    options = {"target": cpd.Target(latency_ms=0.7), "round_to": 1, "latency_backend": "eager"}
    monkeypatch.setattr(CpdRun, "_event", dies)
    with pytest.raises(MemoryError):
        tiny.run(tmp_path / "run", **options)
    monkeypatch.setattr(CpdRun, "_event", event)
    monkeypatch.setattr(target, "_measurer", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(table, "latency", lambda *_, **__: pytest.fail("measured again"))
    resumed = tiny.run(tmp_path / "run", **options)
    assert resumed.plan == cpd.PrunePlan.from_json(
        json.loads((tmp_path / "run/latency.json").read_text())["prune"]["plan"]
    )


@pytest.mark.parametrize("limit", ["latency_ms", "params", "memory", "macs"])
def test_impossible_targets_are_refused_before_training(tiny, clock, tmp_path, limit, monkeypatch):
    monkeypatch.setattr(CpdRun, "_teacher", lambda *_: pytest.fail("trained"))
    with pytest.raises(PlanError, match=rf"{limit}=0.01 cannot be reached: the range is 0\.\d+ to 1 with"):
        tiny.run(tmp_path / "run", target=cpd.Target(**{limit: 0.01}), latency_backend="eager")


def test_latency_that_the_real_network_never_has_says_what_was_measured(tiny, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "_measurer", lambda *_: lambda small: (20.0, 20.0))
    with pytest.raises(PlanError, match=r"14\.000 ms were not reached: measured were 20\.000 ms \(predicted"):
        tiny.run(tmp_path / "run", target=cpd.Target(latency_ms=0.7), round_to=1, latency_backend="eager")


# ------------------------------------------------------------------------------------------------ pruned by a preset
IN_LOOP = {"prune_steps": 12, "prune_events": 3, "checkpoint_every": 5, "round_to": 1, "latency_backend": "eager"}


@pytest.fixture
def removals(monkeypatch):
    """What the plans of a run keep, one after another."""
    seen, apply = [], Pruner._apply

    def remember(self, plan, events):
        seen.append(self.graph.alive(plan))
        apply(self, plan, events)

    monkeypatch.setattr(Pruner, "_apply", remember)
    return seen


@pytest.mark.parametrize("goal", [0.7, 4.5])
@pytest.mark.parametrize("preset", ["best", "published"])
def test_a_preset_meets_a_latency(tiny, clock, tmp_path, removals, preset, goal):
    result = tiny.run(tmp_path / "run", target=cpd.Target(latency_ms=goal), preset=preset, **IN_LOOP)
    goal *= ms_of(result.teacher) if goal < 1 else 1
    assert ms_of(result.student) == pytest.approx(goal, rel=0.05)
    assert [step for step, _ in result.results.steps] == [3, 7, 11] and len(removals) == 4
    for before, after in itertools.pairwise(removals):
        assert not (after & ~before).any()  # masks only grow
    kept = json.loads((tmp_path / "run/latency.json").read_text())
    assert len(kept["aim"]["tries"]) + len(kept["prune"]["tries"]) == len(clock)
    assert "within 5% of it" in " ".join(result.results.notes)


def test_the_ramp_leads_to_what_was_measured(tiny, clock, tmp_path, monkeypatch):
    """On a machine where everything that shrinks is slower than the table says: the last removal is not the largest."""
    slow = lambda model, *_: lambda small: (ms_of(model), ms_of(model) - 0.6 * (ms_of(model) - ms_of(small)))  # noqa: E731
    monkeypatch.setattr(target, "_measurer", slow)
    result = tiny.run(tmp_path / "run", target=cpd.Target(latency_ms=0.8), preset="best", **IN_LOOP)
    kept = json.loads((tmp_path / "run/latency.json").read_text())
    aim = kept["aim"]["tries"][kept["aim"]["chosen"]]
    assert aim["predicted_ms"] < 0.9 * aim["goal_ms"] and len(kept["prune"]["tries"]) > 0
    shares = [1.0, *(share for _, share in result.results.steps)]
    gone = [a - b for a, b in itertools.pairwise(shares)]
    assert gone[0] > gone[1] > gone[2]  # a cubic ramp to the very end


def test_a_preset_after_a_search_keeps_to_what_was_measured(tiny, clock, tmp_path):
    how = {"search_ratios": 1, "candidates": 3, "calibration_batches": 2}
    result = tiny.run(tmp_path / "run", target=cpd.Target(latency_ms=0.7), preset="best", **how, **IN_LOOP)
    assert ms_of(result.student) == pytest.approx(0.7 * ms_of(result.teacher), rel=0.05)
    kept = json.loads((tmp_path / "run/latency.json").read_text())
    found = cpd.PrunePlan.from_json(kept["search"]["plan"])
    assert {k: len(v) for k, v in result.plan.items()} == {k: len(v) for k, v in found.items()}
    assert set(kept) == {"machine", "dense_ms", "search"}


def dying(run, monkeypatch, event):
    """The run dies with removal number ``event`` in no checkpoint."""
    next_plan = MeasuredGreedy.next_plan

    def dies(self, number, *arguments):
        found = next_plan(self, number, *arguments)
        if number == event:
            raise MemoryError
        return found

    with monkeypatch.context() as patch:
        patch.setattr(MeasuredGreedy, "next_plan", dies)
        with pytest.raises(MemoryError):
            run()


@pytest.mark.parametrize("event", [1, 3])
def test_a_preset_that_was_killed_goes_on_with_the_measured_plans(tiny, clock, tmp_path, monkeypatch, event):
    go = lambda name: tiny.run(  # noqa: E731
        tmp_path / name, target=cpd.Target(latency_ms=0.7), preset="best", **IN_LOOP
    )
    whole, measured = go("whole"), len(clock)
    dying(lambda: go("killed"), monkeypatch, event)
    resumed = go("killed")
    assert len(clock) == 2 * measured  # nothing twice
    assert resumed.plan == whole.plan
    read = lambda name: (tmp_path / name / "student.safetensors").read_bytes()  # noqa: E731
    assert read("killed") == read("whole")


def test_a_kept_plan_that_gives_channels_back_is_measured_anew(tiny, clock, tmp_path, monkeypatch, removals):
    """As it is after a kill where the rest of the run is computed with other bits."""
    go = lambda: tiny.run(  # noqa: E731
        tmp_path / "run", target=cpd.Target(latency_ms=0.7), preset="best", **IN_LOOP
    )
    dying(go, monkeypatch, 3)
    file = tmp_path / "run/latency.json"
    kept = json.loads(file.read_text())
    plan = cpd.PrunePlan.from_json(kept["prune"]["plan"])
    kept["prune"]["plan"] = cpd.PrunePlan({}, plan.fingerprint).to_json()
    file.write_text(json.dumps(kept))
    removals.clear()
    assert go().plan == plan
    assert not (removals[-1] & ~removals[-2]).any()


def test_a_preset_whose_latency_is_never_had_stops_at_the_first_removal(tiny, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "_measurer", lambda *_: lambda small: (20.0, 20.0))
    with pytest.raises(PlanError, match=r"14\.000 ms were not reached: measured were 20\.000 ms \(predicted"):
        tiny.run(tmp_path / "run", target=cpd.Target(latency_ms=0.7), preset="best", **IN_LOOP)
    assert RunFolder(tmp_path / "run", read_settings(tmp_path / "run")).load_checkpoint()[:2] == ("prune", 0)


def test_the_released_rule_refuses_latency(tiny, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(CpdRun, "_teacher", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="preset=released: its rule leaves odd widths.* use preset=best, published"):
        tiny.run(tmp_path / "run", target=cpd.Target(latency_ms=0.7), preset="released", latency_backend="eager")


def test_parameters_and_memory(tiny, tmp_path):
    r = tiny.run(tmp_path / "run", target=cpd.Target(params=0.6, memory=0.8)).results
    assert r.student.params <= 0.6 * r.teacher.params and r.student.activation_mib <= 0.8 * r.teacher.activation_mib
    assert r.settings["target_macs"] == 1.0


def test_targets_combine(tiny, tmp_path):
    r = tiny.run(tmp_path / "run", target=cpd.Target(params=0.9, macs=0.6)).results
    assert r.student.macs <= 0.6 * r.teacher.macs and r.settings["target_params"] == 0.9


def test_absolute_limits_but_milliseconds_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"target_params=20000\.0: expected a number from 0\.001 to 1"):
        tiny.run(tmp_path / "run", target=cpd.Target(params=20000.0))

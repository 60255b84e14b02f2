"""The recipe that suits the time, and why."""

import importlib
import json

import pytest

from cpd_fast import recipes
from cpd_fast.config import ConfigError
from cpd_fast.errors import RunFolderError
from cpd_fast.recipes.auto import FORWARDS_A_STEP, choose

pytest.importorskip("optuna")


@pytest.mark.parametrize("steps", [10, 60, 150, 320, 1000, 2000, 1e5])
@pytest.mark.parametrize("teacher", [0, 200])
def test_the_steps_fit(steps, teacher):
    c = choose(steps, teacher, 16, 50)
    s = c.settings
    used = sum(s.get(k, 0) for k in ("teacher_steps", "prune_steps", "finetune_steps"))
    used += s.get("rounds", 0) * s.get("round_steps", 0)
    if c.recipe == "eagleeye":
        used += s["candidates"] * (19 + s["search_images"] / 16) / FORWARDS_A_STEP
    assert 0.7 * steps <= used <= steps * 1.02 + 8 and c.why  # at least one candidate, however little time
    assert teacher or c.recipe != "prune_then_distill"  # not where the network was trained elsewhere


def test_too_little_time():
    with pytest.raises(ConfigError, match="there is time for 3 training steps; give more minutes"):
        choose(3, 0, 16, 50)
    for minutes in (0, -1, float("nan"), "ten", True):
        with pytest.raises(ConfigError, match="minutes=.*: expected a positive number"):
            recipes.auto("climate", minutes=minutes, run_dir="nowhere")


@pytest.mark.parametrize("part", ["search_ratios", "prune_teacher"])
def test_parts_that_take_time_are_not_shared_out(part):
    with pytest.raises(ConfigError, match=f"auto: {part} is not in what it shares the minutes out to"):
        recipes.auto("climate", minutes=1, run_dir="nowhere", **{part: 1})


def test_a_run_says_why_and_resumes_with_its_choice(tiny, tmp_path, monkeypatch):
    module = importlib.import_module("cpd_fast.recipes.auto")  # the package's `auto` is the function
    monkeypatch.setattr(module, "seconds_a_step", lambda *_: 0.8 * 60 / 40)
    steps = {"teacher_steps": 6, "calibration_batches": 2}
    given = {k: v for k, v in tiny.SETTINGS.items() if not k.endswith("steps")}
    monkeypatch.setattr(tiny, "SETTINGS", {**given, **steps})
    result = tiny.run(tmp_path, recipe="auto", minutes=1)
    chosen = json.loads((tmp_path / "auto.json").read_text())
    assert result.results.settings["recipe"] == chosen["recipe"] == "eagleeye"
    assert result.results.notes[0] == chosen["why"] and "auto, 1 minutes: eagleeye. 0.8 steps a second" in chosen["why"]
    monkeypatch.setattr(module, "seconds_a_step", None)  # not measured again
    assert tiny.run(tmp_path, recipe="auto", minutes=1).plan == result.plan
    with pytest.raises(RunFolderError, match="was made for 1 minutes, this command asks for 2"):
        tiny.run(tmp_path, recipe="auto", minutes=2)

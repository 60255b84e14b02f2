"""The command line: results on stdout, talk on stderr, exit codes, errors in one line."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import cpd_fast
from cpd_fast import cli, recipes
from cpd_fast.recipes import outcome
from cpd_fast.report import Results

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "recipes" / "tiny.py")
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


@pytest.fixture
def run(monkeypatch, capsys):
    """``run("comb", "climate")`` -> exit code, stdout, stderr, each with its white space collapsed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cpd-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as e:
            cli.main()
        out, err = capsys.readouterr()
        return e.value.code or 0, " ".join(out.split()), " ".join(err.replace("│", " ").split())

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "export_onnx", tiny.no_onnx)
        return recipes.cpd(
            tiny.classification(),
            run_dir=tmp_path_factory.mktemp("cli") / "run",
            talk=recipes.Talk(quiet=True),
            **tiny.SETTINGS,
        )


def test_comb_prints_groups_and_cost(run):
    code, out, err = run("comb", "fashion-mnist")
    assert code == 0 and err == ""
    assert "layers.0.conv1 32 layers.0.bn1 layers.0.conv2" in out and "308,074 parameters, 10,150,272 MACs" in out


def test_comb_explains_and_gives_json_and_a_drawing(run, tmp_path):
    code, out, _ = run("comb", "fashion-mnist", "--explain", "stem.0.weight")
    assert code == 0 and out.startswith("stem.0.weight (") and "produces" in out
    page = tmp_path / "groups.html"
    code, out, err = run("comb", "fashion-mnist", "--json", "--html", str(page), "--protect", "first")
    doc = json.loads(out)
    assert code == 0 and doc["parameters"] > 1000
    assert any(g["reason"] == "of the first layer, which is protected" for g in doc["groups"])
    assert page.read_text().startswith("<!doctype html>") and err == f"drawn in {page}"
    page.unlink()
    code, out, err = run("comb", "fashion-mnist", "--explain", "stem.0.weight", "--html", str(page))
    assert code == 0 and out.startswith("stem.0.weight (") and err == f"drawn in {page}" and page.is_file()
    code, _, err = run("comb", "fashion-mnist", "--html", str(tmp_path / "no" / "page.html"))
    assert code == 1 and "cannot be written" in err


def test_comb_obeys_its_options(run):
    def shrinks(*options):
        groups = json.loads(run("comb", "fashion-mnist", "--json", *options)[1])["groups"]
        return {g["name"] for g in groups if g["prunable"]}

    everything = shrinks()
    some = sorted(everything)[0]
    assert shrinks("--freeze", some) == everything - {some}
    assert shrinks("--ignore", "*") == set()
    code, _, err = run("comb", "fashion-mnist", "--freeze", "nothing")
    assert code == 1 and "matches no group" in err
    code, _, err = run("comb", "fashion-mnist", "--granularity", "row")
    assert code == 2 and "expected one of dim, head" in err


def test_comb_of_an_unknown_model(run):
    code, _, err = run("comb", "resnet18")
    assert code == 1 and "expected timm/NAME, smp/DECODER:ENCODER, hf/FOLDER, python.module:function" in err


def test_comb_of_a_misspelt_timm_model(run):
    pytest.importorskip("timm", reason="timm is not installed")
    code, _, err = run("comb", "timm/resnet81")
    assert code == 1 and "timm has no model 'resnet81'; did you mean" in err


def test_report_shows_the_table_and_the_path(run, finished):
    (finished.run_dir / "report.html").unlink()
    code, out, err = run("report", finished.run_dir)
    assert code == 0 and err == ""
    assert "Parameters" in out and f"Report: {finished.report}" in out and finished.report.is_file()


def test_report_of_one_run_elsewhere(run, finished, tmp_path):
    page = tmp_path / "page.html"
    code, out, err = run("report", finished.run_dir, "--out", page)
    assert code == 0 and err == "" and f"Report: {page}" in out and page.read_text() == finished.report.read_text()
    code, out, err = run("report", finished.run_dir, "--out", tmp_path / "no" / "page.html")
    assert code == 1 and "page.html: cannot be written" in err


def test_report_as_json(run, finished):
    code, out, _ = run("report", finished.run_dir, "--json")
    assert code == 0 and Results.from_json(out) == finished.results and json.loads(out)["version"] == 1


def test_report_of_an_unfinished_run(run, tmp_path):
    code, out, err = run("report", tmp_path)
    assert (
        code == 1 and out == "" and "holds no results.json; the run is not finished" in err and "Traceback" not in err
    )


def test_doctor_names_every_backend(run):
    code, out, _ = run("doctor")
    assert code == 0 and all(f"backend {b}" in out for b in ("reference runs", "cpu", "cuda", "triton"))


def test_runs_are_compared_and_unfinished_ones_named(run, finished, tmp_path):
    (tmp_path / "begun").mkdir()
    code, out, err = run("report", finished.run_dir, finished.run_dir, tmp_path / "begun", "--json")
    assert code == 0 and [r["run"] for r in json.loads(out)] == ["run", "run"]
    assert f"left out: {tmp_path}/begun holds no results.json" in err
    page = tmp_path / "page.html"
    code, out, _ = run("report", finished.run_dir, finished.run_dir, "--out", page)
    assert code == 0 and f"Report: {page}" in out and page.read_text().startswith("<!doctype html>")
    for kind in ("--json", "--markdown"):  # the page only where it is asked for, and said beside the results
        page.unlink()
        code, out, err = run("report", finished.run_dir, finished.run_dir, kind, "--out", page)
        assert code == 0 and err == f"Report: {page}" and page.is_file() and "Report:" not in out
    code, out, err = run("report", tmp_path, tmp_path / "begun")
    assert code == 1 and out == "" and "none of the 2 folders holds a results.json" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_flags(shell, monkeypatch, capsys):
    """What the script that --install-completion leaves asks for at a press of the tab key."""

    def press(typed):
        monkeypatch.setattr(sys, "argv", ["cpd-fast"])
        monkeypatch.setenv("_CPD_FAST_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", typed)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        with pytest.raises(SystemExit) as e:
            cli.main()
        assert not e.value.code
        return capsys.readouterr().out

    assert all(name in press("cpd-fast com") for name in ("comb", "compress"))
    assert "--target-latency-ms" in press("cpd-fast compress --target")


def test_version_comes_from_one_place(run):
    assert run("--version") == (0, cpd_fast.__version__, "")


def test_settings_are_listed(run):
    settings = {s["name"]: s for s in json.loads(run("settings", "--json")[1])}
    assert (
        settings["round_to"]["default"] == 8
        and settings["round_to"]["allowed"] == "1 to 1,024"
        and settings["round_to"]["high"] == 1024
    )
    code, out, _ = run("settings")
    assert code == 0 and "round_to 8 1 to 1,024 kept channels" in out


def test_compress_calls_the_recipe_and_ends_with_table_and_path(run, finished, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(recipes, "cpd", lambda task, **options: asked.update(task=task, **options) or finished)
    code, out, _ = run(
        "compress", "--demo", "--seed", 3, "--teacher-steps", 5, "--set", "tau=2.5", "--run-dir", tmp_path
    )
    assert code == 0 and out.endswith(f"Report: {finished.report}") and "before after change" in out
    assert (asked["task"].name, asked["seed"], asked["teacher_steps"], asked["tau"]) == ("climate", 3, 5, 2.5)
    assert asked["run_dir"] == tmp_path and asked["command"].startswith("cpd-fast compress --demo")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "imagenet"], 1, "data 'imagenet' is unknown; choose one of climate, fashion-mnist"),
        (["--target-macs", "1.5"], 1, "target_macs=1.5: expected a number from 0.001 to 1"),
        (["--set", "tua=1"], 1, "tua: no such setting, did you mean tau?"),
        (["--set", "tau"], 2, "expected NAME=VALUE"),
        (["--data", "fashion-mnist", "--data-dir", "/nowhere"], 1, "apt-get install dataset-fashion-mnist"),
    ],
    ids=["data", "target", "setting", "syntax", "folder"],
)
def test_compress_errors_are_one_line(run, tmp_path, arguments, code, message):
    got, out, err = run("compress", "--run-dir", tmp_path / "run", *arguments)
    assert got == code and out == "" and message in err and "Traceback" not in err


def test_ctrl_c_is_130(run, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "cpd", interrupt)
    assert run("compress", "--run-dir", tmp_path)[0] == 130

"""``cpd-fast compress --recipe``: which recipe is called, and what is refused."""

import sys

import pytest

from cpd_fast import cli, recipes
from cpd_fast.cli import tasks
from cpd_fast.errors import CpdError


@pytest.mark.parametrize(
    ("arguments", "name", "folder"),
    [
        ([], "cpd", "climate-macs0.5-seed0"),
        (["--recipe", "eagleeye", "--candidates", "9"], "eagleeye", "climate-eagleeye-macs0.5-seed0"),
        (["--recipe", "auto", "--minutes", "7"], "auto", "climate-auto-macs0.5-seed0"),
    ],
)
def test_the_recipe_is_called(monkeypatch, arguments, name, folder):
    seen = {}
    monkeypatch.setattr(tasks, "builtin", lambda name, _: recipes.Task(name, "tiny", None, None))

    def stand_in(task, **given):
        seen.update(given, task=task)
        raise CpdError("far enough")

    monkeypatch.setattr(recipes, name, stand_in)
    monkeypatch.setattr(sys, "argv", ["cpd-fast", "compress", *arguments, "--set", "round_to=4"])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 1
    assert seen["task"].name == "climate" and seen["round_to"] == 4 and seen["run_dir"].name == folder
    assert seen.get("minutes") == (7 if name == "auto" else None)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--recipe", "magic"], "expected one of cpd, eagleeye, prune_then_distill, auto"),
        (["--recipe", "auto"], "minutes: recipe auto needs them"),
        (["--minutes", "7"], "and the others take none"),
        (["--recipe", "auto", "--minutes", "0"], "minutes=0.0: expected a positive number"),
    ],
)
def test_what_is_refused(monkeypatch, capsys, arguments, error):
    monkeypatch.setattr(sys, "argv", ["cpd-fast", "compress", *arguments])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 1 and error in " ".join(capsys.readouterr().err.replace("│", " ").split())

"""The examples run as they are."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_ten_lines(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLES / "ten_lines.py"))
    before, after = capsys.readouterr().out.splitlines()
    assert before == str(names["cpd"].cost(names["model"], names["x"])) and before != after
    dense, small = (names["cpd"].cost(names[n], names["x"]).macs for n in ("model", "small"))
    assert small <= 0.5 * dense

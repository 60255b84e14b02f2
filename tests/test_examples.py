"""The examples run as they are, in a folder of their own, and the README shows the same lines."""

import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TEN_LINES = ROOT / "examples" / "ten_lines.py"


def test_ten_lines(tmp_path, monkeypatch, capsys):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(TEN_LINES))
    before, after = capsys.readouterr().out.splitlines()
    cpd, model, small, x = (names[n] for n in ("cpd", "model", "small", "x"))
    assert before == str(cpd.cost(model, x)) and before != after
    assert cpd.cost(small, x).macs <= 0.5 * cpd.cost(model, x).macs
    again = cpd.load("small.safetensors", timm.create_model("resnet18"))
    assert torch.equal(again.eval()(x), small(x))


def test_ten_lines_are_ten_and_those_of_the_readme():
    code = TEN_LINES.read_text().partition("\n\n")[2].strip()
    assert len([line for line in code.splitlines() if line]) == 10
    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text()

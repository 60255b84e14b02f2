import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny():
    """The module tiny.py, whose recipe run takes a second."""
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _restore_export(monkeypatch):
    """``tiny.run`` leaves ONNX out; other tests shall not notice."""
    from cpd_fast.recipes import outcome

    monkeypatch.setattr(outcome, "export_onnx", outcome.export_onnx)

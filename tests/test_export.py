"""ONNX export is checked against PyTorch; latency figures are medians with intervals."""

import numpy as np
import pytest
import torch
from torch import nn

from cpd_fast import export
from cpd_fast.errors import BackendError
from cpd_fast.export import OPSET, compare_latency, export_onnx, latency

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


X = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    model = net()
    error = export_onnx(model, X, path)
    return model, path, error


def test_batch_is_dynamic_and_outputs_agree(exported):
    model, path, error = exported
    assert error < 1e-5 and model.training  # left in the mode it was in
    assert [o.version for o in onnx.load(path).opset_import if o.domain == ""] == [OPSET]
    session = ort.InferenceSession(str(path))
    x = torch.randn(5, 3, 8, 8)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, model.eval()(x).numpy(), rtol=1e-4, atol=1e-5)
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]  # weights inside, no leftovers


def test_wrong_outputs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_difference", lambda *_: 1e-2)
    with pytest.raises(
        BackendError, match=r"differs from PyTorch by 1\.00e-02.*allowed are 0\.0001; nothing was written"
    ):
        export_onnx(net(), X, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_be_exported_is_named(tmp_path):
    class Loop(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(BackendError, match="Loop cannot be exported to ONNX: "):
        export_onnx(Loop(), X, tmp_path / "loop.onnx")


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        BackendError, match="onnx, onnxscript, onnxruntime: not installed; install it with: pip install"
    ):
        export_onnx(net(), X, tmp_path / "net.onnx")


def test_latency_of_a_file(exported):
    _, path, _ = exported
    a = latency(path, X, runs=30, threads=1)
    assert a.low_ms <= a.median_ms <= a.high_ms and (a.runs, a.threads, a.input_shapes) == (30, 1, ((1, 3, 8, 8),))
    assert a.backend == "onnxruntime"


def test_eager_runs_models_in_turns_and_keeps_their_mode():
    calls = []

    class Spy(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            assert not self.training
            return x

    a, b = Spy("a"), Spy("b")
    first, second = compare_latency([a, b], X, "eager", runs=4, threads=1)
    assert calls[-8:] == ["a", "b"] * 4 and a.training and first.runs == second.runs == 4


def test_interval_of_the_median():
    median, low, high = export._median_interval(np.arange(101.0))
    assert (median, low, high) == (50.0, 40.0, 61.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "tensorrt"}, BackendError, "backend 'tensorrt' is unknown; choose one of onnxruntime, eager"),
        ({"runs": 0}, ValueError, "runs must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        latency(net(), X, **arguments)


def test_eager_cannot_time_a_file(exported):
    with pytest.raises(BackendError, match="'eager' times modules"):
        latency(exported[1], X, backend="eager", runs=1)


def test_runs_that_lost_the_core_do_not_count(monkeypatch):
    preempted, clock = 0, 0.0

    class Slow(nn.Module):
        """Takes 2 ms; every other time 6, of which it waits for the core for 4."""

        calls = 0

        def forward(self, x):
            nonlocal preempted, clock
            self.calls += 1
            clock += 2e-3
            if self.calls % 2:
                clock += 4e-3
                preempted += 1
            return x

    monkeypatch.setattr(export, "_times_preempted", lambda: preempted)
    monkeypatch.setattr(export.time, "perf_counter", lambda: clock)
    few, many = (latency(Slow(), X, "eager", runs=runs, threads=1) for runs in (10, 100))
    assert many.median_ms == pytest.approx(2) and (many.runs, many.left_out) == (100, 50)
    assert few.median_ms == pytest.approx(4) and (few.runs, few.left_out) == (10, 0)

"""Latency figures are medians with intervals, of runs in turns."""

import numpy as np
import pytest
import torch
from torch import nn

from cpd_fast.errors import BackendError
from cpd_fast.export import export_onnx
from cpd_fast.timing import compare_latency, latency, measure


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
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(net(), X, path)
    return path


def test_latency_of_a_file(exported):
    a = latency(exported, X, runs=30, threads=1)
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
    median, low, high = measure._median_interval(np.arange(101.0))
    assert (median, low, high) == (50.0, 40.0, 61.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"backend": "tensorrt"},
            BackendError,
            "backend 'tensorrt' is unknown; choose one of onnxruntime, onnxruntime-cuda, eager, compile",
        ),
        ({"runs": 0}, ValueError, "runs must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        latency(net(), X, **arguments)


def test_eager_cannot_time_a_file(exported):
    with pytest.raises(BackendError, match="'eager' times modules"):
        latency(exported, X, backend="eager", runs=1)


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

    monkeypatch.setattr(measure, "_times_preempted", lambda: preempted)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock)
    few, many = (latency(Slow(), X, "eager", runs=runs, threads=1) for runs in (10, 100))
    assert many.median_ms == pytest.approx(2) and (many.runs, many.left_out) == (100, 50)
    assert few.median_ms == pytest.approx(4) and (few.runs, few.left_out) == (10, 0)


def test_missing_cuda_provider_is_named(exported):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it is not missing")
    with pytest.raises(
        BackendError, match=r"no CUDAExecutionProvider here \(it has .*CPU.*pip install onnxruntime-gpu"
    ):
        latency(exported, X, backend="onnxruntime-cuda", runs=1)


def test_bound_inputs_and_outputs_run(exported):
    """The way to the GPU, on the CPU: what is bound gives what an ordinary run gives."""
    from cpd_fast.export import onnx_feed, onnx_session

    session, feed = onnx_session(exported, 1), onnx_feed(exported, torch.ones_like(X))
    binding, _ = measure._bound(session, feed, "cpu")()
    assert np.array_equal(binding.copy_outputs_to_cpu()[0], session.run(None, feed)[0])


def test_file_that_is_no_model(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(BackendError, match=r"a\.onnx: ONNX Runtime cannot load it"):
        latency(tmp_path / "a.onnx", X, runs=1)


def test_compiled_models_are_timed():
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    with pytest.MonkeyPatch.context() as patch:  # the real compiler takes ten seconds; see the slow test
        patch.setattr(torch, "compile", lambda m, dynamic: real(m, backend=compiler, dynamic=dynamic))
        result = latency(net(), X, backend="compile", runs=5)
    assert len(graphs) == 1 and result.backend == "compile" and result.runs == 5


@pytest.mark.slow
def test_inductor_is_timed():
    assert 0 < latency(net(), X, backend="compile", runs=20).median_ms < 1000


def test_model_that_cannot_be_compiled_is_named(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, dynamic: real(m, backend=broken, dynamic=dynamic))
    with pytest.raises(BackendError, match="Sequential cannot be compiled by torch.compile: .*no such instruction"):
        latency(net(), X, backend="compile", runs=1)

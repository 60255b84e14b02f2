"""Latency of networks, measured so that two of them can be compared."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from cpd_fast.errors import BackendError
from cpd_fast.export import CPU, CUDA, export_onnx, onnx_feed, onnx_session
from cpd_fast.export.shared import arguments, eval_mode
from cpd_fast.packages import require

FEWEST = 20  # undisturbed runs that a median needs
WARM_UP = 20
BACKENDS = {
    "onnxruntime": "ONNX Runtime on the CPU; modules are exported first",
    "onnxruntime-cuda": "ONNX Runtime's CUDA provider, inputs and outputs stay on the GPU",
    "eager": "PyTorch as it is, where the model and its inputs are",
    "compile": "PyTorch through torch.compile, for the inputs' shapes",
}
Runner = Callable[[], Any]


@dataclass(frozen=True)
class Latency:
    """Time of one forward.

    Attributes:
        median_ms: Median over the runs, milliseconds.
        low_ms: Lower end of the 95 % confidence interval of the median, milliseconds.
        high_ms: Its upper end.
        runs: Timed runs.
        left_out: Runs that do not count, because another process took the core meanwhile. On a busy machine a long run
            is hit more often than a short one, and a ratio of medians over all runs would compare the waiting.
        backend: One of ``BACKENDS``.
        threads: CPU threads that the backend was given.
        input_shapes: Shape of each input.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    backend: str
    threads: int
    input_shapes: tuple[tuple[int, ...], ...]
    left_out: int = 0

    def __str__(self) -> str:
        return f"{self.median_ms:.3f} ms [{self.low_ms:.3f}, {self.high_ms:.3f}]"


def latency(
    model: nn.Module | str | Path,
    example_inputs: Any,
    backend: str = "onnxruntime",
    runs: int = 1000,
    threads: int | None = None,
    seconds: float | None = None,
) -> Latency:
    """Time forwards of one network.

    Args:
        model: A module, or the path of an ONNX file (backends of ONNX Runtime only).
        example_inputs: What the network is timed on; batch size is theirs.
        backend: ``"onnxruntime"`` (a module is exported first), ``"onnxruntime-cuda"``, ``"eager"`` PyTorch or
            ``"compile"``, torch.compile for these shapes. On a GPU ``"eager"`` and ``"compile"`` wait for it.
        runs: Timed runs, after 20 that are not counted.
        threads: CPU threads; default: what PyTorch uses.
        seconds: Stop after this time even if ``runs`` are not done; None: no limit.

    Returns:
        Median and its 95 % confidence interval.

    Raises:
        BackendError: If the backend is unknown, not installed or not able to run here.
        ValueError: If ``runs`` is below 1.

    Example:
        >>> latency(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), backend="eager", runs=20).runs
        20
    """
    return compare_latency([model], example_inputs, backend, runs, threads, seconds)[0]


def compare_latency(
    models: Sequence[nn.Module | str | Path],
    example_inputs: Any,
    backend: str = "onnxruntime",
    runs: int = 1000,
    threads: int | None = None,
    seconds: float | None = None,
) -> list[Latency]:
    """Time several networks in turns, so that drift of the machine hits all of them alike.

    Arguments and errors are those of :func:`latency`; ``runs`` and ``seconds`` count for each model.

    Raises:
        BackendError: If the backend is unknown, not installed or not able to run here.
        ValueError: If ``runs`` is below 1.

    Example:
        >>> small, large = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 512, 3)
        >>> a, b = compare_latency([small, large], torch.zeros(1, 3, 32, 32), backend="eager", runs=50)
        >>> a.median_ms < b.median_ms
        True
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    count = threads or torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        prepare = _onnx_runner if backend.startswith("onnxruntime") else _torch_runner
        runners = [prepare(m, example_inputs, count, backend, stack) for m in models]
        times = _interleaved(runners, runs, seconds)
    shapes = tuple(tuple(t.shape) for t in tree_flatten(example_inputs)[0] if isinstance(t, Tensor))
    results = []
    for all_runs, disturbed in times:
        calm = _calm(all_runs, disturbed)
        left_out = len(all_runs) - len(calm)
        results.append(Latency(*_median_interval(calm), len(all_runs), backend, count, shapes, left_out))
    return results


def median_ms(run: Runner, runs: int, seconds: float) -> float:
    """Median milliseconds of a call, after a warm-up; runs that lost the core do not count."""
    return float(np.median(_calm(*_interleaved([run], runs, seconds)[0])))


def _calm(times: np.ndarray, disturbed: np.ndarray) -> np.ndarray:
    """The undisturbed runs, where they are enough for a median."""
    calm = times[~disturbed]
    return calm if len(calm) >= FEWEST else times


def _interleaved(runners: Sequence[Runner], runs: int, seconds: float | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each runner the milliseconds of every run, and whether the core was taken away meanwhile."""
    for run in runners:
        for _ in range(WARM_UP):
            run()
    times: list[list[tuple[float, bool]]] = [[] for _ in runners]
    end = None if seconds is None else time.perf_counter() + seconds * len(runners)
    for _ in range(runs):
        for run, record in zip(runners, times, strict=True):
            taken, start = _times_preempted(), time.perf_counter()
            run()
            spent = (time.perf_counter() - start) * 1e3
            record.append((spent, _times_preempted() != taken))
        if end is not None and time.perf_counter() > end:
            break
    return [(np.array([t for t, _ in rows]), np.array([hit for _, hit in rows])) for rows in times]


def _times_preempted() -> int:
    """How often the kernel has taken the core from this thread; 0 where it does not say."""
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
    except (ImportError, AttributeError):  # not Linux
        return 0


def _median_interval(times: np.ndarray) -> tuple[float, float, float]:
    """Median and its distribution-free 95 % interval: order statistics n/2 -+ 1.96 sqrt(n)/2."""
    ordered, n = np.sort(times), len(times)
    half = 1.96 * n**0.5 / 2
    low, high = max(int(np.floor(n / 2 - half)), 0), min(int(np.ceil(n / 2 + half)), n - 1)
    return float(np.median(ordered)), float(ordered[low]), float(ordered[high])


def _torch_runner(model: Any, inputs: Any, threads: int, backend: str, stack: contextlib.ExitStack) -> Runner:
    if not isinstance(model, nn.Module):
        raise BackendError(f"backend {backend!r} times modules, got {type(model).__name__}; use backend='onnxruntime'")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    stack.callback(torch.set_num_threads, before)
    stack.enter_context(eval_mode(model))
    args, kwargs = arguments(inputs)
    is_cuda = any(t.is_cuda for t in tree_flatten(inputs)[0] if isinstance(t, Tensor))
    forward: Callable[..., Any] = model
    if backend == "compile":
        forward = torch.compile(model, dynamic=False)
        try:
            with torch.inference_mode():
                forward(*args, **kwargs)
        except Exception as e:
            what = " ".join(str(e).strip().splitlines()[:2]) or repr(e)
            raise BackendError(f"{type(model).__name__} cannot be compiled by torch.compile: {what}") from e

    def run() -> None:
        with torch.inference_mode():
            forward(*args, **kwargs)
        if is_cuda:
            torch.cuda.synchronize()

    return run


def _onnx_runner(model: Any, inputs: Any, threads: int, backend: str, stack: contextlib.ExitStack) -> Runner:
    require("onnx", "onnxruntime")
    if isinstance(model, nn.Module):
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.onnx"
        export_onnx(model, inputs, path)
    else:
        path = Path(model)
    provider, device = (CUDA, "cuda") if backend == "onnxruntime-cuda" else (CPU, "cpu")
    session, feed = onnx_session(path, threads, provider), onnx_feed(path, inputs)
    return (lambda: session.run(None, feed)) if device == "cpu" else _bound(session, feed, device)


def _bound(session: Any, feed: dict[str, np.ndarray], device: str) -> Runner:
    """Inputs are copied once, outputs stay on the device: what is timed is the network."""
    import onnxruntime

    binding = session.io_binding()
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a, device, 0) for n, a in feed.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for out in session.get_outputs():
        binding.bind_output(out.name, device)

    def run() -> Any:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding, values  # keep what is bound alive

    return run

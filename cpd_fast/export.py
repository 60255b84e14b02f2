"""Export to ONNX, and measure latency so that two networks can be compared."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from cpd_fast.errors import BackendError, ShapeError

OPSET = 20
TOLERANCE = 1e-4  # of the largest output; fp32 in another order of summation stays below 1e-5
FEWEST = 20  # undisturbed runs that a median needs
BACKENDS = ("onnxruntime", "eager")
WARM_UP = 20
INSTALL = "install it with: pip install onnx onnxscript onnxruntime"


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
        backend: ``"onnxruntime"`` or ``"eager"``.
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


def export_onnx(model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]) -> float:
    """Write an ONNX file (opset 20, dynamic batch) and prove in ONNX Runtime that it computes the same.

    Args:
        model: Any module; exported in eval mode, and left in the mode it was in.
        example_inputs: Tensor, tuple of tensors or dict of keyword tensors; dim 0 is the batch.
        path: The file; weights go inside. Written only if the check passes.

    Returns:
        Largest difference to PyTorch, relative to the largest output (at two batch sizes).

    Raises:
        BackendError: If onnx, onnxscript or onnxruntime is missing, the model cannot be exported, or ONNX Runtime's
            outputs differ by more than 1e-4.
        ShapeError: If the forward fails on the example inputs.

    Example:
        >>> import tempfile
        >>> error = export_onnx(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), tempfile.mkdtemp() + "/conv.onnx")
        >>> error < 1e-4
        True
    """
    _require("onnx", "onnxscript", "onnxruntime")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with _eval_mode(model):
            _try_forward(model, example_inputs)
            _write(model, example_inputs, part)
            error = max(_difference(model, inputs, part) for inputs in (example_inputs, _twice(example_inputs)))
        if not error <= TOLERANCE:
            raise BackendError(
                f"{path}: ONNX Runtime differs from PyTorch by {error:.2e} of the largest output, "
                f"allowed are {TOLERANCE:g}; nothing was written"
            )
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
    return error


def _try_forward(model: nn.Module, inputs: Any) -> None:
    """Find wrong inputs here: the exporter would wrap them in pages of its own advice.

    Raises:
        ShapeError: If the forward fails.
    """
    args, kwargs = _arguments(inputs)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as e:
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor))
        raise ShapeError(
            f"{type(model).__name__}: the forward fails on example inputs of shape {shapes}: {e}; "
            "give inputs that the model accepts"
        ) from e


@contextlib.contextmanager
def _quiet_logger(name: str) -> Iterator[None]:
    """Errors only: the exporter talks about optional packages that are not installed."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _write(model: nn.Module, example_inputs: Any, path: Path) -> None:
    args, kwargs = _arguments(example_inputs)
    batch = torch.export.Dim("batch", min=1)
    dynamic = tree_map(lambda t: {0: batch} if isinstance(t, Tensor) and t.dim() else None, (args, kwargs))
    shapes: Any = dynamic[1] if kwargs else dynamic[0]
    try:
        with warnings.catch_warnings(), _quiet_logger("torch.onnx"):
            warnings.simplefilter("ignore")  # deprecations inside the exporter; the result is checked below
            program = torch.onnx.export(
                model,
                tree_map(_at_least_two, args),  # torch.export would bake in a batch of 1
                kwargs=tree_map(_at_least_two, kwargs),
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                verbose=False,
            )
            assert program is not None
            program.save(str(path), external_data=False)
    except OSError:
        raise
    except Exception as e:
        reason = str(e.__cause__ or e).strip().splitlines()
        raise BackendError(f"{type(model).__name__} cannot be exported to ONNX: {reason[0] if reason else e!r}") from e


def _difference(model: nn.Module, inputs: Any, path: Path) -> float:
    """Largest absolute difference between ONNX Runtime and PyTorch, over the largest absolute output."""
    generator = torch.Generator().manual_seed(0)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t

    inputs = tree_map(noise, inputs)
    args, kwargs = _arguments(inputs)
    with torch.no_grad():
        wanted = [t.float().cpu().numpy() for t in tree_flatten(model(*args, **kwargs))[0] if isinstance(t, Tensor)]
    got = _session(path, threads=0).run(None, _feed(path, inputs))
    worst = 0.0
    for w, g in zip(wanted, got, strict=True):
        worst = max(worst, float(np.abs(w - g).max() / max(np.abs(w).max(), 1e-12)))
    return worst


def latency(
    model: nn.Module | str | os.PathLike[str],
    example_inputs: Any,
    backend: str = "onnxruntime",
    runs: int = 1000,
    threads: int | None = None,
    seconds: float | None = None,
) -> Latency:
    """Time forwards of one network.

    Args:
        model: A module, or the path of an ONNX file (backend ``"onnxruntime"`` only).
        example_inputs: What the network is timed on; batch size is theirs.
        backend: ``"onnxruntime"`` (a module is exported first) or ``"eager"`` PyTorch.
        runs: Timed runs, after 20 that are not counted.
        threads: CPU threads; default: what PyTorch uses.
        seconds: Stop after this time even if ``runs`` are not done; None: no limit.

    Returns:
        Median and its 95 % confidence interval.

    Raises:
        BackendError: If the backend is unknown or not installed.
        ValueError: If ``runs`` is below 1.

    Example:
        >>> latency(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), backend="eager", runs=20).runs
        20
    """
    return compare_latency([model], example_inputs, backend, runs, threads, seconds)[0]


def compare_latency(
    models: Sequence[nn.Module | str | os.PathLike[str]],
    example_inputs: Any,
    backend: str = "onnxruntime",
    runs: int = 1000,
    threads: int | None = None,
    seconds: float | None = None,
) -> list[Latency]:
    """Time several networks in turns, so that drift of the machine hits all of them alike.

    Arguments and errors are those of :func:`latency`; ``runs`` and ``seconds`` count for each model.

    Raises:
        BackendError: If the backend is unknown or not installed.
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
        prepare = _onnx_runner if backend == "onnxruntime" else _eager_runner
        runners = [prepare(m, example_inputs, count, stack) for m in models]
        times = _interleaved(runners, runs, seconds)
    shapes = tuple(tuple(t.shape) for t in tree_flatten(example_inputs)[0] if isinstance(t, Tensor))
    results = []
    for all_runs, disturbed in times:
        calm = all_runs[~disturbed]
        calm = calm if len(calm) >= FEWEST else all_runs
        left_out = len(all_runs) - len(calm)
        results.append(Latency(*_median_interval(calm), len(all_runs), backend, count, shapes, left_out))
    return results


def _interleaved(
    runners: Sequence[Callable[[], Any]], runs: int, seconds: float | None
) -> list[tuple[np.ndarray, np.ndarray]]:
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


def _eager_runner(model: Any, inputs: Any, threads: int, stack: contextlib.ExitStack) -> Callable[[], Any]:
    if not isinstance(model, nn.Module):
        raise BackendError(f"backend 'eager' times modules, got {type(model).__name__}; use backend='onnxruntime'")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    stack.callback(torch.set_num_threads, before)
    stack.enter_context(_eval_mode(model))
    args, kwargs = _arguments(inputs)
    is_cuda = any(t.is_cuda for t in tree_flatten(inputs)[0] if isinstance(t, Tensor))

    def run() -> None:
        with torch.inference_mode():
            model(*args, **kwargs)
        if is_cuda:
            torch.cuda.synchronize()

    return run


def _onnx_runner(model: Any, inputs: Any, threads: int, stack: contextlib.ExitStack) -> Callable[[], Any]:
    _require("onnxruntime")
    if isinstance(model, nn.Module):
        import tempfile

        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.onnx"
        export_onnx(model, inputs, path)
    else:
        path = Path(model)
    session, feed = _session(path, threads), _feed(path, inputs)
    return lambda: session.run(None, feed)


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feed(path: Path, inputs: Any) -> dict[str, np.ndarray]:
    import onnx

    names = [i.name for i in onnx.load(str(path), load_external_data=False).graph.input]
    if isinstance(inputs, Mapping):
        return {k: v.cpu().numpy() for k, v in inputs.items()}
    return {n: t.cpu().numpy() for n, t in zip(names, tree_flatten(inputs)[0], strict=True)}


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _at_least_two(t: Any) -> Any:
    return torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() and len(t) == 1 else t


def _twice(inputs: Any) -> Any:
    return tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t, inputs)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Any:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for m, mode in modes:
            m.training = mode


def _require(*packages: str) -> None:
    import importlib.util

    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise BackendError(f"{', '.join(missing)}: not installed; {INSTALL}")

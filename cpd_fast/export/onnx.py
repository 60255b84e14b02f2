"""ONNX files, held against PyTorch in ONNX Runtime before they are kept."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from cpd_fast.errors import BackendError
from cpd_fast.export.shared import (
    TOLERANCE,
    arguments,
    at_least_two,
    check_inputs,
    difference,
    dynamic_shapes,
    eval_mode,
    twice,
)
from cpd_fast.packages import ONNX, require

OPSET = 20
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def export_onnx(
    model: nn.Module, example_inputs: Any, path: str | os.PathLike[str], dynamic_batch: bool = True
) -> float:
    """Write an ONNX file (opset 20) and prove in ONNX Runtime that it computes the same.

    Args:
        model: Any module; exported in eval mode, and left in the mode it was in.
        example_inputs: Tensor, tuple of tensors or dict of keyword tensors; dim 0 is the batch.
        path: The file; weights go inside. Written only if the check passes.
        dynamic_batch: Whether the file takes any batch size; False for forwards that hold a batch size of their own.

    Returns:
        Largest difference to PyTorch, relative to the largest output (at two batch sizes where they may differ).

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
    require(*ONNX)
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with eval_mode(model):
            check_inputs(model, example_inputs, dynamic_batch)
            _write(model, example_inputs, part, dynamic_batch)
            checked = (example_inputs, twice(example_inputs)) if dynamic_batch else (example_inputs,)
            error = max(difference(model, inputs, lambda x: _run(part, x)) for inputs in checked)
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


def _write(model: nn.Module, example_inputs: Any, path: Path, dynamic_batch: bool) -> None:
    args, kwargs = arguments(at_least_two(example_inputs) if dynamic_batch else example_inputs)
    try:
        with warnings.catch_warnings(), _quiet_logger("torch.onnx"):
            warnings.simplefilter("ignore")  # deprecations inside the exporter; the result is checked afterwards
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=dynamic_shapes(example_inputs, dynamic_batch),
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


def _run(path: Path, inputs: Any) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(a)) for a in onnx_session(path, threads=0).run(None, onnx_feed(path, inputs))]


def onnx_session(path: Path, threads: int, provider: str = CPU) -> Any:
    """A session of ONNX Runtime.

    Args:
        path: The file.
        threads: CPU threads inside an operator; 0 lets ONNX Runtime choose.
        provider: ``"CPUExecutionProvider"`` or ``"CUDAExecutionProvider"``.

    Raises:
        BackendError: If the provider is not there, or the file is no model.
    """
    import onnxruntime

    there = onnxruntime.get_available_providers()
    if provider not in there:
        raise BackendError(
            f"ONNX Runtime has no {provider} here (it has {', '.join(there)}); for CUDA: pip install onnxruntime-gpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as e:
        raise BackendError(f"{path}: ONNX Runtime cannot load it: {str(e).strip().splitlines()[0]}") from e
    if provider not in session.get_providers():  # it falls back to the CPU without a word
        raise BackendError(f"{path}: ONNX Runtime could not use {provider}, only {', '.join(session.get_providers())}")
    return session


def onnx_feed(path: Path, inputs: Any) -> dict[str, np.ndarray]:
    """Inputs by the names that the file gives them."""
    import onnx

    names = [i.name for i in onnx.load(str(path), load_external_data=False).graph.input]
    if isinstance(inputs, Mapping):
        return {k: v.cpu().numpy() for k, v in inputs.items()}
    return {n: t.cpu().numpy() for n, t in zip(names, tree_flatten(inputs)[0], strict=True)}

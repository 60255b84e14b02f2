"""torch.export's own file format, ``.pt2``: a graph that runs without the model's Python code."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

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


def export_pt2(
    model: nn.Module, example_inputs: Any, path: str | os.PathLike[str], dynamic_batch: bool = True
) -> float:
    """Write a ``.pt2`` file with torch.export, read it back, and prove that it computes the same.

    ``torch.export.load(path).module()`` runs it, also where the model's class is not installed; AOTInductor
    compiles it.

    Args:
        model: Any module; exported in eval mode, and left in the mode it was in.
        example_inputs: Tensor, tuple of tensors or dict of keyword tensors; dim 0 is the batch.
        path: The file. Written only if the check passes.
        dynamic_batch: Whether the file takes any batch size; False for forwards that hold a batch size of their own.

    Returns:
        Largest difference to the model, relative to the largest output (at two batch sizes where they may differ).

    Raises:
        OSError: If the file cannot be written.
        BackendError: If torch.export cannot follow the forward, or the outputs differ by more than 1e-4.
        ShapeError: If the forward fails on the example inputs.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/conv.pt2"
        >>> export_pt2(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), path) < 1e-4
        True
        >>> tuple(torch.export.load(path).module()(torch.zeros(5, 3, 8, 8)).shape)
        (5, 4, 6, 6)
    """
    path = Path(path)
    part = path.with_name(path.stem + ".part.pt2")  # torch.export insists on the suffix
    try:
        with eval_mode(model):
            check_inputs(model, example_inputs, dynamic_batch)
            args, kwargs = arguments(at_least_two(example_inputs) if dynamic_batch else example_inputs)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    shapes = dynamic_shapes(example_inputs, dynamic_batch)
                    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
                    torch.export.save(program, part)
                    again = torch.export.load(part).module()
            except OSError:
                raise
            except Exception as e:
                reason = str(e).strip().splitlines()
                what = reason[0] if reason else repr(e)
                raise BackendError(f"{type(model).__name__} cannot be exported by torch.export: {what}") from e

            def run(inputs: Any) -> list[Tensor]:
                args, kwargs = arguments(inputs)
                with torch.no_grad():
                    return [t for t in tree_flatten(again(*args, **kwargs))[0] if isinstance(t, Tensor)]

            checked = (example_inputs, twice(example_inputs)) if dynamic_batch else (example_inputs,)
            error = max(difference(model, inputs, run) for inputs in checked)
        if not error <= TOLERANCE:
            raise BackendError(
                f"{path}: the exported program differs from the model by {error:.2e} of the largest output, "
                f"allowed are {TOLERANCE:g}; nothing was written"
            )
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
    return error

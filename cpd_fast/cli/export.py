"""``cpd-fast export``: the compacted network of a finished run, as a file for somewhere else."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from cpd_fast.cli.compress import read_run
from cpd_fast.cli.shared import as_json
from cpd_fast.errors import RunFolderError


class Format(str, Enum):
    """File formats."""

    onnx = "onnx"
    pt2 = "pt2"
    state_dict = "state-dict"


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    format: Annotated[Format, typer.Option(help="ONNX, torch.export, or weights alone as safetensors.")] = Format.onnx,
    out: Annotated[Path | None, typer.Option(help="The file; default RUN/student.FORMAT.")] = None,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="Take batches of 1 alone.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print path and difference as JSON.")] = False,
) -> None:
    """Write the compacted network to a file, and check it against PyTorch.

    Raises:
        RunFolderError: If the run is not finished.
    """
    import torch
    from safetensors.torch import save_file

    from cpd_fast import store
    from cpd_fast.cli.tasks import build_alone
    from cpd_fast.export import export_onnx, export_pt2
    from cpd_fast.report import Results

    numbers = run / "results.json"
    if not numbers.is_file():
        raise RunFolderError(f"{run}: holds no results.json; the run is not finished: cpd-fast resume {run}")
    results = Results.from_json(numbers.read_text(), str(numbers))
    what, _ = read_run(run)
    model = build_alone(what, len(results.classes))
    small = store.load(run / "student.safetensors", model).eval()
    x = torch.zeros(results.input_shape)
    suffix = {"state-dict": "weights.safetensors"}.get(format.value, format.value)
    path = out or run / f"student.{suffix}"
    try:
        if format is Format.state_dict:
            save_file({k: v.contiguous() for k, v in small.state_dict().items()}, path)
            error = 0.0
        else:
            error = (export_onnx if format is Format.onnx else export_pt2)(small, x, path, not fixed_batch)
    except OSError as e:
        raise RunFolderError(f"{path}: cannot be written: {e.strerror or e}") from e
    if json:
        as_json({"path": str(path.resolve()), "format": format.value, "difference": error})
    else:
        print(f"{path.resolve()}\ndifference to PyTorch: {error:.1e} of the largest output")

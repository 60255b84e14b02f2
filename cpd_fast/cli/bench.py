"""``cpd-fast bench``: latency of networks in turns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from cpd_fast.cli.models import ModelError, build_model
from cpd_fast.cli.shared import as_json, show_table


def command(
    what: Annotated[
        list[str], typer.Argument(metavar="WHAT...", help="Run folders (before and after), ONNX files, or models.")
    ],
    backend: Annotated[str, typer.Option(help="onnxruntime, onnxruntime-cuda, eager or compile.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Timed forwards of each network.")] = 1000,
    seconds: Annotated[float, typer.Option(min=0.1, help="At most so long for each network.")] = 15.0,
    size: Annotated[int | None, typer.Option(help="Side of the pictures of models; default: theirs, or 224.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time networks in turns, so that drift of the machine hits all of them alike.

    The figure is the median of one forward, with its 95 % interval.

    Raises:
        ModelError: If networks do not take the same input.
    """
    import torch

    from cpd_fast.timing import compare_latency

    networks: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for name in what:
        networks |= _networks(name, size)
    shapes = {shape[1:] for _, shape in networks.values()}
    if len(shapes) > 1:
        raise ModelError(f"networks take different inputs ({', '.join(map(str, sorted(shapes)))}); time them apart")
    x = torch.zeros(batch, *shapes.pop())
    timed = compare_latency([net for net, _ in networks.values()], x, backend, runs, threads, seconds)
    if json:
        as_json({n: dataclasses.asdict(t) for n, t in zip(networks, timed, strict=True)})
        return
    first = timed[0].median_ms
    rows = [
        (n, f"{t.median_ms:.3f}", f"{t.low_ms:.3f} to {t.high_ms:.3f}", f"{first / t.median_ms:.2f}x", str(t.runs))
        for n, t in zip(networks, timed, strict=True)
    ]
    show_table(("network", "median, ms", "95 % interval", "speed", "runs"), rows)
    print(f"\n{backend}, input {'x'.join(map(str, x.shape))}, {threads} thread{'s' if threads > 1 else ''}")


def _networks(name: str, size: int | None) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Networks of one argument, with the shape of their input (batch 1).

    Raises:
        ModelError: If there are none.
    """
    path = Path(name)
    if path.is_dir():
        files = [path / f"{n}.onnx" for n in ("teacher", "student") if (path / f"{n}.onnx").is_file()]
        if not files:
            raise ModelError(f"{path}: holds no teacher.onnx and student.onnx; is the run finished?")
        return {str(f): (f, _onnx_shape(f)) for f in files}
    if path.suffix == ".onnx":
        if not path.is_file():
            raise ModelError(f"{path}: no such file")
        return {name: (path, _onnx_shape(path))}
    model, shape = build_model(name, size)
    return {name: (model.eval(), shape)}


def _onnx_shape(path: Path) -> tuple[int, ...]:
    import onnx

    try:
        given = onnx.load(str(path), load_external_data=False).graph.input[0].type.tensor_type.shape.dim
    except Exception as e:  # protobuf has errors of its own
        raise ModelError(f"{path}: no ONNX file ({e})") from e
    return (1, *(d.dim_value or 1 for d in given[1:]))

"""The command ``cpd-fast``: results on stdout, talk on stderr, exit code 1 with one plain sentence on failure."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cpd_fast.config import CompressConfig
from cpd_fast.errors import CpdError, RunFolderError
from cpd_fast.report import Results, table, write_report

app = typer.Typer(
    help="Make trained vision networks physically smaller and faster.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130  # what shells expect after Ctrl-C


@app.command()
def compress(
    demo: Annotated[
        bool, typer.Option("--demo", help="Into runs/demo or runs/demo-DATA; with no other option the climate task.")
    ] = False,
    data: Annotated[str, typer.Option(help="climate (segmentation) or fashion-mnist (classification).")] = "climate",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data, for fashion-mnist.")] = None,
    target_macs: Annotated[float, typer.Option(help="Fraction of the multiply-accumulates that remains.")] = 0.5,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder; default runs/DATA-macsTARGET-seedSEED.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    teacher_steps: Annotated[int | None, typer.Option(help="Training steps of the original.")] = None,
    prune_steps: Annotated[int | None, typer.Option(help="Training steps under masks.")] = None,
    finetune_steps: Annotated[int | None, typer.Option(help="Training steps of the compacted network.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, NAME=VALUE; see cpd-fast settings.")
    ] = None,
) -> None:
    """Train, prune, distil, compact, export and measure; the run folder keeps everything.

    Stop it whenever you like (Ctrl-C, kill): the same command goes on from the last checkpoint.
    """
    from cpd_fast import recipes

    given = {"teacher_steps": teacher_steps, "prune_steps": prune_steps, "finetune_steps": finetune_steps}
    settings: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    settings |= dict(_setting(s) for s in setting or ())
    named = "demo" if data == "climate" else f"demo-{data}"
    folder = run_dir or Path("runs") / (named if demo else f"{data}-macs{target_macs:g}-seed{seed}")
    result = recipes.cpd(
        data,
        target=target_macs,
        run_dir=folder,
        data_dir=data_dir,
        command=" ".join(["cpd-fast", *sys.argv[1:]]),
        seed=seed,
        **settings,
    )
    _show(result.results, result.report)


@app.command()
def settings() -> None:
    """List the settings of compress --set, with defaults and ranges."""
    out = Table("setting", "default", "range", "what it is", box=None, pad_edge=False)
    for f in dataclasses.fields(CompressConfig):
        out.add_row(f.name, str(f.default), f"{f.metadata['low']:g} to {f.metadata['high']:g}", f.metadata["help"])
    Console(highlight=False).print(out)


@app.command()
def comb(
    model: Annotated[str, typer.Argument(help="timm/NAME (random weights), or climate, fashion-mnist.")],
    size: Annotated[int, typer.Option(help="Side of the square input of a timm model.")] = 224,
    freeze_unknown: Annotated[bool, typer.Option(help="Freeze what an operator without a rule touches.")] = False,
) -> None:
    """Print the coupled channel groups of a model, and what it costs."""
    import torch

    from cpd_fast.pipeline import comb as comb_model
    from cpd_fast.schedule import plan_cost

    net, shape = _model(model, size)
    graph = comb_model(net, torch.zeros(shape), on_unknown="freeze" if freeze_unknown else "error")
    print(graph)
    cost = plan_cost(graph, None)
    dims = "x".join(map(str, shape))
    print(f"\n{cost.params:,} parameters, {cost.macs:,} MACs, {cost.activation_bytes:,} activation bytes at {dims}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead.")] = False,
) -> None:
    """Print the before/after table of a finished run and write its HTML report anew.

    Raises:
        RunFolderError: If the run is not finished or its folder cannot be written.
    """
    path = run / "results.json"
    if not path.is_file():
        raise RunFolderError(f"{run}: holds no results.json; the run is not finished, run its command again")
    results = Results.from_json(path.read_text(), str(path))
    if json:
        print(results.to_json())
        return
    try:
        page = write_report(results, run)
    except OSError as e:
        raise RunFolderError(
            f"{run}: report.html cannot be written: {e.strerror}; choose a folder you may write"
        ) from e
    _show(results, page)


@app.command()
def doctor() -> None:
    """Say what is installed and which backends run here, and why not the others."""
    from cpd_fast.recipes.environment import environment

    out = Table("what", "state", box=None, pad_edge=False)
    for name, text in environment().items():
        out.add_row(name, text)
    for name, state in _backends().items():
        out.add_row(name, state)
    Console(highlight=False).print(out)


def main() -> None:
    """Entry point: our own errors become one line on stderr and exit code 1, Ctrl-C becomes 130."""
    talk = Console(stderr=True, highlight=False)
    try:
        app(standalone_mode=True)
    except CpdError as e:
        talk.print(f"[bold red]error:[/] {_escape(str(e))}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        talk.print("[bold]interrupted[/]")
        sys.exit(INTERRUPTED)


# ---------------------------------------------------------------------------------------------------------------- parts
def _show(results: Results, page: Path) -> None:
    out = Table("", "before", "after", "change", box=None, pad_edge=False)
    for column in out.columns[1:]:
        column.justify = "right"
    for row in table(results):
        out.add_row(*row)
    console = Console(highlight=False)
    console.print()
    console.print(out)
    console.print(f"\nReport: {page.resolve()}", soft_wrap=True)


def _setting(text: str) -> tuple[str, int | float | str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise typer.BadParameter(f"--set {text}: expected NAME=VALUE")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def _model(name: str, size: int) -> tuple[Any, tuple[int, ...]]:
    """A model by name and the shape of its example input.

    Raises:
        BadParameter: If there is no such model.
    """
    from cpd_fast.models import EfficientNetLite0FPN, SmallResNet

    if name == "climate":
        return EfficientNetLite0FPN(5, pretrained=False), (1, 3, 96, 96)
    if name == "fashion-mnist":
        return SmallResNet(10), (1, 1, 28, 28)
    kind, _, rest = name.partition("/")
    if kind != "timm" or not rest:
        raise typer.BadParameter(f"model {name!r}: expected timm/NAME, climate or fashion-mnist")
    if importlib.util.find_spec("timm") is None:
        raise typer.BadParameter("timm is not installed; install it with: pip install timm")
    try:
        import timm
    except (ImportError, RuntimeError) as e:  # a torchvision built for another torch raises RuntimeError
        raise typer.BadParameter(f"timm cannot be imported ({e}); install a torchvision that fits torch") from e
    if not timm.is_model(rest):
        import difflib

        near = difflib.get_close_matches(rest, timm.list_models(), n=3)
        raise typer.BadParameter(f"timm has no model {rest!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return timm.create_model(rest, pretrained=False), (1, 3, size, size)


def _backends() -> dict[str, str]:
    """Which backend runs here, or why it does not."""
    import torch

    cuda = torch.cuda.is_available()
    native = importlib.util.find_spec("cpd_fast._native") is not None
    why_no_gpu = "torch is a CPU build" if torch.version.cuda is None else "no CUDA device"
    triton = importlib.util.find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return {
        "backend reference": "runs",
        "backend cpu": "runs"
        if native
        else "no: cpd_fast._native was not built (needs a C++ compiler at install time)",
        "backend cuda": "runs"
        if cuda and native
        else f"no: {why_no_gpu if not cuda else 'cpd_fast._native is missing'}",
        "backend triton": "runs"
        if triton and cuda
        else "runs in its interpreter (slow)"
        if triton and interpreted
        else f"no: {'triton is not installed' if not triton else why_no_gpu}",
        "latency onnxruntime": "runs"
        if importlib.util.find_spec("onnxruntime")
        else "no: onnxruntime is not installed; pip install onnxruntime",
    }


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()

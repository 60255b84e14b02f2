"""``cpd-fast compress``: a whole run, from training to report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cpd_fast.cli.shared import show_results


def command(
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
    show_results(result.results, result.report)


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

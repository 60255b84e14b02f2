"""``cpd-fast report``: the numbers of a run, as a table, a page or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cpd_fast.cli.shared import show_results
from cpd_fast.errors import RunFolderError
from cpd_fast.report import Results, write_report


def command(
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
    show_results(results, page)

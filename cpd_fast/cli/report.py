"""``cpd-fast report``: the numbers of one run, or of several side by side, as a table, a page, Markdown or JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cpd_fast.cli.shared import TABLE_HEAD, as_json, show_table
from cpd_fast.errors import RunFolderError
from cpd_fast.report import (
    Results,
    comparison_json,
    comparison_markdown,
    render,
    render_comparison,
    table,
    to_markdown,
)
from cpd_fast.report.compare import HEAD, cells, rows_of

RESULTS, COMPARISON = "results.json", "comparison.html"


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the numbers as Markdown instead.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The page; default RUN/report.html, or comparison.html of several runs.")
    ] = None,
) -> None:
    """Print the before/after table of a finished run and write its HTML report anew; compare several runs.

    Of several, those that are not finished are left out, and named on stderr.

    Raises:
        RunFolderError: If no run is finished or the page cannot be written.
    """
    if len(runs) == 1:
        _one(runs[0], _results(runs[0]), json, markdown, out)
        return
    finished = [run for run in runs if (run / RESULTS).is_file()]
    for run in runs:
        if run not in finished:
            print(f"left out: {run} holds no {RESULTS}; it is no run, or not finished", file=sys.stderr)
    if not finished:
        raise RunFolderError(f"none of the {len(runs)} folders holds a {RESULTS}; no run is finished")
    read = [(run.resolve().name, _results(run)) for run in finished]
    if json:
        as_json(comparison_json(read))
    elif markdown:
        print(comparison_markdown(read), end="")
    else:
        out = out or Path(COMPARISON)
        show_table(HEAD, cells(rows_of(read)))
    if out is not None:
        _write(out, render_comparison(read), json or markdown)


def _write(page: Path, text: str, quiet: bool) -> None:
    """Write a page and say where; ``quiet``: not among the results.

    Raises:
        RunFolderError: If it cannot be written.
    """
    try:
        page.write_text(text)
    except OSError as e:
        raise RunFolderError(f"{page}: cannot be written: {e.strerror}; give another --out") from e
    if not quiet:
        print()
    print(f"Report: {page.resolve()}", file=sys.stderr if quiet else sys.stdout)


def _results(run: Path) -> Results:
    path = run / RESULTS
    if not path.is_file():
        raise RunFolderError(f"{run}: holds no {RESULTS}; the run is not finished, run its command again")
    return Results.from_json(path.read_text(), str(path))


def _one(run: Path, results: Results, json: bool, markdown: bool, out: Path | None) -> None:
    if json:
        as_json(results.to_json())
    elif markdown:
        print(to_markdown(results), end="")
    else:
        out = out or run / "report.html"
        show_table(TABLE_HEAD, table(results))
    if out is not None:
        _write(out, render(results, run), json or markdown)

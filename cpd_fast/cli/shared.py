"""What several subcommands print."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cpd_fast.report import Results, table


def show_results(results: Results, page: Path) -> None:
    """Print the before/after table and the path of the report."""
    out = Table("", "before", "after", "change", box=None, pad_edge=False)
    for column in out.columns[1:]:
        column.justify = "right"
    for row in table(results):
        out.add_row(*row)
    console = Console(highlight=False)
    console.print()
    console.print(out)
    console.print(f"\nReport: {page.resolve()}", soft_wrap=True)

"""What several subcommands print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cpd_fast.report import Results, table

TABLE_HEAD = ("", "before", "after", "change")
WHOLE = 10_000  # characters, wider than any table


def show_results(results: Results, page: Path) -> None:
    """Print the before/after table and the path of the report."""
    show_table(TABLE_HEAD, table(results))
    Console(highlight=False).print(f"\nReport: {page.resolve()}", soft_wrap=True)


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> None:
    """A table without lines, numbers to the right; in a file or a pipe no cell is cut, however wide it is."""
    out = Table(*head, box=None, pad_edge=False)
    for column in out.columns[1:]:
        column.justify = "right" if numbers else "left"
    for row in rows:
        out.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WHOLE
    console.print()
    console.print(out)


def as_json(value: Any) -> None:
    """JSON to stdout; text is JSON already."""
    print(value if isinstance(value, str) else json.dumps(value, indent=1))

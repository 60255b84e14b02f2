"""``cpd-fast settings``: what compress can be told."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from cpd_fast.config import CompressConfig


def command() -> None:
    """List the settings of compress --set, with defaults and ranges."""
    out = Table("setting", "default", "range", "what it is", box=None, pad_edge=False)
    for f in dataclasses.fields(CompressConfig):
        out.add_row(f.name, str(f.default), f"{f.metadata['low']:g} to {f.metadata['high']:g}", f.metadata["help"])
    Console(highlight=False).print(out)

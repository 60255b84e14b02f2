"""``cpd-fast settings``: what compress can be told."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from cpd_fast.config import RECIPES, CompressConfig


def command() -> None:
    """List the settings of compress --set, with defaults and ranges."""
    out = Table("setting", "default", "range", "what it is", "recipes", box=None, pad_edge=False)
    for f in dataclasses.fields(CompressConfig):
        limits = ", ".join(f.metadata["choices"]) if "choices" in f.metadata else ""
        limits = f"{f.metadata['low']:g} to {f.metadata['high']:g}" if "low" in f.metadata else limits or "names"
        out.add_row(f.name, str(f.default), limits, f.metadata["help"], _recipes(f))
    Console(highlight=False).print(out)


def _recipes(field: dataclasses.Field[object]) -> str:
    own = field.metadata["recipes"]
    return "all" if own == RECIPES else ", ".join(own)

"""``cpd-fast settings``: what compress can be told."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cpd_fast.cli.shared import as_json
from cpd_fast.config import RECIPES, CompressConfig


def command(json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """List the settings of compress, with defaults and ranges: each is a flag, a name in a recipe, and a --set."""
    if json:
        as_json([
            {"name": f.name, "default": f.default, "allowed": _limits(f), "help": f.metadata["help"]}
            | {"recipes": list(f.metadata["recipes"])}
            for f in dataclasses.fields(CompressConfig)
        ])
        return
    out = Table("setting", "default", "range", "what it is", "recipes", box=None, pad_edge=False)
    for f in dataclasses.fields(CompressConfig):
        out.add_row(f.name, str(f.default), _limits(f), f.metadata["help"], _recipes(f))
    Console(highlight=False).print(out)


def _limits(field: dataclasses.Field[object]) -> str:
    """Which values a setting may have."""
    about = field.metadata
    if "low" in about:
        return f"{about['low']:g} to {about['high']:g}"
    return "bytes" if "memory" in about else ", ".join(about["choices"]) or "names"


def _recipes(field: dataclasses.Field[object]) -> str:
    own = field.metadata["recipes"]
    return "all" if own == RECIPES else ", ".join(own)

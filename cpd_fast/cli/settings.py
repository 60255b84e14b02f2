"""``cpd-fast settings``: what compress can be told."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from cpd_fast.cli.recipe import allowed
from cpd_fast.cli.shared import as_json, show_table
from cpd_fast.config import RECIPES, CompressConfig


def command(json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """List the settings of compress, with defaults and ranges: each is a flag, a name in a recipe, and a --set."""
    fields = dataclasses.fields(CompressConfig)
    if json:
        as_json([
            {"name": f.name, "default": f.default, "allowed": allowed(f), "help": f.metadata["help"]}
            | {"recipes": list(f.metadata["recipes"])}
            | {k: f.metadata[k] for k in ("low", "high", "choices") if k in f.metadata}
            for f in fields
        ])
        return
    rows = [(f.name, str(f.default), allowed(f), f.metadata["help"], _recipes(f)) for f in fields]
    show_table(("setting", "default", "range", "what it is", "recipes"), rows, numbers=False)


def _recipes(field: dataclasses.Field[object]) -> str:
    own = field.metadata["recipes"]
    return "all" if own == RECIPES else ", ".join(own)

"""``cpd-fast comb``: which channels of a model belong together."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import Annotated

import typer

from cpd_fast.cli.models import build_model
from cpd_fast.errors import RunFolderError


def command(
    model: Annotated[
        str,
        typer.Argument(help="timm/NAME, smp/DECODER:ENCODER, hf/FOLDER, module:function, climate or fashion-mnist."),
    ],
    size: Annotated[int | None, typer.Option(help="Side of the square input; default: the model's, or 224.")] = None,
    freeze_unknown: Annotated[bool, typer.Option(help="Freeze what an operator without a rule touches.")] = False,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Modules or parameters that keep their shapes; names or patterns.")
    ] = None,
    freeze: Annotated[list[str] | None, typer.Option(help="Groups that stay whole; names or patterns.")] = None,
    protect: Annotated[list[str] | None, typer.Option(help="first or last: layers that stay whole.")] = None,
    granularity: Annotated[str, typer.Option(help="A channel of an attention: dim or head.")] = "dim",
    conv_groups: Annotated[str, typer.Option(help="A channel of a grouped convolution: channel or group.")] = "channel",
    explain: Annotated[
        list[str] | None, typer.Option(help="Explain a parameter or module instead of listing everything.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
    html: Annotated[Path | None, typer.Option(help="Draw the groups over the module tree into this file.")] = None,
) -> None:
    """Print the coupled channel groups of a model, and what it costs.

    Raises:
        BadParameter: If granularity or conv-groups is none of the choices.
        RunFolderError: If the drawing cannot be written.
    """
    import torch

    from cpd_fast.pipeline import comb as comb_model
    from cpd_fast.report.groups import render_groups
    from cpd_fast.schedule import plan_cost

    net, shape = build_model(model, size)
    unknown = "freeze" if freeze_unknown else "error"
    try:
        graph = comb_model(net, torch.zeros(shape), ignore or (), unknown, granularity, conv_groups, protect or ())
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e
    graph = graph.freeze(*freeze or ())
    cost = plan_cost(graph, None)
    if html is not None:
        try:
            html.write_text(render_groups(graph, model.removeprefix("timm/")))
        except OSError as e:
            raise RunFolderError(f"{html} cannot be written: {e.strerror}; choose a file you may write") from e
        print(f"drawn in {html.resolve()}", file=sys.stderr)
    if json:
        costs = {"parameters": cost.params, "macs": cost.macs, "activation_bytes": cost.activation_bytes}
        print(json_text.dumps({"model": model} | costs | graph.as_dict(), indent=1))
        return
    if explain:
        print("\n".join(graph.explain(name) for name in explain))
        return
    print(graph)
    dims = "x".join(map(str, shape))
    print(f"\n{cost.params:,} parameters, {cost.macs:,} MACs, {cost.activation_bytes:,} activation bytes at {dims}")

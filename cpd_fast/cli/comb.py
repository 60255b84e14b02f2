"""``cpd-fast comb``: which channels of a model belong together."""

from __future__ import annotations

from typing import Annotated

import typer

from cpd_fast.cli.models import build_model


def command(
    model: Annotated[str, typer.Argument(help="timm/NAME (random weights), or climate, fashion-mnist.")],
    size: Annotated[int, typer.Option(help="Side of the square input of a timm model.")] = 224,
    freeze_unknown: Annotated[bool, typer.Option(help="Freeze what an operator without a rule touches.")] = False,
) -> None:
    """Print the coupled channel groups of a model, and what it costs."""
    import torch

    from cpd_fast.pipeline import comb as comb_model
    from cpd_fast.schedule import plan_cost

    net, shape = build_model(model, size)
    graph = comb_model(net, torch.zeros(shape), on_unknown="freeze" if freeze_unknown else "error")
    print(graph)
    cost = plan_cost(graph, None)
    dims = "x".join(map(str, shape))
    print(f"\n{cost.params:,} parameters, {cost.macs:,} MACs, {cost.activation_bytes:,} activation bytes at {dims}")

"""Calls that wire several rooms together."""

from __future__ import annotations

from typing import Any

from torch import nn

from cpd_fast.comb import comb
from cpd_fast.schedule import plan_cost
from cpd_fast.types import ChannelGraph, Cost, PrunePlan


def cost(model: nn.Module, example_inputs: Any, plan: PrunePlan | None = None, graph: ChannelGraph | None = None) -> Cost:
    """What one forward costs, dense or under a plan; the pruned model is not built.

    Args:
        model: The model.
        example_inputs: Tensor, tuple of arguments or dict of keyword arguments; the costs are for this input.
        plan: Kept channels; None for the model as it is.
        graph: The model's graph at ``example_inputs``, if at hand: saves the trace.

    Returns:
        Parameters, MACs and activation bytes, exact integers; under a plan equal to those of the compacted model.

    Raises:
        PlanError: If the plan belongs to another model.
        TraceError: If the forward fails on the example inputs.

    Example:
        >>> import torch, cpd_fast as cpd
        >>> cpd.cost(torch.nn.Linear(4, 2), torch.zeros(1, 4))
        Cost(params=10, macs=8, activation_bytes=8)
    """
    if graph is None:
        graph = comb(model, example_inputs, on_unknown="error" if plan is not None else "freeze")
    if plan is not None:
        plan.check(graph)
    return plan_cost(graph, plan)

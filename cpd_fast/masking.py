"""Masks as users meet them: compact activations where the compacted structure can be proven, full width elsewhere."""

from __future__ import annotations

from torch import nn

from cpd_fast.compact import Resizer, Structure
from cpd_fast.prune import MaskedModel, MaskHandle
from cpd_fast.types import ChannelGraph, PrunePlan
from cpd_fast.wrappers import unwrap


class _Structures:
    """A :class:`Resizer` that is made, and proves what it does, when the first plan comes."""

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self._model, self._graph = model, graph
        self._resizer: Resizer | None = None

    @property
    def proof(self) -> str:
        return "not looked for yet" if self._resizer is None else self._resizer.proof

    def __call__(self, plan: PrunePlan) -> Structure:
        if self._resizer is None:
            self._resizer = Resizer(self._model, self._graph)
        return self._resizer(plan)


def masked(
    model: nn.Module, graph: ChannelGraph, plan: PrunePlan, execution: str = "auto", regrow: bool = False
) -> MaskedModel:
    """Run a model at its original weights as if the channels that a plan removes did not exist.

    A forward runs the compacted structure on the kept elements of the weights, taken out at its start; removed channels
    cost nothing. Activations between layers, and what hooks on submodules see, then have the compacted shapes. Where
    that cannot be proven (``m.explain()`` says why) weights are multiplied by masks at the original shapes.

    Args:
        model: The model that ``graph`` was combed from (or one of the same structure).
        graph: Its coupled channel groups.
        plan: Kept channels; an empty plan changes nothing, bit for bit.
        execution: ``"auto"``: compact where it is possible, full width below ``torch.compile``, which would compile
            again for every plan; ``"compact"``, an error where that is not possible; ``"full_width"``, at the original
            shapes.
        regrow: Let optimizers move masked weights. Without it they stand still, bit for bit, whatever momentum and
            weight decay would do.

    Returns:
        A module, also usable as a context manager, that shares parameters with ``model``. Outputs equal those of
        ``compact(model, graph, plan)``; gradients of removed weights are exactly zero. ``update(plan)`` changes the
        plan in milliseconds.

    Raises:
        PlanError: If the plan or the model does not fit the graph.
        CompactError: If ``execution="compact"`` and the forward cannot be run so.

    Example:
        >>> import torch, cpd_fast as cpd
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> x = torch.zeros(1, 3, 8, 8)
        >>> graph = cpd.comb(net, x)
        >>> plan = cpd.random_plan(graph, keep=0.5)
        >>> with cpd.masked(net, graph, plan) as m:
        ...     y = m(x)
        >>> m.explain()
        'compact activations: structure by arithmetic, proven by replays of 1 uneven plan'
    """
    inner = unwrap(model)
    if execution == "auto" and hasattr(model, "_orig_mod"):  # shapes that stay, so that it is compiled once
        execution = "full_width"
    return MaskedModel(model, MaskHandle(inner, graph, plan, _Structures(inner, graph), execution, regrow))


def attach_masks(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PrunePlan | None = None,
    execution: str = "auto",
    regrow: bool = False,
) -> MaskHandle:
    """Mask the user's own model object, for training loops that keep calling ``model(x)``.

    Args:
        model: The model that ``graph`` was combed from; wrappers of DDP and ``torch.compile`` are looked through.
        graph: Its coupled channel groups.
        plan: First plan; without one nothing is masked yet.
        execution: See :func:`masked`.
        regrow: See :func:`masked`.

    Returns:
        A handle: ``update(plan)`` changes the masks, ``remove()`` takes them off, ``explain()`` says how forwards run.

    Raises:
        PlanError: If the plan or the model does not fit the graph.
        CompactError: If ``execution="compact"`` and the forward cannot be run so.
    """
    inner = unwrap(model)
    return MaskHandle(inner, graph, plan, _Structures(inner, graph), execution, regrow).attach()

"""Compaction: from a plan to a physically smaller network that computes what the masked one did."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cpd_fast.adapters import adapt
from cpd_fast.comb.meta import clone_to_meta, collection_paused, copy_modules
from cpd_fast.comb.walk import modules_of, named_tensors
from cpd_fast.compact.repair import repair, repair_known
from cpd_fast.compact.replay import Replayer
from cpd_fast.compact.shrink import Cut, left_shape, make_cut
from cpd_fast.compact.views import Resized, scale_calls
from cpd_fast.errors import CompactError, PlanError
from cpd_fast.types import ChannelGraph, PrunePlan, ScaleSite
from cpd_fast.wrappers import unwrap

_RowScale = tuple[Tensor, float]


class Scale(nn.Module):
    """Multiplies by a constant: keeps the attention scale of the original head size.

    Args:
        factor: sqrt(kept head dims / original head dims), dimensionless.
    """

    keeps_attention_scale = True  # comb looks through it, and another compaction multiplies its factor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """``x * factor``."""
        return x * self.factor

    def extra_repr(self) -> str:
        """The factor."""
        return f"{self.factor:.6g}"


@collection_paused()
def compact(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PrunePlan,
    optimizer: torch.optim.Optimizer | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Remove the channels that a plan does not keep.

    The result is an ordinary module of the same classes with smaller tensors and repaired attributes. It is proven by
    a replay in which every channel must meet itself; until that has succeeded nothing of the caller's is changed.

    Args:
        model: The model that ``graph`` was combed from, or one of the same structure. Its own hooks go along.
        graph: Its coupled channel groups.
        plan: Kept channels.
        optimizer: Optimizer over ``model``'s parameters. It is changed in place to hold the new parameters, with its
            state (momentum, Adam moments) and gradients cut alike.
        inplace: Shrink ``model`` itself instead of a copy.

    Returns:
        The compacted model, in the mode (train or eval) of ``model``.

    Raises:
        PlanError: If plan, graph and model do not fit together.
        CompactError: If the compacted forward cannot be proven equal; ``model`` and ``optimizer`` are unchanged.

    Example:
        >>> import torch, cpd_fast as cpd
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> graph = cpd.comb(net, torch.zeros(1, 3, 8, 8))
        >>> small = cpd.compact(net, graph, cpd.random_plan(graph, keep=0.5))
        >>> small[0].weight.shape
        torch.Size([4, 3, 3, 3])
    """
    model = unwrap(model)
    plan.check(graph)
    _check_model(model, graph)
    alive = graph.alive(plan)
    cuts = {n: c for n, t in graph.tensors.items() if (c := make_cut(t, alive)) is not None}
    identities, scaled_rows, scales = kept_scales(graph.scale_sites, alive)
    small = _copy_cut(model, graph, cuts, scaled_rows)
    adapt(small, lambda name: any(not name or n.startswith(f"{name}.") for n in cuts))
    drop_mask_hooks(small)
    fit_modules(small, graph, plan, identities)
    for name, calls in scales.items():
        scale_calls(small.get_submodule(name), calls)
    carried = [] if optimizer is None else _carry_optimizer(optimizer, model, small, cuts)
    if inplace:
        _overwrite(model, small)
        small = model
    for move in carried:
        move()
    return small


def rehearse(model: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> bool:
    """Compaction without weights (meta device): can the forward follow this plan?

    Returns:
        Whether sizes had to be put into calls, because attributes did not help.

    Raises:
        CompactError: If it cannot; ``module`` names where.
    """
    model = unwrap(model)
    alive = graph.alive(plan)
    small = cut_on_meta(model, graph, alive)
    fit_modules(small, graph, plan, kept_scales(graph.scale_sites, alive)[0])
    return any(isinstance(m, Resized) and m.resized_calls for m in modules_of(small))


def cut_on_meta(model: nn.Module, graph: ChannelGraph, alive: np.ndarray) -> nn.Module:
    """A copy without weights whose tensors have the shapes that are left of them; attributes are not repaired yet."""
    memo: dict[int, Any] = {}
    for name, t in named_tensors(model):
        known = graph.tensors.get(name)
        if known is not None:
            shape = left_shape(known.shape, known.maps, alive)
            value = torch.empty(shape, dtype=t.dtype, device="meta")
            if value.shape != t.shape or isinstance(t, nn.Parameter):  # others are copied with what is known of them
                memo[id(t)] = nn.Parameter(value, t.requires_grad) if isinstance(t, nn.Parameter) else value
    return clone_to_meta(model, memo, graph.needs_hooks)


def fit_modules(
    small: nn.Module, graph: ChannelGraph, plan: PrunePlan, identities: dict[str, float]
) -> list[tuple[str, np.ndarray, float]]:
    """Make the modules fit tensors that are cut already, and prove it; ``identities`` become scales.

    Returns:
        Rows (of original tensors) that had to be scaled.
    """
    alive = graph.alive(plan)
    for name, factor in identities.items():
        small.set_submodule(name, Scale(factor * getattr(small.get_submodule(name), "factor", 1.0)))
    repair_known(small, graph, alive)
    return repair(small, graph, plan, Replayer(small, graph, alive, frozenset(identities)))


def drop_mask_hooks(small: nn.Module) -> None:
    """Take the hooks off that belong to masks: nothing is left to mask in a compacted copy."""
    for module in small.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [
                k for k, h in hooks.items() if getattr(getattr(h, "__self__", None), "dropped_by_compaction", False)
            ]:
                del hooks[key]


def _check_model(model: nn.Module, graph: ChannelGraph) -> None:
    own = dict(named_tensors(model))
    for name, t in graph.tensors.items():
        got = own.get(name)
        if got is None or tuple(got.shape) != t.shape:
            what = "no such tensor" if got is None else f"shape {tuple(got.shape)}"
            raise PlanError(f"{name}: the graph expects shape {t.shape}, the model has {what}; comb this model")


def kept_scales(
    sites: tuple[ScaleSite, ...], alive: np.ndarray
) -> tuple[dict[str, float], dict[str, list[_RowScale]], dict[str, dict[int, float]]]:
    """How attention that takes 1/sqrt(head_dim) as its scale keeps the original one.

    Identities that become scales, rows to scale, and the scales of calls by module.
    """
    identities: dict[str, float] = {}
    scaled: dict[str, list[_RowScale]] = {}
    calls: dict[str, dict[int, float]] = {}
    seen: set[bytes] = set()
    for site in sites:
        factor = (int(alive[site.channels].sum(1).max()) / site.channels.shape[1]) ** 0.5
        key = str(site.identity or site.module).encode() + site.channels.tobytes()
        if factor != 1 and site.identity is None and not site.rows:
            calls.setdefault(site.module, {})[site.call] = site.channels.shape[1] ** -0.5
            continue
        if factor == 1 or key in seen:
            continue
        seen.add(key)
        if site.identity is not None:
            identities[site.identity] = factor
        else:
            for name, rows in site.rows:
                scaled.setdefault(name, []).append((torch.from_numpy(rows), factor))
    return identities, scaled, calls


def _copy_cut(
    model: nn.Module, graph: ChannelGraph, cuts: dict[str, Cut], scales: dict[str, list[_RowScale]]
) -> nn.Module:
    """A deep copy in which every tensor that shrinks is cut on the way; sharing between modules is kept."""
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for name, t in named_tensors(model):
            value = t.detach()
            for rows, factor in scales.get(name, ()):
                value = value.clone()
                value[rows] *= factor
            if name in cuts:
                value = cuts[name](value)
            elif name not in scales:
                continue
            memo[id(t)] = nn.Parameter(value, t.requires_grad) if isinstance(t, nn.Parameter) else value
    return copy_modules(model, memo)


def _carry_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, cuts: dict[str, Cut]
) -> list[Any]:
    """Prepare the moves that rebind an optimizer to the compacted parameters; nothing is changed until they run.

    Raises:
        CompactError: If the optimizer holds state that does not have the shape of its parameter.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    fresh = dict(small.named_parameters())
    moves = []
    for group in optimizer.param_groups:
        renewed = [fresh[names[id(p)]] if id(p) in names else p for p in group["params"]]
        for old, new in zip(group["params"], renewed, strict=True):
            if old is new:
                continue
            cut = cuts.get(names[id(old)])
            state = {}
            for key, value in optimizer.state.get(old, {}).items():
                if cut is not None and isinstance(value, Tensor) and value.numel() > 1:
                    if value.shape != old.shape:
                        raise CompactError(
                            f"{names[id(old)]}: optimizer state {key!r} has shape {tuple(value.shape)}, the parameter "
                            f"{tuple(old.shape)}; {type(optimizer).__name__} cannot be carried, build a new optimizer"
                        )
                    value = cut(value)
                state[key] = value
            grad = None if old.grad is None else old.grad if cut is None else cut(old.grad)
            moves.append(_move(optimizer, old, new, state, grad))
        moves.append(lambda group=group, renewed=renewed: group.__setitem__("params", renewed))
    return moves


def _move(
    optimizer: torch.optim.Optimizer, old: Tensor, new: nn.Parameter, state: dict[str, Any], grad: Tensor | None
) -> Any:
    def move() -> None:
        had = optimizer.state.pop(old, None)
        if had is not None:
            optimizer.state[new] = state
        new.grad = grad

    return move


def _overwrite(model: nn.Module, small: nn.Module) -> None:
    """Give the caller's own module objects the compacted contents."""
    for name, module in list(model.named_modules()):
        source = small.get_submodule(name) if name else small
        if type(source) is not type(module):
            model.set_submodule(name, source)
            continue
        children = module._modules
        module.__dict__.update(source.__dict__)
        module._modules = children

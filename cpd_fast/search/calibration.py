"""Statistics of a pruned network from a few batches without labels: adaptive batch norm, and what stands in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cpd_fast.errors import SearchError
from cpd_fast.types import ChannelGraph, PrunePlan

_BatchNorm = nn.modules.batchnorm._BatchNorm
PAPER_MOMENTUM, PAPER_BATCHES = 0.1, 102  # of EagleEye's code


@dataclass(frozen=True, eq=False)
class Batch:
    """Arguments of one forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def feed(self, model: nn.Module) -> Any:
        """Call the model."""
        return model(*self.args, **self.kwargs)


def materialise(calibration: Iterable[Any], graph: ChannelGraph, device: torch.device) -> tuple[Batch, ...]:
    """The calibration batches, decoded once and kept on the device for all candidates.

    Args:
        calibration: Batches: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments. Of
            tuples that are longer than the model's own inputs (images, labels) the rest is left out.
        graph: Knows how many inputs the model takes.
        device: Where to.

    Raises:
        SearchError: If there is none, or one is no tensor, tuple or dict.
    """
    batches = []
    for item in calibration:
        item = tree_map_only(Tensor, lambda t: t.detach().to(device), item)
        if isinstance(item, Tensor):
            batches.append(Batch((item,), {}))
        elif isinstance(item, Mapping):
            batches.append(Batch((), dict(item)))
        elif isinstance(item, (tuple, list)):
            batches.append(Batch(tuple(item)[: max(1, len(graph.inputs[0]))], {}))
        else:
            raise SearchError(
                f"calibration: batch {len(batches)} is a {type(item).__name__}; expected a tensor, a tuple of "
                "arguments or a dict of them"
            )
    if not batches:
        raise SearchError(
            "calibration: expected at least one batch of training inputs, got none; a generator can be read only once"
        )
    return tuple(batches)


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode inside the block, in its own mode afterwards."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def adapt_batch_norm(model: nn.Module, batches: Iterable[Batch], momentum: float | None = None) -> None:
    r"""Re-estimate the running statistics of all batch norms, in place; weights do not move (EagleEye's adaptive BN).

    Only batch norms run in train mode: dropout and stochastic depth, which the paper's code leaves on, stay off.

    Args:
        model: The network. Its mode, and its norms' momenta, are restored.
        batches: What to run through it, in order.
        momentum: ``None``: the plain average over all batches, started anew. A number m: an exponential average
            ``(1 - m) * old + m * batch`` from the statistics at hand, as in the paper's code (0.1, 102 batches), whose
            result is as noisy as a plain average of ``(2 - m) / m`` = 19 batches.

    Source: Li et al., arXiv:2007.02491, section 3.3.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1)).eval()
        >>> adapt_batch_norm(net, [Batch((torch.tensor([[x], [x + 2.0]]),), {}) for x in (1.0, 5.0)])
        >>> net[0].running_mean.item(), net[0].running_var.item()
        (4.0, 2.0)
    """
    norms = batch_norms(model)
    momenta = [m.momentum for m in norms]
    with eval_mode(model):
        try:
            for m in norms:
                if momentum is None:
                    m.reset_running_stats()
                m.momentum = momentum
                m.training = True
            for batch in batches:
                batch.feed(model)
        finally:
            for m, old in zip(norms, momenta, strict=True):
                m.momentum = old


# ------------------------------------------------------------------------------------------- networks without them
Means = dict[str, Tensor]
Layer = nn.Linear | nn.modules.conv._ConvNd


def _biased(model: nn.Module, graph: ChannelGraph) -> dict[str, Layer]:
    """Layers with a bias, but for those whose rows compaction rescales."""
    scaled = {name for site in graph.scale_sites for name, _ in site.rows}
    scaled |= {name for step in graph.steps for name, _ in step.rows}
    found: dict[str, Layer] = {}
    for name, m in model.named_modules():
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) and m.bias is not None:
            own = [graph.aliases.get(f"{name}.{t}", f"{name}.{t}") for t in ("weight", "bias")]
            if not scaled & set(own):
                found[name] = m
    return found


def _channel_mean(layer: Layer, out: Tensor) -> Tensor:
    return out.float().movedim(_channel_dim(layer, out), -1).flatten(0, -2).mean(0)


def _channel_dim(layer: Layer, out: Tensor) -> int:
    return out.dim() - 1 - (0 if isinstance(layer, nn.Linear) else layer.weight.dim() - 2)


@torch.no_grad()
def channel_means(model: nn.Module, graph: ChannelGraph, batches: Iterable[Batch]) -> Means:
    """Mean output of every channel of every layer with a bias, over the batches: module name -> fp32 ``(C,)``."""
    sums: dict[str, list[Tensor]] = {}
    with eval_mode(model), ExitStack() as stack:
        for name, layer in _biased(model, graph).items():
            sums[name] = []
            hook = layer.register_forward_hook(lambda m, _i, out, s=sums[name]: s.append(_channel_mean(m, out)))  # type: ignore[misc]
            stack.callback(hook.remove)
        for batch in batches:
            batch.feed(model)
    return {name: torch.stack(s).mean(0) for name, s in sums.items() if s}


@torch.no_grad()
def match_means(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PrunePlan,
    batches: Iterable[Batch],
    dense: Means,
    run: nn.Module | None = None,
) -> None:
    r"""Shift biases so that every kept channel has the mean that it had in the dense network, in place.

    This is what adaptive BN does for means, for networks that have no batch norm: without labels and gradients.
    While the batches run, every layer's output is shifted to the dense mean of its channels, so that later layers see
    inputs as they will be; the shifts, averaged over the batches, are then added to the biases. Layers without a bias
    are left alone.

    Args:
        model: The network, compacted or masked by ``plan``.
        graph: Coupled channel groups of the dense network.
        plan: Kept channels.
        batches: What to run through it.
        dense: :func:`channel_means` of the dense network on the same batches.
        run: What to call, where that is not the model itself but the model under masks.

    Source: bias correction of Nagel et al., arXiv:1906.04721, section 4.2, for what pruning takes away.
    """
    alive = graph.alive(plan)
    layers = {name: m for name, m in _biased(model, graph).items() if name in dense}
    biases = {name: m.bias for name, m in layers.items() if m.bias is not None}
    shifts: dict[str, list[Tensor]] = {name: [] for name in layers}
    wanted: dict[str, tuple[Tensor, Tensor]] = {}
    for name, bias in biases.items():
        known = graph.tensors.get(graph.aliases.get(f"{name}.bias", f"{name}.bias"))
        kept = torch.ones(len(dense[name]), dtype=torch.bool)
        for m in known.maps if known is not None else ():
            kept &= torch.from_numpy(alive[m])
        kept = kept.to(dense[name].device)
        is_cut = bias.numel() == int(kept.sum())
        mean = dense[name][kept] if is_cut else dense[name]
        wanted[name] = (mean, torch.ones_like(mean, dtype=torch.bool) if is_cut else kept)

    def corrected(name: str) -> Callable[..., Tensor]:
        mean, kept = wanted[name]

        def hook(layer: Layer, _inputs: Any, out: Tensor) -> Tensor:
            shift = torch.where(kept, mean - _channel_mean(layer, out), 0.0).to(out.dtype)
            shifts[name].append(shift)
            return out + shift.reshape(-1, *[1] * (out.dim() - 1 - _channel_dim(layer, out)))

        return hook

    with eval_mode(model), ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(corrected(name)).remove)
        for batch in batches:
            batch.feed(model if run is None else run)
    for name, bias in biases.items():
        if shifts[name]:
            bias += torch.stack(shifts[name]).mean(0)

"""The user's own module inside what others wrap around it."""

from __future__ import annotations

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile wrappers.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(net)) is net
        True
    """
    return _layers(model)[-1]


def ddp_of(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel among a model's wrappers, if there is one."""
    return next((m for m in _layers(model) if isinstance(m, nn.parallel.DistributedDataParallel)), None)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The model, what it wraps, and so on."""
    layers = [model]
    while True:
        inner = getattr(layers[-1], "_orig_mod", None)
        if inner is None and isinstance(layers[-1], nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = layers[-1].module
        if not isinstance(inner, nn.Module):
            return layers
        layers.append(inner)

"""Which classes of modules have an adapter, and putting it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class _Adapter:
    forward: Callable[..., Any]
    attributes: dict[str, Any]
    kind: type[nn.Module]  # the class with the other forward


_ADAPTERS: dict[type[nn.Module], _Adapter] = {}


class Adapted(nn.Module):
    """Mixed into the class of a compacted module whose own forward holds sizes of the original."""


def register_adapter(module: type[nn.Module], **attributes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a class of modules a forward that can be compacted, where its own one holds sizes.

    The function computes what ``module.forward`` does from the same parameters, buffers and submodules, but takes
    every size from its tensors (``weight.shape[0]``, ``view(n, t, self.heads, -1)``). comb traces it, masked models run
    it, and a module that lost channels keeps it: its class becomes ``Adapted<name>``, a subclass of ``module`` with the
    same state dict. Modules that lost nothing stay as they are.

    Args:
        module: The class; its subclasses are not adapted, since their forwards may differ.
        attributes: Set on a module when it is adapted, e.g. to switch off a fast path that reads sizes.

    Raises:
        TypeError: If ``module`` is no class of modules.

    Example:
        >>> import torch, cpd_fast as cpd
        >>> from cpd_fast.comb import register_adapter
        >>> class Halves(torch.nn.Linear):
        ...     def forward(self, x):
        ...         y = super().forward(x)
        ...         return y[..., :4] * y[..., 4:]  # eight outputs, whatever they are
        >>> @register_adapter(Halves)
        ... def halves(self, x):
        ...     a, b = torch.nn.functional.linear(x, self.weight, self.bias).chunk(2, -1)
        ...     return a * b
        >>> net = torch.nn.Sequential(Halves(3, 8), torch.nn.Linear(4, 2))
        >>> graph = cpd.comb(net, torch.zeros(1, 3))
        >>> small = cpd.compact(net, graph, cpd.random_plan(graph, keep=0.5))
        >>> small[0].weight.shape, type(small[0]).__name__
        (torch.Size([4, 3]), 'AdaptedHalves')
    """
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        raise TypeError(f"register_adapter: expected a class of modules, got {module!r}")

    def add(forward: Callable[..., Any]) -> Callable[..., Any]:
        body = {"forward": forward, "__module__": module.__module__, "__doc__": module.__doc__}
        kind = type(f"Adapted{module.__name__}", (Adapted, module), body)
        _ADAPTERS[module] = _Adapter(forward, attributes, kind)
        return forward

    return add


def adaptable(module: nn.Module) -> bool:
    """Whether a module's class has an adapter; one whose forward was replaced by hand is left alone."""
    return type(module) in _ADAPTERS and "forward" not in vars(module)


def adapted_forward(module: nn.Module) -> Callable[..., Any]:
    """The adapter's forward for an adaptable module."""
    return _ADAPTERS[type(module)].forward


def adaptation(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """The class and the attributes that an adaptable module gets; None for others."""
    if not adaptable(module):
        return None
    adapter = _ADAPTERS[type(module)]
    return adapter.kind, adapter.attributes


def adapt(model: nn.Module, which: Callable[[str], bool] = lambda name: True) -> None:
    """Put the adapters on the modules of a model whose names ``which`` accepts."""
    for name, module in model.named_modules():
        if adaptable(module) and which(name):
            adapter = _ADAPTERS[type(module)]
            module.__class__ = adapter.kind
            vars(module).update(adapter.attributes)

"""Modules and tensors of a model by name; PyTorch's own nested generators cost a frame a level of the tree."""

from __future__ import annotations

from torch import Tensor, nn


def named_modules(model: nn.Module, repeated: bool = False) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` gives; ``repeated`` names shared modules at every place."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> None:
        if not repeated:
            if module in seen:
                return
            seen.add(module)
        found.append((name, module))
        prefix = f"{name}." if name else ""
        for key, child in module._modules.items():
            if child is not None:
                visit(prefix + key, child)

    visit("", model)
    return found


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module once."""
    return [m for _, m in named_modules(model)]


def named_tensors(model: nn.Module, repeated: bool = False) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers; ``repeated`` names shared ones at every place."""
    modules = [(f"{name}." if name else "", m) for name, m in named_modules(model, repeated)]
    named: list[tuple[str, Tensor]]
    named = [(prefix + key, p) for prefix, m in modules for key, p in m._parameters.items() if p is not None]
    named += [(prefix + key, b) for prefix, m in modules for key, b in m._buffers.items() if b is not None]
    if repeated:
        return named
    first: dict[int, tuple[str, Tensor]] = {}
    for name, t in named:
        first.setdefault(id(t), (name, t))
    return list(first.values())

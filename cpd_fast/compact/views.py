"""Modules whose forward computes a size or scale that does not follow the plan: it is put into the call instead."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from cpd_fast.comb.sizes import SIZED_CALLS, SizeFix, sizes_of, with_sizes


class _Sizes(TorchFunctionMode):
    """Counts calls with sizes, and attention calls, of one forward and changes those that need another argument."""

    def __init__(self, fixes: dict[int, SizeFix], scales: dict[int, float]) -> None:
        super().__init__()
        self.fixes, self.scales, self.count, self.attended = fixes, scales, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        sizes = sizes_of(name, args, kwargs) if name in SIZED_CALLS else None
        if sizes is not None:
            fix = self.fixes.get(self.count)
            self.count += 1
            if fix is not None:
                args, kwargs = with_sizes(name, args, kwargs, sizes, fix)
        if func is scaled_dot_product_attention:
            scale = self.scales.get(self.attended)
            self.attended += 1
            if scale is not None:
                kwargs = {**kwargs, "scale": scale}
        return func(*args, **kwargs)


class Resized(nn.Module):
    """Mixed into the class of a module whose forward mixes up sizes or scales after compaction.

    ``resized_calls`` maps the number of a view, reshape, expand, unflatten or split within one forward to the sizes
    that it must be given; dims that are not named follow the input as before. ``scaled_calls`` maps the number of a
    scaled_dot_product_attention to the scale it had before.
    """

    resized_calls: dict[int, SizeFix]
    scaled_calls: dict[int, float]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the original class with some sizes and scales put right."""
        with _Sizes(self.resized_calls, self.scaled_calls):
            return super().forward(*args, **kwargs)


@cache
def resized_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of modules of class ``base`` whose calls are put right."""
    if issubclass(base, Resized):
        return base
    return type(f"Resized{base.__name__}", (Resized, base), {"__module__": base.__module__})


def resize_calls(module: nn.Module, fixes: dict[int, SizeFix]) -> None:
    """Make a module give these sizes; it keeps its class as a base, its parameters and its state dict."""
    _mix_in(module)
    module.__dict__["resized_calls"] = fixes


def scale_calls(module: nn.Module, scales: dict[int, float]) -> None:
    """Make a module give its attention calls these scales, likewise."""
    _mix_in(module)
    module.__dict__["scaled_calls"] = scales


def _mix_in(module: nn.Module) -> None:
    if not isinstance(module, Resized):
        base: Any = type(module)
        module.__class__ = resized_class(base)
        module.__dict__.update(resized_calls={}, scaled_calls={})

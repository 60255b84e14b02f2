"""Models by name: ``timm/NAME`` and the networks of the built-in tasks."""

from __future__ import annotations

import importlib.util
from typing import Any

import typer


def build_model(name: str, size: int) -> tuple[Any, tuple[int, ...]]:
    """A model by name and the shape of its example input.

    Raises:
        BadParameter: If there is no such model.
    """
    from cpd_fast.models import EfficientNetLite0FPN, SmallResNet

    if name == "climate":
        return EfficientNetLite0FPN(5, pretrained=False), (1, 3, 96, 96)
    if name == "fashion-mnist":
        return SmallResNet(10), (1, 1, 28, 28)
    kind, _, rest = name.partition("/")
    if kind != "timm" or not rest:
        raise typer.BadParameter(f"model {name!r}: expected timm/NAME, climate or fashion-mnist")
    if importlib.util.find_spec("timm") is None:
        raise typer.BadParameter("timm is not installed; install it with: pip install timm")
    try:
        import timm
    except (ImportError, RuntimeError) as e:  # a torchvision built for another torch raises RuntimeError
        raise typer.BadParameter(f"timm cannot be imported ({e}); install a torchvision that fits torch") from e
    if not timm.is_model(rest):
        import difflib

        near = difflib.get_close_matches(rest, timm.list_models(), n=3)
        raise typer.BadParameter(f"timm has no model {rest!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return timm.create_model(rest, pretrained=False), (1, 3, size, size)

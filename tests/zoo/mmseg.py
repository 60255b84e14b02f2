"""mmsegmentation's networks from its own configurations, without mmcv's compiled operators.

mmsegmentation imports ``mmcv._ext``, which the wheel of mmcv-lite does not have; a module whose functions raise stands
in for it. Networks that call one of them cannot be built here.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn


def _without_compiled_operators() -> None:
    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"mmcv._ext.{name} is not compiled here")

        return call

    stand_in = types.ModuleType("mmcv._ext")
    stand_in.__getattr__ = missing  # type: ignore[method-assign]
    stand_in.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
    sys.modules.setdefault("mmcv._ext", stand_in)


def build(name: str, size: int) -> nn.Module:
    """The network of a configuration file, e.g. ``"pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes"``."""
    _without_compiled_operators()
    import mmseg.models  # noqa: F401
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    init_default_scope("mmseg")
    config = Config.fromfile(Path(mmseg.__file__).parent / ".mim" / "configs" / f"{name}.py").model
    config.pretrained = config.data_preprocessor = None
    _plain(config)
    model = MODELS.build(config).eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))  # some make their buffers now
    return model


def _plain(config: Any) -> None:
    """No checkpoints, no synchronised norms, no random numbers in a forward."""
    if isinstance(config, dict):
        if config.get("type") == "SyncBN":
            config["type"] = "BN"
        config.update({k: v for k, v in (("init_cfg", None), ("rand_init", False)) if k in config})
        for value in config.values():
            _plain(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            _plain(value)

"""What a recipe compresses: a network, data and where distillation listens."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd_fast.config import CLASSIFICATION, TARGETS, CompressConfig
from cpd_fast.data import IGNORE, DataSplits, climate, fashion_mnist
from cpd_fast.errors import DataError
from cpd_fast.models import EfficientNetLite0FPN, SmallResNet

TASKS = ("climate", "fashion-mnist")
LABEL_SMOOTHING = 0.05  # classification


@dataclass(frozen=True, eq=False)
class Task:
    """A network and its data.

    Attributes:
        name: For the report and the run folder.
        model_name: For the report.
        data: Train, val and test.
        build: Makes the network as it is before training; called anew on every resume, under a fixed seed.
        distill_at: Name of the module whose output the student is to imitate; None: the network's output.
        origin: Where network and data came from, by the names of the command's flags; a run folder belongs to it.
    """

    name: str
    model_name: str
    data: DataSplits
    build: Callable[[], nn.Module]
    distill_at: str | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def example_inputs(self, batch: int = 1) -> Tensor:
        """Zeros of the shape of a normalised batch, fp32 ``(batch, C, H, W)``."""
        return torch.zeros(batch, *self.data.test.images.shape[1:])

    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Cross-entropy; segmentation weighs classes by ``1 / sqrt(frequency)``, classification smooths labels."""
        if not self.data.is_segmentation:
            return lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        weight = self.data.class_weights()
        return lambda logits, labels: F.cross_entropy(
            logits, labels, weight=weight.to(logits.device), ignore_index=IGNORE
        )


def builtin(name: str, data_dir: str | os.PathLike[str] | None = None) -> Task:
    """One of the tasks that come with cpd_fast: ``"climate"`` (segmentation) or ``"fashion-mnist"`` (classification).

    Args:
        name: Name of the task.
        data_dir: Folder with Fashion-MNIST's four files, where Debian's package is not installed.

    Raises:
        DataError: If the task is unknown, or its data is missing or corrupt.
    """
    if name == "climate":
        if data_dir is not None:
            raise DataError("climate: comes from Python packages, not from a folder; leave out --data-dir")
        data = climate()
        return Task(
            name,
            "EfficientNet-Lite0 (ImageNet) + FPN",
            data,
            lambda: EfficientNetLite0FPN(len(data.classes)),
            distill_at="classify",
        )
    if name == "fashion-mnist":
        data = fashion_mnist(data_dir)
        return Task(name, "ResNet, widths 32/64/128", data, lambda: SmallResNet(len(data.classes)))
    raise DataError(f"data {name!r} is unknown; choose one of {', '.join(TASKS)}")


def default_config(name: str, **settings: object) -> CompressConfig:
    """The defaults of a built-in task, with ``settings`` in place of some.

    Raises:
        ConfigError: If a setting is unknown or out of range.
    """
    base = dict(CLASSIFICATION) if name == "fashion-mnist" else {}
    if any(settings.get(t, 1) != 1 for t in TARGETS[1:]):  # MACs are not limited beside it, unless asked for
        base["target_macs"] = 1.0
    return CompressConfig.from_dict({**base, **settings})

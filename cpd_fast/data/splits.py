"""Train, val and test in memory, and batches that are a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = 255  # label of pixels that no loss and no figure looks at


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one split.

    Attributes:
        images: uint8, shape ``(N, C, H, W)``.
        labels: uint8, shape ``(N, H, W)`` for segmentation (255: not looked at), ``(N,)`` for classification.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set in memory, with what a person and a loss need to know about it.

    Attributes:
        name: Short name, e.g. ``"climate"``.
        classes: Class names, in the order of the labels.
        palette: One ``(r, g, b)`` a class, 0-255, for pictures of label maps; empty for classification.
        mean: ``images - mean`` ... (a number, or one a channel)
        std: ``... / std`` is what the network gets; in units of the uint8 values.
        train: Training split.
        val: Validation split: choices are made on this one.
        test: Test split: only ever measured on.
        shift: Largest random shift in pixels that augments training images (classification).
        flips: Which mirror images augment training: any of ``"h"``, ``"v"``.
        source: Where the files came from, for the report.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    train: Split
    val: Split
    test: Split
    shift: int = 0
    flips: str = "hv"
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_segmentation(self) -> bool:
        """Whether every pixel has a label."""
        return self.train.labels.dim() == 3

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images ``(N, C, H, W)`` -> fp32 of the same shape, ``(x - mean) / std``."""
        mean, std = (torch.tensor(v, device=images.device).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return (images.to(torch.float32) - mean) / std

    def class_weights(self) -> Tensor:
        """``1 / sqrt(frequency)`` of each class in the training split, mean 1; fp32, shape ``(K,)``."""
        labels = self.train.labels.flatten()
        count = torch.bincount(labels[labels != IGNORE].long(), minlength=len(self.classes)).double()
        weight = 1.0 / (count / count.sum()).clamp_min(1e-4).sqrt()
        return (weight / weight.mean()).float()


def augmented_batch(data: DataSplits, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Training batch number ``step``: shuffled by epoch, mirrored and shifted at random.

    A pure function of its arguments, so that a resumed run continues with the very same batches.

    Args:
        data: The data set.
        batch_size: Images a batch; the last, smaller batch of an epoch is dropped.
        seed: Seed of shuffling and augmentation.
        step: Batch number, 0 and up, over all epochs.

    Returns:
        fp32 images ``(B, C, H, W)``, normalised, and int64 labels.

    Example:
        >>> split = Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4, dtype=torch.uint8))
        >>> data = DataSplits("toy", ("a", "b", "c", "d"), (), 0.0, 255.0, split, split, split)
        >>> x, y = augmented_batch(data, 2, seed=0, step=0)
        >>> tuple(x.shape), x.dtype, y.dtype
        ((2, 1, 8, 8), torch.float32, torch.int64)
    """
    batch_size = min(batch_size, len(data.train))
    epoch, position = divmod(step, len(data.train) // batch_size)
    order = np.random.default_rng([seed, 0, epoch]).permutation(len(data.train))
    pick = torch.from_numpy(order[position * batch_size : (position + 1) * batch_size])
    images, labels = data.train.images[pick], data.train.labels[pick].long()
    rng = np.random.default_rng([seed, 1, step])
    x, y = [], []
    for image, label in zip(images, labels, strict=True):
        dims = [d for axis, d in (("h", -1), ("v", -2)) if axis in data.flips and rng.random() < 0.5]
        image = image.flip(dims)
        if data.is_segmentation:
            label = label.flip(dims)
        elif data.shift:
            dy, dx = rng.integers(-data.shift, data.shift + 1, 2)
            image = _shifted(image, int(dy), int(dx))
        x.append(image)
        y.append(label)
    return data.normalise(torch.stack(x)), torch.stack(y)


def _shifted(image: Tensor, dy: int, dx: int) -> Tensor:
    """Move a ``(C, H, W)`` picture by whole pixels, filling with 0."""
    out = torch.zeros_like(image)
    h, w = image.shape[-2:]
    to_y, to_x = slice(max(dy, 0), h + min(dy, 0)), slice(max(dx, 0), w + min(dx, 0))
    from_y, from_x = slice(max(-dy, 0), h + min(-dy, 0)), slice(max(-dx, 0), w + min(-dx, 0))
    out[..., to_y, to_x] = image[..., from_y, from_x]
    return out

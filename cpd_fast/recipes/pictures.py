"""Small pictures for the report: test images beside labels and predictions."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor, nn

from cpd_fast.data import DataSplits
from cpd_fast.recipes.evaluate import predict
from cpd_fast.recipes.run_folder import RunFolder

COUNT = 6


def choose(data: DataSplits, count: int = COUNT) -> list[int]:
    """Test pictures worth a look, chosen by their labels alone: many classes first, spread over the split."""
    labels = data.test.labels
    if not data.is_segmentation:
        first = {int(c): i for i, c in reversed(list(enumerate(labels.tolist())))}
        return [first[c] for c in sorted(first)]
    k = len(data.classes)
    share = torch.stack([torch.bincount(y.flatten().long(), minlength=k)[:k] / y.numel() for y in labels])
    entropy = -(share * share.clamp_min(1e-9).log()).sum(1)
    chunks = np.array_split(np.arange(len(labels)), min(count, len(labels)))
    return [int(c[int(entropy[c].argmax())]) for c in chunks]


def write_tiles(run: RunFolder, teacher: nn.Module, student: nn.Module, data: DataSplits) -> tuple[dict[str, str], ...]:
    """Write PNG files into ``tiles/`` and return, for each picture, its file names (and class names)."""
    indices = choose(data)
    images, labels = data.test.images[indices], data.test.labels[indices]
    by_teacher, by_student = predict(teacher, data, images), predict(student, data, images)
    rows, palette = [], np.zeros((256, 3), np.uint8)  # black: not looked at
    palette[: len(data.palette)] = np.asarray(data.palette, np.uint8).reshape(-1, 3)
    for n, image in enumerate(images):
        row = {"picture": _write(run, f"tiles/{n}-picture.png", _picture(image))}
        if data.is_segmentation:
            for kind, classes in (("label", labels), ("teacher", by_teacher), ("student", by_student)):
                row[kind] = _write(run, f"tiles/{n}-{kind}.png", palette[classes[n].numpy()])
        else:
            row |= {
                kind: data.classes[int(classes[n])]
                for kind, classes in (("label", labels), ("teacher", by_teacher), ("student", by_student))
            }
        rows.append(row)
    return tuple(rows)


def _picture(image: Tensor) -> np.ndarray:
    """uint8 ``(C, H, W)`` -> ``(H, W, 3)`` or ``(H, W)``."""
    return image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()


def _write(run: RunFolder, name: str, pixels: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "png", optimize=True)
    run.write(name, buffer.getvalue())
    return name

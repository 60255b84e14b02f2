"""How good a network is on one split, and batch norm statistics re-estimated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cpd_fast.data import IGNORE, DataSplits, Split, augmented_batch
from cpd_fast.memory import device_of


@dataclass(frozen=True)
class Quality:
    """Figures of one network on one split, all in [0, 1].

    Attributes:
        accuracy: Share of pixels (segmentation) or pictures (classification) that get the right class.
        class_scores: Intersection over union of each class (segmentation), or recall (classification); None for a
            class that no label of the split is of.
        miou: Mean of the class IoUs that there are; None for classification.
    """

    accuracy: float
    class_scores: tuple[float | None, ...]
    miou: float | None

    @property
    def main(self) -> float:
        """The figure that choices are made by: mIoU, or accuracy."""
        return self.accuracy if self.miou is None else self.miou


@torch.no_grad()
def predict(model: nn.Module, data: DataSplits, images: Tensor, batch: int = 64) -> Tensor:
    """Predicted classes, uint8, shape of the labels; in eval mode, left in the mode it was in."""
    mode, device = model.training, device_of(model)
    model.eval()
    try:
        parts = [
            model(data.normalise(images[i : i + batch].to(device))).argmax(1).to("cpu", torch.uint8)
            for i in range(0, len(images), batch)
        ]
    finally:
        model.train(mode)
    return torch.cat(parts)


def evaluate(model: nn.Module, data: DataSplits, split: Split) -> Quality:
    """Measure a network on a split."""
    k = len(data.classes)
    predicted = predict(model, data, split.images)
    labels, predicted = split.labels.flatten(), predicted.flatten()
    counts = labels != IGNORE
    pairs = labels[counts].long() * k + predicted[counts].long()
    table = torch.bincount(pairs, minlength=k * k).reshape(k, k).double()  # row: label, column: prediction
    hit = table.diag()
    accuracy = float(hit.sum() / table.sum())
    labelled = table.sum(1)
    there = labelled > 0  # and not: predicted or labelled, so that both networks of a run have the same classes
    score = hit / (labelled + table.sum(0) - hit if data.is_segmentation else labelled)
    scores = tuple(s if t else None for s, t in zip(score.tolist(), there.tolist(), strict=True))
    return Quality(accuracy, scores, float(score[there].mean()) if data.is_segmentation else None)


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, data: DataSplits, batch_size: int, seed: int, batches: int = 16) -> None:
    """Replace running statistics by plain averages over training batches, in place (EagleEye's adaptive BN)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta, mode = [m.momentum for m in norms], model.training
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # cumulative average
    model.train()
    for step in range(batches):
        model(augmented_batch(data, batch_size, seed, step)[0].to(device_of(model)))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    model.train(mode)

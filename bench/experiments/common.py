"""What the experiments share: Fashion-MNIST, training that is a function of its seed, and cells that survive a kill."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd_fast.data import DataSplits, Split, fashion_mnist

RESULTS = Path(__file__).resolve().parents[1] / "results"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (inputs, logits, labels) -> scalar


class Cells:
    """One JSON line a finished cell; a cell that is in the file is not computed again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the last line of a killed run
                    continue
                self.rows[row["cell"]] = row

    def get(self, cell: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell's row, computed where it is missing."""
        if cell not in self.rows:
            began = time.process_time()
            row = {"cell": cell, **make()}
            row["cpu_s"] = round(time.process_time() - began, 3)
            with self.path.open("a") as f:
                f.write(json.dumps(row) + "\n")
                f.flush()
                os.fsync(f.fileno())
            self.rows[cell] = row
            print(f"{time.strftime('%H:%M:%S')} {cell} {row['cpu_s']:.1f} s", flush=True)
        return self.rows[cell]


def augmented(data: DataSplits, split: Split, pick: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The pictures ``pick``, mirrored and shifted by up to two pixels at random, normalised."""
    n, s = len(pick), data.shift
    padded = F.pad(split.images[torch.from_numpy(pick)], (s, s, s, s))
    h, w = split.images.shape[-2:]
    rows = torch.from_numpy(rng.integers(0, 2 * s + 1, n))[:, None] + torch.arange(h)
    cols = torch.from_numpy(rng.integers(0, 2 * s + 1, n))[:, None] + torch.arange(w)
    flip = torch.from_numpy(rng.random(n) < 0.5)
    cols = torch.where(flip[:, None], cols.flip(1), cols)
    images = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], cols[:, None, :]]  # (n, h, w, c)
    return data.normalise(images.movedim(-1, 1).contiguous())


def batches(data: DataSplits, count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` training batches: a function of the seed."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(count):
        if len(order) < size:
            order = rng.permutation(len(data.train)).tolist()
        pick = np.array([order.pop() for _ in range(size)])
        yield augmented(data, data.train, pick, rng), data.train.labels[torch.from_numpy(pick)].long()


def cross_entropy(_x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def train(
    model: nn.Module,
    data: DataSplits,
    steps: int,
    lr: float,
    seed: int,
    batch: int = 128,
    loss: Loss = cross_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    warm_up: float = 0.15,
) -> nn.Module:
    """SGD with Nesterov momentum 0.9 along one cycle of the learning rate, in place."""
    torch.manual_seed(seed)
    optimizer = optimizer or sgd(model, lr)
    model.train()
    for step, (x, y) in enumerate(batches(data, steps, batch, seed)):
        rise = max(1, int(warm_up * steps))
        share = (step + 1) / rise if step < rise else 0.5 * (1 + np.cos(np.pi * (step - rise) / max(1, steps - rise)))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        optimizer.zero_grad(set_to_none=True)
        loss(x, model(x), y).backward()
        optimizer.step()
    return model.eval()


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of pictures (normalised) that get the right class."""
    model.eval()
    hits = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    )
    return hits / len(labels)


def load() -> DataSplits:
    """Fashion-MNIST, one thread."""
    torch.set_num_threads(1)
    return fashion_mnist()


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard error over seeds."""
    v = np.array(values)
    return {"mean": float(v.mean()), "stderr": float(v.std(ddof=1) / len(v) ** 0.5) if len(v) > 1 else 0.0, "n": len(v)}

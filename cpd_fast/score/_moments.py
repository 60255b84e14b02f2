"""Running mean and spread of observations, updated without synchronising, mergeable across ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_FIELDS = ("count", "mean", "m2", "batches", "between")


class Moments:
    """Count, mean and sums of squared deviations (Welford), fp64 ``(n_channels,)``.

    Observations come in batches: probes of one batch of data share that batch, and their spread says nothing of how
    batches differ. So the spread of the batch means (weighted by their observations) is kept beside the spread of all.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(n, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(n, dtype=torch.float64, device=device)
        self.batches = torch.zeros((), dtype=torch.float64, device=device)
        self.between = torch.zeros(n, dtype=torch.float64, device=device)

    def add(self, x: Tensor, skip_nonfinite: bool = False) -> None:
        """Take one observation in, a batch by itself; with ``skip_nonfinite`` NaN or inf counts for nothing."""
        x = x.detach().to(self.mean)
        ok = torch.isfinite(x).all() if skip_nonfinite else torch.ones((), dtype=torch.bool, device=x.device)
        self.count += ok
        self.batches += ok
        delta = torch.where(ok, x - self.mean, 0.0)
        self.mean += delta / self.count.clamp(min=1)
        change = delta * torch.where(ok, x - self.mean, 0.0)
        self.m2 += change
        self.between += change

    def add_batch(self, batch: Moments) -> None:
        """Take in the observations of one batch of data."""
        single = Moments(len(self.mean), self.mean.device)
        single.count, single.mean, single.m2 = batch.count, batch.mean, batch.m2
        single.batches = (batch.count > 0).to(batch.count)
        self.merge(single)

    def merge(self, other: Moments) -> None:
        """Take in all observations of another rank."""
        n = self.count + other.count
        delta = other.mean.to(self.mean) - self.mean
        share = other.count.to(n) / n.clamp(min=1)
        moved = delta**2 * self.count * share
        self.mean += delta * share
        self.m2 += other.m2.to(self.m2) + moved
        self.between += other.between.to(self.m2) + moved
        self.batches = self.batches + other.batches.to(n)
        self.count = n

    def gather(self) -> None:
        """Take in the observations of all ranks of the default process group, in rank order: equal on every rank."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.state_dict())
        self.load_state_dict(states[0])
        for state in states[1:]:
            other = Moments(len(self.mean), self.mean.device)
            other.load_state_dict(state)
            self.merge(other)

    @property
    def stderr(self) -> Tensor | None:
        """Standard error of the mean; None with fewer than two observations.

        From two batches on it is the standard error over batches: of the mean over all data that they are a sample of.
        With one batch it is that of the probes: of this batch's own mean.
        """
        n, b = float(self.count), float(self.batches)
        if n < 2:
            return None
        square = self.between / (n * (b - 1)) if b > 1 else self.m2 / (n * (n - 1))
        return square.clamp(min=0).sqrt()

    def relative_error(self) -> float:
        """Sum of the standard errors over the sum of the magnitudes of the means; inf with fewer than two."""
        spread = self.stderr
        if spread is None:
            return float("inf")
        size = float(self.mean.abs().sum())
        return float(spread.sum()) / size if size > 0 else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors, on the CPU."""
        return {k: getattr(self, k).detach().cpu().clone() for k in _FIELDS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the tensors of :meth:`state_dict` over."""
        for k in _FIELDS:
            setattr(self, k, state[k].to(getattr(self, k)).clone())

"""Running mean and spread of observations, updated without synchronising, mergeable across ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Moments:
    """Count, mean and sum of squared deviations (Welford), fp64 ``(n_channels,)``."""

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(n, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(n, dtype=torch.float64, device=device)

    def add(self, x: Tensor, skip_nonfinite: bool = False) -> None:
        """Take one observation in; with ``skip_nonfinite`` one that holds NaN or inf counts for nothing."""
        x = x.detach().to(self.mean)
        ok = torch.isfinite(x).all() if skip_nonfinite else torch.ones((), dtype=torch.bool, device=x.device)
        self.count += ok
        delta = torch.where(ok, x - self.mean, 0.0)
        self.mean += delta / self.count.clamp(min=1)
        self.m2 += delta * torch.where(ok, x - self.mean, 0.0)

    def merge(self, other: Moments) -> None:
        """Take in all observations of another rank."""
        n = self.count + other.count
        delta = other.mean.to(self.mean) - self.mean
        share = other.count.to(n) / n.clamp(min=1)
        self.mean += delta * share
        self.m2 += other.m2.to(self.m2) + delta**2 * self.count * share
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
        """Standard error of the mean; None with fewer than two observations."""
        n = float(self.count)
        return (self.m2 / (n * (n - 1))).clamp(min=0).sqrt() if n > 1 else None

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the three tensors, on the CPU."""
        return {k: getattr(self, k).detach().cpu().clone() for k in ("count", "mean", "m2")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the tensors of :meth:`state_dict` over."""
        for k in ("count", "mean", "m2"):
            setattr(self, k, state[k].to(getattr(self, k)).clone())

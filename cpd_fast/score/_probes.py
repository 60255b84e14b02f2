"""Rademacher probes that are a function of (seed, probe, tensor): made when needed, never kept."""

from __future__ import annotations

import torch
from torch import Tensor


class Probes:
    """A stream of probes of one seed.

    Args:
        generator: Gives the seed when the first probe is asked for; ``None`` is seed 0.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._generator = generator
        self._seed: int | None = None
        self._next = 0

    @property
    def seed(self) -> int:
        """Seed of all probes."""
        if self._seed is None:
            g = self._generator if self._generator is not None else torch.Generator().manual_seed(0)
            self._seed = int(torch.randint(2**63 - 1, (), generator=g, device=g.device))
        return self._seed

    def next(self, count: int = 1) -> int:
        """Number of the next probe, the first of ``count``."""
        self._next += count
        return self._next - count

    def signs(self, like: Tensor, probe: int, tensor: int) -> Tensor:
        """Signs shaped, typed and laid out like ``like``."""
        g = torch.Generator().manual_seed(hash((self.seed, probe, tensor)))
        flat = torch.randint(2, like.shape, generator=g, dtype=torch.int8).to(like.device, like.dtype).mul_(2).sub_(1)
        return torch.empty_like(like).copy_(flat)

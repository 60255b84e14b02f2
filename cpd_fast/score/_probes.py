"""Rademacher probes that are a function of (seed, probe, tensor): made when needed, never kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cpd_fast.ops import fill_rademacher_, rademacher

_PROBES_OF_A_RANK = 2**20


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
        """Number of the next probe, the first of ``count``; ranks of a process group take different ones."""
        self._next += count
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return (rank * _PROBES_OF_A_RANK + self._next - count) % 2**32

    def state(self) -> tuple[int | None, int]:
        """What :meth:`set_state` continues from."""
        return self._seed, self._next

    def set_state(self, state: tuple[int | None, int]) -> None:
        """Continue another stream."""
        self._seed, self._next = state

    def fill(self, tensors: Sequence[Tensor], probe: int, numbers: Sequence[int]) -> None:
        """Write the signs of these numbers of tensors into them."""
        fill_rademacher_(tensors, self.seed, probe, ids=numbers)

    def signs(self, like: Tensor, probe: int, tensor: int) -> Tensor:
        """Signs shaped, typed and laid out like ``like``."""
        return rademacher(like, self.seed, probe, tensor)

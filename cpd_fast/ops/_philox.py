"""Philox4x32-10 in plain PyTorch, and the layout that turns its output into Rademacher signs.

The layout is frozen; every body agrees on it bit for bit:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (block, tensor, probe, 0)
    bit j mod 32 of output word j div 32, 0 <= j < 128: element 128 * block + j is -1 where it is set, else +1

Elements are counted in row-major order of the tensor's shape, whatever its strides.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
ELEMENTS = 128  # signs that one call of Philox gives


def philox(counter: tuple[Any, ...], key: tuple[int, int]) -> tuple[Any, ...]:
    """Four output words for four counter words: int64 tensors or integers in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Modulo 2^64 all bits are right, also where int64 wraps; the mask takes the sign out of the upper half.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & _LOW ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) & _LOW ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def signs(numel: int, seed: int, probe: int, tensor: int, device: torch.device) -> Tensor:
    """The first ``numel`` signs of a probe's tensor: int8, ``(numel,)``."""
    blocks = torch.arange(-(-numel // ELEMENTS), device=device)
    ones = torch.ones_like(blocks)
    words = torch.stack(philox((blocks, ones * tensor, ones * probe, 0 * ones), split(seed)), 1)
    bits = words.unsqueeze(2) >> torch.arange(32, device=device) & 1
    return (1 - 2 * bits).to(torch.int8).reshape(-1)[:numel]


def split(seed: int) -> tuple[int, int]:
    """The key of a seed."""
    return seed & _LOW, seed >> 32


def check_counter(op: str, seed: int, probe: int, tensors: Iterable[int]) -> None:
    """Check that a counter holds these numbers.

    Raises:
        ValueError: If not.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed must be in [0, 2^63), got {seed}")
    for name, value in (("probe", probe), *(("tensor", t) for t in tensors)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{op}: {name} must be in [0, 2^32), got {value}")

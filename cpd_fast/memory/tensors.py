"""How many bytes tensors take: a limit in words, a counter of what lives at once, and a model of fake tensors."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from cpd_fast.errors import MemoryLimitError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WAITING = 4 * 2**20  # bytes of gradients that a probe lets wait for one reduction: a call a parameter costs as much
RESERVE = 0.05  # of a limit: workspaces of libraries and fragmentation, which no tensor shows


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def parse_bytes(limit: int | str) -> int:
    """A number of bytes from ``"10GiB"``, ``"500 MB"`` or an integer.

    Raises:
        MemoryLimitError: If it is neither, or not positive.

    Example:
        >>> parse_bytes("1.5KiB")
        1536
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(limit))
    unit = _UNITS.get(found.group(2).upper()) if found else None
    try:
        value = int(float(found.group(1)) * unit) if found and unit else 0
    except ValueError:
        value = 0
    if value <= 0:
        raise MemoryLimitError(f"memory_limit: expected bytes or a text such as '10GiB' or '500MB', got {limit!r}")
    return value


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors that live at once inside the block, real or fake; what is given counts from the start.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes alive so far.
    """

    def __init__(self, alive: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for t in alive:
            self._see(t)

    def _see(self, t: Tensor) -> Tensor:
        try:
            storage = t.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse and the like hold none of their own
            return t
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            weakref.finalize(storage, self._drop, size)
            self.live += size
            self.peak = max(self.peak, self.live)
        return t

    def _drop(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out


@contextmanager
def faked(model: nn.Module, mode: FakeTensorMode) -> Iterator[list[Tensor]]:
    """The model with fake parameters and buffers in place of its own; gives them."""
    made: dict[int, Tensor] = {}
    places: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, t in table.items():
                if t is not None:
                    places.append((table, name, t))
    try:
        for table, name, t in places:
            if id(t) not in made:
                value = mode.from_tensor(t.detach())
                made[id(t)] = nn.Parameter(value, t.requires_grad) if isinstance(t, nn.Parameter) else value
            table[name] = made[id(t)]
        yield list(made.values())
    finally:
        for table, name, t in places:
            table[name] = t


def size_of(batch: Any) -> int:
    """Bytes of all tensors in a batch."""
    return sum(t.numel() * t.element_size() for t in tree_flatten(batch)[0] if isinstance(t, Tensor))


def bytes_text(size: int) -> str:
    """A size as people write it."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"

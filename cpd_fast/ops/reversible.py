"""A step along a probe, in place, that is taken back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from cpd_fast.ops import _dispatch, _philox, _probe_kernels
from cpd_fast.ops.rademacher import perturb_

_MANY = 16  # a tensor is copied whole if more than a sixteenth of its elements are too small for the step


class ReversibleStep:
    """Moves tensors from ``x`` to ``x + step * v`` in place, and back to the very bits of ``x``.

    On the CPU, fp32 tensors need one byte an element: what is lost by rounding on the way there and back, as the
    difference of two floats' bits, which the same arithmetic finds again. Elements far smaller than the step, and
    tensors of other dtypes or on other devices, are kept as copies. All of the CPU's tensors move in one call that no
    signal interrupts, and which notes whether they are away; :meth:`back` may be called at any time, and again.

    Args:
        tensors: What to move; floating point, on one device.
        step: Length of the step, positive.
        seed: Key of the probes, in [0, 2^63).
        ids: Number of each tensor within the probe; its position if None.
        backend: As for :func:`rademacher`; other bodies than ``"cpu"`` keep copies.

    Raises:
        ShapeError: If a tensor is not of floating point, or they are on several devices.
        ValueError: If a number is out of its range.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.1, 0.2, 1e-20])
        >>> before, step = x.clone(), ReversibleStep([x], 0.5, seed=0)
        >>> step.away(probe=0)
        >>> x
        tensor([-0.4000,  0.7000, -0.5000])
        >>> step.back()
        >>> torch.equal(x, before)
        True
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        step: float,
        seed: int,
        ids: Sequence[int] | None = None,
        backend: str | None = None,
    ) -> None:
        self.step, self._seed, self._backend = step, seed, backend
        self._ids = list(range(len(tensors))) if ids is None else list(ids)
        self._tensors = [t.data for t in tensors]  # .data: no new version, so graphs that hold these stay valid
        _philox.check_counter("ReversibleStep", seed, 0, self._ids)
        self._probe = 0
        self._is_fake = any(isinstance(t, FakeTensor) for t in tensors)
        self._small: list[tuple[Tensor, Tensor, Tensor]] = []  # flat tensor, where its small elements are, their values
        self._exact = [i for i, t in enumerate(self._tensors) if self._is_exact(t)]
        chosen = set(self._exact)
        self._others = [i for i in range(len(tensors)) if i not in chosen]
        self._copies = [self._tensors[i].clone() for i in self._others]
        self._lost = torch.empty(sum(self._tensors[i].numel() for i in self._exact), dtype=torch.int8)
        self._is_away = torch.zeros(1, dtype=torch.int32)
        self._numbers: list[int] = []
        for i in self._exact if not self._is_fake else ():
            t, memory = self._tensors[i], _probe_kernels.memory_of(self._tensors[i])
            assert memory is not None
            self._numbers += (_dispatch.DTYPE_CODES[t.dtype], t.data_ptr(), t.numel(), *memory, self._ids[i])

    def _is_exact(self, t: Tensor) -> bool:
        """Whether the CPU's body moves it; then its small elements are kept."""
        if t.dtype != torch.float32 or t.device.type != "cpu" or not t.numel():
            return False
        if isinstance(t, FakeTensor):  # predicting memory
            return not isinstance(_native(), str) and self._backend in (None, "cpu")
        if _dispatch.is_watched(t):
            return False
        if _dispatch.choose("perturb_", t, self._backend) != "cpu" or _probe_kernels.memory_of(t) is None:
            return False
        most = t.numel() // _MANY
        found = _native().small_elements(t.data_ptr(), t.numel(), self.step, most)
        if len(found) > most:
            return False
        if found:
            flat, where = t.as_strided((t.numel(),), (1,)), torch.tensor(found)  # in the order of memory
            self._small.append((flat, where, flat[where]))
        return True

    def away(self, probe: int) -> None:
        """Move to ``x + step * v`` of this probe."""
        self._probe = probe
        if self._numbers:
            self._move(back=False)
        if self._others:
            others, ids = [self._tensors[i] for i in self._others], [self._ids[i] for i in self._others]
            perturb_(others, self.step, self._seed, probe, ids=ids, backend=self._backend)

    def back(self) -> None:
        """Move back, whether or not, or how far, the tensors have moved."""
        if self._numbers and int(self._is_away):
            self._move(back=True)
        for flat, where, values in self._small:
            flat[where] = values
        if self._others:
            torch._foreach_copy_([self._tensors[i] for i in self._others], self._copies)

    def _move(self, *, back: bool) -> None:
        lost, is_away = self._lost.data_ptr(), self._is_away.data_ptr()
        _native().reversible_step(
            self._numbers, self._seed, self._probe, self.step, back, lost, is_away, torch.get_num_threads()
        )


def _native() -> Any:
    return _dispatch._native()

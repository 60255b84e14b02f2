"""A batch's loss, whole or in micro-batches along dim 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from cpd_fast.errors import MemoryLimitError

Closure = Callable[[], Tensor]
Split = Callable[[Any, int], Iterable[Any]]


@dataclass(frozen=True)
class Part:
    """One micro-batch: the batch loss is the weighted sum of its parts' losses.

    Attributes:
        weight: Its share of the batch.
        closure: Its loss.
        samples: How many samples it holds, where that is known.
    """

    weight: float
    closure: Closure
    samples: int | None = None


class BatchLoss:
    """The loss of one batch, callable as a whole, divisible into :attr:`parts`.

    Args:
        loss_fn: ``(model, batch) -> scalar loss``, a mean over the samples.
        model: The model.
        batch: What ``loss_fn`` takes.
        micro_batch: Most samples a part; None: undivided.
        split: ``(batch, micro_batch) -> micro-batches``, or pairs of one and its share of the batch.

    Raises:
        MemoryLimitError: If the batch is to be divided and cannot be.
    """

    def __init__(
        self,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        model: nn.Module,
        batch: Any,
        micro_batch: int | None = None,
        split: Split | None = None,
    ) -> None:
        self._whole = partial(loss_fn, model, batch)
        self.samples = count_samples(batch)
        if micro_batch is None or (split is None and self.samples is not None and self.samples <= micro_batch):
            self.parts: Sequence[Part] = (Part(1.0, self._whole, self.samples),)
            return
        pieces = [
            p if isinstance(p, tuple) and len(p) == 2 and isinstance(p[1], float) else (p, None)
            for p in (split(batch, micro_batch) if split is not None else split_batch(batch, micro_batch))
        ]
        counts = [count_samples(p) for p, _ in pieces]
        if any(w is None for _, w in pieces):
            if not pieces or any(c is None for c in counts):
                raise MemoryLimitError(
                    "split: a micro-batch whose tensors do not share dim 0 needs its share of the batch; yield pairs "
                    "(micro_batch, share) with shares that add up to 1"
                )
            total = sum(c for c in counts if c is not None)
            pieces = [(p, (c or 0) / total) for (p, _), c in zip(pieces, counts, strict=True)]
        shares = [float(w) for _, w in pieces if w is not None]
        if abs(sum(shares) - 1) > 1e-6:
            raise MemoryLimitError(f"split: the shares of the micro-batches must add up to 1, got {sum(shares):g}")
        self.parts = tuple(
            Part(w, partial(loss_fn, model, p), c) for (p, _), w, c in zip(pieces, shares, counts, strict=True)
        )

    def __call__(self) -> Tensor:
        """The loss of the whole batch."""
        return self._whole()


def parts_of(closure: Closure) -> Sequence[Part]:
    """The micro-batches of a batch's loss; a plain function is one."""
    return closure.parts if isinstance(closure, BatchLoss) else (Part(1.0, closure),)


def count_samples(batch: Any) -> int | None:
    """The size of dim 0 that all tensors of a batch share, or None."""
    sizes = {t.shape[0] for t in tree_flatten(batch)[0] if isinstance(t, Tensor) and t.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else None


def split_batch(batch: Any, size: int) -> list[Any]:
    """Cut the tensors of a batch (alone, or in tuples, lists and dicts) along dim 0; everything else goes with each.

    Raises:
        MemoryLimitError: If the tensors do not share dim 0, or there are none.

    Example:
        >>> import torch
        >>> [b["x"].tolist() for b in split_batch({"x": torch.arange(3), "name": "a"}, 2)]
        [[0, 1], [2]]
    """
    leaves, spec = tree_flatten(batch)
    shapes = [tuple(t.shape) for t in leaves if isinstance(t, Tensor) and t.dim() > 0]
    samples = count_samples(batch)
    if samples is None:
        raise MemoryLimitError(
            "memory_limit: cannot divide the batch along dim 0: "
            + (f"its tensors have shapes {shapes}" if shapes else f"{type(batch).__name__} holds no tensors")
            + "; give split=(batch, size) -> micro-batches"
        )
    return [
        tree_unflatten(
            [t[i : i + size] if isinstance(t, Tensor) and t.dim() > 0 else t for t in leaves],
            spec,
        )
        for i in range(0, samples, size)
    ]


def first_part(batch: Any, n: int, split: Split | None) -> Any:
    """The first micro-batch of a batch."""
    if split is None:
        return split_batch(batch, n)[0]
    piece = next(iter(split(batch, n)))
    return piece[0] if isinstance(piece, tuple) and len(piece) == 2 and isinstance(piece[1], float) else piece

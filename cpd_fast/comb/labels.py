"""Labels: one integer for every index of every parameter dim, and the facts that a trace learns about them.

Nothing is decided while tracing: unions, freezes and grids are only recorded, as arrays, and resolved at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cpd_fast.errors import CompactError


def distinct(values: np.ndarray) -> np.ndarray:
    """Sorted, each once; ``np.unique`` of integers hashes, which is slower on labels."""
    ordered = np.sort(values, axis=None)
    first = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


class LabelStore:
    """Records which labels go together, which may not go at all, and which form grids."""

    def __init__(self) -> None:
        self.count = 0
        self.where: Callable[[], str] = str  # module and line of the running call
        self.reasons: list[str] = []
        self._pairs: list[np.ndarray] = []  # two labels in one integer
        self._frozen: list[tuple[np.ndarray, int]] = []
        self._consumed: list[np.ndarray] = []
        self._known: np.ndarray | None = None  # classes of the pairs so far
        self.grids: dict[bytes, tuple[np.ndarray, bool]] = {}

    def new(self, n: int) -> np.ndarray:
        """``n`` fresh labels, int64."""
        self.count += n
        return np.arange(self.count - n, self.count, dtype=np.int64)

    def pinned(self, n: int) -> np.ndarray:
        """``n`` fresh labels that never go: padding, rows of a grid."""
        labels = self.new(n)
        self.freeze(labels, "")
        return labels

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Labels at equal positions go together; arrays broadcast."""
        if a is b:
            return
        differ = a != b
        if differ.any():
            a, b = np.broadcast_arrays(a, b)
            pairs = (a[differ] << 32) | b[differ]
            self._pairs.append(distinct(pairs) if pairs.size > 4096 else pairs)

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        """These labels stay. An empty reason marks labels that are no channels at all (kernel positions, padding)."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        self._frozen.append((distinct(labels), self.reasons.index(reason)))

    def consume(self, labels: np.ndarray) -> None:
        """These labels of a parameter are contracted with an activation: the parameter consumes the channel."""
        self._consumed.append(distinct(labels))

    def grid(self, labels: np.ndarray, whole_rows: bool = True) -> None:
        """What remains of these labels must be a box; positions may differ only along the last dim.

        ``whole_rows`` says whether rows may go whole (a head) or every row must keep something (a conv group).
        """
        for axis in range(labels.ndim - 1):  # rows that repeat (batch, windows) say nothing new
            first = labels.take([0], axis)
            if labels.shape[axis] > 1 and (labels == first).all():
                labels = first
        labels = labels.reshape([s for s in labels.shape if s > 1] or [1])
        if labels.ndim > 1:
            key = labels.tobytes() + f"{labels.shape}{whole_rows}".encode()
            self.grids[key] = (labels, whole_rows)

    def classes(self) -> np.ndarray:
        """Label -> smallest label it is united with, int64 ``(count,)``."""
        if self._known is not None and len(self._pairs) <= 1 and len(self._known) == self.count:
            return self._known  # nothing was united since
        root = np.arange(self.count, dtype=np.int64)
        self._known = root
        if not self._pairs:
            return root
        pairs = distinct(np.concatenate(self._pairs))
        self._pairs = [pairs]
        left, right = pairs >> 32, pairs & 0xFFFFFFFF
        while True:
            a, b = root[left], root[right]
            differ = a != b
            if not differ.any():
                self._known = root
                return root
            low, high = np.minimum(a[differ], b[differ]), np.maximum(a[differ], b[differ])
            np.minimum.at(root, high, low)
            while (jump := root[root]).tobytes() != root.tobytes():
                root = jump

    def frozen(self, classes: np.ndarray) -> np.ndarray:
        """Class -> index into ``reasons`` or -1, int64 ``(count,)``; the reason that a person can use wins."""
        reason = np.full(self.count, -1, np.int64)
        for labels, r in sorted(self._frozen, key=lambda f: self.reasons[f[1]] == "", reverse=True):
            reason[classes[labels]] = r
        return reason

    def consumed(self) -> np.ndarray:
        """Label -> whether :meth:`consume` named it, bool ``(count,)``."""
        out = np.zeros(self.count, bool)
        for labels in self._consumed:
            out[labels] = True
        return out


class LabelCheck(LabelStore):
    """The store of a replay: labels are channel ids already (-1: unknown), a union must find them equal.

    With ``heads`` an array of one label may be the dims of the only head that is left: it says nothing of positions.
    Nor do channels that are ``alone`` in their block (the only dim left of every head), bool by channel: once a dim of
    size 1 is all that is left of the dims of a head, they pass for the heads.
    """

    def __init__(self, heads: bool = False, alone: np.ndarray | None = None) -> None:
        super().__init__()
        self._heads = heads
        self._alone = np.zeros(1, bool) if alone is None else alone

    def new(self, n: int) -> np.ndarray:
        """Nothing is known of labels made during a replay."""
        return np.full(n, -1, np.int64)

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Find the labels equal.

        Raises:
            CompactError: Where two channels meet that are not coupled.
        """
        if not self.agree(a, b):
            raise CompactError("channels meet that do not belong together")

    def agree(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Whether the labels are equal wherever both are known."""
        differ = a != b
        if not differ.any():
            return True
        if self._heads and any(x.size > 1 and (x == x.flat[0]).all() for x in (a, b)):
            return True
        differ = differ & (a >= 0) & (b >= 0)
        if not differ.any():
            return True
        return bool(self._alone.any() and (self._alone[a].all() or self._alone[b].all()))

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        """Nothing to record."""

    def consume(self, labels: np.ndarray) -> None:
        """Nothing to record."""

    def grid(self, labels: np.ndarray, whole_rows: bool = True) -> None:
        """Nothing to record."""

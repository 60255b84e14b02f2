"""From recorded labels to coupled groups: classes, grids, balance, names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpd_fast.comb.labels import LabelStore
from cpd_fast.comb.planes import Plane
from cpd_fast.types import CoupledGroup, ParamSlice

MIXED_GRID = "belongs to a grid of unequal blocks"


@dataclass
class Resolved:
    """Groups, and the global channel id of every label (-1: none)."""

    groups: tuple[CoupledGroup, ...]
    channel: np.ndarray


def resolve(store: LabelStore, planes: dict[str, list[Plane]], order: Sequence[str]) -> Resolved:
    """Classes of united labels become channels; channels that own slices of the same tensors become groups.

    Args:
        store: What the traces recorded.
        planes: Planes of every parameter and buffer that was used.
        order: Names by first use: decides channel order and names.
    """
    flat = [(name, i, p) for name in order for i, p in enumerate(planes[name])]
    _freeze_unproduced(store, flat)
    for _ in range(1 + len(store.grids)):
        classes = store.classes()
        frozen = store.frozen(classes)
        signature = _signatures(flat, classes, store.count)
        balance = _Balance(store, classes, frozen, signature)
        if balance.settled:
            break
    assert balance.settled  # every round that is not unites or freezes one grid more
    groups, channel = _build_groups(store, flat, classes, frozen, signature, balance)
    return Resolved(groups, channel)


def _freeze_unproduced(store: LabelStore, flat: list[tuple[str, int, Plane]]) -> None:
    """Columns that no parameter produces anything for read values made by the forward, whose number is fixed."""
    classes, consumed = store.classes(), store.consumed()
    frozen = store.frozen(classes)
    produced = np.zeros(store.count, bool)
    for _, _, p in flat:
        labels = p.labels.reshape(-1)
        produced[classes[labels[~consumed[labels]]]] = True
    for _, _, p in flat:
        orphans = p.labels[~produced[classes[p.labels]] & (frozen[classes[p.labels]] < 0)]
        if orphans.size:
            store.freeze(orphans, "reads values that no layer produces")


def _mix(values: np.ndarray | int) -> np.ndarray:
    """splitmix64: spreads small integers over 64 bits, so that sums of them identify multisets."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _signatures(flat: list[tuple[str, int, Plane]], classes: np.ndarray, count: int) -> np.ndarray:
    """Class -> hash of the multiset of (tensor, plane) it owns indices of; 0 for classes that own none."""
    out = np.zeros(count, np.uint64)
    for i, (_, _, plane) in enumerate(flat):
        with np.errstate(over="ignore"):
            np.add.at(out, classes[plane.labels.reshape(-1)], _mix(i + 1))
    return out


class _Balance:
    """Turns grids into blocks: the rows of a grid must keep equally many channels.

    Attributes:
        block: Class -> hash of the grid rows it lies in, uint64.
        ties: Sets of signatures whose blocks must keep the same number.
        settled: False when a grid had to be united along its rows, or frozen, and everything must be looked at anew.
    """

    def __init__(self, store: LabelStore, classes: np.ndarray, frozen: np.ndarray, signature: np.ndarray) -> None:
        self.block = np.zeros(store.count, np.uint64)
        self.ties: list[set[int]] = []
        self.settled = True
        self._frozen, self._signature = frozen, signature
        grids = {}
        for labels, whole_rows in store.grids.values():
            grid = _class_grid(classes[labels], whole_rows)
            if grid.ndim == 2 and not (frozen[grid] >= 0).all():
                grids[grid.tobytes() + bytes(str(grid.shape), "ascii")] = (grid, labels)
        for i, (grid, _) in enumerate(grids.values()):
            with np.errstate(over="ignore"):
                rows = _mix(np.arange(len(grid), dtype=np.uint64) + np.uint64(i) * np.uint64(1 << 20) + np.uint64(1))
                np.add.at(self.block, grid, np.broadcast_to(rows[:, None], grid.shape))
        for grid, labels in grids.values():
            if not self._tie(grid):
                self.settled = False
                store.unite(labels, labels[tuple([slice(0, 1)] * (labels.ndim - 1))])
                if (frozen[grid] >= 0).any() and not _rows_alike(frozen[grid]):
                    store.freeze(labels, MIXED_GRID)  # part of a row must stay: rows could not shrink alike

    def _tie(self, grid: np.ndarray) -> bool:
        """Accept a grid whose rows are built from blocks of equal sizes, and tie these blocks."""
        pieces: list[list[int]] = []
        sizes = []
        for row in grid:
            if (self._frozen[row] >= 0).any():
                return False
            key = self._signature[row] ^ _mix(self.block[row])
            first = [int(j) for j in np.unique(key, return_index=True)[1]]
            first.sort()
            counts = [len(np.unique(row[key == key[j]])) for j in first]
            repeats = [int((key == key[j]).sum()) for j in first]
            pieces.append([int(self._signature[row[j]]) for j in first])
            sizes.append(list(zip(counts, repeats, strict=True)))
        if any(s != sizes[0] for s in sizes):
            return False
        for column in zip(*pieces, strict=True):
            self.ties.append(set(column))
        return True

    def tie_of(self) -> dict[int, int]:
        """Signature -> smallest signature it is tied to."""
        root: dict[int, int] = {}

        def find(s: int) -> int:
            while root.setdefault(s, s) != s:
                s = root[s]
            return s

        for tied in self.ties:
            first, *others = sorted(tied)
            for s in others:
                a, b = sorted((find(first), find(s)))
                root[b] = a
        return {s: find(s) for s in root}


def _rows_alike(frozen: np.ndarray) -> bool:
    return bool(((frozen >= 0) == (frozen[:1] >= 0)).all())


def _class_grid(grid: np.ndarray, whole_rows: bool) -> np.ndarray:
    """Drop dims along which classes are equal, and rows that repeat; two dims remain where rows must be balanced.

    A row of a single class goes whole or stays whole: nothing is left to balance, unless every row must stay.
    """
    for axis in range(grid.ndim if whole_rows else grid.ndim - 1):
        first = grid.take([0], axis)
        if (grid == first).all():
            grid = first
    grid = grid.reshape([s for s in grid.shape if s > 1] or [1])
    if grid.ndim < 2:
        return grid
    rows = grid.reshape(-1, grid.shape[-1])
    _, first_rows = np.unique(rows, axis=0, return_index=True)
    rows = rows[np.sort(first_rows)]
    return rows if len(rows) > 1 else rows[0]


def _build_groups(
    store: LabelStore,
    flat: list[tuple[str, int, Plane]],
    classes: np.ndarray,
    frozen: np.ndarray,
    signature: np.ndarray,
    balance: _Balance,
) -> tuple[tuple[CoupledGroup, ...], np.ndarray]:
    silent = {i for i, r in enumerate(store.reasons) if not r}
    consumed = store.consumed()
    # members: key (signature, frozen reason) -> classes in the order of first appearance
    members: dict[tuple[int, int], list[np.ndarray]] = {}
    roots: dict[tuple[int, int], str] = {}
    producing = [not consumed[p.labels.reshape(-1)[0]] for _, _, p in flat]
    ranked = sorted(range(len(flat)), key=lambda i: (not producing[i], not flat[i][0].endswith("weight"), i))
    ranked.sort(key=lambda i: (not producing[i], flat[i][2].labels.ndim < 2))  # layers before norms and tokens
    seen = np.zeros(store.count, bool)
    for i in ranked:
        name, _, plane = flat[i]
        own = classes[plane.labels.reshape(-1)]
        own = own[~seen[own]]
        if not own.size:
            continue
        seen[own] = True
        _, first = np.unique(own, return_index=True)
        own = own[np.sort(first)]
        while own.size:  # mostly all of one group
            key = (int(signature[own[0]]), int(frozen[own[0]]))
            same = (signature[own] == signature[own[0]]) & (frozen[own] == frozen[own[0]])
            if key[1] not in silent:
                members.setdefault(key, []).append(own[same])
                roots.setdefault(key, name)
            own = own[~same]
    keys = sorted(members, key=lambda k: _first_use(flat, classes, members[k], roots[k]))
    ties = balance.tie_of()
    tie_names: dict[int, str] = {}
    groups: list[CoupledGroup] = []
    channel = np.full(store.count, -1, np.int64)
    used: dict[str, int] = {}
    offset = 0
    local: list[tuple[np.ndarray, str | None, np.ndarray | None, tuple[int, int]]] = []
    for key in keys:
        ids = np.concatenate(members[key])
        block = None
        tie = None
        if key[1] < 0 and balance.block[ids].any():
            values, first, inverse = np.unique(balance.block[ids], return_index=True, return_inverse=True)
            block = np.argsort(np.argsort(first))[inverse]
            root_tie = ties.get(key[0])
            if root_tie is not None:
                tie = tie_names.setdefault(root_tie, f"tie{len(tie_names)}")
            if len(values) == 1:
                block = None
        channel[ids] = offset + np.arange(len(ids))
        offset += len(ids)
        local.append((ids, tie, block, key))
    by_label = channel[classes]
    slices = _slices(flat, by_label, producing, [len(entry[0]) for entry in local])
    shared = [entry[1] for entry in local]
    offset = 0
    for n, (ids, tie, block, key) in enumerate(local):
        root = roots[key].rsplit(".", 1)
        base = root[0] if len(root) == 2 and root[1] in ("weight", "bias") else roots[key]
        used[base] = used.get(base, 0) + 1
        name = base if used[base] == 1 else f"{base}#{used[base]}"
        reason = store.reasons[key[1]] if key[1] >= 0 else None
        if reason is None and len(ids) == (1 if block is None else block.max() + 1):
            reason = "has a single channel" if block is None else "has a single channel in every block"
        groups.append(
            CoupledGroup(
                name=name,
                root=base,
                n_channels=len(ids),
                offset=offset,
                slices=tuple(slices[n]),
                balance=block,
                tie=tie if tie is not None and shared.count(tie) > 1 else None,
                prunable=reason is None,
                reason=reason,
            )
        )
        offset += len(ids)
    return tuple(groups), by_label


def _first_use(
    flat: list[tuple[str, int, Plane]],
    classes: np.ndarray,
    members: list[np.ndarray],
    root: str,
) -> tuple[int, int]:
    """Where the first channel of a group first appears: the order of groups."""
    first = members[0][0]
    for j, (name, _, plane) in enumerate(flat):
        if name == root:
            hit = np.flatnonzero(classes[plane.labels.reshape(-1)] == first)
            if len(hit):
                return j, int(hit[0])
    return len(flat), 0


def _slices(
    flat: list[tuple[str, int, Plane]], by_label: np.ndarray, producing: list[bool], sizes: list[int]
) -> list[list[ParamSlice]]:
    """For every group and plane: the flat positions (over the plane's dims) that each channel owns."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    out: list[list[ParamSlice]] = [[] for _ in sizes]
    for i, (name, _, plane) in enumerate(flat):
        ids = by_label[plane.labels.reshape(-1)]
        low, high = int(ids.min()), int(ids.max())
        if high < 0:
            continue
        g = int(np.searchsorted(starts, low, side="right")) - 1
        if low >= 0 and len(ids) == sizes[g] and low == starts[g] and (np.diff(ids) == 1).all():  # a group in order
            out[g].append(ParamSlice(name, plane.dims or (plane.fast,), np.arange(sizes[g])[:, None], producing[i]))
            continue
        order = np.argsort(ids, kind="stable")
        order = order[ids[order] >= 0]
        owners = np.searchsorted(starts, ids[order], side="right") - 1
        for g in np.unique(owners).tolist():
            mine = order[owners == g]
            out[g].append(ParamSlice(name, plane.dims or (plane.fast,), mine.reshape(sizes[g], -1), producing[i]))
    return out


def fingerprint(shapes: dict[str, tuple[int, ...]], groups: Sequence[CoupledGroup]) -> str:
    """16 hex digits that two models share exactly when a plan of one can be applied to the other."""
    digest = hashlib.sha256()
    for name in sorted(shapes):
        digest.update(f"{name}{tuple(shapes[name])};".encode())
    for g in groups:
        digest.update(f"{g.name},{g.n_channels},{g.prunable}:".encode())
        for s in g.slices:
            digest.update(f"{s.param}{s.dims}".encode() + np.ascontiguousarray(s.index).tobytes())
        if g.balance is not None:
            digest.update(np.ascontiguousarray(g.balance, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]

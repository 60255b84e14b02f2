"""Widths of a student whose layers hold as many weights as those of an unstructured pruned teacher.

The paper has two rules. In a plain network the layers are gone through in order, and each gets the width at which its
weight count matches, given the width before it. In a residual network one width a stage is chosen for all its layers.
Both are one rule here: units (coupled groups) that feed each other in a circle, as a residual stage and the inner
layers of its blocks do, form a *stage* and shrink by one common share; stages are solved in the order of the network.
In a plain network every unit is a stage of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from cpd_fast.errors import PlanError
from cpd_fast.schedule.plan import _build, _Unit, _units
from cpd_fast.types import ChannelGraph, PrunePlan, TensorMap


def match_plan(graph: ChannelGraph, nonzeros: Mapping[str, float]) -> PrunePlan:
    r"""The plan whose stages hold as many weights as remain in a teacher of the same architecture.

    For every stage the common share is sought at which the weights that its units produce (given the widths before it)
    are closest in number to ``sum(nonzeros)``. Widths are at least 1 and at most the teacher's.

    Args:
        graph: The channel graph of the teacher.
        nonzeros: Remaining weights by parameter name, as ``WeightMasks.nonzeros`` counts them; layers that are not
            named do not matter.

    Returns:
        The plan; which channels it keeps means nothing, only how many.

    Raises:
        PlanError: If nothing is prunable, a name is unknown, or a count exceeds the layer.

    Source: Park and No, arXiv:2109.14960; for a plain network ``out_l = round(nnz_l / (out_{l-1} * k^2))``.

    Example:
        >>> import torch, cpd_fast as cpd
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> graph = cpd.comb(net, torch.zeros(1, 4))
        >>> plan = match_plan(graph, {"0.weight": 16, "1.weight": 24, "2.weight": 12})
        >>> {name: len(kept) for name, kept in plan.items()}  # 16 / 4, 24 / 4
        {'0': 4, '1': 6}
    """
    weights = {graph.aliases.get(name, name): (name, float(n)) for name, n in nonzeros.items()}
    for name, (given, n) in weights.items():
        tensor = graph.tensors.get(name)
        if name not in graph.aliases:
            raise PlanError(f"nonzeros: the graph has no parameter {given!r}; comb the teacher")
        if tensor is not None and not 0 <= n <= prod(tensor.shape):
            raise PlanError(f"nonzeros: {given}: expected 0 to {prod(tensor.shape)} weights, got {n:g}")
    zeros = {g.name: np.zeros(g.n_channels) for g in graph.prunable_groups}
    units = _units(graph, zeros, graph.alive(None), 1, 1.0, 1)
    counts = [u.size for u in units]
    alive = graph.alive(None)
    for stage in _stages(graph, units, weights):
        own = [graph.tensors[w] for w in stage.weights]
        if not own:
            continue
        wanted = sum(weights[t.name][1] for t in own)
        largest = max(units[u].size for u in stage.units)

        def at(width: int, stage: _Stage = stage, largest: int = largest) -> list[int]:
            return [max(1, round(width * units[u].size / largest)) for u in stage.units]

        def holds(width: int, stage: _Stage = stage, own: list[TensorMap] = own) -> int:
            now = alive.copy()
            for u, count in zip(stage.units, at(width), strict=True):
                _shrink(now, units[u], count)
            return sum(_elements(t, now) for t in own)

        low, high = 1, largest  # the first width that holds at least as many as wanted
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) >= wanted else (middle + 1, high)
        if low > 1 and wanted - holds(low - 1) < abs(holds(low) - wanted):
            low -= 1
        for u, count in zip(stage.units, at(low), strict=True):
            counts[u] = count
            _shrink(alive, units[u], count)
    return _build(graph, list(zip(units, counts, strict=True)), None)


def _shrink(alive: np.ndarray, unit: _Unit, count: int) -> None:
    for b in unit.blocks:
        alive[b.group.offset + b.order[: unit.size - count]] = False


def _elements(tensor: TensorMap, alive: np.ndarray) -> int:
    """How many elements of a tensor survive."""
    if all(sum(s > 1 for s in m.shape) <= 1 for m in tensor.maps):
        kept: dict[int, np.ndarray] = {}
        for m in tensor.maps:
            dim = int(np.argmax(m.shape))
            flat = alive[m.reshape(-1)]
            kept[dim] = kept[dim] & flat if dim in kept else flat
        return prod(int(kept[d].sum()) if d in kept else s for d, s in enumerate(tensor.shape))
    keep = np.ones(tensor.shape, bool)
    for m in tensor.maps:
        keep &= alive[m]
    return int(keep.sum())


@dataclass(frozen=True)
class _Stage:
    units: tuple[int, ...]
    weights: tuple[str, ...]  # whose rows its units produce


def _stages(graph: ChannelGraph, units: Sequence[_Unit], weights: Mapping[str, object]) -> list[_Stage]:
    """Units that feed each other in a circle, in the order in which channels flow."""
    unit_of = {b.group.name: n for n, u in enumerate(units) for b in u.blocks}
    makers: dict[str, set[int]] = {}
    readers: dict[str, set[int]] = {}
    for g in graph.groups:
        for s in g.slices:
            if s.param in weights and g.name in unit_of:
                (makers if s.produces else readers).setdefault(s.param, set()).add(unit_of[g.name])
    reach = np.eye(len(units), dtype=bool)
    for name, out in makers.items():
        for maker in out:
            for other in out:  # rows of several units in one weight: they are solved together
                reach[maker, other] = True
            for reader in readers.get(name, ()):
                reach[reader, maker] = True
    # a block whose shortcut is a layer, too (the first of a stage): what it holds belongs to the stage that it leads to
    feeds = reach.copy()
    for name, out in makers.items():
        for beside, also in makers.items():
            for maker in (out & also) if name != beside else ():
                for inner in readers.get(name, ()):
                    if any(feeds[around, inner] for around in readers.get(beside, set()) - {inner}):
                        reach[maker, inner] = True
    for _ in range(max(1, int(np.ceil(np.log2(max(2, len(units))))))):  # transitive closure
        reach = reach @ reach
    together = reach & reach.T
    before = reach.sum(0)  # how many units a unit depends on: never fewer than those before it
    found: dict[int, list[int]] = {}
    for n in range(len(units)):
        found.setdefault(int(np.argmax(together[n])), []).append(n)
    order = sorted(found.values(), key=lambda members: (int(before[members[0]]), members[0]))
    return [
        _Stage(tuple(members), tuple(w for w, out in makers.items() if out & set(members)))
        for members in order
    ]  # fmt: skip

"""What a plan changes in a model beside the tensors, without a rebuild: for masks that move all the time.

A compaction is proven for uneven plans, once. Where the sizes that it repaired are those of PyTorch's own layers, or
are seen to be numbers of kept channels, they follow for any other plan by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from cpd_fast.adapters import adapt, adaptation
from cpd_fast.compact.compact import Scale, cut_on_meta, fit_modules, kept_scales
from cpd_fast.compact.repair import has_sizes, known_sizes, norm_lengths
from cpd_fast.compact.shrink import Kept, what_is_left
from cpd_fast.compact.sizes import KNOWN
from cpd_fast.compact.trials import trial_plan
from cpd_fast.compact.views import resized_class, scale_calls
from cpd_fast.errors import CompactError
from cpd_fast.types import ChannelGraph, PrunePlan
from cpd_fast.wrappers import unwrap

Attributes = dict[str, dict[str, Any]]  # module name -> attribute -> value; ``__class__`` is one of them
_CLASS = "__class__"
_STATE = frozenset(vars(nn.Module()))
_PROBES = 3  # uneven plans that a rule for a size must hold for


@dataclass(frozen=True, eq=False)
class Structure:
    """A compacted model as differences from the original.

    Attributes:
        kept: What remains of every tensor that loses something, by first name.
        attributes: Attributes of modules that have another value, classes among them.
        rows: ``(rows, factor)`` by which rows of a tensor are multiplied, in terms of the original.
    """

    kept: dict[str, Kept]
    attributes: Attributes
    rows: dict[str, list[tuple[np.ndarray, float]]]


class Resizer:
    """Finds the :class:`Structure` of plan after plan.

    Args:
        model: The model that ``graph`` was combed from; never changed.
        graph: Its coupled channel groups.

    Attributes:
        proof: How structures are found, in words.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self._model, self._graph = unwrap(model), graph
        self._sized = [(n, m) for n, m in self._model.named_modules() if has_sizes(m) or adaptation(m) is not None]
        self._rules: dict[tuple[str, str], _Rule] | None = None
        self._proven: dict[PrunePlan, Structure] = {}
        self.proof = "every plan by a replay of its own"
        try:
            self._learn()
        except CompactError:  # of an uneven plan; the plan at hand may still be possible
            self._rules = None

    def __call__(self, plan: PrunePlan) -> Structure:
        """The structure that a plan leaves.

        Raises:
            CompactError: If the compacted forward cannot be proven equal.
        """
        if self._rules is None:
            if plan not in self._proven:
                self._proven = {plan: _structure(self._model, self._graph, plan)}
            return self._proven[plan]
        return self._directly(plan, self._rules)

    def _learn(self) -> None:
        """Find rules for what cannot be computed directly; none where they do not hold for every probe."""
        plan = _uneven_plan(self._graph, 0)
        simple, real = self._directly(plan, {}), _structure(self._model, self._graph, plan)
        found = {0: (plan, real)}
        open_ends = [(name, key) for name, a in real.attributes.items() for key in a if not _has(simple, name, key)]
        if self._indirect() or not _contains(real, simple):
            return
        rules: dict[tuple[str, str], _Rule] = {}
        if open_ends:
            for turn in range(1, _PROBES):
                plan = _uneven_plan(self._graph, turn)
                found[turn] = (plan, _structure(self._model, self._graph, plan))
            for name, key in open_ends:
                rule = self._explain(name, key, [found[t] for t in range(_PROBES)])
                if rule is None:
                    return
                rules[name, key] = rule
        if all(self._directly(p, rules).attributes == s.attributes for p, s in found.values()):
            self._rules = rules
            self.proof = f"by arithmetic, proven by replays of {len(found)} uneven plan" + "s" * (len(found) > 1)

    def _indirect(self) -> bool:
        """Whether something hides the sizes: a weight that is computed, or a module under two names."""
        seen: set[int] = set()
        for _, m in self._model.named_modules(remove_duplicate=False):
            if isinstance(m, KNOWN) and ("parametrizations" in m._modules or m._forward_pre_hooks):
                return True
            if id(m) in seen and not isinstance(m, KNOWN):
                return True
            seen.add(id(m))
        return False

    def _directly(self, plan: PrunePlan, rules: dict[tuple[str, str], _Rule]) -> Structure:
        graph = self._graph
        alive = graph.alive(plan)
        lines: dict[int, np.ndarray | None] = {}
        kept = {n: k for n, t in graph.tensors.items() if (k := what_is_left(t, alive, lines)) is not None}
        attributes: Attributes = {}
        lengths = norm_lengths(graph, alive)
        for name, m in self._sized:
            own = known_sizes(name, m, self._shape(name, m, kept), graph, alive, lengths)
            _note(attributes, name, m, own)
            adapted = adaptation(m)
            if adapted is not None and any(not name or n.startswith(f"{name}.") for n in kept):
                attributes.setdefault(name, {}).update({_CLASS: adapted[0], **adapted[1]})
        identities, rows, calls = kept_scales(graph.scale_sites, alive)
        for name, factor in identities.items():
            old = getattr(self._model.get_submodule(name), "factor", 1.0)
            attributes.setdefault(name, {}).update({_CLASS: Scale, "factor": factor * old})
        for name, scales in calls.items():
            m = self._model.get_submodule(name)
            kind: Any = type(m)
            fixes = vars(m).get("resized_calls", {})
            mixed = {_CLASS: resized_class(kind), "resized_calls": fixes, "scaled_calls": scales}
            attributes.setdefault(name, {}).update(mixed)
        for (name, key), rule in rules.items():
            module = self._model.get_submodule(name)
            _note(attributes, name, module, {key: rule(plan)})
        return Structure(kept, attributes, {n: [(r.numpy(), f) for r, f in rs] for n, rs in rows.items()})

    def _shape(self, name: str, m: nn.Module, kept: Mapping[str, Kept]) -> Callable[[str], tuple[int, ...] | None]:
        prefix, aliases = f"{name}." if name else "", self._graph.aliases

        def shape(key: str) -> tuple[int, ...] | None:
            path = prefix + key
            left = kept.get(aliases.get(path, path))
            if left is not None:
                return left.shape
            tensor = m._parameters.get(key, m._buffers.get(key))
            return None if tensor is None else tuple(tensor.shape)

        return shape

    # ------------------------------------------------------------------------------------------------ learnt sizes
    def _explain(self, name: str, key: str, probes: list[tuple[PrunePlan, Structure]]) -> _Rule | None:
        """A rule that gives the attribute for every probe."""
        module = self._model.get_submodule(name)
        if key == _CLASS or key not in vars(module):
            return None
        old = vars(module)[key]
        values = [(p, s.attributes.get(name, {}).get(key, old)) for p, s in probes]
        if type(old) is int:
            count = self._count(name, old, values)
            return None if count is None else _Rule(None, (count,))
        if type(old) in (tuple, list) and all(type(v) is int for v in old):
            if any(type(v) is not type(old) or len(v) != len(old) for _, v in values):
                return None
            counts = [self._count(name, o, [(p, v[i]) for p, v in values]) for i, o in enumerate(old)]
            return None if None in counts else _Rule(type(old), tuple(c for c in counts if c is not None))
        return None

    def _count(self, name: str, old: int, values: list[tuple[PrunePlan, Any]]) -> _Count | None:
        if all(v == old for _, v in values):
            return _Count(None, 1, 0, old)
        for count in self._candidates(name, old):
            if all(count(p) == v for p, v in values):
                return count
        return None

    def _candidates(self, name: str, old: int) -> Iterator[_Count]:
        """Numbers of channels that are ``old`` now: of groups in the module, then of those of what it computes."""
        prefix = f"{name}." if name else ""
        inside = [g for g in self._graph.groups if any(s.param.startswith(prefix) for s in g.slices)]
        ids = [m[m >= 0] for s in self._graph.steps if s.module == name or s.op == f"call {name}" for m in s.maps]
        passing = np.unique(np.concatenate(ids)) if ids else np.zeros(0, np.int64)
        starts = [g.offset for g in self._graph.groups]
        around = [self._graph.groups[i] for i in np.unique(np.searchsorted(starts, passing, "right") - 1)]
        for g in dict.fromkeys([*inside, *around]):
            for divisor in dict.fromkeys((len(g.blocks), 1)):
                own = g.n_channels // divisor
                if own and old % own == 0:
                    yield _Count(g.name, divisor, old // own, 0, g.n_channels)
            widths = {s.index.shape[1] for s in g.slices}
            for width in widths:
                if old == g.n_channels * width:
                    yield _Count(g.name, 1, width, 0, g.n_channels)


@dataclass(frozen=True)
class _Count:
    """``constant + factor * kept channels of a group / divisor``."""

    group: str | None
    divisor: int
    factor: int
    constant: int
    n_channels: int = 0

    def __call__(self, plan: PrunePlan) -> int:
        if self.group is None:
            return self.constant
        kept = plan.get(self.group)
        return self.factor * ((self.n_channels if kept is None else len(kept)) // self.divisor)


@dataclass(frozen=True)
class _Rule:
    """An integer, or a tuple or list of them."""

    kind: type | None
    counts: tuple[_Count, ...]

    def __call__(self, plan: PrunePlan) -> Any:
        values = [c(plan) for c in self.counts]
        return values[0] if self.kind is None else self.kind(values)


def _uneven_plan(graph: ChannelGraph, turn: int) -> PrunePlan:
    """Groups shrink by different shares, and by others in every turn."""
    step = (0.618, 0.414, 0.732)[turn]
    return trial_plan(graph, lambda n: 0.4 + 0.45 * (((n + 1) * step) % 1))


def _structure(model: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> Structure:
    """The structure of one plan, from a compaction without weights, which is proven.

    Raises:
        CompactError: If it cannot be.
    """
    alive = graph.alive(plan)
    kept = {n: k for n, t in graph.tensors.items() if (k := what_is_left(t, alive)) is not None}
    identities, rows, calls = kept_scales(graph.scale_sites, alive)
    small = cut_on_meta(model, graph, alive)
    adapt(small, lambda name: any(not name or n.startswith(f"{name}.") for n in kept))
    moved = fit_modules(small, graph, plan, identities)
    for name, scales in calls.items():
        scale_calls(small.get_submodule(name), scales)
    attributes: Attributes = {}
    for name, m in model.named_modules():
        new = small.get_submodule(name) if name else small
        own = {k: v for k, v in vars(new).items() if k not in _STATE and _plain(v)}
        if type(new) is not type(m):
            attributes[name] = {_CLASS: type(new)}
        _note(attributes, name, m, own)
    scaled = {n: [(r.numpy(), f) for r, f in rs] for n, rs in rows.items()}
    for name, which, factor in moved:
        scaled.setdefault(name, []).append((which, factor))
    return Structure(kept, attributes, scaled)


def _note(attributes: Attributes, name: str, module: nn.Module, values: Mapping[str, Any]) -> None:
    """Remember the values that differ from those of the module."""
    own = vars(module)
    for key, value in values.items():
        if key not in own or type(own[key]) is not type(value) or own[key] != value:
            attributes.setdefault(name, {})[key] = value


def _plain(value: Any) -> bool:
    """Numbers, and containers of them."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_plain(v) for v in value.values())
    return isinstance(value, (int, float, bool))


def _has(structure: Structure, name: str, key: str) -> bool:
    return key in structure.attributes.get(name, {})


def _contains(whole: Structure, part: Structure) -> bool:
    """Whether everything that ``part`` changes is changed alike in ``whole``, and rows are scaled alike."""
    alike = all(
        _has(whole, name, key) and whole.attributes[name][key] == value
        for name, a in part.attributes.items()
        for key, value in a.items()
    )
    count = {n: len(r) for n, r in whole.rows.items()}
    return alike and count == {n: len(r) for n, r in part.rows.items()}

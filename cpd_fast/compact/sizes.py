"""What became of each size around a module, and the attributes that hold an old one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import torch
from torch import nn

from cpd_fast.compact.replay import Left
from cpd_fast.types import ChannelGraph, PrunePlan

# layers whose sizes follow from their tensors; their other numbers (strides, groups of a norm) are no sizes
KNOWN = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU, nn.Embedding)


@dataclass(frozen=True)
class Edit:
    """Another value for an attribute of a module."""

    attribute: str
    value: Any
    roles: frozenset[str]  # what the new size is the size of, relative to the module


class Applied:
    """Edits of a module's attributes, taken back on exit."""

    def __init__(self, module: nn.Module, edits: tuple[Edit, ...]) -> None:
        self._module, self._edits = module, edits
        self._old = {e.attribute: getattr(module, e.attribute) for e in edits}

    def __enter__(self) -> None:
        for e in self._edits:
            setattr(self._module, e.attribute, e.value)

    def __exit__(self, *_: Any) -> None:
        for name, value in self._old.items():
            setattr(self._module, name, value)


class Sizes:
    """Which old sizes became which new ones, around each module, and what they are sizes of."""

    def __init__(self, graph: ChannelGraph, plan: PrunePlan) -> None:
        self._graph, self._plan = graph, plan
        self._by_tensor: dict[str, set[tuple[int, int, str]]] = {}
        self._names: list[str] = []
        self._originals: dict[tuple[str, str], Any] = {}

    def _collect(self) -> None:
        """Done once a module has failed: mostly none does."""
        graph, plan = self._graph, self._plan
        alive = graph.alive(plan)
        for g in graph.groups:
            kept, blocks = len(plan.get(g.name, range(g.n_channels))), len(g.blocks)
            for s in g.slices:
                pairs = {(g.n_channels // blocks, kept // blocks, "block"), (g.n_channels, kept, "group")}
                self._add(s.param, pairs, str(s.dim))
        left = Left(alive)
        for name, t in graph.tensors.items():
            new, _ = left.of(t.shape, t.maps)
            self._add(name, {(a, b, str(d)) for d, (a, b) in enumerate(zip(t.shape, new, strict=True))})
        for step in graph.steps:  # activations: what a module is given and computes
            new, _ = left.of(step.shape, step.maps)
            owner = step.op.removeprefix("call ") if step.op.startswith("call ") else step.module
            self._add(f"{owner}.", {(a, b, str(d)) for d, (a, b) in enumerate(zip(step.shape, new, strict=True))})

    def _add(self, name: str, pairs: set[tuple[int, int, str]], what: str = "") -> None:
        known = self._by_tensor.setdefault(name, set())
        known.update((a, b, f"{role}{what}") for a, b, role in pairs if a != b)

    def around(self, path: str) -> dict[tuple[int, int], frozenset[str]]:
        """(old, new) sizes of tensors of a module and of what it holds, with their roles."""
        if not self._names:
            self._collect()
            self._names = sorted(self._by_tensor)
        prefix = f"{path}." if path else ""
        found: dict[tuple[int, int], set[str]] = {}
        first = bisect_left(self._names, prefix)
        for name in takewhile(lambda n: n.startswith(prefix), islice(self._names, first, None)):
            for old, new, role in self._by_tensor[name]:
                found.setdefault((old, new), set()).add(f"{name[len(prefix) :]}|{role}")
        return {pair: frozenset(roles) for pair, roles in sorted(found.items())}

    def edits(self, path: str, module: nn.Module, near: str | None = None) -> Iterator[Edit]:
        """Integer attributes (and tuples of them) that hold an old size, with what it became around ``near``."""
        if isinstance(module, KNOWN):
            return
        pairs = self.around(path if near is None else near)
        for name, value in vars(module).items():
            if name.startswith("_") or not holds_sizes(value):
                continue
            original = self._originals.setdefault((path, name), value)
            if value != original:  # an edit learned from another module may be wrong here
                yield Edit(name, original, frozenset())
            if isinstance(original, int):
                yield from (Edit(name, new, roles) for (old, new), roles in pairs.items() if old == original)
            else:
                for (old, new), roles in pairs.items():
                    if old in original:
                        yield Edit(name, type(original)([new if v == old else v for v in original]), roles)

    def edited(self, path: str, module: nn.Module) -> list[tuple[Edit, Edit]]:
        """The edits that gave attributes of a module what they hold, and those that take it back."""
        held = [(a, vars(module)[a], v) for (p, a), v in self._originals.items() if p == path]
        return [(Edit(a, now, frozenset()), Edit(a, was, frozenset())) for a, now, was in held if now != was]


def holds_sizes(value: Any) -> bool:
    """An integer, or a tuple or list of them."""
    if isinstance(value, (tuple, list, torch.Size)):
        return bool(value) and all(type(v) is int for v in value)
    return isinstance(value, int) and not isinstance(value, bool)

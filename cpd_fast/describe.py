"""A channel graph for people and for other programs, and groups frozen by name: methods of ``ChannelGraph``."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from cpd_fast.errors import PlanError

if TYPE_CHECKING:
    from cpd_fast.types import ChannelGraph, CoupledGroup

ENDS = ("first", "last")
OUTPUT = "is an output of the model"
UNUSED = (
    "Where they read what shrinks (an auxiliary head), they will not fit: comb a module whose forward calls them too"
)


def layer_of(param: str) -> str:
    """The module that holds a parameter or buffer, by name; the model itself is ``"(model)"``."""
    return param.rpartition(".")[0] or "(model)"


def layers(group: CoupledGroup, produces: bool) -> tuple[str, ...]:
    """Names of the modules that produce (or consume) a group's channels, in the order of use."""
    return tuple(dict.fromkeys(layer_of(s.param) for s in group.slices if s.produces == produces))


def state(group: CoupledGroup) -> str:
    """``prunable``, or why not."""
    return "prunable" if group.prunable else f"frozen: {group.reason}"


# --------------------------------------------------------------------------------------------------------------- text
def table(graph: ChannelGraph) -> str:
    """A row a group: what produces it, what reads it, and its state."""
    rows = [("group", "channels", "blocks", "goes with", "is read by", "state")]
    for g in graph.groups:
        blocks = "" if g.balance is None else f"{len(g.blocks)} x {g.n_channels // len(g.blocks)}"
        blocks += f" ({g.tie})" if g.tie else ""
        others = [name for name in layers(g, True) if name != g.root]
        what = "" if g.prunable else state(g)
        rows.append((g.name, str(g.n_channels), blocks, _some(others), _some(layers(g, False)), what))
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(r[:5], widths, strict=True)), r[5]]).rstrip() for r in rows]
    prunable = sum(g.n_channels for g in graph.prunable_groups)
    groups = f"{len(graph.prunable_groups)} of {len(graph.groups)} groups"
    lines.append(f"{prunable} of {graph.n_channels} channels can go, in {groups}")
    if graph.unused:
        lines.append(f"never used by the forward, which keeps its shape: {_some(_whole(graph), 4)}. {UNUSED}")
    return "\n".join(lines)


def _some(names: Iterable[str], most: int = 2) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" +{len(names) - most}" if len(names) > most else "")


def _whole(graph: ChannelGraph) -> list[str]:
    """The largest modules (else parameters) that the forward never uses."""
    used = set(graph.aliases.values()).difference(graph.unused)
    found = []
    for name in graph.unused:
        parts = name.split(".")
        heads = (".".join(parts[: i + 1]) for i in range(len(parts)))
        found.append(next((h for h in heads if not any(u.startswith(f"{h}.") for u in used - {name})), name))
    return list(dict.fromkeys(found))


def explain(graph: ChannelGraph, param: str) -> str:
    """For one parameter, buffer or module: its groups, what goes with it, what limits it, and why it is frozen."""
    name = graph.aliases.get(param, param)
    lines = []
    for g in graph.groups:
        for s in g.slices:
            if s.param == name:
                lines += _explain_slice(graph, g, s)
    if lines:
        shape = "x".join(map(str, graph.tensors[name].shape))
        tied = sorted(a for a, first in graph.aliases.items() if first == name and a != param)
        head = f"{param} ({shape}){f', the same tensor as {_some(tied)}' if tied else ''}:"
        return "\n".join([head, *("  " + line for line in lines)])
    inside = [n for n in graph.tensors if n.startswith(f"{name}.")]
    if inside:
        return "\n".join(explain(graph, n) for n in inside)
    unused = [n for n in graph.unused if n == name or n.startswith(f"{name}.")]
    if unused:
        return f"{param}: the forward on the example inputs never uses it, so it keeps its shape. {UNUSED}"
    if name in graph.aliases:
        return f"{param}: no channel runs through it"
    near = difflib.get_close_matches(param, graph.aliases, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"{param}: the model has no such parameter or buffer{hint}"


def _explain_slice(graph: ChannelGraph, g: CoupledGroup, s: Any) -> list[str]:
    dims = ",".join(map(str, s.dims))
    each = s.index.shape[1]
    lines = [
        f"dim {dims}: {'produces' if s.produces else 'consumes'} {g.n_channels} channels of {g.name} ({state(g)})"
        + (f", {each} indices a channel" if each > 1 else "")
    ]
    own = layer_of(s.param)
    for produces, verb in ((True, "goes with"), (False, "is read by")):
        others = [n for n in layers(g, produces) if n != own or (produces != s.produces)]
        if others:
            lines.append(f"  {verb} {_some(others, 6)}")
    if g.prunable and g.balance is not None:
        count = len(g.blocks)
        lines.append(f"  limit: {count} blocks of {g.n_channels // count}, which must all keep equally many")
    if g.prunable and g.tie is not None:
        tied = [o.name for o in graph.groups if o.tie == g.tie and o.name != g.name]
        lines.append(f"  limit: keeps as many a block as {_some(tied, 6)}")
    return lines


def as_dict(graph: ChannelGraph) -> dict[str, Any]:
    """Everything that :func:`table` and :func:`explain` say, for JSON."""
    return {
        "fingerprint": graph.fingerprint,
        "inputs": [list(s) for s in graph.input_shapes],
        "channels": graph.n_channels,
        "unused": list(graph.unused),
        "groups": [
            {
                "name": g.name,
                "root": g.root,
                "channels": g.n_channels,
                "blocks": len(g.blocks),
                "tie": g.tie,
                "prunable": g.prunable,
                "reason": g.reason,
                "tensors": [
                    {"name": s.param, "dims": list(s.dims), "produces": s.produces, "indices": int(s.index.shape[1])}
                    for s in g.slices
                ],
            }
            for g in graph.groups
        ],
    }


# ------------------------------------------------------------------------------------------------------------- freezing
def freeze(graph: ChannelGraph, items: Iterable[str | nn.Module], model: nn.Module | None, reason: str) -> ChannelGraph:
    """``graph`` with more groups frozen; see :meth:`ChannelGraph.freeze`.

    Raises:
        PlanError: If an item matches nothing, or is a module and ``model`` is not given or does not hold it.
    """
    names: set[str] = set()
    for item in items:
        names |= {g.name for g in matching(graph, _name(item, model), "freeze")}
    return _frozen(graph, names, reason)


def protect(graph: ChannelGraph, ends: Iterable[str]) -> ChannelGraph:
    """``graph`` with the first or last layers whole; see :meth:`ChannelGraph.protect`.

    Raises:
        PlanError: If an end is neither ``"first"`` nor ``"last"``.
    """
    ends = [ends] if isinstance(ends, str) else list(ends)
    for end in ends:
        if end not in ENDS:
            raise PlanError(f"protect: expected some of {', '.join(ENDS)}, got {end!r}")
    for end in ends:
        names = _first(graph) if end == "first" else _last(graph)
        graph = _frozen(graph, names, f"of the {end} layer, which is protected")
    return graph


def _first(graph: ChannelGraph) -> set[str]:
    """Groups that the first weight of the forward produces."""
    for name in graph.tensors:
        hit = {g.name for g in graph.groups for s in g.slices if s.param == name and s.produces}
        if hit and len(graph.tensors[name].shape) > 1:
            return hit
    return set()


def _last(graph: ChannelGraph) -> set[str]:
    """Groups that the layers read which produce the outputs."""
    producing = {layer_of(s.param) for g in graph.groups if (g.reason or "").startswith(OUTPUT) for s in g.slices}
    return {g.name for g in graph.groups for s in g.slices if not s.produces and layer_of(s.param) in producing}


def _frozen(graph: ChannelGraph, names: set[str], reason: str) -> ChannelGraph:
    ties: dict[str | None, str] = {g.tie: g.name for g in graph.groups if g.name in names and g.tie}

    def one(g: CoupledGroup) -> CoupledGroup:
        if not g.prunable or (g.name not in names and g.tie not in ties):
            return g
        why = reason if g.name in names else f"keeps as many as {ties[g.tie]}, which is frozen"
        return replace(g, prunable=False, reason=why)

    return replace(graph, groups=tuple(one(g) for g in graph.groups), _by_name={})


def _name(item: str | nn.Module, model: nn.Module | None) -> str:
    if isinstance(item, str):
        return item
    if model is None:
        raise PlanError(f"freeze: to find the name of a {type(item).__name__}, pass the model too: freeze(..., model=)")
    for name, module in model.named_modules():
        if module is item:
            return name or "*"
    raise PlanError(f"freeze: {type(item).__name__} is not a module of this model")


def matching(graph: ChannelGraph, pattern: str, what: str) -> list[CoupledGroup]:
    """Groups whose name matches an ``fnmatch`` pattern; where none of them can shrink, those of modules, parameters.

    Raises:
        PlanError: If there is none; ``what`` says whose pattern it is.
    """
    groups = [g for g in graph.groups if fnmatch.fnmatchcase(g.name, pattern)]
    if not any(g.prunable for g in groups):
        params = {
            alias
            for alias in graph.aliases
            if fnmatch.fnmatchcase(alias, pattern) or fnmatch.fnmatchcase(alias, f"{pattern}.*")
        }
        params = {graph.aliases[a] for a in params}
        groups = [g for g in graph.groups if any(s.param in params for s in g.slices)] or groups
    if not groups:
        near = difflib.get_close_matches(pattern, [g.name for g in graph.groups], n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise PlanError(f"{what}: {pattern!r} matches no group, module or parameter with channels{hint}")
    return groups

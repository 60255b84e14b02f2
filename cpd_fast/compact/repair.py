"""Repair the attributes that mirror sizes, and prove the result by a label-checked replay.

The replay runs the compacted model on meta tensors with the surviving channels written on its parameters, under the
same rules as comb; every union becomes the question whether the two channels are one. A size that stands in an
attribute shows as a shape error inside its module: the attributes there that hold an old size are tried with the
sizes it became, and an edit stays when the replay gets further.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cpd_fast.comb.calls import Call, constants
from cpd_fast.comb.labels import LabelCheck, agree
from cpd_fast.comb.meta import clone_to_meta, tensor_names
from cpd_fast.comb.planes import Plane, State
from cpd_fast.comb.sizes import SizeFix, fit, with_sizes
from cpd_fast.comb.trace import Tracer, run_trace
from cpd_fast.compact.shrink import box_shape
from cpd_fast.compact.views import resize_calls
from cpd_fast.errors import CompactError
from cpd_fast.types import ChannelGraph, PrunePlan, TraceStep

MOST_TRIES = 16  # replays a failing module: enough for every network of the zoo that can be repaired at all
# layers whose sizes follow from their tensors; their other numbers (strides, groups of a norm) are no sizes
KNOWN = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU, nn.Embedding)


def repair_known(model: nn.Module, graph: ChannelGraph, alive: np.ndarray) -> None:
    """Sizes of PyTorch's own layers (and their subclasses), from their tensors' new shapes."""
    norm_sizes = {
        s.module: int(alive[s.channels].sum()) for s in graph.norm_sites if max(s.channels.shape) == s.channels.size
    }
    for name, m in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(m, nn.modules.conv._ConvNd):
            _repair_conv(m, graph, alive, graph.aliases.get(f"{prefix}weight", f"{prefix}weight"))
        elif isinstance(m, nn.Linear):
            m.out_features, m.in_features = m.weight.shape
        elif isinstance(m, nn.modules.batchnorm._NormBase):
            t = m.weight if m.weight is not None else m.running_mean
            if t is not None:
                m.num_features = len(t)
        elif isinstance(m, nn.GroupNorm):
            channels = len(m.weight) if m.weight is not None else norm_sizes.get(name, m.num_channels)
            m.num_groups = channels if m.num_groups == m.num_channels else m.num_groups
            m.num_channels = channels
        elif isinstance(m, nn.PReLU):
            m.num_parameters = m.weight.numel()
        elif isinstance(m, nn.Embedding):
            m.num_embeddings, m.embedding_dim = m.weight.shape
        elif hasattr(m, "normalized_shape"):
            weight = getattr(m, "weight", None)
            if weight is not None:
                m.normalized_shape = tuple(weight.shape)
            elif name in norm_sizes:
                m.normalized_shape = (norm_sizes[name],)


def _repair_conv(m: nn.modules.conv._ConvNd, graph: ChannelGraph, alive: np.ndarray, weight: str) -> None:
    tensor = graph.tensors.get(weight)
    groups = m.groups
    if tensor is not None and groups > 1:  # conv groups that keep a row
        rows = np.ones(tensor.shape[0], bool)
        for ids in tensor.maps:
            if ids.shape[0] > 1:
                rows &= alive[ids].any(tuple(range(1, ids.ndim)))
        groups = int(rows.reshape(m.groups, -1).any(1).sum())
    first, second = m.weight.shape[:2]
    m.groups = groups
    if m.transposed:
        m.in_channels, m.out_channels = first, second * groups
    else:
        m.out_channels, m.in_channels = first, second * groups


@dataclass
class Replay:
    """How far a replay came: ``error`` is None when it came to the end and every channel met its own."""

    done: int
    module: str
    error: Exception | None
    scales: list[tuple[str, np.ndarray, float]]
    resizes: dict[str, dict[int, SizeFix]]


class Replayer:
    """Replays a compacted model; made once a compaction, run once an edit.

    Every computing call must be the one that comb saw, with the shape that the plan leaves of it, and channels may
    only meet themselves.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, alive: np.ndarray, transparent: frozenset[str]) -> None:
        self._model, self._graph, self._transparent = model, graph, transparent
        self._planes = {name: _kept_planes(t.maps, t.shape, alive) for name, t in graph.tensors.items()}
        left = _Left(alive)
        self.resizable: set[str] = set()  # modules in whose calls sizes may be put right
        self._expected = [(s, *left.of(s.shape, s.maps)) for s in graph.steps]

    def run(self) -> Replay:
        """One label-checked forward on meta tensors, in eval mode."""
        clone = clone_to_meta(self._model, hooks=self._graph.needs_hooks).eval()
        ids, _ = tensor_names(clone)
        tracer = _ReplayTracer(LabelCheck(), ids, dict(self._planes), heads=False)
        tracer.on_unknown, tracer.transparent, tracer.expected = "freeze", self._transparent, self._expected
        tracer.scales, tracer.resizes, tracer.resizable = [], {}, self.resizable
        try:
            run_trace(clone, *self._graph.inputs, tracer)
        except Exception as e:
            return Replay(tracer.done, tracer.module, e, [], {})
        if tracer.output_shapes != self._graph.output_shapes or tracer.done != len(self._expected):
            error = CompactError(f"output shapes {tracer.output_shapes}, expected {self._graph.output_shapes}")
            return Replay(tracer.done, "", error, [], {})
        return Replay(tracer.done, "", None, tracer.scales, tracer.resizes)


_Expected = tuple[TraceStep, tuple[int, ...], list[Plane]]  # a computing call, the shape and channels left of it


class _ReplayTracer(Tracer):
    """Compares every computing call with the one that comb saw, and goes on with what is expected of it."""

    replay = True
    expected: list[_Expected]
    scales: list[tuple[str, np.ndarray, float]]
    resizes: dict[str, dict[int, SizeFix]]
    resizable: set[str]
    done = 0

    def resize(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: list[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put in the sizes that the plan leaves, in modules where nothing else helped.

        Raises:
            CompactError: If one call of a module needs different sizes in two of its forwards.
        """
        ahead = self.expected[self.done : self.done + 1]
        if self.module not in self.resizable or not ahead or ahead[0][0].op != name:
            return args, kwargs
        parts = int(ahead[0][0].constants[-1])
        wanted = [shape for _, shape, _ in self.expected[self.done : self.done + parts]]
        fix = fit(name, args, kwargs, sizes, wanted)
        if fix is None:
            return args, kwargs
        if self.resizes.setdefault(self.module, {}).setdefault(self.sized[-1], fix) != fix:
            raise CompactError(f"{name}: called with different sizes in two forwards of the module")
        return with_sizes(name, args, kwargs, sizes, fix)

    def step(self, call: Call, out: Tensor, state: State) -> None:
        """Compare with the original call.

        Raises:
            CompactError: Where the compacted forward leaves the original one.
        """
        if self.done >= len(self.expected):
            raise CompactError(f"the forward takes another path: {call.op} after the end")
        wanted, shape, planes = self.expected[self.done]
        if call.op != wanted.op:
            raise CompactError(f"the forward takes another path: {call.op} where {wanted.op} was")
        if tuple(out.shape) != shape:
            raise CompactError(f"{call.op} gives shape {tuple(out.shape)}, the plan leaves {shape}")
        self._compare_constants(call.op, wanted, constants(call))
        for got in state.planes:
            alike = [p.labels for p in planes if p.dims == got.dims]
            if alike and not any(agree(got.labels, labels) for labels in alike):
                raise CompactError(f"{call.op}: channels meet that do not belong together")
        self.set_state(out, replace(state, planes=tuple(planes)))
        self.done += 1

    def _compare_constants(self, op: str, wanted: TraceStep, found: tuple[float, ...]) -> None:
        """A scale that follows a size (1/sqrt(head_dim)) is made up for by scaling the rows before it.

        Raises:
            CompactError: If there are no such rows.
        """
        if found == wanted.constants:
            return
        if op == "aten.native_group_norm" and wanted.shape[1] == wanted.constants[0]:
            return  # one channel a group: as many groups as channels
        differ = [(a, b) for a, b in zip(wanted.constants, found, strict=False) if a != b]
        if len(found) != len(wanted.constants) or len(differ) != 1 or not wanted.rows or 0 in differ[0]:
            raise CompactError(f"{op}: its constants {wanted.constants} became {found}: they follow a size")
        old, new = differ[0]
        factor = new / old if op.startswith("aten.div") else old / new
        self.scales += [(name, rows, factor) for name, rows in wanted.rows]


class _Left:
    """What a plan leaves of shapes and channel maps; many tensors share a map."""

    def __init__(self, alive: np.ndarray) -> None:
        self._alive = alive
        self._cache: dict[int, np.ndarray] = {}

    def of(self, shape: tuple[int, ...], maps: tuple[np.ndarray, ...]) -> tuple[tuple[int, ...], list[Plane]]:
        """The shape of the compacted tensor and the channels along its dims."""
        new, planes = list(shape), []
        for m in maps:
            if id(m) not in self._cache:
                keep = self._alive[m]
                self._cache[id(m)] = m if keep.all() else m[keep].reshape(box_shape(keep))
            labels = self._cache[id(m)]
            for d, size in enumerate(m.shape):
                if size > 1:
                    new[d] = min(new[d], labels.shape[d])
            varying = [d for d, s in enumerate(labels.shape) if s > 1]
            planes.append(Plane(labels, varying[-1] if varying else 0))
        return tuple(new), planes


def _kept_planes(maps: tuple[np.ndarray, ...], shape: tuple[int, ...], alive: np.ndarray) -> list[Plane]:
    """The planes of a compacted tensor: surviving channel ids, and unknown labels on the other dims."""
    if all(sum(s > 1 for s in m.shape) <= 1 for m in maps):
        index = {}
        for m in maps:
            dim = int(np.argmax(m.shape))
            index[dim] = index.get(dim, True) & alive[m.reshape(-1)]
        new_shape = [int(index[d].sum()) if d in index else s for d, s in enumerate(shape)]
        cut = [m.compress(index[d], d) for m in maps for d in [int(np.argmax(m.shape))]]
    else:
        keep = np.ones(shape, bool)
        for m in maps:
            keep &= alive[m]
        new_shape = box_shape(keep)
        cut = [np.broadcast_to(m, shape)[keep].reshape(new_shape) for m in maps]
        cut = [c[tuple(slice(None) if s > 1 else slice(0, 1) for s in m.shape)] for c, m in zip(cut, maps, strict=True)]
    planes, covered = [], set()
    for labels, m in zip(cut, maps, strict=True):
        varying = [d for d, s in enumerate(m.shape) if s > 1]
        covered.update(varying)
        planes.append(Plane(np.ascontiguousarray(labels), varying[-1] if varying else 0))
    for d, s in enumerate(new_shape):
        if d not in covered and s > 1:
            planes.append(Plane(np.full([s if i == d else 1 for i in range(len(new_shape))], -1), d))
    return planes


def repair(model: nn.Module, graph: ChannelGraph, plan: PrunePlan, replayer: Replayer) -> None:
    """Edit attributes of custom modules until the replay succeeds; then scale rows before scales that moved.

    Raises:
        CompactError: When no edit gets the replay further; names the module, the failing call and what was tried.
    """
    sizes = _Sizes(graph, plan)
    result = replayer.run()
    hopeless: set[type] = set()  # classes whose attributes do not help
    for _ in range(200):
        if result.error is None:
            break
        module = model.get_submodule(result.module) if result.module else model
        better = None if type(module) in hopeless else _improve(model, sizes, replayer, result, result.module)
        if better is None:
            hopeless.add(type(module))
            replayer.resizable |= {name for name, m in model.named_modules() if type(m) is type(module)}
            better = replayer.run()
            if better.error is not None and better.done <= result.done:
                better = _improve_above(model, sizes, replayer, result)
        result = better
    if result.resizes:
        for name, fixes in result.resizes.items():
            resize_calls(model.get_submodule(name) if name else model, fixes)
        replayer.resizable = set()
        result = replayer.run()
    if result.error is not None:
        failure = _failure(result, model.get_submodule(result.module))
        raise failure from result.error
    _scale_rows(model, graph, plan, result.scales)


def _failure(result: Replay, module: nn.Module) -> CompactError:
    return CompactError(
        f"{result.module or 'the model'} ({type(module).__name__}): the compacted forward fails: {result.error}. "
        "Its forward holds a size that cpd_fast could not repair; keep the module whole with comb(..., ignore=[...])",
        result.module,
    )


def _scale_rows(
    model: nn.Module, graph: ChannelGraph, plan: PrunePlan, scales: list[tuple[str, np.ndarray, float]]
) -> None:
    alive = graph.alive(plan)
    for name, rows, factor in scales:
        kept = np.ones(graph.tensors[name].shape[0], bool)
        for m in graph.tensors[name].maps:
            if m.size == m.shape[0]:
                kept &= alive[m.reshape(-1)]
        left = torch.from_numpy((np.cumsum(kept) - 1)[rows[kept[rows]]])
        with torch.no_grad():
            model.get_parameter(name)[left] *= factor


@dataclass(frozen=True)
class _Edit:
    attribute: str
    value: Any
    roles: frozenset[str]  # what the new size is the size of, relative to the module


def _improve_above(model: nn.Module, sizes: _Sizes, replayer: Replayer, before: Replay) -> Replay:
    """Edits at the modules that hold the failing one.

    Raises:
        CompactError: When none of them helps either.
    """
    path = before.module
    while path:
        path = path.rpartition(".")[0]
        better = _improve(model, sizes, replayer, before, path, most=1)
        if better is not None:
            return better
    module = model.get_submodule(before.module) if before.module else model
    failure = _failure(before, module)
    raise failure from before.error


def _improve(
    model: nn.Module, sizes: _Sizes, replayer: Replayer, before: Replay, path: str, most: int = 2
) -> Replay | None:
    """Find the edit (of up to ``most`` attributes) at one module that gets the replay furthest, and keep it."""
    module = model.get_submodule(path) if path else model
    edits = list(sizes.edits(path, module))
    best: tuple[Replay, tuple[_Edit, ...]] | None = None
    for n in range(1, most + 1):
        for chosen in islice(combinations(edits, n), MOST_TRIES):
            if len({e.attribute for e in chosen}) < n:
                continue
            with _Applied(module, chosen):
                after = replayer.run()
            if after.error is None or after.done > (best[0] if best else before).done:
                best = (after, chosen)
            if after.error is None:
                break
        if best is not None:
            break
    if best is None:
        return None
    _Applied(module, best[1]).__enter__()
    if best[0].error is None:
        return best[0]
    return _repeat_on_class(model, module, best[1], sizes, replayer, best[0])


def _repeat_on_class(
    model: nn.Module, module: nn.Module, edits: tuple[_Edit, ...], sizes: _Sizes, replayer: Replayer, reached: Replay
) -> Replay:
    """Other modules of the class likely need the same attributes edited: try all of them at once."""
    learned = {e.attribute: e.roles for e in edits}
    applied = []
    for path, other in model.named_modules():
        if other is module or type(other) is not type(module):
            continue
        own = {e.attribute: e for e in sizes.edits(path, other) if e.roles & learned.get(e.attribute, frozenset())}
        applied.append(_Applied(other, tuple(own.values())))
        applied[-1].__enter__()
    after = replayer.run()
    if after.error is None or after.done >= reached.done:
        return after
    for a in applied:
        a.__exit__()
    return reached


class _Applied:
    """Edits of a module's attributes, taken back on exit."""

    def __init__(self, module: nn.Module, edits: tuple[_Edit, ...]) -> None:
        self._module, self._edits = module, edits
        self._old = {e.attribute: getattr(module, e.attribute) for e in edits}

    def __enter__(self) -> None:
        for e in self._edits:
            setattr(self._module, e.attribute, e.value)

    def __exit__(self, *_: Any) -> None:
        for name, value in self._old.items():
            setattr(self._module, name, value)


class _Sizes:
    """Which old sizes became which new ones, around each module, and what they are sizes of."""

    def __init__(self, graph: ChannelGraph, plan: PrunePlan) -> None:
        self._by_tensor: dict[str, set[tuple[int, int, str]]] = {}
        self._originals: dict[tuple[str, str], Any] = {}
        alive = graph.alive(plan)
        for g in graph.groups:
            kept, blocks = len(plan.get(g.name, range(g.n_channels))), len(g.blocks)
            for s in g.slices:
                pairs = {(g.n_channels // blocks, kept // blocks, "block"), (g.n_channels, kept, "group")}
                self._add(s.param, pairs, str(s.dim))
        left = _Left(alive)
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
        prefix = f"{path}." if path else ""
        found: dict[tuple[int, int], set[str]] = {}
        for name, pairs in self._by_tensor.items():
            if name.startswith(prefix):
                for old, new, role in pairs:
                    found.setdefault((old, new), set()).add(f"{name[len(prefix) :]}|{role}")
        return {pair: frozenset(roles) for pair, roles in sorted(found.items())}

    def edits(self, path: str, module: nn.Module) -> Iterator[_Edit]:
        """Integer attributes (and tuples of them) that hold an old size, with what it became."""
        if isinstance(module, KNOWN):
            return
        pairs = self.around(path)
        for name, value in vars(module).items():
            if name.startswith("_") or isinstance(value, bool):
                continue
            original = self._originals.setdefault((path, name), value)
            if value != original:  # an edit learned from another module may be wrong here
                yield _Edit(name, original, frozenset())
            value = original
            if isinstance(value, int):
                yield from (_Edit(name, new, roles) for (old, new), roles in pairs.items() if old == value)
            elif isinstance(value, (tuple, list, torch.Size)) and value and all(type(v) is int for v in value):
                for (old, new), roles in pairs.items():
                    if old in value:
                        yield _Edit(name, type(value)([new if v == old else v for v in value]), roles)

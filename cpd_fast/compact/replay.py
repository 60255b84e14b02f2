"""The proof of a compaction: a label-checked replay on meta tensors.

The compacted model runs with the surviving channels written on its parameters, under the same rules as comb; every
union becomes the question whether the two channels are one, and every computing call must be the one that comb saw,
with the shape that the plan leaves of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from cpd_fast.adapters import adapt
from cpd_fast.comb.calls import Call
from cpd_fast.comb.forward import run_trace
from cpd_fast.comb.labels import LabelCheck
from cpd_fast.comb.meta import clone_to_meta, tensor_names
from cpd_fast.comb.planes import Plane, State
from cpd_fast.comb.sizes import SizeFix, fit, with_sizes
from cpd_fast.comb.trace import Tracer
from cpd_fast.comb.walk import named_modules
from cpd_fast.compact.shrink import box_shape
from cpd_fast.errors import CompactError
from cpd_fast.types import ChannelGraph, TraceStep


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
        left = Left(alive)
        self._planes = {name: _kept_planes(t.maps, t.shape, alive, left) for name, t in graph.tensors.items()}
        self.resizable: set[str] = set()  # modules in whose calls sizes may be put right
        self._expected = [(s, *left.of(s.shape, s.maps)) for s in graph.steps]
        self.steps = len(self._expected)
        self._alone = _alone(graph, alive)

    def run(self, prepare: Callable[[nn.Module, ReplayTracer], None] | None = None) -> Replay:
        """One label-checked forward on meta tensors, in eval mode; ``prepare`` gets the copy that will run."""
        clone = clone_to_meta(self._model, hooks=self._graph.needs_hooks).eval()
        adapt(clone)
        ids, _ = tensor_names(clone)
        check = LabelCheck(self._graph.heads, self._alone)
        tracer = ReplayTracer(check, ids, dict(self._planes), self._graph.heads)
        tracer.check = check
        tracer.on_unknown, tracer.transparent, tracer.expected = "freeze", self._transparent, self._expected
        tracer.scales, tracer.resizes, tracer.resizable = [], {}, self.resizable
        tracer.journal = None if prepare is None else []
        if prepare is not None:
            prepare(clone, tracer)
        try:
            run_trace(clone, *self._graph.inputs, tracer)
        except Exception as e:
            where = owner(e, {id(m): n for n, m in named_modules(clone)}, tracer.module)
            return Replay(tracer.done, where or tracer.module, e, [], {})
        if tracer.output_shapes != self._graph.output_shapes or tracer.done != len(self._expected):
            error = CompactError(f"output shapes {tracer.output_shapes}, expected {self._graph.output_shapes}")
            return Replay(tracer.done, "", error, [], {})
        return Replay(tracer.done, "", None, tracer.scales, tracer.resizes)


def owner(error: Exception, names: dict[int, str], module: str) -> str | None:
    """The module in a method of which (not its forward) another failed that holds it; ``names`` by id."""
    trace, found = error.__traceback__, None
    while trace is not None:
        name, method = names.get(id(trace.tb_frame.f_locals.get("self"))), trace.tb_frame.f_code.co_name
        if name is not None and not method.endswith("_call_impl"):
            found = None if method == "forward" else name
        trace = trace.tb_next
    inside = found is not None and found != module and found.startswith(f"{module}." if module else "")
    return found if inside else None


_Expected = tuple[TraceStep, tuple[int, ...], list[Plane]]  # a computing call, the shape and channels left of it


@dataclass(frozen=True)
class Mark:
    """A point of a replay that it can go back to."""

    done: int
    position: tuple[list[str], list[int], tuple[str, int], bool]
    states: int
    scales: int
    resizes: dict[str, dict[int, SizeFix]]


class ReplayTracer(Tracer):
    """Compares every computing call with the one that comb saw, and goes on with what is expected of it."""

    replay = True
    check: LabelCheck
    expected: list[_Expected]
    scales: list[tuple[str, np.ndarray, float]]
    resizes: dict[str, dict[int, SizeFix]]
    resizable: set[str]
    journal: list[tuple[int, State | None]] | None  # states that were overwritten, while going back is possible
    done = 0
    wrong: frozenset[tuple[int, int]] = frozenset()  # sizes of the last call, where they are not what they must be

    def set_state(self, t: Tensor, state: State) -> None:
        """Remember the state of a tensor, and what it was."""
        if self.journal is not None:
            self.journal.append((id(t), self.states.get(id(t))))
        super().set_state(t, state)

    def mark(self) -> Mark:
        """Where the trace is now."""
        resizes = {name: dict(fixes) for name, fixes in self.resizes.items()}
        position = (list(self.stack), list(self.sized), self.function, self.is_suspended)
        return Mark(self.done, position, len(self.journal or ()), len(self.scales), resizes)

    def rewind(self, mark: Mark) -> None:
        """Forget what came after ``mark``."""
        self.done, self.wrong = mark.done, frozenset()
        stack, sized, self.function, self.is_suspended = mark.position
        self.stack[:], self.sized, self.attended = stack, list(sized), [0] * len(stack)  # a replay counts no attention
        for key, state in reversed((self.journal or [])[mark.states :]):
            if state is None:
                self.states.pop(key, None)
            else:
                self.states[key] = state
        del (self.journal or [])[mark.states :], self.scales[mark.scales :]
        self.resizes = {name: dict(fixes) for name, fixes in mark.resizes.items()}

    def resize(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: list[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put in the sizes that the plan leaves, in modules where nothing else helped.

        Raises:
            CompactError: If one call of a module needs different sizes in two of its forwards.
        """
        self.wrong = frozenset()
        ahead = self.expected[self.done : self.done + 1]
        if not ahead or ahead[0][0].op != name:
            return args, kwargs
        parts = int(ahead[0][0].constants[-1])
        wanted = [shape for _, shape, _ in self.expected[self.done : self.done + parts]]
        fix = fit(name, args, kwargs, sizes, wanted)
        if isinstance(fix, dict) and ahead[0][0].loose:
            first = 0 if name != "unflatten" else (args[1] if len(args) > 1 else kwargs["dim"]) % args[0].dim()
            fix = {i: e for i, e in fix.items() if i + first not in ahead[0][0].loose}
        if not fix:
            return args, kwargs
        if self.module not in self.resizable:
            new = dict(enumerate(fix)) if isinstance(fix, list) else fix
            self.wrong = frozenset((sizes[i], size) for i, size in new.items() if i < len(sizes))
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
        if not _same_shape(out, shape, wanted.loose):
            self.wrong |= {pair for pair in zip(out.shape, shape, strict=False) if pair[0] != pair[1]}
            raise CompactError(f"{call.op} gives shape {tuple(out.shape)}, the plan leaves {shape}")
        self._compare_constants(call.op, wanted, self.constants(call))
        for got in state.planes:
            if any(got is p for p in planes):
                continue
            alike = [p.labels for p in planes if p.dims == got.dims]
            if alike and not any(self.check.agree(got.labels, labels) for labels in alike):
                raise CompactError(f"{call.op}: channels meet that do not belong together")
        known = State(tuple(planes), state.constant, state.source, state.scaled_by, state.identity)
        self.set_state(out, known)
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


def _alone(graph: ChannelGraph, alive: np.ndarray) -> np.ndarray:
    """Which channels are the only ones left of their blocks, bool like ``alive``."""
    alone = np.zeros_like(alive)
    for g in graph.groups:
        own = slice(g.offset, g.offset + g.n_channels)
        if g.balance is not None and np.count_nonzero(alive[own]) == g.balance.max() + 1:
            alone[own] = True
    return alone


def _same_shape(out: Tensor, shape: tuple[int, ...], loose: frozenset[int]) -> bool:
    """Whether sizes agree, but for dims along which elements repeat."""
    if tuple(out.shape) == shape:
        return True
    pairs = enumerate(zip(out.shape, shape, strict=False))
    return out.dim() == len(shape) and all(a == b for d, (a, b) in pairs if d not in loose)


class Left:
    """What a plan leaves of shapes and channel maps; many tensors share a map."""

    def __init__(self, alive: np.ndarray) -> None:
        self._alive = alive
        self._cache: dict[int, tuple[Plane, tuple[int, ...]]] = {}

    def of(self, shape: tuple[int, ...], maps: tuple[np.ndarray, ...]) -> tuple[tuple[int, ...], list[Plane]]:
        """The shape of the compacted tensor and the channels along its dims."""
        new, planes = list(shape), []
        for m in maps:
            plane, dims = self.along(m)
            size = plane.labels.shape
            for d in dims:
                new[d] = min(new[d], size[d])
            planes.append(plane)
        return tuple(new), planes

    def along(self, m: np.ndarray) -> tuple[Plane, tuple[int, ...]]:
        """What is left of one map, and the dims that the whole map varies over."""
        known = self._cache.get(id(m))
        if known is None:
            keep = self._alive[m]
            dims = tuple(d for d, s in enumerate(m.shape) if s > 1)
            box = [-1 if s > 1 else 1 for s in m.shape] if len(dims) <= 1 else None  # one dim: what is left of it
            labels = m if keep.all() else m[keep].reshape(box or box_shape(keep))
            varying = [d for d, s in enumerate(labels.shape) if s > 1]
            known = self._cache[id(m)] = Plane(labels, varying[-1] if varying else 0), dims
        return known


def _kept_planes(maps: tuple[np.ndarray, ...], shape: tuple[int, ...], alive: np.ndarray, left: Left) -> list[Plane]:
    """The planes of a compacted tensor: surviving channel ids, and unknown labels on the other dims."""
    over = [tuple(d for d, s in enumerate(m.shape) if s > 1) for m in maps]
    if all(len(dims) == 1 for dims in over) and len(set(over)) == len(over):
        planes = [Plane(left.along(m)[0].labels, dim) for m, (dim,) in zip(maps, over, strict=True)]
        return planes + _unknown(list(shape), {d for (d,) in over})
    if all(len(dims) <= 1 for dims in over):
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
    planes = [Plane(np.ascontiguousarray(c), dims[-1] if dims else 0) for c, dims in zip(cut, over, strict=True)]
    return planes + _unknown(new_shape, {d for dims in over for d in dims})


def _unknown(shape: list[int], covered: set[int]) -> list[Plane]:
    """Planes over the dims of which nothing is known."""
    return [
        Plane(np.full([s if i == d else 1 for i in range(len(shape))], -1), d)
        for d, s in enumerate(shape)
        if d not in covered and s > 1
    ]

"""Run a model once on meta tensors and hand every ATen call to its channel rule."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from cpd_fast.comb.calls import (
    RULES,
    SCALING,
    VIEWS,
    AttentionSite,
    Call,
    Rule,
    Site,
    Step,
    Term,
    constants,
    out_of_place_tags,
)
from cpd_fast.comb.labels import LabelStore
from cpd_fast.comb.leaves import leaves
from cpd_fast.comb.planes import Plane, State, collapse, constant_state, freeze_dims, meet, orbit
from cpd_fast.comb.quick import quick_shape
from cpd_fast.comb.training import TrainingWatch
from cpd_fast.comb.values import LARGEST, Values
from cpd_fast.errors import CpdError, TraceError, UnsupportedOpError
from cpd_fast.types import NORMALISING, PRODUCTS


class Tracer(TorchDispatchMode):
    """Follows labels through the ATen calls of one forward.

    ``tensors`` maps the id of a parameter or buffer of the traced module to its name; ``planes`` gives the planes of
    each name (shared by several traces of one model, so that their constraints unite).
    """

    replay = False  # whether labels are those of a compacted model
    watch: TrainingWatch | None = None  # what train mode changes, in a trace in eval mode
    whole_conv_groups = False  # whether a conv group goes whole or stays whole

    def __init__(
        self,
        store: LabelStore,
        tensors: dict[int, str],
        planes: dict[str, list[Plane]],
        heads: bool,
        unmasked: set[str] | None = None,
    ) -> None:
        super().__init__()
        self.store, self.planes, self.heads = store, planes, heads
        store.where = self.where
        self.tensors = tensors
        self.states: dict[int, State] = {}
        self.alive: list[Tensor] = []  # ids are reused once a tensor dies
        self.stack: list[str] = [""]
        self.sized = [0]  # calls with sizes so far, in the forward of each module of the stack
        self.attended = [0]  # attention calls, likewise
        self.terms: list[Term] = []
        self.steps: list[Step] = []
        # parameters that a mask must leave alone, shared like ``planes``
        self.unmasked: set[str] = set() if unmasked is None else unmasked
        self.transparent: frozenset[str] = frozenset()  # modules that a replay looks through
        self.sites: list[Site] = []
        self.attention: list[AttentionSite] = []
        self.on_unknown = "error"
        self.strict: frozenset[str] = frozenset()  # modules whose numbers are known not to follow
        self.hopes: set[str] = set()  # modules whose numbers must
        self.function: tuple[str, int] = ("", 0)  # running function and its number within the module
        self.is_suspended = False
        self.values = Values()
        self.numbers: Counter[tuple[str, str]] = Counter()  # calls of each function so far, by module
        self._places: dict[int, list[np.ndarray]] = {}  # tensors of positions along an axis -> labels of that axis
        self._written: set[int] = set()  # ids of tensors that were written in place with something else than 0
        self.output_shapes: tuple[tuple[int, ...], ...] = ()
        self.order: list[str] = []  # parameters and buffers by first use

    # ---- what rules use

    def state(self, t: Tensor) -> State:
        """What is known of a tensor; a tensor made outside the trace is free."""
        known = self.states.get(id(t))
        if known is not None:
            if self._places:
                for labels in self._places.pop(id(t), ()):
                    self.store.freeze(labels, f"positions along this axis are read ({self.where()})")
            if self._written and any(p.zero for p in known.planes) and self._overwritten(t):
                known = self.states[id(t)] = replace(known, planes=tuple(replace(p, zero=False) for p in known.planes))
            return known
        name = self.tensors.get(id(t))
        if name is not None and not t.is_floating_point() and not t.is_complex():
            name = None  # index tables and flags follow no channel
        if name is None:
            state = State() if t.numel() > 1 else constant_state(t.dim())
        else:
            self.order.append(name)
            planes = self.param_planes(name, tuple(t.shape))
            zero = isinstance(t, nn.Parameter) and name not in self.unmasked
            state = State(tuple(p.where_zero(zero) for p in planes), source=name)
        self.set_state(t, state)
        return state

    def _overwritten(self, t: Tensor) -> bool:
        return id(t if t._base is None else t._base) in self._written

    def not_zero(self, t: Tensor) -> None:
        """Note an in-place write: ``t`` and what shares its memory need not be 0 at removed channels any more."""
        base = t if t._base is None else t._base
        self._written.add(id(base))
        self.alive.append(base)

    def places(self, t: Tensor, axes: list[np.ndarray]) -> None:
        """Note that ``t`` holds positions along axes: where anything reads it, their channels stay."""
        self._places[id(t)] = axes

    def avoid_zero(self, t: Tensor, what: str) -> None:
        """For operators with a pole at 0: a parameter that nothing has read yet is left unmasked, others freeze."""
        name = self.tensors.get(id(t))
        fresh = name not in self.planes
        state = self.state(t)
        if not any(p.zero for p in state.planes):
            return
        if name is not None and fresh and max(t.shape) == t.numel():
            self.unmasked.add(name)
            self.set_state(t, replace(state, planes=tuple(replace(p, zero=False) for p in state.planes)))
        else:
            self.freeze_all(t, f"{what} has a pole where removed channels are 0")

    def param_planes(self, name: str, shape: tuple[int, ...]) -> list[Plane]:
        """The planes of a parameter: fresh labels for every dim the first time it is seen."""
        if name not in self.planes:
            self.planes[name] = [
                Plane(self.store.new(s).reshape([s if i == d else 1 for i in range(len(shape))]), d)
                for d, s in enumerate(shape)
                if s > 1
            ]
        return self.planes[name]

    def set_state(self, t: Tensor, state: State) -> None:
        """Remember the state of a tensor (and keep the tensor alive)."""
        self.states[id(t)] = state
        self.alive.append(t)

    def meet(self, *tensors: Tensor, out: Tensor, zero: str = "") -> State:
        """Elementwise meeting of broadcast tensors; ``zero`` as in :func:`cpd_fast.comb.planes.meet`."""
        shapes = [tuple(t.shape) for t in tensors]
        return meet(self.store, [self.state(t) for t in tensors], shapes, tuple(out.shape), self.heads, zero)

    def freeze_dims(self, t: Tensor, dims: set[int], reason: str) -> State:
        """The state of ``t`` with everything that varies over ``dims`` frozen."""
        state = self.state(t)
        if not any(dims.intersection(p.dims) for p in state.planes):
            return state
        return freeze_dims(self.store, state, dims, f"{reason} ({self.where()})")

    def only_dim(self, t: Tensor, dim: int, reason: str, over: Iterable[int] | None = None) -> State:
        """The state of ``t`` for an op that treats indices of ``dim`` alike and mixes those of ``over``.

        Channels that also vary over the mixed dims (after a pixel shuffle) are united along them; those that vary
        over nothing else are frozen.
        """
        mixed = {d for d in range(t.dim()) if d != dim} if over is None else set(over)
        state = self.state(t)
        if all(p.dims == (dim,) for p in state.planes):
            return state
        planes = []
        for p in state.planes:
            if mixed.intersection(p.dims) and dim in p.dims:
                orbit(self.store, p, tuple(mixed.intersection(p.dims)))
                labels = p.labels
                for d in mixed:
                    labels = labels.take([0], d)
                p = p.moved(labels, dim if p.fast in mixed else p.fast)
            planes.append(p)
        self.set_state(t, replace(state, planes=tuple(planes)))
        return self.freeze_dims(t, mixed, reason)

    def tie_rows(self, t: Tensor, dims: set[int]) -> State:
        """The state of ``t`` for an op that mixes along ``dims``: rows of a grid there lose the same columns."""
        planes = list(self.state(t).planes)
        for i, p in enumerate(planes):
            rows = tuple(dims.intersection(p.rows))
            if rows and p.fast not in dims:
                orbit(self.store, p, rows)
                labels = p.labels
                for d in rows:
                    labels = labels.take([0], d)
                planes[i] = p.moved(labels, p.fast)
        state = replace(self.state(t), planes=tuple(planes))
        self.set_state(t, state)
        return state

    def freeze_all(self, t: Tensor, reason: str) -> State:
        """Freeze every label of ``t``."""
        return self.freeze_dims(t, set(range(t.dim())), reason)

    def add_cost(self, kind: str, coefficient: int, shape: tuple[int, ...], planes: list[np.ndarray]) -> None:
        """Count ``coefficient`` for every surviving position of a (virtual) tensor of this shape."""
        if self.replay:  # costs were counted by comb
            return
        covered = {d for p in planes for d, s in enumerate(p.shape) if s > 1}
        for d, s in enumerate(shape):
            if d not in covered:
                coefficient *= s
        unlike = tuple(planes if len(planes) < 2 else {p.tobytes(): p for p in planes}.values())
        self.terms.append(Term(kind, self.module, coefficient, unlike))

    def add_site(self, x: Tensor, planes: list[Plane]) -> None:
        """Note that the running call's result depends on how many of these channels of its input ``x`` there are.

        A masked forward recognises the call by module, function and number; where it could not (the call is part of
        another function), or statistics run over several planes, the channels are frozen.
        """
        name, call = self.function
        if not planes:
            return
        if name not in NORMALISING or len(planes) > 1:
            for p in planes:
                self.store.freeze(p.labels, f"{name or 'a reduction'} over this axis ({self.where()})")
            return
        self.sites.append(Site(self.module, name, call, planes[0].labels))

    def add_product_site(self, labels: list[np.ndarray], shape: tuple[int, ...] | None, reason: str) -> None:
        """Note that a masked forward must clear removed channels in the first argument of the running function.

        ``shape`` is that of the argument; None where it is none. What cannot be cleared there is frozen.
        """
        name, call = self.function
        possible = shape is not None and name in PRODUCTS and len(labels) == 1
        if possible and all(s == 1 for s in labels[0].shape[: labels[0].ndim - len(shape or ())]):
            self.sites.append(Site(self.module, name, call, labels[0].reshape(labels[0].shape[-len(shape or ()) :])))
        else:
            for found in labels:
                self.store.freeze(found, f"{reason} ({self.where()})")

    def reduce_planes(self, planes: tuple[Plane, ...], dims: set[int]) -> list[Plane]:
        """What is left of planes, in the same rank, once ``dims`` are summed over."""
        kept = []
        for p in planes:
            if not dims.intersection(p.dims):
                kept.append(p)
            elif len(p.dims) > 1 and p.fast in dims and not dims.intersection(p.rows):
                if self.heads:
                    kept.append(p.moved(collapse(self.store, p), p.rows[-1]))
                else:  # rows of the grid stay: labels that never go, so that they are not taken for a free dim
                    shape = [1 if d == p.fast else s for d, s in enumerate(p.labels.shape)]
                    labels = self.store.pinned(prod(shape)).reshape(shape)
                    kept.append(Plane(labels, p.rows[-1], p.zero, stays=True))
            elif not dims.issuperset(p.dims):
                self.store.freeze(p.labels, f"summed over the rows of a grid ({self.where()})")
        return kept

    def hope(self) -> bool:
        """Whether a rule may rely on numbers of the forward following the channels; a rehearsal finds out."""
        if self.module in self.strict:
            return False
        self.hopes.add(self.module)
        return True

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, calls run without their rules: a rule of the whole function follows."""
        before, self.is_suspended = self.is_suspended, True
        try:
            yield
        finally:
            self.is_suspended = before

    @contextmanager
    def forgotten(self, name: str) -> Iterator[None]:
        """Inside, the forward of a module runs once more; afterwards only what was recorded of labels is left."""
        before = self.stack, self.sized, self.attended, self.function, self.numbers
        lists = [(kept, len(kept)) for kept in (self.terms, self.steps, self.sites, self.attention, self.order)]
        self.stack, self.sized, self.attended = [*self.stack, name], [*self.sized, 0], [*self.attended, 0]
        self.numbers = Counter(self.numbers)
        try:
            yield
        finally:
            self.stack, self.sized, self.attended, self.function, self.numbers = before
            for kept, n in lists:
                del kept[n:]

    @property
    def module(self) -> str:
        """Qualified name of the module whose forward runs."""
        return self.stack[-1]

    def where(self) -> str:
        """Module and source line of the running call."""
        frame = sys._getframe()
        while frame is not None:
            name = frame.f_code.co_filename.replace("\\", "/")
            if not any(part in name for part in ("/torch/", "cpd_fast/comb", "cpd_fast/compact", "<frozen")):
                short = "/".join(name.split("/")[-2:])
                return f"in {self.module or 'the model'}, {short}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return f"in {self.module or 'the model'}"

    # ---- the mode itself

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _all_meta(args) or not _all_meta(kwargs.values()):
            args, kwargs = tree_map_only(Tensor, self._on_meta, (args, kwargs))
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if func is torch.ops.aten._local_scalar_dense.default and (value := self.values.of(args[0])) is not None:
            return value.item()
        try:
            out = quick_shape(func, args, kwargs)
            out = func(*args, **kwargs) if out is None else out
        except CpdError:
            raise
        except (RuntimeError, NotImplementedError) as e:
            if "meta" in str(e) and ("item" in str(e) or "local_scalar_dense" in str(e)):
                raise TraceError(
                    f"data-dependent control flow {self.where()}: the forward reads the value of a tensor ({func}); "
                    "comb needs a forward whose path does not depend on data. Move the test out of forward, or pass "
                    "ignore= / example inputs that avoid it"
                ) from e
            raise
        if self.is_suspended:
            return out
        op = f"{func.namespace}.{func._schema.name.split('::')[1]}"
        self.values.follow(op, func, args, kwargs, out)
        self._apply(op, func, Call(op, tuple(args), kwargs, out))
        return out

    def _on_meta(self, t: Tensor) -> Tensor:
        if t.device.type == "meta":
            return t
        for held in self.alive:
            if getattr(held, "_cpd_original", None) is t:
                return held
        copy_ = torch.empty_like(t, device="meta")
        copy_._cpd_original = t  # type: ignore[attr-defined]
        if t.device.type == "cpu" and not t.requires_grad and t.numel() <= LARGEST:
            with _disable_current_modes():
                self.values.set(copy_, t.clone())
        self.set_state(copy_, self.states.get(id(t), State() if t.numel() > 1 else constant_state(t.dim())))
        return copy_

    def apply(self, call: Call, outs: list[Tensor]) -> None:
        """Let the rule of a common elementwise or computing call follow the channels."""
        rule = RULES.get(call.op) or RULES.get(call.op.rstrip("_")) or RULES["pointwise"]
        result = rule(self, call)
        self.finish(call, outs, result if isinstance(result, list) else [result] * len(outs))

    def _apply(self, op: str, func: Any, call: Call) -> None:
        outs = [o for o in leaves(call.out) if isinstance(o, Tensor)]
        if not outs:
            return
        rule = RULES.get(op) or RULES.get(op.rstrip("_"))
        if rule is None and (torch.Tag.pointwise in func.tags or torch.Tag.pointwise in out_of_place_tags(func)):
            rule = RULES["pointwise"]
        if rule is None:
            rule = self._unknown(op)
        result = rule(self, call)
        states = result if isinstance(result, list) else [result] * len(outs)
        written = op == "aten.copy_" and call.args[0]._is_view()
        self.finish(call, outs, states, computes=written or (not func.is_view and op not in VIEWS))

    def finish(self, call: Call, outs: list[Tensor], states: list[State], computes: bool = True) -> None:
        """Take over what a rule said of a call's outputs."""
        for o, s in zip(outs, states, strict=True):
            self.set_state(o, s)
        if self.watch is not None and call.op.endswith("_") and call.args and isinstance(call.args[0], Tensor):
            self.watch.written(call.args[0])
        if not computes:
            return
        out, state = outs[0], states[0]  # further outputs are statistics for the backward
        labels = [p.labels for p in state.planes]
        if not call.op.endswith("_"):
            self.add_cost("activation_bytes", out.element_size(), tuple(out.shape), labels)
        self.step(call, out, state)

    def resize(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: list[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with sizes; a replay may put right ones in."""
        return args, kwargs

    def step(self, call: Call, out: Tensor, state: State) -> None:
        """Remember a computing call; a replay compares it with the original instead."""
        scaled = None
        if call.op.rstrip("_") in SCALING and call.args and isinstance(call.args[0], Tensor):
            scaled = self.state(call.args[0])
        labels = tuple(p.labels for p in state.planes)
        loose = state.constant.union(*(p.dims for p in state.planes if p.stays))
        self.steps.append(Step(call.op, self.module, tuple(out.shape), labels, self.constants(call), scaled, loose))

    def constants(self, call: Call) -> tuple[float, ...]:
        """The numbers of a call that must stay, those in tensors among them."""
        return constants(call) + self.values.numbers(call)

    def _unknown(self, op: str) -> Rule:
        if self.on_unknown == "error":
            raise UnsupportedOpError(
                f"no channel rule for operator {op} ({self.where()}). Register one with "
                f"cpd_fast.comb.register_rule({op!r}) (docs/rules.md), or pass on_unknown='freeze' to keep every "
                "channel that reaches it"
            )
        return RULES["unknown"]


def _all_meta(values: Iterable[Any]) -> bool:
    """Whether no tensor among these arguments lies on a real device."""
    for v in values:
        if isinstance(v, Tensor):
            if v.device.type != "meta":
                return False
        elif isinstance(v, (list, tuple)) and not _all_meta(v):
            return False
    return True

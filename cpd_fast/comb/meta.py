"""Models and inputs without weights: what a trace runs on."""

from __future__ import annotations

import copy
import copyreg
import functools
import gc
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cpd_fast.comb.walk import modules_of, named_tensors
from cpd_fast.errors import TraceError


@contextmanager
def collection_paused() -> Iterator[None]:
    """Garbage is collected afterwards.

    A trace makes a hundred thousand objects that live as long as it does: full collections in between, which visit
    everything that PyTorch and the model hold, can double its time and find nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOKED = "_output_capturing_hooks_installed"  # transformers: a model that its first forward put hooks on has this


def has_hooks(model: nn.Module) -> bool:
    """Whether any module has hooks."""
    return any(getattr(m, h) for m in modules_of(model) for h in HOOKS)


def clone_to_meta(model: nn.Module, memo: dict[int, Any] | None = None, hooks: bool = False) -> nn.Module:
    """A copy without weights and without hooks; the model itself is not touched, sharing of tensors is kept.

    ``memo`` may hold replacements of tensors by id; ``hooks`` keeps hooks, for forwards that rely on their own.
    """
    memo = {} if memo is None else memo
    modules = modules_of(model)
    for m in modules:
        for p in m._parameters.values():
            if p is not None and id(p) not in memo:
                memo[id(p)] = nn.Parameter(_without_values(p), requires_grad=p.is_floating_point())
        for name, t in [*m._buffers.items(), *vars(m).items()]:
            if type(t) not in _ATOMIC and isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = _without_values(t)
                if t.numel() <= LARGEST_SWITCH and name in m._buffers and name not in STATISTICS:
                    memo[id(t)]._cpd_value = t.detach().cpu() if t.device.type != "meta" else switch(t)
    kept = [] if hooks else [(m, h, getattr(m, h)) for m in modules for h in HOOKS if getattr(m, h)]
    try:
        for m, h, _ in kept:
            setattr(m, h, type(getattr(m, h))())
        clone = copy_modules(model, memo)
    finally:
        for m, h, value in kept:
            setattr(m, h, value)
    for m in modules_of(clone) if kept else ():
        vars(m).pop(HOOKED, None)  # its forward puts them on again
    return clone


LARGEST_SWITCH = 64  # elements
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def switch(t: Tensor) -> Tensor | None:
    """The value of a small buffer (a switch, a schedule) whose copy without weights is ``t``."""
    return getattr(t, "_cpd_value", None)


def _without_values(t: Tensor) -> Tensor:
    if t.is_contiguous():
        return torch.empty(t.shape, dtype=t.dtype, device="meta")
    return torch.empty_like(t, device="meta", requires_grad=False)


def copy_modules(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What ``copy.deepcopy(model, memo)`` returns, sooner.

    Modules that copy themselves in no way of their own are copied attribute by attribute, and only attributes that
    need it are left to ``deepcopy``.
    """
    modules = modules_of(model)
    plain = {kind for kind in {type(m) for m in modules} if _copies_plainly(kind)}
    pairs = [(m, type(m).__new__(type(m))) for m in modules if type(m) in plain and id(m) not in memo]
    memo.update((id(m), new) for m, new in pairs)
    for m, new in pairs:
        own = new.__dict__
        own.update(vars(m))
        for name, value in vars(m).items():
            kind = type(value)
            if kind in _ATOMIC:
                continue
            if kind is OrderedDict and not value and id(value) not in memo:  # hooks
                own[name] = memo[id(value)] = OrderedDict()
            else:
                own[name] = _copied(value, memo)
    return copy.deepcopy(model, memo)


_COPIED_BY = ("__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__", "__deepcopy__")


def _copies_plainly(kind: type[nn.Module]) -> bool:
    """Whether copying a module of this class means copying its ``__dict__``."""
    plain = all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _COPIED_BY)
    # PyTorch's layers only add there what an older version did not save
    plain &= kind.__setstate__.__module__.startswith("torch.nn.modules.")
    return plain and kind not in copyreg.dispatch_table and not any(vars(c).get("__slots__") for c in kind.__mro__)


# what ``deepcopy`` hands on as it is
_ATOMIC = {int, float, bool, str, bytes, type(None), type, types.FunctionType, types.BuiltinFunctionType, torch.dtype}
_MAPPINGS = (dict, OrderedDict)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(value, memo)``; most of what a module holds is a number or a (mostly empty) dict."""
    known = memo.get(id(value))
    if known is not None:
        return known
    kind = type(value)
    if kind is tuple and _ATOMIC.issuperset(map(type, value)):
        return value
    if kind in _MAPPINGS:
        new = memo[id(value)] = kind()
        for key, v in value.items():
            new[key if type(key) in _ATOMIC else copy.deepcopy(key, memo)] = (
                v if type(v) in _ATOMIC else _copied(v, memo)
            )
        return new
    if kind is set and not value:
        return memo.setdefault(id(value), set())
    return copy.deepcopy(value, memo)


_EMPTY = types.CellType()
# values that are no cache and hold none: nearly all of a namespace
_INERT = {*_ATOMIC, *_MAPPINGS, set, tuple, list, types.ModuleType, Tensor, nn.Parameter} - {types.FunctionType}


def clear_caches(model: nn.Module) -> None:
    """Empty the ``lru_cache`` of functions in reach of a model: a trace may neither read nor leave tensors there.

    In reach is what its modules and their classes hold, what the files of the classes name, and what the files of the
    functions named there do, within the same packages.
    """
    modules = modules_of(model)
    classes = {
        kind for own in {type(m) for m in modules} for kind in own.__mro__ if not kind.__module__.startswith("torch.")
    }
    files = {kind.__module__ for kind in classes}
    packages = {name.partition(".")[0] for name in files}
    spaces = [vars(m) for m in modules] + [vars(kind) for kind in classes]
    spaces += [vars(sys.modules[name]) for name in files if name in sys.modules]
    for space in spaces:  # grows
        for value in list(space.values()):
            kind = type(value)
            if kind in _INERT:
                continue
            if kind in (staticmethod, classmethod):
                value = value.__func__
            if type(value) is types.FunctionType:
                file = value.__module__
                if file not in files and str(file).partition(".")[0] in packages and file in sys.modules:
                    files.add(file)
                    spaces.append(vars(sys.modules[file]))
                if value.__closure__ is None:
                    continue
            held = [c.cell_contents for c in getattr(value, "__closure__", None) or () if c != _EMPTY]  # decorators
            for found in (value, *held):
                if isinstance(found, functools._lru_cache_wrapper):
                    found.cache_clear()


def tensor_names(model: nn.Module) -> tuple[dict[int, str], dict[str, str]]:
    """id -> first name of every parameter and buffer, and every name -> first name of the same tensor."""
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, t in named_tensors(model, repeated=True):
        aliases[name] = names.setdefault(id(t), name)
    return names, aliases


def example_args(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, tuple or list, or dict of keyword arguments -> args and kwargs on the meta device.

    Raises:
        TraceError: If it is none of these.
    """
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, (tuple, list, dict)):
        raise TraceError(
            f"example_inputs: expected a tensor, a tuple of arguments or a dict of keyword arguments, "
            f"got {type(example_inputs).__name__}"
        )
    moved = tree_map_only(Tensor, lambda t: t.detach().to("meta"), example_inputs)
    return ((), dict(moved)) if isinstance(moved, dict) else (tuple(moved), {})

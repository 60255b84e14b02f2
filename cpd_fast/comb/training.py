"""What train mode changes in a forward, found out during a trace in eval mode.

A second trace in train mode would mostly repeat the first. So the trace notes which modules read ``training`` while
their forwards run, and runs those alone once more in train mode, on the same inputs: what their rules record there
counts, and where the outcome is the same, so is everything after it. Where it is not, or cannot be told, the model is
traced in train mode as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cpd_fast.comb.leaves import leaves
from cpd_fast.comb.planes import State
from cpd_fast.comb.walk import modules_of

if TYPE_CHECKING:
    from cpd_fast.comb.trace import Tracer

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size)


class TrainingWatch:
    """Follows one trace in eval mode; ``matters`` says in the end whether a trace in train mode is needed too."""

    def __init__(self, model: nn.Module) -> None:
        """``model`` is in eval mode."""
        modules = modules_of(model)
        own_ways = any(
            type(m).train is not nn.Module.train
            or type(m).eval is not nn.Module.eval
            or isinstance(m, torch.jit.ScriptModule)
            or any("training" in vars(c) for c in type(m).__mro__ if c is not nn.Module)
            for m in modules
        )
        self.matters = own_ways
        self._training: dict[int, bool] = {}
        if not own_ways:
            model.train()
            self._training = {id(m): m.training for m in modules}
            model.eval()
        self._reads: list[bool] = [False]  # whether the forward of each running module has read ``training``
        self._again = False  # in train mode
        self._same_tensor: set[int] = set()  # outputs that are inputs in eval mode only
        self._entries: list[tuple[list[Tensor], list[State | None], tuple[int, ...]]] = []

    def read(self) -> None:
        """A module's ``training`` was read."""
        if not self._again:
            self._reads[-1] = True

    def written(self, t: Tensor) -> None:
        """A tensor is written in place: in train mode the input of a dropout may be left as it is."""
        if id(t) in self._same_tensor or id(t._base) in self._same_tensor:
            self.matters = True

    def enter(self, tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module's forward begins."""
        self._reads.append(False)
        given = [a for a in leaves([args, kwargs] if kwargs else args) if isinstance(a, Tensor)]
        sizes = len(tracer.sites), len(tracer.order)
        self._entries.append((given, [tracer.states.get(id(t)) for t in given], sizes))

    def leave(self, tracer: Tracer, name: str, m: nn.Module, call: tuple[Any, Any], out: Any) -> None:
        """A module's forward ends, in eval mode: does it do the same in train mode?"""
        given, states, (sites, _) = self._entries.pop()
        if not self._reads.pop() or self.matters or self._again or self._is_known(tracer, m, given):
            return
        if not name or any(tracer.states.get(id(t)) is not s for t, s in zip(given, states, strict=True) if s):
            self.matters = True  # the whole model, or its input is not what it was
            return
        self._again = True
        try:
            self.matters = not self._alike_in_training(tracer, name, m, call, out, tracer.sites[sites:])
        finally:
            self._again = False
        after = [tracer.states.get(id(t)) for t in given]
        self.matters |= any(a is not s for a, s in zip(after, states, strict=True) if s)
        self._same_tensor |= {id(t) for t in given}.intersection(map(id, leaves(out)))

    def _is_known(self, tracer: Tracer, m: nn.Module, given: list[Tensor]) -> bool:
        """PyTorch's own layers that treat channels alike in both modes."""
        if type(m) in _BATCH_NORMS:  # statistics over the batch, not over what carries channels
            return all(p.dims == (1,) for p in tracer.state(given[0]).planes)
        if type(m) in _DROPOUTS and not getattr(m, "inplace", False):
            self._same_tensor.add(id(given[0]))
            return True
        return False

    def _alike_in_training(
        self, tracer: Tracer, name: str, m: nn.Module, call: tuple[Any, Any], out: Any, sites: list[Any]
    ) -> bool:
        """Run one module again in train mode and forget all but what its rules recorded of labels."""
        inside = modules_of(m)
        before = [({**vars(x), "training": False}, dict(x._buffers)) for x in inside]
        was = len(tracer.sites), len(tracer.order)
        with tracer.forgotten(name):
            try:
                for x in inside:
                    x.training = self._training.get(id(x), False)
                found = m.forward(*call[0], **call[1])
            except Exception:
                return False
            finally:
                for x in inside:
                    x.training = False
            fresh = tracer.sites[was[0] :]
            alike = len(tracer.order) == was[1] and len(fresh) == len(sites)
            alike &= all(a.op == b.op and _equal(a.labels, b.labels) for a, b in zip(fresh, sites, strict=False))
            alike &= all(_kept(x, *held) for x, held in zip(inside, before, strict=True))
            return alike and _alike(tracer, found, out)


def _kept(m: nn.Module, own: dict[str, Any], buffers: dict[str, Any]) -> bool:
    """Whether a module holds what it held."""
    return all(
        now.keys() == then.keys()
        and all(now[k] is v or (isinstance(v, _PLAIN) and bool(now[k] == v)) for k, v in then.items())
        for now, then in ((vars(m), own), (m._buffers, buffers))
    )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or np.array_equal(a, b)


def _alike(tracer: Tracer, a: Any, b: Any) -> bool:
    """Whether two results carry the same channels."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and _same(tracer.state(a), tracer.state(b)))
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_alike(tracer, x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(tracer, a[k], b[k]) for k in a)
    return a is b or (isinstance(a, _PLAIN) and bool(a == b))


def _same(a: State, b: State) -> bool:
    """What rules look at; what only a compaction in eval mode uses may differ."""
    if len(a.planes) != len(b.planes) or a.constant != b.constant or a.source != b.source:
        return False
    return all(
        (p.fast, p.zero, p.stays) == (q.fast, q.zero, q.stays) and _equal(p.labels, q.labels)
        for p, q in zip(a.planes, b.planes, strict=True)
    )


# ---- noticing that ``training`` is read

_LOCK = threading.Lock()
_WATCHERS: dict[int, TrainingWatch] = {}  # by thread


def _get(module: nn.Module) -> bool:
    watch = _WATCHERS.get(threading.get_ident())
    if watch is not None:
        watch.read()
    try:
        return vars(module)["training"]
    except KeyError:
        raise AttributeError("training") from None


def _set(module: nn.Module, value: bool) -> None:
    vars(module)["training"] = value


@contextmanager
def reads_noticed(watch: TrainingWatch | None) -> Iterator[None]:
    """Inside, ``watch`` hears of every read of ``training`` by this thread."""
    if watch is None:
        yield
        return
    with _LOCK:
        _WATCHERS[threading.get_ident()] = watch
        nn.Module.training = property(_get, _set)  # type: ignore[assignment]
    try:
        yield
    finally:
        with _LOCK:
            del _WATCHERS[threading.get_ident()]
            if not _WATCHERS:
                del nn.Module.training

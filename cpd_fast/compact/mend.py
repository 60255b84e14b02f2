"""Mend attributes while the replay runs: a module that fails is tried again at once with other attributes.

Whole replays an edit would cost modules x tries x calls. Here the forward of every custom module of the replayed copy
is guarded: where it fails, the trace goes back to the module's entry, attributes that hold an old size are changed, and
the module alone runs again, until it comes through. An edit that helped is given to all modules of the class that have
not run yet. The module then hands its output on, so that one replay usually mends the whole network. What was found is
proven by a replay of its own; a module that cannot be mended here is left to :func:`cpd_fast.compact.repair.repair`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import combinations, islice
from typing import Any

from torch import nn

from cpd_fast.comb.walk import named_modules
from cpd_fast.compact.replay import Replay, Replayer, ReplayTracer, owner
from cpd_fast.compact.sizes import KNOWN, Applied, Edit, Sizes, holds_sizes

MOST_TRIES = 16  # a failing module: enough for every network of the zoo that can be mended at all
MOST_REPLAYS = 1  # whole replays that all tries together may cost
MOST_EDITS = 8  # accepted edits a call of a module
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def mend(model: nn.Module, sizes: Sizes, replayer: Replayer) -> tuple[Replay, bool]:
    """One replay that edits attributes of ``model`` where its modules fail.

    Returns:
        How far it came, and whether something was edited or resized (then only a further replay is a proof).
    """
    mender = _Mender(model, sizes, replayer)
    result = replayer.run(mender.guard)
    return result, mender.changed


class _Mender:
    def __init__(self, model: nn.Module, sizes: Sizes, replayer: Replayer) -> None:
        self._real = dict(named_modules(model))
        self._sizes, self._replayer = sizes, replayer
        self._passed: set[str] = set()
        self._budget = MOST_REPLAYS * replayer.steps  # calls that tries may still run
        self._trying = False
        self.changed = False

    def guard(self, clone: nn.Module, tracer: ReplayTracer) -> None:
        """Wrap the forwards of custom modules of the copy that is replayed."""
        self._copies = dict(named_modules(clone))
        self._fresh = {name: _contents(module) for name, module in self._copies.items()}
        self._buffers = {name: dict(module._buffers) for name, module in self._copies.items()}
        for name, module in self._copies.items():
            if type(module) not in _CONTAINERS and not isinstance(module, (*KNOWN, nn.Identity)):
                module.forward = self._guarded(name, module, module.forward, tracer)

    def _guarded(
        self, name: str, module: nn.Module, forward: Callable[..., Any], tracer: ReplayTracer
    ) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            mark = tracer.mark()
            try:
                out = forward(*args, **kwargs)
            except Exception as error:
                if self._trying:
                    raise

                def again() -> Any:
                    tracer.rewind(mark)
                    self._forget(name)
                    try:
                        return forward(*args, **kwargs)
                    finally:
                        self._budget -= tracer.done - mark.done

                out = self._mend(name, module, again, tracer, error)
            self._passed.add(name)
            return out

        return run

    def _forget(self, path: str) -> None:
        """Give a module and what it holds back what a forward may have cached in them."""
        prefix = f"{path}." if path else ""
        for name, fresh in self._fresh.items():
            if name == path or name.startswith(prefix):
                own = self._copies[name].__dict__
                own["_buffers"].clear()
                own["_buffers"].update(self._buffers[name])
                for key in [k for k in own if k not in fresh and k not in _OWN and not holds_sizes(own[k])]:
                    del own[key]
                for key, value in fresh.items():
                    own[key] = copy.copy(value) if isinstance(value, (dict, list, set)) else value

    def _mend(
        self, name: str, module: nn.Module, again: Callable[[], Any], tracer: ReplayTracer, error: Exception
    ) -> Any:
        """Run a module again with other attributes until it comes through; raises ``error`` where none helps."""
        for _ in range(MOST_EDITS):
            found, holder = self._try(name, module, again, tracer), name
            if found is None or not found[1]:
                other = owner(error, {id(m): n for n, m in self._copies.items()}, name)
                better = None if other is None else self._try(other, self._copies[other], again, tracer, near=name)
                if other is not None and better is not None:
                    found, holder = better, other
            if found is None:
                break
            chosen, ok, out = found
            self._keep(holder, self._copies[holder], chosen)
            if ok:
                return out
            try:
                return again()
            except Exception as e:
                error = e
        if tracer.module == name and name not in self._replayer.resizable:
            return self._resize(name, module, again, tracer, error)
        raise error

    def _resize(
        self, name: str, module: nn.Module, again: Callable[[], Any], tracer: ReplayTracer, error: Exception
    ) -> Any:
        """Put right sizes into the calls of this class: its attributes alone do not help.

        Then also with the attributes as they were: an edited one may be what moved a scale (1/sqrt(head size)).
        """
        before = set(self._replayer.resizable)
        alike = [n for n, m in self._copies.items() if type(m) is type(module)]
        edited = {n: self._sizes.edited(n, self._copies[n]) for n in alike if n == name or n not in self._passed}
        self._replayer.resizable.update(alike)
        reached = tracer.done
        for undo in (False, True) if edited[name] else (False,):
            if undo:
                for n, pairs in edited.items():
                    self._set(n, tuple(original for _, original in pairs))
            try:
                out = again()
            except Exception as e:
                last = e
                if tracer.done > reached:
                    break
            else:
                self.changed = True
                return out
        if tracer.done > reached:
            self.changed = True
            raise last
        for n, pairs in edited.items():
            self._set(n, tuple(edit for edit, _ in pairs))
        self._replayer.resizable.clear()
        self._replayer.resizable.update(before)
        raise error from last

    def _try(
        self, name: str, module: nn.Module, again: Callable[[], Any], tracer: ReplayTracer, near: str | None = None
    ) -> tuple[tuple[Edit, ...], bool, Any] | None:
        """The first edit with which the module comes through, else the one that gets it furthest."""
        inside = tracer.module == (name if near is None else near)
        reached, best = tracer.done, None
        wrong = set(tracer.wrong)
        edits = list(self._sizes.edits(name, module, near))
        self._trying = True
        try:
            for chosen in _candidates(module, edits, wrong, most=2 if inside else 1):
                if self._budget < 0:
                    break
                with Applied(module, chosen):
                    try:
                        return chosen, True, again()
                    except Exception:
                        if tracer.done > (best[1] if best else reached):
                            best = (chosen, tracer.done)
        finally:
            self._trying = False
        return None if best is None else (best[0], False, None)

    def _keep(self, name: str, module: nn.Module, edits: tuple[Edit, ...]) -> None:
        """Make edits last, and make them on the modules of the class that are still to come."""
        self.changed = True
        self._set(name, edits)
        learned = {e.attribute: e.roles for e in edits}
        for path, other in self._copies.items():
            if other is not module and type(other) is type(module) and path not in self._passed:
                own = {
                    e.attribute: e
                    for e in self._sizes.edits(path, other)
                    if e.roles & learned.get(e.attribute, frozenset())
                }
                self._set(path, tuple(own.values()))

    def _set(self, path: str, edits: tuple[Edit, ...]) -> None:
        for module in (self._copies[path], self._real[path]):
            for e in edits:
                setattr(module, e.attribute, e.value)


_OWN = {*vars(nn.Module()), "forward"}


def _contents(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module beside parameters, buffers, children and sizes, containers copied."""
    own = {k: v for k, v in vars(module).items() if k not in _OWN and not holds_sizes(v)}
    return {k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in own.items()}


def _pairs(old: Any, new: Any) -> list[tuple[int, int]]:
    """Which sizes an edit changes into which: those of a list one by one."""
    return list(zip(old, new, strict=False)) if isinstance(old, (tuple, list)) else [(old, new)]


def _candidates(
    module: nn.Module, edits: list[Edit], wrong: set[tuple[int, int]], most: int
) -> Iterator[tuple[Edit, ...]]:
    """Combinations of edits, those first that turn a size that the failing call was given into the one it needs."""
    likely = [e for e in edits if wrong.intersection(_pairs(getattr(module, e.attribute), e.value))]
    ordered = [*likely, *(e for e in edits if e not in likely)]
    for n in range(1, most + 1):
        for chosen in islice(combinations(ordered, n), MOST_TRIES):
            if len({e.attribute for e in chosen}) == n:
                yield chosen

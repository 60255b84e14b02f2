"""Masked weights stand still, whatever an optimizer would do to them (momentum, weight decay)."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cpd_fast.prune.picks import Kept, Pick, complement


class Hold:
    """Gives masked weights their values back after every step of any ``torch.optim`` optimizer.

    What an optimizer has gathered for weights that are masked (momentum, moments) is dropped when a later plan keeps
    them, so that they start anew from the values they had.
    """

    def __init__(self) -> None:
        self._masked: dict[int, tuple[Tensor, Kept]] = {}  # by id of the parameter, which is kept alive
        self._made: dict[int, list[Pick]] = {}  # what is masked, made when an optimizer first steps
        self._values: dict[int, list[Tensor]] = {}
        self._stale: dict[int, list[Pick]] = {}  # masked by an earlier plan: state that is to be dropped
        self._stepping: set[int] = set()  # parameters of an optimizer that is in its step
        self._key = next(_keys)
        _holds[self._key] = self
        _watch_optimizers()

    def update(self, masked: Mapping[str, tuple[Tensor, Kept]]) -> None:
        """Masks have moved: parameter and what is kept of it, by name."""
        for key in self._values:
            self._stale.setdefault(key, []).extend(self._made[key])
        self._values, self._made = {}, {}
        self._masked = {id(p): (p, kept) for p, kept in masked.values()}
        if self._stepping:  # masks moved in the closure that the step calls: it has yet to move weights
            for key in self._stepping & self._masked.keys():
                self._keep(self._masked[key][0])

    def remove(self) -> None:
        """Let optimizers do what they like."""
        _holds.pop(self._key, None)

    def _parts(self, p: Tensor) -> list[Pick]:
        if id(p) not in self._made:
            self._made[id(p)] = complement(tuple(p.shape), self._masked[id(p)][1])
        return self._made[id(p)]

    def _mine(self, optimizer: Optimizer) -> list[Tensor]:
        known = self._masked.keys() | self._stale.keys()
        return [p for group in optimizer.param_groups for p in group["params"] if id(p) in known]

    @torch.no_grad()
    def _before(self, optimizer: Optimizer) -> None:
        for p in self._mine(optimizer):
            for part in self._stale.pop(id(p), ()):
                for value in optimizer.state.get(p, {}).values():
                    if isinstance(value, Tensor) and value.shape == p.shape:
                        part.write(value, 0.0)
            if id(p) in self._masked:  # anew in every step: weights may have been loaded in between
                self._keep(p)
        self._stepping.update(id(p) for group in optimizer.param_groups for p in group["params"])

    @torch.no_grad()
    def _keep(self, p: Tensor) -> None:
        self._values[id(p)] = [part.take(p).detach() for part in self._parts(p)]

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        self._stepping.difference_update(id(p) for group in optimizer.param_groups for p in group["params"])
        for p in self._mine(optimizer):
            if id(p) in self._values:
                for part, value in zip(self._parts(p), self._values[id(p)], strict=True):
                    part.write(p, value)


# The hooks stay once they are there: to take one off when a Hold is collected, at any time, would change the
# dictionary that a step may be walking through.
_keys = itertools.count()
_holds: weakref.WeakValueDictionary[int, Hold] = weakref.WeakValueDictionary()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(lambda optimizer, *_: _call("_before", optimizer))
    register_optimizer_step_post_hook(lambda optimizer, *_: _call("_after", optimizer))


def _call(method: str, optimizer: Optimizer) -> None:
    for hold in list(_holds.values()):
        getattr(hold, method)(optimizer)

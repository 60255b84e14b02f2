"""Hessian-vector products by differences of gradients, with parameters moved in place and restored bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from cpd_fast.errors import ScoreError
from cpd_fast.memory import Part
from cpd_fast.memory.tensors import WAITING as _WAITING
from cpd_fast.ops import ReversibleStep
from cpd_fast.score.criterion import Context, checked

_RATIO = 8.0  # between the steps that are compared
_MOST_SHIFTS = 4  # of the three steps, while the best lies at their edge


@dataclass(frozen=True)
class Step:
    """Length of a step a parameter, and its relative error as estimated (None: the step was given)."""

    length: float
    error: float | None


class Differences:
    """Forward differences of the gradient of one batch's loss.

    Gradients are reduced as autograd makes them, a few MiB at a time, and dropped: beside the parameters, and the byte
    an element (or the copy) that takes them back, nothing of their size is ever held.

    Args:
        context: Model and graph.
        parts: The micro-batches of the loss.
        loss_scale: The loss is multiplied by it before the backward pass, the result divided.
        may_overflow: A loss that is not finite is no error: the products are not finite either.

    Raises:
        ScoreError: If a parameter is of half precision.
    """

    def __init__(
        self, context: Context, parts: Sequence[Part], loss_scale: float = 1.0, may_overflow: bool = False
    ) -> None:
        self.context, self.parts = context, parts
        self.loss_scale, self.may_overflow = loss_scale, may_overflow
        for name, t in context.params.items():
            if t.dtype not in (torch.float32, torch.float64):
                raise ScoreError(
                    f"HessianTrace: a finite difference needs fp32 parameters, {name} is {t.dtype}: a step would be "
                    "lost in rounding; keep the parameters in fp32 (autocast is fine) or use engine='retained'"
                )

    def products(self, probes: Sequence[int], step: float) -> Iterator[Tensor]:
        """``v . (H v)`` summed to pieces ``(n_pieces,)``, for each probe."""
        yield from self.from_base(self._reduced(self.parts, probes), probes, step)

    def from_base(self, before: Tensor, probes: Sequence[int], step: float) -> Iterator[Tensor]:
        """The same, where ``v . g`` is known where the parameters are now: ``(len(probes), n_pieces)``."""
        steps = steps_of(self.context, step)  # once: the parameters are the same after every probe
        for k, probe in enumerate(probes):
            with moved(steps, probe):
                (after,) = self._reduced(self.parts, [probe])
            yield (after - before[k]) / step

    def choose(self, probe: int, channels: Callable[[Tensor], Tensor]) -> Step:
        """The step at which curvature of the gradient and rounding are in balance, by three gradients or a few more.

        A difference over step h is off by a h from the third derivative and by b / h from rounding. Both are read off
        the disagreement of three steps, a factor 8 apart, in the scores of all channels (sums of magnitudes).
        """
        part = self.parts[:1]
        (before,) = self._reduced(part, [probe])

        def observe(step: float) -> Tensor:
            with moved(steps_of(self.context, step), probe):
                (after,) = self._reduced(part, [probe])
            return channels((after - before) / step).double()

        with precision_of(self.context.model) as precisions:
            part[0].closure()
        step = first_step(self.context, precisions)
        seen = {s: observe(s) for s in (step / _RATIO, step, step * _RATIO)}
        for shift in range(_MOST_SHIFTS + 1):
            low, middle, high = (seen[s] for s in (step / _RATIO, step, step * _RATIO))
            factor, error = _balance(float((middle - low).abs().sum()), float((high - middle).abs().sum()))
            size = float(middle.abs().sum())
            if factor < _RATIO or shift == _MOST_SHIFTS:
                break
            step *= _RATIO  # rounding rules still: autocast, or a flat loss
            seen[step * _RATIO] = observe(step * _RATIO)
        return Step(step * factor, error / size if size > 0 else 0.0)

    def _reduced(self, parts: Sequence[Part], probes: Sequence[int]) -> Tensor:
        """``v . g`` summed to pieces, ``(len(probes), n_pieces)``, of the gradient g where the parameters are now."""
        context = self.context
        out = context.layout.empty(len(probes))
        for part in parts:
            sums = Sums(context, probes, out, part.weight / self.loss_scale)
            with sums.watching():
                with torch.random.fork_rng(context.cuda_devices):  # the same random numbers every time
                    loss = checked(part.closure(), finite=not self.may_overflow)
                found = torch.autograd.grad(loss * self.loss_scale, context.tensors, allow_unused=True)
            context.refuse_unused(found)
        return out


class Sums:
    """Takes gradients as autograd makes them, and adds ``share * v . g`` to one row of ``out`` a probe.

    Args:
        context: Model and graph.
        probes: Numbers of the probes.
        out: ``(len(probes), n_pieces)``.
        share: Factor on the gradients.
        at_once: Reduce each gradient before autograd goes on, because it may be written over then.
    """

    def __init__(
        self, context: Context, probes: Sequence[int], out: Tensor, share: float, at_once: bool = False
    ) -> None:
        self._context, self._probes, self._out, self._share = context, probes, out, share
        self._most = 0 if at_once else _WAITING
        self._waiting: dict[int, Tensor] = {}
        self._bytes = 0
        self._zero: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.count = 0  # of gradients taken

    @contextmanager
    def watching(self, keep: bool = False) -> Iterator[None]:
        """Take the gradients of the backward pass inside the block; ``keep``: autograd goes on with them, too."""
        hooks = [p.register_hook(partial(self._take, keep, i)) for i, p in enumerate(self._context.tensors)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._flush()

    def _take(self, keep: bool, index: int, g: Tensor) -> Tensor | None:
        """Hook of parameter number ``index``: what autograd goes on with in place of ``g`` holds no memory."""
        self.count += 1
        self._waiting[index] = g.detach()
        self._bytes += g.numel() * g.element_size()
        if self._bytes > self._most:
            self._flush()
        return None if keep else self._zeros(g).expand(g.shape)

    def _zeros(self, like: Tensor) -> Tensor:
        key = (like.dtype, like.device)
        if key not in self._zero:
            self._zero[key] = like.new_zeros(())
        return self._zero[key]

    def _flush(self) -> None:
        """Reduce what waits."""
        for row, probe in zip(self._out, self._probes, strict=True):
            self._context.layout.reduce_probe(self._waiting, self._context.probes.seed, probe, row, self._share)
        self._waiting.clear()
        self._bytes = 0


@contextmanager
def precision_of(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Collect the autocast dtypes under which modules are called inside the block."""
    found: set[torch.dtype] = set()

    def look(module: nn.Module, args: Any) -> None:
        for p in module.parameters(recurse=False):
            if torch.is_autocast_enabled(p.device.type):
                found.add(torch.get_autocast_dtype(p.device.type))

    hooks = [m.register_forward_pre_hook(look) for m in model.modules()]
    try:
        with torch.no_grad():
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def first_step(context: Context, precisions: Iterable[torch.dtype] = ()) -> float:
    """Where to look first: 2 sqrt(eps) (1 + ||w||) / ||v||, eps of the lowest precision that computes."""
    eps = max(torch.finfo(d).eps for d in [*(t.dtype for t in context.tensors), *precisions])
    norm = float(torch.stack([t.detach().double().square().sum().cpu() for t in context.tensors]).sum().sqrt())
    return 2 * sqrt(eps) * (1 + norm) / sqrt(sum(t.numel() for t in context.tensors))


def _balance(lower: float, upper: float) -> tuple[float, float]:
    """Best factor on the middle step, in [1/8, 8], and the error there, from two disagreements.

    With A = a h and B = b / h at the middle step, independent: lower^2 = (7/8 A)^2 + (8^2 + 1) B^2 and upper^2 =
    (7 A)^2 + (1 + 1/8^2) B^2.
    """
    r = _RATIO
    p, q, s, t = (1 - 1 / r) ** 2, r**2 + 1, (r - 1) ** 2, 1 + r**-2
    determinant = q * s - p * t
    curvature = max((q * upper**2 - t * lower**2) / determinant, 0.0)
    rounding = max((s * lower**2 - p * upper**2) / determinant, 0.0)
    factor = (rounding / curvature) ** 0.25 if curvature > 0 else r
    factor = min(max(factor, 1 / r), r)
    return factor, sqrt(curvature * factor**2 + rounding / factor**2)


def steps_of(context: Context, step: float) -> ReversibleStep:
    """Steps of the scored parameters along the context's probes."""
    return ReversibleStep(context.tensors, step, context.probes.seed)


@contextmanager
def moved(steps: ReversibleStep, probe: int) -> Iterator[None]:
    """Parameters at ``w + step * v``; restored bit for bit, also when interrupted."""
    try:
        steps.away(probe)
        torch.clear_autocast_cache()  # below an autocast of the user's, half-precision copies of where they were
        yield
    finally:
        torch.clear_autocast_cache()
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                steps.back()
                break
            except KeyboardInterrupt as e:  # a second Ctrl-C: restore first, then obey
                interrupt = e
        if interrupt is not None:
            raise interrupt

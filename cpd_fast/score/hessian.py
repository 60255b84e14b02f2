"""HessianTrace: HAP's criterion, Tr(H)/(2p) * ||w||^2, by Hutchinson's estimator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from cpd_fast.errors import ScoreError
from cpd_fast.memory import Part, parts_of
from cpd_fast.ops import squared_norms
from cpd_fast.score._double import (
    by_engine,
    double_backward_errors,
    double_differentiable,
    refuse_dead_ends,
)
from cpd_fast.score._finite import Differences, Step
from cpd_fast.score._in_training import InTraining
from cpd_fast.score._moments import Moments
from cpd_fast.score.criterion import Closure, Context, Criterion, first_gradients

ENGINES = ("auto", "retained", "streaming", "finite_difference")
_FEWEST_BATCHES = 4  # before their spread may end a run
_UNCERTAIN = 0.25  # relative error of a finite difference that is worth a warning


@dataclass(frozen=True)
class HessianTrace(Criterion):
    r"""Average curvature of the loss along a channel, times its squared norm.

    For every slice w_s (p_s parameters) that channel c owns, rows out and columns in alike,

        score_c = sum_s Tr(H_ss) / (2 p_s) * ||w_s||^2,

    the second-order Taylor term of removing the slice with its Hessian block replaced by its mean eigenvalue. The
    traces are estimated with Rademacher probes v over all parameters at once, E[v_s . (H v)_s] = Tr(H_ss); the variance
    comes from the off-diagonal of H only. The model runs in eval mode.

    Attributes:
        num_probes: Probes a batch, at most (see ``stop``). More batches serve better than more probes.
        engine: How H v is computed.

            - ``"retained"``: double backward through one graph a batch, kept for all its probes. Exact; about 2 times a
              forward + backward a probe, and twice its memory.
            - ``"streaming"``: the same with a fresh graph a probe, freed while it is used: less memory, more time. With
              ``num_probes=1`` it is ``"retained"``: one fresh batch a probe.
            - ``"finite_difference"``: one more gradient a probe at parameters moved along it, which are restored bit
              for bit whatever happens. Works with every operator, fused attention, autocast and compiled models, in the
              memory of a training step. Its error of first order in the step is
              odd in the probe and averages out; a step across the kink of a ReLU shows as a rare large observation.
              ``scores.info`` has the step and its estimated relative error.
            - ``"auto"``: ``"retained"``, or ``"finite_difference"`` where an operator has no double backward, or what
              fits into :func:`cpd_fast.score`'s ``memory_limit``. ``scores.info`` says which, and why.
        signed: False scores a channel by the magnitude of its mean over all probes. True leaves the sign (channels of
            negative curvature go first, as in HAP): with few probes about half of the means are negative and most of
            these signs are noise, so use it with many probes only, and without ``per_cost``.
        stop: Relative error at which to stop early: the sum of the channels' standard errors over the sum of the
            magnitudes of their means. A batch ends where its probes are this precise; the run ends, after four batches
            at least, where the mean over batches is. None: all probes of all batches.
        check_every: Probes between looks at ``stop``; only these wait for the device.
        step: Length of the finite-difference step a parameter; ``None`` chooses it, with three or more gradients.
        loss_scale: The loss is multiplied by it before every backward pass and the result divided, so that fp16
            gradients under autocast do not vanish; a power of two.
        generator: Gives the seed of the probes, whatever device it is on; ``None`` is seed 0 for every call. Probes are
            a function of (seed, probe, parameter), the same on every device.

    Raises:
        ScoreError: If an argument is out of range; while scoring, if the loss is not a finite scalar with a graph, a
            Hessian-vector product is not finite, an operator has no double backward (engines ``"retained"`` and
            ``"streaming"``), or a parameter is of half precision (engine ``"finite_difference"``).

    Source: Yu et al., arXiv:2101.08940 (HAP), relative Hessian trace; their code leaves the 1/2 out, keeps the sign and
    scores output rows only. Adding the columns of the coupled consumers and taking the magnitude are ours.

    Example:
        >>> HessianTrace(num_probes=4).engine
        'auto'
    """

    num_probes: int = 1
    engine: str = "auto"
    signed: bool = False
    stop: float | None = None
    check_every: int = 4
    step: float | None = None
    loss_scale: float = 1.0
    generator: torch.Generator | None = None

    data: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ScoreError(f"HessianTrace: num_probes must be at least 1, got {self.num_probes}")
        if self.engine not in ENGINES:
            raise ScoreError(f"HessianTrace: engine={self.engine!r}: expected one of {', '.join(ENGINES)}")
        if self.step is not None and not self.step > 0:
            raise ScoreError(f"HessianTrace: step must be positive, got {self.step}")
        if self.stop is not None and not self.stop > 0:
            raise ScoreError(f"HessianTrace: stop must be a positive relative error, got {self.stop}")
        if self.check_every < 1:
            raise ScoreError(f"HessianTrace: check_every must be at least 1, got {self.check_every}")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise ScoreError(
                "HessianTrace: generator must be a torch.Generator (of any device), got "
                f"{type(self.generator).__name__}"
            )
        if not 0 < self.loss_scale < float("inf"):
            raise ScoreError(f"HessianTrace: loss_scale must be positive and finite, got {self.loss_scale}")

    def observe(self, context: Context, closure: Closure | None) -> Iterator[Tensor]:
        """Yield one observation a probe."""
        assert closure is not None
        first = context.probes.next(self.num_probes)
        probes = range(first, first + self.num_probes)
        channels = _channels(context)
        for pieces in self._products(context, parts_of(closure), probes, channels):
            yield channels(pieces)

    def in_training(self, context: Context) -> InTraining:
        """Finite differences of the training loss itself, from the gradients that training computes.

        Raises:
            ScoreError: If an exact engine was asked for, or a relative error to stop at.
        """
        if self.engine not in ("auto", "finite_difference") or self.stop is not None:
            raise ScoreError(
                "HessianTrace: pruner.backward takes differences of the gradients of a training step, all num_probes "
                f"of them: use engine='auto' and stop=None (got {self.engine!r}, {self.stop}), or pruner.step(closure)"
            )
        context.engine = ("finite_difference", "from the gradient of the training step")
        return InTraining(
            context, "HessianTrace", self.num_probes, self.step, lambda pieces: _channels(context)(pieces)
        )

    def _products(
        self, context: Context, parts: Sequence[Part], probes: range, channels: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """``v . (H v)`` summed to pieces for each probe, by the engine that this model and its memory admit."""
        engines = {
            "retained": lambda: _retained(context, parts, probes, self.loss_scale),
            "streaming": lambda: chain.from_iterable(
                _retained(context, parts, range(k, k + 1), self.loss_scale) for k in probes
            ),
            "finite_difference": lambda: self._differences(context, parts, probes, channels),
        }
        return by_engine(context, "HessianTrace", self.engine, engines)

    def _differences(
        self, context: Context, parts: Sequence[Part], probes: range, channels: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        differences = Differences(context, parts, self.loss_scale)
        if self.step is not None:
            context.step = Step(self.step, None)
        elif context.step is None:
            context.step = differences.choose(probes[0], channels)
        yield from differences.products(probes, context.step.length)

    def enough(self, batch: Moments, taken: int) -> bool:
        """Whether the probes of a batch are as precise as ``stop`` asks; looks every ``check_every`` probes only."""
        if self.stop is None or taken % self.check_every:
            return False
        return batch.relative_error() <= self.stop

    def finished(self, moments: Moments) -> bool:
        """Whether the mean over batches is as precise as ``stop`` asks."""
        if self.stop is None or float(moments.batches) < _FEWEST_BATCHES:
            return False
        return moments.relative_error() <= self.stop

    @property
    def is_magnitude(self) -> bool:
        """Whether signs are dropped once the mean is taken."""
        return not self.signed

    def information(self, context: Context, moments: Moments) -> dict[str, object]:
        """Engine and why, the step and its error, and the relative error reached."""
        info = super().information(context, moments)
        if context.step is not None:
            info["step"], info["step_error"] = context.step.length, context.step.error
            if context.step.error is not None and context.step.error > _UNCERTAIN:
                warnings.warn(
                    f"HessianTrace: finite differences of this model are off by about {context.step.error:.0%}; use "
                    "engine='retained', smoother activations, or loss_scale under fp16 autocast",
                    stacklevel=4,
                )
        if self.stop is not None:
            info["relative_error"] = moments.relative_error()
        return info


def _channels(context: Context) -> Callable[[Tensor], Tensor]:
    """Observations by channel, from ``v . (H v)`` summed to pieces, with the weights as they are now."""
    layout = context.layout
    norms = squared_norms(layout.table, list(context.weights.values()))
    scale = layout.cells(norms) / (2 * context.elements)
    return lambda pieces: layout.scaled_channels(pieces, scale)


def _retained(context: Context, parts: Sequence[Part], probes: range, loss_scale: float) -> Iterator[Tensor]:
    """By double backward, one graph a micro-batch; all micro-batches see the same probes."""
    if len(parts) == 1:
        yield from _one_graph(context, parts[0], probes, loss_scale)
        return
    total: list[Tensor] = []
    for part in parts:
        for k, pieces in enumerate(_one_graph(context, part, probes, loss_scale)):
            if k == len(total):
                total.append(torch.zeros_like(pieces))
            total[k] += part.weight * pieces
    yield from total


def _one_graph(context: Context, part: Part, probes: range, loss_scale: float) -> Iterator[Tensor]:
    tensors, layout = context.tensors, context.layout
    with double_backward_errors("HessianTrace"):
        with double_differentiable():
            grads = first_gradients(context, part.closure, create_graph=True, scale=loss_scale)
        # A gradient without a graph is constant: its row of the Hessian is zero.
        active = {i: g for i, g in enumerate(grads) if g is not None and g.requires_grad}
        del grads
        if not context.graph_is_checked:
            refuse_dead_ends(list(active.values()))
            context.graph_is_checked = True
        # Memory for one probe, written anew for each: fresh memory would cost more than the signs.
        signs = [torch.empty_like(tensors[i], requires_grad=False) for i in active]
        for k in probes:
            if not active:
                yield torch.zeros(layout.n_pieces, dtype=layout.dtype, device=layout.device)
                continue
            context.probes.fill(signs, k, list(active))
            hv = torch.autograd.grad(
                list(active.values()),
                tensors,
                signs,
                retain_graph=k != probes[-1],
                allow_unused=True,
            )
            pieces = layout.reduce_probe(hv, context.probes.seed, k, share=1 / loss_scale)
            del hv
            yield pieces

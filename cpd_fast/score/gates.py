"""What the loss says about gates on channels: GateHessian, and GroupFisher, its cheap first-order form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from cpd_fast.errors import ScoreError
from cpd_fast.memory import parts_of
from cpd_fast.score._double import (
    by_engine,
    double_backward_errors,
    double_differentiable,
    refuse_dead_ends,
)
from cpd_fast.score._gates import Gates, Marks, Rows
from cpd_fast.score._probes import Probes
from cpd_fast.score.criterion import Closure, Context, Criterion, checked

_ENGINES = ("auto", "retained", "finite_difference")


@dataclass(frozen=True)
class GroupFisher(Criterion):
    r"""Empirical Fisher information of a gate on each channel, per sample.

    score_c = sum_n ( sum_{consumers l} sum_{positions} x_{l,n,c} * dL/dx_{l,n,c} )^2: the squared gradient of the loss
    with respect to a gate m_c = 1 that multiplies the channel wherever a convolution or linear layer consumes it, for
    each sample n alone (dim 0 of activations; windows and tokens folded into dim 0 are unfolded). Groups that no such
    layer consumes (query and key dims) are gated where they are produced. It sees what batch norm hides from weight
    gradients. One backward a batch, without weight gradients. L is the batch loss: the score scales with the square of
    its reduction.

    The cheap form of :class:`GateHessian`, and honestly another thing: the *empirical* Fisher uses the labels of the
    data where the Gauss-Newton matrix takes the expectation over the model's own predictions. The two differ most where
    the network is sure and right: there the first vanishes.

    Raises:
        ScoreError: While scoring, if no convolution or linear layer of a prunable group was called.

    Source: Liu et al., arXiv:2108.00708 (group Fisher pruning), without its memory normalisation (see ``per_cost`` of
    :func:`cpd_fast.plan`).

    Example:
        >>> GroupFisher().data
        'loss'
    """

    data: ClassVar[str] = "loss"

    def observe(self, context: Context, closure: Closure | None) -> Iterator[Tensor]:
        """Yield one observation a batch."""
        assert closure is not None
        layout = context.layout
        total = torch.zeros(layout.n_channels, dtype=layout.dtype, device=layout.device)
        for part in parts_of(closure):
            context.samples = part.samples
            marks = Marks(context)
            with marks:
                loss = checked(part.closure())
            grads = torch.autograd.grad(loss, marks.tensors, allow_unused=True) if marks.tensors else ()
            marks.refuse_unseen("GroupFisher")
            total += part.weight**2 * _squared_gate_gradients(context, marks, grads)
        yield total


def _squared_gate_gradients(context: Context, marks: Marks, grads: tuple[Tensor | None, ...]) -> Tensor:
    """Sum over samples of the squared sum over uses and positions of activation times gradient: ``(n_channels,)``."""
    layout = context.layout
    samples = context.samples or marks.rows or 1
    gates: dict[str, Tensor] = {}
    out = torch.zeros(layout.n_channels, dtype=layout.dtype, device=layout.device)
    for x, grad, dim, uses in zip(marks.tensors, grads, marks.dims, marks.uses, strict=True):
        if grad is None:
            continue
        both = x.detach().to(layout.dtype) * grad.to(layout.dtype)
        rows = both.unsqueeze(0) if dim == 0 else both
        others = [d for d in range(1, rows.dim()) if d != (1 if dim == 0 else dim)]
        rows = rows.sum(others) if others else rows  # (rows, C)
        unfolded = rows.shape[0] % samples == 0
        if unfolded:
            rows = rows.view(samples, -1, rows.shape[1]).sum(1)
        for u in uses:
            value = rows[:, torch.from_numpy(u.index).to(rows.device)].sum(2)  # (rows, n_channels)
            if unfolded:
                known = gates.get(u.group.name)
                gates[u.group.name] = value if known is None else known + value
            else:
                out[u.group.offset : u.group.offset + u.group.n_channels] += (value**2).sum(0)
    for g in context.graph.groups:
        if g.name in gates:
            out[g.offset : g.offset + g.n_channels] += (gates[g.name] ** 2).sum(0)
    return out


@dataclass(frozen=True)
class GateHessian(Criterion):
    r"""Curvature of the loss along a gate on each channel: what removing the channel costs to second order.

        score_c = 1/2 d^2 L / d m_c^2,

    with a gate m_c = 1 that multiplies channel c wherever a convolution or linear layer consumes it (groups that none
    consumes, query and key dims, are gated where they are produced). Unlike a weight in front of a batch norm, whose
    scale the norm undoes, a gate behind it changes what the network computes. For a piecewise linear network a gate
    that acts at one depth has no second derivative of its own: the score is then the diagonal of the Gauss-Newton
    matrix, and not negative.

    The diagonal is estimated by Rademacher probes over all gates at once, E[z . (H z)]. Every sample has gates and
    signs of its own: samples do not interact (eval mode), so one product gives an independent estimate for each, and
    the error falls with the batch as well as with the probes. Weight gradients are never computed.

    Attributes:
        num_probes: Probes a batch. More batches serve as well as more probes.
        engine: ``"retained"``: exact products by double backward. ``"finite_difference"``: one more gradient a probe
            with the gates moved by ``step``; for operators without double backward, in the memory of a training step.
            ``"auto"``: the first, or the second where an operator has no double backward or ``memory_limit`` is too
            low for the first. ``scores.info`` says which, and why.
        signed: False scores by the magnitude of the mean; True leaves the sign.
        step: How far gates are moved by ``engine="finite_difference"``.
        generator: Source of the probes; ``None`` is seed 0 for every call.

    Raises:
        ScoreError: If an argument is out of range; while scoring, if the loss is not a finite scalar with a graph, no
            convolution or linear layer of a prunable group was called, or an operator has no double backward.

    Source: the gates of Liu et al., arXiv:2108.00708, with the Hessian in place of the empirical Fisher; LeCun et al.
    1989 (optimal brain damage) for the diagonal. Probes per sample are ours.

    Example:
        >>> GateHessian(num_probes=4).engine
        'auto'
    """

    num_probes: int = 1
    engine: str = "auto"
    signed: bool = False
    step: float = 1e-2
    generator: torch.Generator | None = None

    data: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ScoreError(f"GateHessian: num_probes must be at least 1, got {self.num_probes}")
        if self.engine not in _ENGINES:
            raise ScoreError(f"GateHessian: engine={self.engine!r}: expected one of {', '.join(_ENGINES)}")
        if not self.step > 0:
            raise ScoreError(f"GateHessian: step must be positive, got {self.step}")

    def observe(self, context: Context, closure: Closure | None) -> Iterator[Tensor]:
        """Yield one observation a probe."""
        assert closure is not None
        layout = context.layout
        parts = parts_of(closure)
        total: list[Tensor] = []
        for part in parts:
            context.samples = part.samples
            rows = Rows(context)
            with rows:  # with a graph, through which masked weights are known; it is dropped at once
                part.closure()
            rows.refuse_unseen("GateHessian")
            for k, hz in enumerate(self._products(context, part.closure, rows.samples)):
                out = torch.zeros(layout.n_channels, dtype=layout.dtype, device=layout.device)
                for g in context.graph.groups:
                    if g.name in hz:
                        out[g.offset : g.offset + g.n_channels] = hz[g.name] * (part.weight / 2)
                if len(parts) == 1:
                    yield out
                elif k < len(total):
                    total[k] += out
                else:
                    total.append(out)
        yield from total

    def _products(self, context: Context, closure: Closure, samples: int) -> Iterator[dict[str, Tensor]]:
        """``sum_n z . (H z)`` of every channel by group name, for each probe, by the engine that the model admits."""
        given = self, context, closure, samples
        engines = {"retained": partial(_retained, *given), "finite_difference": partial(_moved_gates, *given)}
        return by_engine(context, "GateHessian", self.engine, engines)

    @property
    def is_magnitude(self) -> bool:
        """Whether signs are dropped once the mean is taken."""
        return not self.signed


def _signs(context: Context, probes: Probes, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """One Rademacher vector over all gates of all samples."""
    number = {g.name: i for i, g in enumerate(context.graph.groups)}
    probe = probes.next()
    return {name: probes.signs(gate, probe, number[name]) for name, gate in gates.items()}


def _retained(criterion: GateHessian, context: Context, closure: Closure, samples: int) -> Iterator[dict[str, Tensor]]:
    """``sum_n z . (H z)`` of every channel by group name, for each probe."""
    gates = Gates(context, samples)
    with double_backward_errors("GateHessian"):
        with double_differentiable(), gates:
            loss = checked(closure())
        leaves = gates.gates
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
        first = {n: g for n, g in zip(leaves, found, strict=True) if g is not None and g.requires_grad}
        if not context.graph_is_checked:
            refuse_dead_ends(list(first.values()))
            context.graph_is_checked = True
        for k in range(criterion.num_probes):
            z = _signs(context, context.probes, leaves)
            if not first:  # a loss linear in the gates
                yield {}
                continue
            hz = torch.autograd.grad(
                list(first.values()),
                list(leaves.values()),
                [z[n] for n in first],
                retain_graph=k + 1 < criterion.num_probes,
                allow_unused=True,
            )
            yield {n: (z[n] * h).sum(0) for n, h in zip(leaves, hz, strict=True) if h is not None}


def _moved_gates(
    criterion: GateHessian, context: Context, closure: Closure, samples: int
) -> Iterator[dict[str, Tensor]]:
    """The same by differences of the gates' gradients; no parameter is touched."""

    def gradients(values: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        gates = Gates(context, samples, values)
        with torch.random.fork_rng(context.cuda_devices), gates:  # the same random numbers every time
            loss = checked(closure())
        leaves = gates.gates
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return leaves, dict(zip(leaves, found, strict=True))

    leaves, before = gradients()
    for _ in range(criterion.num_probes):
        z = _signs(context, context.probes, leaves)
        _, after = gradients({n: 1 + criterion.step * v for n, v in z.items()})
        yield {n: (z[n] * (after[n] - before[n])).sum(0) / criterion.step for n in leaves}

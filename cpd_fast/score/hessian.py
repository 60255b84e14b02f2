"""HessianTrace: HAP's criterion, Tr(H)/(2p) * ||w||^2, by Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cpd_fast.errors import ScoreError
from cpd_fast.score._conv import DoubleDifferentiable
from cpd_fast.score.criterion import (
    Closure,
    Context,
    Criterion,
    double_backward_errors,
    first_gradients,
    refuse_dead_ends,
)

_ENGINES = ("retained", "finite_difference")


@dataclass(frozen=True)
class HessianTrace(Criterion):
    r"""Average curvature of the loss along a channel, times its squared norm.

    For every slice w_s (p_s parameters) that channel c owns, rows out and columns in alike,

        score_c = sum_s Tr(H_ss) / (2 p_s) * ||w_s||^2,

    the second-order Taylor term of removing the slice with its Hessian block replaced by its mean eigenvalue. The
    traces are estimated with Rademacher probes v over all parameters at once, E[v_s . (H v)_s] = Tr(H_ss); the variance
    comes from the off-diagonal of H only. The model runs in eval mode.

    Attributes:
        num_probes: Probes a batch. More batches serve as well as more probes.
        engine: ``"retained"``: exact Hessian-vector products by double backward through one retained graph a batch;
            about 2.0 times a forward + backward a probe and its memory twice. ``"finite_difference"``: one more
            gradient a probe at parameters moved along the probe, which are restored bit for bit whatever happens; works
            with every operator, in the memory of a training step and a copy of the parameters. Its error of first
            order in the step is odd in the probe and averages out; a step across the kink of a ReLU shows as a rare
            large observation (longer steps tame them).
        signed: False scores a channel by the magnitude of its mean over all probes. True leaves the sign (channels of
            negative curvature go first, as in HAP): with few probes about half of the means are negative and most of
            these signs are noise, so use it with many probes only, and without ``per_cost``.
        step: Length of the finite-difference step a parameter; ``None`` is 2 sqrt(eps) (1 + ||w||) / ||v||.
        generator: Source of the probes; ``None`` is a fresh one on the CPU with seed 0 for every call. A CPU generator
            serves models on any device, with the same probes.

    Raises:
        ScoreError: If an argument is out of range; while scoring, if the loss is not a finite scalar with a graph, a
            Hessian-vector product is not finite, an operator has no double backward (engine ``"retained"``), or a
            parameter is of half precision (engine ``"finite_difference"``).

    Source: Yu et al., arXiv:2101.08940 (HAP), relative Hessian trace; their code leaves the 1/2 out, keeps the sign and
    scores output rows only. Adding the columns of the coupled consumers and taking the magnitude are ours.

    Example:
        >>> HessianTrace(num_probes=4).engine
        'retained'
    """

    num_probes: int = 1
    engine: str = "retained"
    signed: bool = False
    step: float | None = None
    generator: torch.Generator | None = None

    data: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ScoreError(f"HessianTrace: num_probes must be at least 1, got {self.num_probes}")
        if self.engine not in _ENGINES:
            raise ScoreError(f"HessianTrace: engine={self.engine!r}: expected one of {', '.join(_ENGINES)}")
        if self.step is not None and not self.step > 0:
            raise ScoreError(f"HessianTrace: step must be positive, got {self.step}")

    def observe(self, context: Context, closure: Closure | None) -> Iterator[Tensor]:
        """Yield one observation a probe."""
        assert closure is not None
        layout = context.layout
        weights = dict(context.weights)
        scale = layout.cells(layout.reduce_product(weights, weights)) / (2 * context.elements)
        products = _retained if self.engine == "retained" else _finite_difference
        for v, hv in products(self, context, closure):
            traces = layout.cells(layout.reduce_product(context.by_name(v), context.by_name(hv)))
            yield layout.channels(traces * scale)

    @property
    def is_magnitude(self) -> bool:
        """Whether signs are dropped once the mean is taken."""
        return not self.signed


_Product = tuple[list[Tensor], Sequence[Tensor | None]]  # v, H v


def _retained(criterion: HessianTrace, context: Context, closure: Closure) -> Iterator[_Product]:
    tensors = context.tensors
    with double_backward_errors("HessianTrace"):
        with DoubleDifferentiable(), sdpa_kernel(SDPBackend.MATH):
            grads = first_gradients(context, closure, create_graph=True)
        # A gradient without a graph is constant: its row of the Hessian is zero.
        active = {i: g for i, g in enumerate(grads) if g is not None and g.requires_grad}
        if not context.graph_is_checked:
            refuse_dead_ends(list(active.values()))
            context.graph_is_checked = True
        for k in range(criterion.num_probes):
            v = _probe(tensors, context.generator)
            if not active:
                yield v, [None] * len(tensors)
                continue
            hv = torch.autograd.grad(
                list(active.values()),
                tensors,
                [v[i] for i in active],
                retain_graph=k + 1 < criterion.num_probes,
                allow_unused=True,
            )
            yield v, hv


def _finite_difference(criterion: HessianTrace, context: Context, closure: Closure) -> Iterator[_Product]:
    """Forward differences of the gradient.

    Raises:
        ScoreError: If a parameter is of half precision.
    """
    tensors = context.tensors
    for name, t in context.params.items():
        if t.dtype not in (torch.float32, torch.float64):
            raise ScoreError(
                f"HessianTrace: a finite difference needs fp32 parameters, {name} is {t.dtype}: a step would be lost "
                "in rounding; keep the parameters in fp32 (autocast is fine) or use engine='retained'"
            )

    def gradients() -> tuple[Tensor | None, ...]:
        with torch.random.fork_rng(_cuda(tensors)):  # the same random numbers every time
            return first_gradients(context, closure)

    before = gradients()
    step = criterion.step or _step(tensors)
    for _ in range(criterion.num_probes):
        v = _probe(tensors, context.generator)
        with _moved(tensors, v, step):
            after = gradients()
        yield v, [None if a is None or b is None else (a - b) / step for a, b in zip(after, before, strict=True)]


def _step(tensors: Sequence[Tensor]) -> float:
    """Balances rounding against curvature of the gradient."""
    eps = max(torch.finfo(t.dtype).eps for t in tensors)
    norm = float(torch.stack([t.detach().double().square().sum().cpu() for t in tensors]).sum().sqrt())
    return 2 * eps**0.5 * (1 + norm) / sum(t.numel() for t in tensors) ** 0.5


@contextmanager
def _moved(tensors: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Iterator[None]:
    """Parameters at ``w + step * v``; restored bit for bit, also when interrupted."""
    saved = [t.detach().clone() for t in tensors]
    try:
        # .data: what is restored exactly needs no new version, so graphs that hold these weights stay valid
        for t, v in zip(tensors, direction, strict=True):
            t.data.add_(v, alpha=step)
        yield
    finally:
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                for t, s in zip(tensors, saved, strict=True):
                    t.data.copy_(s)
                break
            except KeyboardInterrupt as e:  # a second Ctrl-C: restore first, then obey
                interrupt = e
        if interrupt is not None:
            raise interrupt


def _probe(tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Rademacher vectors shaped like ``tensors``, in their dtype: one bit a parameter, drawn at once."""
    total = sum(t.numel() for t in tensors)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-total // 64),), generator=generator, device=generator.device)
    packed: dict[torch.device, Tensor] = {}
    out, start = [], 0
    for t in tensors:
        if t.device not in packed:
            packed[t.device] = words.to(t.device).view(torch.uint8)
        first, last = start // 8, -(-(start + t.numel()) // 8)
        signs = torch.nn.functional.embedding(packed[t.device][first:last].int(), _signs(t.device, t.dtype))
        skip = start - 8 * first
        out.append(signs.reshape(-1)[skip : skip + t.numel()].view(t.shape))
        start += t.numel()
    return out


_tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _signs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The eight signs that each byte stands for, ``(256, 8)``."""
    key = (device, dtype)
    if key not in _tables:
        bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
        _tables[key] = (2 * bits - 1).to(device, dtype)
    return _tables[key]


def _cuda(tensors: Sequence[Tensor]) -> list[int]:
    return sorted({t.device.index for t in tensors if t.device.type == "cuda"})

"""Taylor: what CPD's released code computes from the gradients of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import numpy as np
from torch import Tensor

from cpd_fast.memory import parts_of
from cpd_fast.score.criterion import Closure, Context, Criterion, first_gradients


@dataclass(frozen=True)
class Taylor(Criterion):
    r"""Squared first-order Taylor term of a channel, from the gradients that training computes anyway.

    For every tensor t that produces channel c: s_t = (sum_{j in c} w_j g_j)^2 / a_t, with g the gradient of the batch
    and a_t the number of activations of t's module; the score is the mean over the group's producing tensors, divided
    by the number of all its tensors (producing and consuming). This is the empirical Fisher on the batch-mean gradient:
    no Hessian, although the paper speaks of one.

    Attributes:
        normalize_cost: False leaves out a_t and the division by the number of tensors: the plain mean of squares.

    Source: code released with arXiv:2408.03046 (CPD). Two departures: activations of token tensors (N, T, C) are
    counted in full, where the released code drops T's neighbour by mistake; column terms are not used, as there.

    Example:
        >>> Taylor().data
        'gradients'
    """

    normalize_cost: bool = True

    data: ClassVar[str] = "gradients"

    def observe(self, context: Context, closure: Closure | None) -> Iterator[Tensor]:
        """Yield one observation a batch."""
        assert closure is not None
        total: list[Tensor | None] = [None] * len(context.tensors)
        for part in parts_of(closure):
            for i, g in enumerate(first_gradients(context, part.closure)):
                if g is not None:
                    known = total[i]
                    total[i] = g * part.weight if known is None else known.add_(g, alpha=part.weight)
        yield self.from_gradients(context, context.by_name(total))

    def from_gradients(self, context: Context, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """One observation from a training step's gradients, ``(n_channels,)``."""
        layout = context.layout
        terms = layout.cells(layout.reduce_product(context.params, gradients, context.kept)) ** 2
        weights = layout.mean_weights(lambda r: r.slice.produces)
        if self.normalize_cost:
            acts = _activations(context)
            weights = weights / layout.per_cell(lambda r: acts[r.slice.param] * len(r.group.slices))
        return layout.channels(terms * weights)


def _activations(context: Context) -> dict[str, float]:
    """Output activations of every parameter's module under the context's plan, from the graph's cost terms."""
    modules = {name.rpartition(".")[0] for name in context.params}
    alive = context.graph.alive(context.plan)
    counts: dict[str, float] = {}
    for term in context.graph.terms:
        if term.kind == "activation_bytes" and term.module in modules and term.maps:
            keep = np.ones((), bool)
            for m in term.maps:
                keep = keep & alive[m]
            counts[term.module] = counts.get(term.module, 0.0) + term.coefficient / 4 * int(np.count_nonzero(keep))
    usual = median(counts.values()) if counts else 1.0  # parameters outside any module that computes (embeddings)
    return {name: max(counts.get(name.rpartition(".")[0], usual), 1.0) for name in context.params}

"""Criteria that need no data: Magnitude, BNScale, Random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cpd_fast.errors import ScoreError
from cpd_fast.score._layout import Run
from cpd_fast.score.criterion import Closure, Context, Criterion

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Magnitude(Criterion):
    r"""Size of a channel's weights: mean over its slices of sum_j |w_j|^p.

    Slices are rows and columns of weights; biases and norms count only where a group has nothing else.

    Attributes:
        p: Exponent; 2 is the squared L2 norm, 1 the L1 norm.

    Source: Li et al., arXiv:1608.08710, sum of absolute weights of one filter; over coupled rows and columns as in
    Fang et al., arXiv:2301.12900 (DepGraph).

    Example:
        >>> Magnitude(p=1)
        Magnitude(p=1)
    """

    p: float = 2

    data: ClassVar[str] = "nothing"
    normalize: ClassVar[str] = "mean"

    def observe(self, context: Context, closure: Closure | None) -> Iterator[Tensor]:
        """Yield the one observation."""
        layout, params = context.layout, context.params
        sums = layout.cells(layout.reduce({k: w.abs().pow(self.p) for k, w in context.weights.items()}))
        yield layout.channels(sums * layout.mean_weights(lambda r: params[r.slice.param].dim() > 1))


@dataclass(frozen=True)
class BNScale(Criterion):
    r"""Mean of |gamma| over the normalisation layers that a channel runs through.

    Raises:
        ScoreError: While scoring, if a prunable group runs through no normalisation with a scale.

    Source: Liu et al., arXiv:1708.06519 (network slimming).

    Example:
        >>> BNScale().data
        'nothing'
    """

    data: ClassVar[str] = "nothing"
    normalize: ClassVar[str] = "none"

    def observe(self, context: Context, closure: Closure | None) -> Iterator[Tensor]:
        """Yield the one observation.

        Raises:
            ScoreError: If a prunable group runs through no normalisation with a scale.
        """
        layout = context.layout
        scales = {
            f"{name}.weight" if name else "weight"
            for name, m in context.model.named_modules(remove_duplicate=False)
            if isinstance(m, _NORMS)
        }

        def chosen(r: Run) -> bool:
            return r.slice.param in scales

        have = {r.group.name for r in layout.runs if chosen(r)}
        lack = [g.name for g in context.graph.prunable_groups if g.name not in have]
        if lack:
            raise ScoreError(
                f"BNScale: {len(lack)} prunable groups run through no normalisation with a scale: "
                f"{', '.join(lack[:5])}; use another criterion or ignore them in comb"
            )
        sums = layout.cells(layout.reduce({k: w.abs() for k, w in context.weights.items()})) / context.elements
        yield layout.channels(sums * layout.mean_weights(chosen) * layout.per_cell(chosen))


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random numbers: the baseline that every criterion has to beat.

    Attributes:
        generator: Source of the numbers; ``None`` is a fresh one on the CPU with seed 0 for every call.

    Example:
        >>> Random().data
        'nothing'
    """

    generator: torch.Generator | None = None

    data: ClassVar[str] = "nothing"

    def observe(self, context: Context, closure: Closure | None) -> Iterator[Tensor]:
        """Yield the one observation."""
        g = context.generator
        yield torch.rand(context.graph.n_channels, generator=g, device=g.device).to(context.layout.device)

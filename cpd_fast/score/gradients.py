"""First-order criteria: Taylor (what CPD's released code computes) and GroupFisher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cpd_fast.errors import ScoreError
from cpd_fast.score.criterion import Closure, Context, Criterion, checked, first_gradients
from cpd_fast.types import CoupledGroup, ParamSlice

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_LINEAR = torch.nn.functional.linear


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
        yield self.from_gradients(context, context.by_name(first_gradients(context, closure)))

    def from_gradients(self, context: Context, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """One observation from a training step's gradients, ``(n_channels,)``."""
        layout = context.layout
        terms = layout.cells(layout.reduce_product(dict(context.weights), gradients)) ** 2
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


@dataclass(frozen=True)
class GroupFisher(Criterion):
    r"""Empirical Fisher information of a gate on each channel, per sample.

    score_c = sum_n ( sum_{consumers l} sum_{positions} x_{l,n,c} * dL/dx_{l,n,c} )^2: the squared gradient of the loss
    with respect to a gate m_c = 1 that multiplies the channel wherever a convolution or linear layer consumes it, for
    each sample n alone (dim 0 of activations; windows and tokens folded into dim 0 are unfolded). Groups that no such
    layer consumes (query and key dims) are gated where they are produced. It sees what batch norm hides from weight
    gradients. One backward a batch, without weight gradients. L is the batch loss: the score scales with the square of
    its reduction.

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
        gates = _Gates(context)
        with gates:
            loss = checked(closure())
        grads = torch.autograd.grad(loss, gates.tensors, allow_unused=True) if gates.tensors else ()
        yield gates.scores(grads)


@dataclass(frozen=True)
class _Use:
    """Where a tensor's channels lie among a group's: ``index`` ``(n_channels, k)`` along ``dim``."""

    group: CoupledGroup
    index: Tensor
    dim: int


class _Gates(TorchFunctionMode):
    """Marks what convolutions and linear layers consume (or produce), so that gate gradients can be read there."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self._context = context
        self._consumers: dict[int, list[tuple[CoupledGroup, ParamSlice]]] = {}
        self._producers: dict[int, list[tuple[CoupledGroup, ParamSlice]]] = {}
        for g in context.graph.groups:
            wide = [s for s in g.slices if s.param in context.params and context.params[s.param].dim() > 1]
            columns = [s for s in wide if not s.produces]
            table, chosen = (self._consumers, columns) if columns else (self._producers, wide)
            for s in chosen:
                table.setdefault(id(context.params[s.param]), []).append((g, s))
        self.tensors: list[Tensor] = []
        self._uses: list[list[_Use]] = []
        self._batch: int | None = None  # fewest rows that any layer saw: the samples

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not _LINEAR and func not in _CONVOLUTIONS:
            return func(*args, **kwargs)
        args = list(args)
        x = args.pop(0) if args else kwargs.pop("input")
        weight = args.pop(0) if args else kwargs.pop("weight")
        dim = -1 if func is _LINEAR else 1
        if x.dim() > 1:
            self._batch = min(x.shape[0], self._batch or x.shape[0])
        key = self._parameter(weight)
        if key in self._consumers and x.requires_grad:
            x = x.view_as(x)
            uses = [_Use(g, self._tensor(_inputs(s, weight, x.shape[dim])), dim) for g, s in self._consumers[key]]
            self.tensors.append(x)
            self._uses.append(uses)
        y = func(x, weight, *args, **kwargs)
        if key in self._producers and y.requires_grad:
            y = y.view_as(y)
            self.tensors.append(y)
            self._uses.append([_Use(g, self._tensor(s.index), dim) for g, s in self._producers[key]])
        return y

    def _parameter(self, weight: Tensor) -> int:
        """Identity of the parameter that a layer's weight is, or is made from in one step (mask, cast)."""
        for node, _ in () if weight.grad_fn is None else weight.grad_fn.next_functions:
            source = getattr(node, "variable", None)
            if id(source) in self._consumers or id(source) in self._producers:
                return id(source)
        return id(weight)

    def _tensor(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(index)).to(self._context.layout.device)

    def scores(self, grads: tuple[Tensor | None, ...]) -> Tensor:
        layout = self._context.layout
        samples = self._batch or 1
        gates: dict[str, Tensor] = {}
        extra = torch.zeros(layout.n_channels, dtype=layout.dtype, device=layout.device)
        seen: set[str] = set()
        for x, grad, uses in zip(self.tensors, grads, self._uses, strict=True):
            seen.update(u.group.name for u in uses)
            if grad is None:
                continue
            both = x.detach().to(layout.dtype) * grad.to(layout.dtype)
            dim = uses[0].dim % both.dim()
            rows = both.unsqueeze(0) if both.dim() == 1 else both
            others = [d for d in range(1, rows.dim()) if d != (dim if both.dim() > 1 else 1)]
            rows = rows.sum(others) if others else rows  # (rows, C)
            unfolded = rows.shape[0] % samples == 0
            if unfolded:
                rows = rows.view(samples, -1, rows.shape[1]).sum(1)
            for u in uses:
                value = rows[:, u.index].sum(2)  # (rows, n_channels)
                if unfolded:
                    known = gates.get(u.group.name)
                    gates[u.group.name] = value if known is None else known + value
                else:
                    extra[u.group.offset : u.group.offset + u.group.n_channels] += (value**2).sum(0)
        lack = [g.name for g in self._context.graph.prunable_groups if g.name not in seen]
        if lack:
            raise ScoreError(
                f"GroupFisher: no convolution or linear layer of {len(lack)} prunable groups was called: "
                f"{', '.join(lack[:5])}; use HessianTrace or Taylor, or ignore them in comb"
            )
        for g in self._context.graph.groups:
            if g.name in gates:
                extra[g.offset : g.offset + g.n_channels] += (gates[g.name] ** 2).sum(0)
        return extra


def _inputs(s: ParamSlice, weight: Tensor, width: int) -> np.ndarray:
    """Indices of the layer's input channels that each channel of a consuming slice owns: ``(n_channels, k)``."""
    if s.dims == (1,):
        return s.index
    rows, columns = weight.shape[:2]  # a grouped convolution: dims (0, 1), input channel from (row, column)
    groups = max(width // columns, 1)
    inputs = s.index // columns // max(rows // groups, 1) * columns + s.index % columns
    unique = [np.unique(r) for r in inputs]
    return np.stack(unique)

"""Candidates as networks one can evaluate: built without a proof, with one, or by masks; then calibrated."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from cpd_fast.compact import can_slice, compact, sliced
from cpd_fast.errors import CompactError, SearchError
from cpd_fast.masking import masked
from cpd_fast.search.calibration import (
    Batch,
    Means,
    adapt_batch_norm,
    batch_norms,
    channel_means,
    match_means,
)
from cpd_fast.types import ChannelGraph, PrunePlan

EXECUTIONS = ("auto", "sliced", "compact", "masked")


class CandidateBuilder:
    """Makes the networks that a search evaluates.

    Args:
        model: The dense network; never changed.
        graph: Its coupled channel groups.
        batches: Calibration batches, the same for every candidate.
        probe: A plan that shrinks every group, by different shares.
        execution: ``"sliced"``: weights are cut, without a proof (exact where ``can_slice``); ``"compact"``: with
            the proof of every candidate; ``"masked"``: the dense network under masks; ``"auto"``: sliced where it is
            exact, else compact.
        momentum: Of adaptive batch norm; None is the plain average.

    Attributes:
        execution: What is done.
        calibration: ``"adaptive batch norm"`` or ``"matched means"``, for networks without one.

    Raises:
        SearchError: If ``execution`` is unknown, or sliced is not exact for this model.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        batches: tuple[Batch, ...],
        probe: PrunePlan,
        execution: str = "auto",
        momentum: float | None = None,
    ) -> None:
        if execution not in EXECUTIONS:
            raise SearchError(f"execution={execution!r}: expected one of {', '.join(EXECUTIONS)}")
        self._model, self._graph, self._batches, self._momentum = model, graph, batches, momentum
        if execution in ("auto", "sliced"):
            exact = self._slicing_is_exact(probe)
            if not exact and execution == "sliced":
                raise SearchError(
                    "execution='sliced': this forward holds sizes that must be repaired; use 'compact' or 'auto'"
                )
            execution = "sliced" if exact else "compact"
        self.execution = execution
        has_norms = bool(batch_norms(model))
        self.calibration = "adaptive batch norm" if has_norms else "matched means"
        self._means: Means = {} if has_norms else channel_means(model, graph, batches)
        how = "auto" if has_norms else "full_width"  # matched means look at the original shapes
        self._masked = masked(copy.deepcopy(model), graph, PrunePlan({}, graph.fingerprint), how)
        if execution != "masked":
            del self._masked

    @torch.no_grad()
    def _slicing_is_exact(self, probe: PrunePlan) -> bool:
        """By the replay without weights, and bit for bit against a proven compaction on the first batch."""
        if not can_slice(self._model, self._graph, probe):
            return False
        try:
            pair = [f(self._model, self._graph, probe).eval() for f in (sliced, compact)]
            outs = [self._batches[0].feed(m) for m in pair]
        except (CompactError, RuntimeError):  # the latter: shapes that do not fit
            return False
        a, b = ([t for t in tree_leaves(out) if isinstance(t, torch.Tensor)] for out in outs)
        return all(torch.equal(x, y) or (x.isnan() == y.isnan()).all() and torch.allclose(x, y, equal_nan=True)
                   for x, y in zip(a, b, strict=True))  # fmt: skip

    @contextmanager
    def candidate(self, plan: PrunePlan) -> Iterator[nn.Module]:
        """The calibrated network of a plan, in eval mode; valid inside the block."""
        if self.execution != "masked":
            network = (sliced if self.execution == "sliced" else compact)(self._model, self._graph, plan).eval()
            self._calibrate(network, plan, network)
            yield network
            return
        self._masked.update(plan)
        network = self._masked.model
        before = {k: v.clone() for k, v in network.state_dict().items()}
        try:
            self._masked.eval()
            with self._masked.cached_weights():
                self._calibrate(network, plan, self._masked)
            with self._masked.cached_weights():  # matched means are in the biases by now
                yield self._masked
        finally:
            network.load_state_dict(before)

    def _calibrate(self, network: nn.Module, plan: PrunePlan, run: nn.Module) -> None:
        if self.calibration == "adaptive batch norm":
            adapt_batch_norm(run, self._batches, self._momentum)
        else:
            match_means(network, self._graph, plan, self._batches, self._means, run)

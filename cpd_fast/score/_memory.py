"""How much memory scoring needs, found out on fake tensors, and how to stay within a limit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

from cpd_fast.errors import MemoryLimitError, ScoreError
from cpd_fast.memory import (
    RESERVE,
    BatchLoss,
    PeakMemory,
    Split,
    bytes_text,
    count_samples,
    faked,
    first_part,
    parse_bytes,
    size_of,
)
from cpd_fast.score._double import NoDoubleBackwardError
from cpd_fast.score._finite import Step
from cpd_fast.score.criterion import Context, Criterion, quiet
from cpd_fast.score.gates import GateHessian
from cpd_fast.score.hessian import HessianTrace
from cpd_fast.types import ChannelGraph, PrunePlan

_PROBES = 2  # of a predicted run: what a kept graph needs beyond the first shows with the second
_MEAN_TOLERANCE = 1e-3
LossFn = Callable[[nn.Module, Any], Tensor]


def predicted_peak(
    model: nn.Module,
    graph: ChannelGraph,
    batch: Any,
    loss_fn: LossFn,
    criterion: Criterion,
    plan: PrunePlan | None = None,
) -> int:
    """Most bytes that scoring one batch undivided holds at once: model, batch and all that is computed.

    The criterion runs on fake tensors: nothing of size is allocated and nothing computed. Workspaces inside library
    calls are not seen.

    Args:
        model: The model; left as it is.
        graph: Its channel graph.
        batch: What ``loss_fn`` takes.
        loss_fn: As for :func:`cpd_fast.score`.
        criterion: As for :func:`cpd_fast.score`.
        plan: As for :func:`cpd_fast.score`.

    Returns:
        Bytes on the device of the model.

    Raises:
        ScoreError: If the criterion cannot run.
        MemoryLimitError: If the loss does not run on fake tensors (it reads a value).

    Example:
        >>> import cpd_fast as cpd
        >>> model = nn.Linear(1000, 1000)
        >>> graph = cpd.comb(nn.Sequential(model, nn.Linear(1000, 2)), torch.zeros(1, 1000))
        >>> net = nn.Sequential(model, nn.Linear(1000, 2))
        >>> bytes_ = predicted_peak(net, graph, torch.zeros(4, 1000), lambda m, x: m(x).mean(), cpd.HessianTrace(1))
        >>> 8e6 < bytes_ < 30e6
        True
    """
    if isinstance(criterion, HessianTrace):
        criterion = replace(criterion, num_probes=min(criterion.num_probes, _PROBES), generator=None)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = tree_map_only(Tensor, mode.from_tensor, batch)
    with faked(model, mode) as tensors:
        inputs = [t for t in tree_flatten(fake)[0] if isinstance(t, Tensor)]
        context = Context(model, graph, None, plan)
        context.step = Step(1e-3, None)  # the search for one needs values
        context.probes.set_state((0, 0))
        tracker = PeakMemory([*tensors, *inputs])
        try:
            with quiet(context), mode, tracker:
                for _ in criterion.observe(context, BatchLoss(loss_fn, model, fake)):
                    pass
        except ScoreError:
            raise
        except Exception as e:
            raise MemoryLimitError(
                f"memory_limit: the loss does not run on fake tensors ({type(e).__name__}: {str(e).splitlines()[0]}); "
                "keep .item(), printing and branches on values out of loss_fn"
            ) from e
    return tracker.peak


class Fitter:
    """Chooses engine and micro-batch so that scoring stays within a limit.

    Args:
        limit: Bytes, or a text such as ``"10GiB"``.
        split: See :func:`cpd_fast.score`.

    Raises:
        MemoryLimitError: If the limit is not one.
    """

    def __init__(self, limit: int | str, split: Split | None = None) -> None:
        self.limit, self.split = parse_bytes(limit), split
        self.peak = 0
        self._chosen: dict[Any, tuple[Criterion, int]] = {}
        self._checked = False

    def fit(
        self, context: Context, batch: Any, loss_fn: LossFn, model: nn.Module, criterion: Criterion
    ) -> tuple[Criterion, BatchLoss]:
        """The criterion with its engine chosen, and the loss divided; decided anew where shapes change.

        Raises:
            MemoryLimitError: If nothing fits.
        """
        shapes = tuple((t.shape[1:], t.dtype) for t in tree_flatten(batch)[0] if isinstance(t, Tensor))
        samples = count_samples(batch)
        if shapes not in self._chosen:
            self._chosen[shapes] = self._choose(context, batch, samples, loss_fn, criterion)
        criterion, micro = self._chosen[shapes]
        loss = BatchLoss(loss_fn, model, batch, micro if samples is None or samples > micro else None, self.split)
        if len(loss.parts) > 1 and not self._checked:
            self._check_mean(context, loss)
            self._checked = True
        return criterion, loss

    def _choose(
        self, context: Context, batch: Any, samples: int | None, loss_fn: LossFn, criterion: Criterion
    ) -> tuple[Criterion, int]:
        refused: list[str] = []
        for candidate in _candidates(criterion):
            engine = getattr(candidate, "engine", type(candidate).__name__)

            def peak(n: int, candidate: Criterion = candidate) -> int:
                whole = samples is not None and n >= samples
                part = batch if whole else first_part(batch, n, self.split)
                rest = size_of(batch) - size_of(part)
                needed = predicted_peak(context.model, context.graph, part, loss_fn, candidate, context.plan) + rest
                return int((needed + _others(context)) / (1 - RESERVE))

            try:
                n, needed = self._largest(peak, samples)
            except NoDoubleBackwardError as e:
                refused.append(str(e).split(";")[0])
                continue
            if needed <= self.limit:
                self.peak = max(self.peak, needed)
                what = "undivided" if n == samples else f"in micro-batches of {n}"
                reason = f"{what} it needs about {bytes_text(needed)} of {bytes_text(self.limit)}"
                context.engine = (engine, "; ".join([*refused, reason])) if hasattr(candidate, "engine") else None
                context.info |= {"memory_limit": self.limit, "predicted_peak": self.peak, "micro_batch": n}
                return candidate, n
            refused.append(f"{engine} needs {bytes_text(needed)} for one sample")
        raise MemoryLimitError(
            f"memory_limit: {'; '.join(refused)}: more than {bytes_text(self.limit)}; raise the limit, use smaller "
            "inputs, or HessianTrace(engine='finite_difference')"
        )

    def _largest(self, peak: Callable[[int], int], samples: int | None) -> tuple[int, int]:
        """Most samples that fit, and their peak; one sample where not even that does."""
        one = peak(1)
        most = samples if samples is not None else 2**30
        if one > self.limit or most == 1:
            return 1, one
        each = max(peak(2) - one, 1)
        n = max(min(most, 1 + (self.limit - one) // each), 1)
        while n > 1:
            needed = peak(n)
            if needed <= self.limit:
                return n, needed
            n = max(min(n - 1, int(n * self.limit / needed)), 1)
        return 1, one

    def _check_mean(self, context: Context, loss: BatchLoss) -> None:
        """Warn where the parts do not add up to the whole: the loss is no mean over samples."""
        with torch.no_grad(), torch.random.fork_rng(context.cuda_devices):
            whole = float(loss())
            parts = sum(p.weight * float(p.closure()) for p in loss.parts)
        if abs(whole - parts) > _MEAN_TOLERANCE * max(abs(whole), 1e-12):
            warnings.warn(
                f"memory_limit: the loss of a batch is {whole:.5g}, of its micro-batches {parts:.5g} on average: it is "
                "no plain mean over samples (class weights, ignored pixels), so scores are those of the average; give "
                "split= with the share of each micro-batch to get the batch's own",
                stacklevel=5,
            )


def _candidates(criterion: Criterion) -> list[Criterion]:
    if isinstance(criterion, HessianTrace) and criterion.engine == "auto":
        engines = ["retained", "streaming", "finite_difference"]
        return [replace(criterion, engine=e) for e in engines if e != "streaming" or criterion.num_probes > 1]
    if isinstance(criterion, GateHessian) and criterion.engine == "auto":
        return [replace(criterion, engine=e) for e in ("retained", "finite_difference")]
    return [criterion]


def _others(context: Context) -> int:
    """Bytes on the model's GPU that belong to nothing here."""
    if not context.cuda_devices:
        return 0
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in context.model.state_dict().values()}
    return max(torch.cuda.memory_allocated(context.cuda_devices[0]) - sum(own.values()), 0)

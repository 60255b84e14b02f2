"""Score the channels of a model over batches of data; merge the scores of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from cpd_fast.errors import ScoreError
from cpd_fast.memory import BatchLoss, Split
from cpd_fast.score._memory import Fitter
from cpd_fast.score._moments import Moments
from cpd_fast.score.criterion import Context, Criterion, quiet
from cpd_fast.score.hessian import HessianTrace
from cpd_fast.types import ChannelGraph, PrunePlan, Scores
from cpd_fast.wrappers import unwrap


def score(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    criterion: Criterion | None = None,
    plan: PrunePlan | None = None,
    memory_limit: int | str | None = None,
    split: Split | None = None,
) -> Scores:
    """Importance of every channel of every group, averaged over batches.

    The model is used in eval mode (batch-norm statistics stand still) and left as it was: parameters and buffers bit
    for bit, ``.grad``, training mode, ``requires_grad`` and the global random state. Frozen parameters are scored like
    all others; parameters that the loss does not use score zero. Compiled and data-parallel wrappers
    are looked through.

    Args:
        model: The model that ``graph`` was combed from; masks may be attached.
        graph: Its channel graph.
        batches: What ``loss_fn`` takes, one after the other; every batch weighs the same. Not needed by criteria that
            look at weights only.
        loss_fn: ``(model, batch) -> scalar loss``, a mean over the batch, with a graph.
        criterion: ``HessianTrace(num_probes=1)`` where ``None``.
        plan: The plan under which ``model`` runs, where masks are attached: removed weights then count for nothing.
        memory_limit: Most that model, batch and scoring may hold at once, in bytes or as ``"10GiB"``. The largest
            micro-batches that fit are used, each weighted by its samples, and ``HessianTrace(engine="auto")`` takes the
            engine that fits; every probe sees all micro-batches, so the scores are those of the undivided batch up to
            rounding. Needs are predicted on fake tensors. None: batches are never divided.
        split: ``(batch, n) -> micro-batches of at most n samples`` or pairs ``(micro_batch, share)`` with shares that
            add up to 1, where the tensors of a batch (alone, or in tuples, lists and dicts) do not share dim 0, or the
            loss is no mean over samples.

    Returns:
        fp32 ``(n_channels,)`` by group name, larger = keep; ``scores.stderr`` where there were two observations.

    Raises:
        ScoreError: If there are no batches, the loss is not a finite scalar with a graph, a value is not finite (the
            parameter is named), or the graph belongs to another model.
        MemoryLimitError: If nothing fits into ``memory_limit``.

    Example:
        >>> import torch, cpd_fast as cpd
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = cpd.comb(model, torch.zeros(1, 4))
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> score(model, graph, batches, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))["0"].shape
        torch.Size([8])
    """
    criterion = criterion if criterion is not None else HessianTrace()
    seen = _callable_model(model, criterion)
    model = unwrap(model)
    context = Context(model, graph, criterion.seeded(), plan)
    moments = context.moments()
    with quiet(context):
        if criterion.data == "nothing":
            for observation in criterion.observe(context, None):
                moments.add(observation)
        else:
            if batches is None or loss_fn is None:
                raise ScoreError(f"{type(criterion).__name__} needs batches and loss_fn(model, batch) -> scalar loss")
            fitter = None if memory_limit is None else Fitter(memory_limit, split)
            chosen = criterion
            for batch in batches:
                loss = BatchLoss(loss_fn, seen, batch)
                if fitter is not None:
                    chosen, loss = fitter.fit(context, batch, loss_fn, seen, criterion)
                one = context.moments()
                for taken, observation in enumerate(chosen.observe(context, loss), 1):
                    one.add(observation)
                    if criterion.enough(one, taken):
                        break
                moments.add_batch(one)
                if criterion.finished(moments):
                    break
    return criterion.finish(context, moments)


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """The scores over all observations of several ranks or runs: weighted means and pooled standard errors.

    Args:
        parts: Scores of one criterion on one model, each fp32 ``(n_channels,)`` by group.

    Returns:
        What scoring all their batches in one call would have given, up to rounding.

    Raises:
        ScoreError: If there are none, or they differ in model or criterion.

    Example:
        >>> import torch
        >>> one = Scores({"a": torch.tensor([1.0])}, criterion="t", fingerprint="f", info={"observations": 1})
        >>> two = Scores({"a": torch.tensor([4.0])}, criterion="t", fingerprint="f", info={"observations": 2})
        >>> merge_scores([one, two])["a"].tolist()
        [3.0]
    """
    if not parts:
        raise ScoreError("no scores to merge; give at least one")
    first = parts[0]
    for other in parts[1:]:
        if (other.fingerprint, other.criterion, set(other)) != (first.fingerprint, first.criterion, set(first)):
            raise ScoreError(
                f"cannot merge {other.criterion} of model {other.fingerprint} with {first.criterion} of model "
                f"{first.fingerprint}; merge scores of one criterion on one graph"
            )
    values, stderr, total, batches = {}, {}, 0, 0
    signed = [part.info.get("signed_means", part) for part in parts]  # scores that are magnitudes: what they are of
    for name in first:
        moments = Moments(first[name].numel())
        for part, means in zip(parts, signed, strict=True):
            n = int(part.info.get("observations", 1))
            b = int(part.info.get("batches", n))
            its = Moments(first[name].numel())
            its.count += n
            its.batches += b
            its.mean += means[name]
            if name in part.stderr:
                square = part.stderr[name].double() ** 2
                its.between += square * n * (b - 1)
                its.m2 += square * n * (b - 1 if b > 1 else n - 1)
            moments.merge(its)
        values[name], total, batches = moments.mean, int(moments.count), int(moments.batches)
        spread = moments.stderr
        if spread is not None:
            stderr[name] = spread.float()
    info: dict[str, Any] = {**first.info, "observations": total, "batches": batches}
    if "signed_means" in info:
        info["signed_means"] = {k: v.float() for k, v in values.items()}
        values = {k: v.abs() for k, v in values.items()}
    return Scores(values, criterion=first.criterion, fingerprint=first.fingerprint, stderr=stderr, info=info)


def _callable_model(model: nn.Module, criterion: Criterion) -> nn.Module:
    """What ``loss_fn`` is given: a compiled model where only gradients of it are taken, else the user's own module."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    if isinstance(criterion, HessianTrace) and criterion.engine == "finite_difference":
        return model
    return unwrap(model)

"""EagleEye's search for a plan, on Optuna: draw, calibrate, evaluate, rank."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cpd_fast.errors import SearchError
from cpd_fast.memory import device_of
from cpd_fast.schedule import CandidateSpace
from cpd_fast.score import Magnitude, score
from cpd_fast.search.calibration import Batch, materialise
from cpd_fast.search.candidates import CandidateBuilder
from cpd_fast.search.result import Candidate, SearchResult, pareto_front
from cpd_fast.search.study import Copy, Report, Study, check_value
from cpd_fast.search.trials import RECORD, WORKER
from cpd_fast.types import ChannelGraph, PrunePlan, Scores, Target
from cpd_fast.wrappers import unwrap

DEFAULT_STORAGE = "cpd_search.sqlite3"


def search(
    model: nn.Module,
    graph: ChannelGraph,
    target: Target,
    calibration: Iterable[Any],
    evaluate: Callable[[nn.Module], float | Iterator[float]],
    *,
    num_candidates: int = 100,
    scores: Scores | Mapping[str, Tensor] | None = None,
    sampler: str = "random",
    pruner: str | None = None,
    storage: str | os.PathLike[str] | None = DEFAULT_STORAGE,
    study_name: str = "search",
    seed: int = 0,
    max_pruning_ratio: float | Mapping[str, float] = 0.8,
    min_channels: float | Mapping[str, float] = 1,
    round_to: int = 1,
    latency: Callable[[PrunePlan], float] | None = None,
    momentum: float | None = None,
    execution: str = "auto",
    timeout_s: float | None = None,
    alone: bool = False,
    heartbeat_s: int = 10,
    storage_timeout_s: float = 60.0,
    on_candidate: Callable[[int, float | None], None] | None = None,
) -> SearchResult:
    r"""Find the best of many plans on a target's limit by evaluating each after adaptive batch norm (EagleEye).

    Every candidate is a set of random keep ratios, scaled such that the target is met exactly: no limit is broken, and
    no channel more would fit. Inside a group the channels with the highest scores stay. The candidate's batch norm
    statistics are re-estimated on the calibration batches, which all candidates share; then it is evaluated.

    The study lives in ``storage``. The same call again goes on where it was stopped; the same call in other processes,
    at the same time, shares the work. A killed worker's candidate is evaluated by another. Under ``torchrun`` (an
    initialised process group) every rank works on the one study, and all return the same result.

    Args:
        model: The trained network; it is not changed.
        graph: Its coupled channel groups.
        target: What may remain.
        calibration: Batches of training inputs, without labels: tensors, tuples of arguments (what follows the model's
            own inputs is left out) or dicts. Kept in memory on the model's device.
        evaluate: ``evaluate(candidate)`` -> a number, larger is better; the candidate is in eval mode and valid during
            the call. As a generator it yields the value so far; the last one counts, and ``pruner`` may stop it.
        num_candidates: Candidates of the study, over all calls and workers.
        scores: Which channels stay inside a group; default: the L1 norm of weights, as in the paper.
        sampler: ``"random"`` (the paper's), ``"tpe"``, ``"cmaes"``; ``"nsga2"`` looks for the front of value against
            cost (``latency``, else MACs), at the target and below it.
        pruner: ``"median"``, ``"halving"`` or ``"hyperband"``: stop hopeless candidates early.
        storage: SQLite file, database URL, or None: in memory.
        study_name: Of the study in its storage.
        seed: Of what is drawn.
        max_pruning_ratio: Most that a block of a group may lose, in [0, 1]; a number or group name -> number.
        min_channels: Fewest channels that a block may keep, or the least share of it, below 1; or group name -> that.
        round_to: Kept channels of a touched block are a multiple of this.
        latency: ``plan -> milliseconds``, needed by ``Target(latency_ms=)``.
        momentum: Of adaptive batch norm: None is the plain average over the batches, 0.1 what the paper's code has.
        execution: How a candidate is run, see :class:`CandidateBuilder`.
        timeout_s: No candidate begins later than this, in seconds after the study is opened; None is no limit.
        alone: No other process works on this study, so that what an earlier one left running is taken up at once.
        heartbeat_s: Seconds between signs of life; a worker that gives none for three times that is taken for dead.
        storage_timeout_s: How long to wait for a locked SQLite file.
        on_candidate: Called with number and value (None: failed or stopped) after every candidate of this process.

    Returns:
        Best plan, all candidates, and how they were evaluated.

    Raises:
        SearchError: If arguments are wrong, the storage cannot be used or is of another search, or no candidate could
            be evaluated (holds the first error).
        PlanError: If the target cannot be reached; says the range that can.
        ScoreError: If scores are missing or of another model.

    Source: Li et al., arXiv:2007.02491. Networks without batch norm: :func:`cpd_fast.search.calibration.match_means`.

    Example:
        >>> import cpd_fast as cpd
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> x = torch.randn(16, 1, 8, 8)
        >>> graph = cpd.comb(net, x[:1])
        >>> def quality(candidate):
        ...     return -candidate(x).var().item()
        >>> found = search(net, graph, Target(macs=0.5), [x], quality, num_candidates=1, storage=None)
        >>> found.plan
        PrunePlan(1 groups, 4 channels kept)
    """
    if not isinstance(num_candidates, int) or num_candidates < 1:
        raise SearchError(f"num_candidates={num_candidates!r}: expected a whole number of at least 1")
    if not callable(evaluate):
        raise SearchError(f"evaluate: expected a function of a model, got {type(evaluate).__name__}")
    model = unwrap(model)
    began = time.monotonic()
    if scores is None:
        scores = score(model, graph, criterion=Magnitude(p=1))
    limits: dict[str, Any] = {
        "max_pruning_ratio": max_pruning_ratio,
        "min_channels": min_channels,
        "round_to": round_to,
    }
    space = CandidateSpace(graph, scores, target, latency=latency, **limits)
    batches = materialise(calibration, graph, device_of(model))
    builder = CandidateBuilder(model, graph, batches, _uneven(space), execution, momentum)
    about = {
        "graph": graph.fingerprint,
        "weights": _digest(model.state_dict().values()),
        "target": target.given,
        "scores": _digest(scores[g.name] for g in graph.prunable_groups),
        "limits": str(sorted(limits.items(), key=str)),
        "calibration": f"{builder.calibration}, momentum {momentum}, {_digest(_tensors(batches))}",
        "seed": seed,
        "objectives": 2 if sampler == "nsga2" else 1,
    }

    solved: dict[int, tuple[int, ...]] = {}

    def objective(
        number: int, ratios: tuple[float, ...], width: float, report: Report, known: dict[int, tuple[int, ...]]
    ) -> tuple[tuple[float, ...], dict[str, Any]]:
        counts = space.counts(ratios, width)
        for earlier in range(number):  # of equal candidates the first counts, whoever is faster
            drawn = study.draw(earlier)
            if drawn is not None and earlier not in solved:
                solved[earlier] = space.counts(drawn)
            if counts == solved.get(earlier, known.get(earlier)):
                raise Copy
        record: dict[str, Any] = {"counts": list(counts)}
        try:
            plan = space.plan(counts)
            with torch.no_grad(), builder.candidate(plan) as candidate:
                for so_far in _values(evaluate(candidate)):
                    record["value"] = so_far
                    if sampler != "nsga2":
                        report(so_far)
        except Exception as e:
            e.record = record  # type: ignore[attr-defined]
            raise
        if sampler != "nsga2":
            return (record["value"],), record
        return (record["value"], latency(plan) if latency else float(space.cost(counts).macs)), record

    with _Ranks() as ranks:
        if ranks.count > 1 and storage is None:
            raise SearchError("storage=None: ranks of a process group need a storage that all can reach")
        with ranks.first_alone():
            study = Study(
                storage, study_name, about, space.names, space.lowest, sampler=sampler, pruner=pruner, seed=seed,
                worker=ranks.name, heartbeat_s=heartbeat_s, storage_timeout_s=storage_timeout_s,
            )  # fmt: skip
        ranks.barrier()  # so that all have a share, also where one is slow to connect
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        study.run(num_candidates, objective, deadline, alone and ranks.count == 1, on_candidate)
    return _result(study, space, builder, time.monotonic() - began)


def _values(outcome: Any) -> Iterator[float]:
    """What ``evaluate`` said, once or step by step.

    Raises:
        SearchError: If it said nothing, or something that is no finite number.
    """
    if not isinstance(outcome, Iterator):
        yield check_value(outcome)
        return
    is_empty = True
    for so_far in outcome:
        is_empty = False
        yield check_value(so_far)
    if is_empty:
        raise SearchError("evaluate yielded nothing; expected at least one number")


def _result(study: Study, space: CandidateSpace, builder: CandidateBuilder, seconds: float) -> SearchResult:
    """Read the study.

    Raises:
        SearchError: If no candidate was evaluated.
    """
    states = {"COMPLETE": "done", "PRUNED": "stopped"}
    found = []
    for number, t in study.candidates():
        record = t.user_attrs.get(RECORD) or {}
        state = states.get(t.state.name, "failed" if t.state.name == "FAIL" else "open")
        error = record.get("error")
        if state == "failed" and not error:
            error = "its worker died each time"
        value = t.values[0] if state == "done" else record.get("value") if state == "stopped" else None
        cost = t.values[1] if state == "done" and len(t.values) > 1 else None
        found.append(
            Candidate(
                number, tuple(record.get("counts", ())), value, cost, state, error,
                float(record.get("seconds", 0.0)), str(t.user_attrs.get(WORKER, "")),
            )
        )  # fmt: skip
    done = [c for c in found if c.state == "done"]
    if not done:
        failed = [c for c in found if c.error]
        why = f"all {len(failed)} failed; candidate {failed[0].number}: {failed[0].error}" if failed else "time was up"
        raise SearchError(f"{study.where}: no candidate could be evaluated: {why}")
    best = max(done, key=lambda c: (c.value, -c.number))
    front = pareto_front(done) if best.cost is not None else (best.number,)
    plans = {c.number: space.plan(c.counts) for c in found if c.counts}
    assert best.value is not None
    return SearchResult(
        plans[best.number], best.value, tuple(found), space.names, plans, front, builder.execution, builder.calibration,
        round(seconds, 3),
    )  # fmt: skip


def _uneven(space: CandidateSpace) -> PrunePlan:
    """A plan that shrinks every unit that it can, by different shares: a size never stands in for another by chance."""
    counts = []
    for n, (size, low) in enumerate(zip(space.sizes, space.lowest, strict=True)):
        counts.append(max(int(low * size + 0.5), min(size - 1, int(size * (0.45 + 0.4 * ((n * 0.618) % 1)))), 1))
    return space.plan(counts)


def _tensors(batches: Iterable[Batch]) -> Iterator[Tensor]:
    for b in batches:
        yield from (t for t in tree_leaves((b.args, dict(b.kwargs))) if isinstance(t, Tensor))


def _digest(tensors: Iterable[Tensor]) -> str:
    """Hash of values, shapes and dtypes."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(f"{tuple(t.shape)} {t.dtype}".encode())
        flat = t.detach().to("cpu").contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return sha.hexdigest()[:16]


class _Ranks:
    """The ranks of the process group, if there is one; they leave the block together."""

    def __init__(self) -> None:
        is_on = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.count = torch.distributed.get_world_size() if is_on else 1
        self.rank = torch.distributed.get_rank() if is_on else 0
        self.name = f"rank {self.rank}" if is_on else ""

    def barrier(self) -> None:
        """Wait for all."""
        if self.count > 1:
            torch.distributed.barrier()

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do: it creates the study."""
        if self.rank:
            self.barrier()
        try:
            yield
        finally:
            if not self.rank:
                self.barrier()

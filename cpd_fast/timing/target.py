"""Plans that meet a latency on the real network: predicted from the table, measured, corrected."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpd_fast.compact import compact
from cpd_fast.errors import PlanError
from cpd_fast.export import export_onnx
from cpd_fast.schedule import plan as make_plan
from cpd_fast.timing.measure import compare_latency
from cpd_fast.timing.table import LatencyTable
from cpd_fast.types import ChannelGraph, PrunePlan, Scores, Target

Measure = Callable[[nn.Module], tuple[float, float]]
TOLERANCE = 0.05  # of the target
CLOSE = 0.02  # what is looked for in CLOSE_TRIES, since the next measurement of the same network will be another
MOST_TRIES, CLOSE_TRIES = 8, 4
UNITS = (8, 4, 2, 1)  # what widths are rounded to, by default
RUNS, SECONDS = 500, 3.0  # of each network, a try


@dataclass(frozen=True)
class Try:
    """One plan that was built and measured.

    Attributes:
        plan: The plan.
        predicted_ms: What the table says of it, milliseconds.
        measured_ms: What was measured, milliseconds.
        dense_ms: What the dense network took in turns with it, milliseconds.
        goal_ms: What was asked for, milliseconds; a fraction is one of ``dense_ms``.
    """

    plan: PrunePlan
    predicted_ms: float
    measured_ms: float
    dense_ms: float
    goal_ms: float

    @property
    def off(self) -> float:
        """Measured over asked for, minus 1."""
        return self.measured_ms / self.goal_ms - 1


@dataclass(frozen=True)
class LatencyPlan:
    """A plan whose network was measured.

    Attributes:
        plan: The plan.
        tries: Every plan that was measured on the way, the chosen one included.
        chosen: Which of them it is.
    """

    plan: PrunePlan
    tries: tuple[Try, ...]
    chosen: int

    @property
    def measured_ms(self) -> float:
        """Latency of the compacted network, milliseconds."""
        return self.tries[self.chosen].measured_ms

    @property
    def goal_ms(self) -> float:
        """The target, milliseconds."""
        return self.tries[self.chosen].goal_ms

    @property
    def off(self) -> float:
        """Measured over asked for, minus 1."""
        return self.tries[self.chosen].off


def plan_for_latency(
    model: nn.Module,
    graph: ChannelGraph,
    scores: Scores | Mapping[str, Tensor],
    target: Target | float,
    example_inputs: Any,
    backend: str = "onnxruntime",
    threads: int | None = None,
    table: LatencyTable | None = None,
    measure: Measure | None = None,
    round_to: int | None = None,
    **options: Any,
) -> LatencyPlan:
    r"""Plan for a latency, and see to it that the real network has it.

    The table's plan is compacted and measured in turns with the dense network. Where it is off by more than 2 %, the
    table is asked for a latency that is as much lower or higher (by halves between what was too slow and too fast,
    once both are known), until the network is within 2 % of the target or plans cannot get closer; from the fourth
    network on 5 % will do. The closest one is taken, at most 5 % above the target.

    Args:
        model: The dense network.
        graph: Its channel graph, combed with ``example_inputs``.
        scores: Importance of every channel, larger = keep.
        target: ``Target(latency_ms=...)``, other limits may be in it too, or the number alone: a fraction of the dense
            network's latency up to 1, milliseconds above 1.
        example_inputs: What latency is about; batch size is theirs.
        backend: ``"onnxruntime"`` or ``"eager"``.
        threads: CPU threads; default: what PyTorch uses.
        table: A table of this network, where it is at hand.
        measure: ``compacted network -> (milliseconds of the dense one, of this one)``; default:
            :func:`cpd_fast.compare_latency`.
        round_to: Kept channels of every block are a multiple of this. Default: 8, because kernels are slow on odd
            widths; where no such network is within 5 %, 4, then 2, then 1.
        **options: ``max_pruning_ratio``, ``min_channels`` ... of :func:`cpd_fast.plan`.

    Returns:
        The plan, and everything that was measured.

    Raises:
        PlanError: If the target holds no latency, or cannot be met; says what was measured.
        BackendError: If the backend is unknown or not installed, or has no table.

    Example:
        >>> import cpd_fast as cpd
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
        >>> x = torch.zeros(1, 3, 32, 32)
        >>> graph = cpd.comb(model, x)
        >>> scores = cpd.score(model, graph, criterion=cpd.Magnitude())
        >>> found = plan_for_latency(model, graph, scores, 0.6, x, backend="eager", threads=1)  # doctest: +SKIP
        >>> abs(found.measured_ms / found.goal_ms - 1) < 0.05  # doctest: +SKIP
        True
    """
    target = target if isinstance(target, Target) else Target(latency_ms=target)
    if target.latency_ms is None:
        raise PlanError(f"plan_for_latency: expected Target(latency_ms=...), got {target}")
    count = threads or torch.get_num_threads()
    table = table or LatencyTable(model, graph, example_inputs, backend, count)

    found: list[LatencyPlan] = []
    for unit in UNITS if round_to is None else (round_to,):
        plan_of = partial(make_plan, graph, scores, round_to=unit, latency=table, **options)
        try:
            found.append(meet_latency(model, graph, plan_of, target, example_inputs, table, backend, count, measure))
        except PlanError:
            if unit == (UNITS[-1] if round_to is None else round_to) and not found:
                raise
            continue
        if abs(found[-1].off) <= TOLERANCE:
            break
    best = min(found, key=lambda f: abs(f.off))
    tries = tuple(t for f in found for t in f.tries)
    return LatencyPlan(best.plan, tries, tries.index(best.tries[best.chosen]))


def meet_latency(
    model: nn.Module,
    graph: ChannelGraph,
    plan_of: Callable[[Target], PrunePlan],
    target: Target,
    example_inputs: Any,
    table: LatencyTable,
    backend: str,
    threads: int,
    measure: Measure | None = None,
) -> LatencyPlan:
    """What :func:`plan_for_latency` does, for plans of any making.

    Args:
        model: The dense network.
        graph: Its channel graph, combed with ``example_inputs``.
        plan_of: The plan that the table predicts a target of; its latency is given as a fraction.
        target: With ``latency_ms``.
        example_inputs: What latency is about.
        table: Of the dense network.
        backend: ``"onnxruntime"`` or ``"eager"``.
        threads: CPU threads.
        measure: As in :func:`plan_for_latency`.

    Raises:
        PlanError: If the target cannot be met; says what was measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        take = measure or _measurer(model, example_inputs, backend, threads, Path(folder))
        return _search(model, graph, plan_of, target, table, take)


def _measurer(model: nn.Module, inputs: Any, backend: str, threads: int, folder: Path) -> Measure:
    """Times the dense network and a small one in turns; the dense one is exported once."""
    dense: nn.Module | Path = model
    if backend == "onnxruntime":
        dense = folder / "dense.onnx"
        export_onnx(model, inputs, dense)

    def measure(small: nn.Module) -> tuple[float, float]:
        a, b = compare_latency([dense, small], inputs, backend, RUNS, threads, SECONDS)
        return a.median_ms, b.median_ms

    return measure


def _search(
    model: nn.Module,
    graph: ChannelGraph,
    plan_of: Callable[[Target], PrunePlan],
    target: Target,
    table: LatencyTable,
    measure: Measure,
) -> LatencyPlan:
    assert target.latency_ms is not None
    asked = target.latency_ms * (table.dense_ms if target.latency_ms <= 1 else 1.0)
    slow: float | None = None  # the least that was asked of the table and came out too slow
    fast: float | None = None  # the most that came out too fast
    tries: list[Try] = []
    for _ in range(MOST_TRIES):
        try:
            plan = plan_of(Target(**{**target.given, "latency_ms": min(asked / table(None), 1.0)}))
        except PlanError:
            if not tries:
                raise
            break  # the table knows of nothing that fast
        if any(t.plan == plan for t in tries):  # nothing in between: channels are whole
            break
        small = compact(model, graph, plan)
        dense_ms, measured = measure(small)
        goal = target.latency_ms * (dense_ms if target.latency_ms <= 1 else 1.0)
        tries.append(Try(plan, table(plan), measured, dense_ms, goal))
        if abs(tries[-1].off) <= CLOSE or (len(tries) >= CLOSE_TRIES and any(abs(t.off) <= TOLERANCE for t in tries)):
            break
        if tries[-1].off > 0:
            slow = asked if slow is None else min(slow, asked)
        elif not len(plan):  # the dense network is fast enough
            return LatencyPlan(plan, tuple(tries), len(tries) - 1)
        else:
            fast = asked if fast is None else max(fast, asked)
        known = slow is not None and fast is not None and fast < slow
        asked = (fast * slow) ** 0.5 if known else asked / (1 + tries[-1].off)  # type: ignore[operator]
    return _closest(tries)


def _closest(tries: list[Try]) -> LatencyPlan:
    """The plan next to the target: at most 5 % above it.

    Raises:
        PlanError: If everything was slower than that.
    """
    allowed = [n for n, t in enumerate(tries) if t.off <= TOLERANCE]
    if not allowed:
        seen = ", ".join(f"{t.measured_ms:.3f} ms (predicted {t.predicted_ms:.3f})" for t in tries)
        raise PlanError(
            f"Target(latency_ms): {tries[-1].goal_ms:.3f} ms were not reached: measured were {seen}, dense "
            f"{tries[-1].dense_ms:.3f} ms; raise the target, loosen round_to, or measure on a quieter machine"
        )
    best = min(allowed, key=lambda n: abs(tries[n].off))
    return LatencyPlan(tries[best].plan, tuple(tries), best)

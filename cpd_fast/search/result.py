"""What a search found: plain data."""

from __future__ import annotations

from dataclasses import dataclass

from cpd_fast.types import PrunePlan


@dataclass(frozen=True)
class Candidate:
    """One plan of a search.

    Attributes:
        number: Of the candidate in its study.
        counts: Channels that a block of each unit keeps, in the order of ``SearchResult.units``; empty where the
            candidate failed before they were known.
        value: What ``evaluate`` said, larger is better; of a stopped candidate the last that was reported; None for
            one that failed.
        cost: Second objective (nsga2), smaller is better; None otherwise.
        state: ``"done"``, ``"stopped"`` (early, as hopeless), ``"failed"`` or ``"open"`` (not finished in time).
        error: Why it failed.
        seconds: Wall time that it took.
        worker: Who evaluated it.
    """

    number: int
    counts: tuple[int, ...]
    value: float | None
    cost: float | None
    state: str
    error: str | None
    seconds: float
    worker: str


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What :func:`cpd_fast.search` returns.

    Attributes:
        plan: The best plan.
        value: Its value.
        candidates: All candidates of the study by number, of all workers and earlier calls.
        units: Names of what the counts of a candidate count.
        plans: The plan of every candidate with counts, by number.
        front: Numbers of the candidates that no other beats in value and cost, by rising cost; the best alone where
            there is one objective.
        execution: How candidates were run: ``"sliced"``, ``"compact"`` or ``"masked"``.
        calibration: ``"adaptive batch norm"`` or ``"matched means"``.
        seconds: Wall time of this call.
    """

    plan: PrunePlan
    value: float
    candidates: tuple[Candidate, ...]
    units: tuple[str, ...]
    plans: dict[int, PrunePlan]
    front: tuple[int, ...]
    execution: str
    calibration: str
    seconds: float

    @property
    def best(self) -> Candidate:
        """The candidate of ``plan``."""
        return next(c for c in self.candidates if self.plans.get(c.number) == self.plan and c.value == self.value)

    @property
    def failed(self) -> tuple[Candidate, ...]:
        """Candidates that could not be evaluated, with their errors."""
        return tuple(c for c in self.candidates if c.state == "failed")


def pareto_front(candidates: list[Candidate]) -> tuple[int, ...]:
    """Numbers of the candidates that no other beats in both value (large) and cost (small), by rising cost."""
    front: list[int] = []
    best = float("-inf")
    for c in sorted(candidates, key=lambda c: (c.cost, -(c.value or 0.0), c.number)):
        if c.value is not None and c.value > best:
            front.append(c.number)
            best = c.value
    return tuple(front)

"""How a study's trials stand for candidates: retries, copies and surplus trials are none of their own."""

from __future__ import annotations

from typing import Any

RECORD, RETRY_OF, WORKER = "record", "retry_of", "worker"  # user attributes of a trial


def record_of(t: Any) -> dict[str, Any]:
    """What a trial wrote down when it ended; empty while it runs, and for a dead worker."""
    return t.user_attrs.get(RECORD) or {}


def counts(t: Any) -> bool:
    """Whether a finished trial settles its candidate."""
    if t.state.name == "FAIL":
        return record_of(t).get("outcome") == "failed"
    return t.state.name in ("COMPLETE", "PRUNED")


def originals(trials: list[Any]) -> list[Any]:
    """The trials that stand for a candidate: no retries, copies or surplus."""
    copies = {t.user_attrs.get(RETRY_OF) for t in trials if record_of(t).get("outcome") == "copy"}
    return [
        t
        for t in trials
        if RETRY_OF not in t.user_attrs
        and t.number not in copies
        and record_of(t).get("outcome") not in ("copy", "surplus")
    ]


def slots_of(trials: list[Any]) -> dict[int, int]:
    """Number of the candidate that an original trial (or a copy) stands for: retries and surplus leave no gaps.

    So a search that was interrupted has the same candidates as one that was not.
    """
    firsts = [t.number for t in trials if RETRY_OF not in t.user_attrs and record_of(t).get("outcome") != "surplus"]
    return {number: slot for slot, number in enumerate(sorted(firsts))}


def families(trials: list[Any]) -> dict[int, list[Any]]:
    """Every candidate's original trial and its retries, in order."""
    families = {t.number: [t] for t in originals(trials)}
    for t in trials:
        origin = t.user_attrs.get(RETRY_OF)
        if origin in families and record_of(t).get("outcome") != "surplus":
            families[origin].append(t)
    return families

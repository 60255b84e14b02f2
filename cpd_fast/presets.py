"""CPD's settings by name: as its paper describes them, as its released code has them, and what did best here."""

from __future__ import annotations

from typing import Any

from cpd_fast.errors import PlanError
from cpd_fast.schedule import Greedy, OneGroup
from cpd_fast.score import HessianTrace, Taylor

PRESETS = ("best", "published", "released")


def preset(name: str, interval: int = 50, steps: int = 10) -> dict[str, Any]:
    """Arguments for :class:`cpd_fast.Pruner` that stand for one version of CPD: ``Pruner(..., **preset("released"))``.

    Args:
        name: ``"best"``: the squared Taylor term divided by the MACs of a channel, all groups ranked together, along a
            cubic ramp; it came first in ``bench/experiments/cpd.py``. ``"published"``: the Hessian trace of the text,
            all groups ranked together, along a straight line to the target (``pruner.step(closure)`` is needed).
            ``"released"``: the squared Taylor term of the code with its normalisation, and its rule that takes a few
            channels of one group at a time; it ends when the target holds.
        interval: Training iterations between two removals; 50 in the released DeiT-S configuration.
        steps: Removals of ``"best"`` and ``"published"``; the release's number follows from the network.

    Returns:
        ``criterion`` and ``schedule``, and of ``"best"`` the cost that scores are divided by.

    Raises:
        PlanError: If the name is none of these.

    Source: Schmitt et al., arXiv:2408.03046, and its release; docs/cpd.md names what is not copied.

    Example:
        >>> preset("released")["schedule"]
        OneGroup(interval=50, k={}, warmup=0)
    """
    if name == "best":
        return {"criterion": Taylor(normalize_cost=False), "schedule": Greedy(interval, steps), "per_cost": "macs"}
    if name == "published":
        return {"criterion": HessianTrace(), "schedule": Greedy(interval, steps, ramp="linear")}
    if name == "released":
        return {"criterion": Taylor(), "schedule": OneGroup(interval)}
    raise PlanError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")

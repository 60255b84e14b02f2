"""Physically remove channels, and prove that the result is the masked model."""

from cpd_fast.compact.compact import Scale, compact, rehearse
from cpd_fast.compact.compose import compose_plans
from cpd_fast.compact.resize import Resizer, Structure
from cpd_fast.compact.shrink import kept_shape
from cpd_fast.compact.sliced import can_slice, sliced
from cpd_fast.compact.trials import trial_plan

__all__ = [
    "Resizer",
    "Scale",
    "Structure",
    "can_slice",
    "compact",
    "compose_plans",
    "kept_shape",
    "rehearse",
    "sliced",
    "trial_plan",
]

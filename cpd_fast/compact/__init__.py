"""Physically remove channels, and prove that the result is the masked model."""

from cpd_fast.compact.compact import Scale, compact, rehearse
from cpd_fast.compact.compose import compose_plans
from cpd_fast.compact.shrink import kept_shape

__all__ = ["Scale", "compact", "compose_plans", "kept_shape", "rehearse"]

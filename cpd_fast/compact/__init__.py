"""Physically remove channels, and prove that the result is the masked model."""

from cpd_fast.compact.compact import Scale, compact, rehearse

__all__ = ["Scale", "compact", "rehearse"]

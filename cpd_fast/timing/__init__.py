"""How long networks take: measured, and predicted from a table of their layers."""

from cpd_fast.timing.measure import BACKENDS, Latency, compare_latency, latency

__all__ = ["BACKENDS", "Latency", "compare_latency", "latency"]

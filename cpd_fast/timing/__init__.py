"""How long networks take: measured, predicted from a table of their layers, and planned for."""

from cpd_fast.timing.layers import Layer
from cpd_fast.timing.measure import BACKENDS, Latency, compare_latency, latency
from cpd_fast.timing.table import LatencyTable, cache_folder
from cpd_fast.timing.target import LatencyPlan, Try, meet_latency, plan_for_latency

__all__ = [
    "BACKENDS",
    "Latency",
    "LatencyPlan",
    "LatencyTable",
    "Layer",
    "Try",
    "cache_folder",
    "compare_latency",
    "latency",
    "meet_latency",
    "plan_for_latency",
]

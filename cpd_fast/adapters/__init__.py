"""Forwards that take their sizes from tensors, in place of forwards that hold them: for comb, masks and compaction."""

from cpd_fast.adapters import multihead  # noqa: F401  (registers nn.MultiheadAttention)
from cpd_fast.adapters.registry import Adapted, adapt, adaptable, adaptation, adapted_forward, register_adapter

__all__ = ["Adapted", "adapt", "adaptable", "adaptation", "adapted_forward", "register_adapter"]

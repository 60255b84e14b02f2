"""Functional operators: each has a reference in plain PyTorch and kernels that :mod:`._dispatch` picks among.

Importing this package imports no kernel, starts no CUDA context and needs neither compiler nor Triton.
"""

from cpd_fast.ops._dispatch import explain_backend
from cpd_fast.ops.channel_kl import channel_kl
from cpd_fast.ops.class_kl import class_kl

__all__ = ["channel_kl", "class_kl", "explain_backend"]

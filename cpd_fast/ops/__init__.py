"""Functional operators: each has a reference in plain PyTorch and kernels that :mod:`._dispatch` picks among.

Importing this package imports no kernel, starts no CUDA context and needs neither compiler nor Triton.
"""

from cpd_fast.ops._dispatch import explain_backend
from cpd_fast.ops.channel_kl import channel_kl
from cpd_fast.ops.channel_sums import ChannelTable, channel_sums
from cpd_fast.ops.class_kl import class_kl
from cpd_fast.ops.grouped_conv import grouped_conv2d
from cpd_fast.ops.hutchinson import ReduceTable, hutchinson_reduce, squared_norms
from cpd_fast.ops.masked_conv import masked_conv2d, masked_linear
from cpd_fast.ops.masked_conv_nd import masked_conv1d, masked_conv3d
from cpd_fast.ops.rademacher import fill_rademacher_, perturb_, rademacher
from cpd_fast.ops.reversible import ReversibleStep

__all__ = [
    "ChannelTable",
    "ReduceTable",
    "ReversibleStep",
    "channel_kl",
    "channel_sums",
    "class_kl",
    "explain_backend",
    "fill_rademacher_",
    "grouped_conv2d",
    "hutchinson_reduce",
    "masked_conv1d",
    "masked_conv2d",
    "masked_conv3d",
    "masked_linear",
    "perturb_",
    "rademacher",
    "squared_norms",
]

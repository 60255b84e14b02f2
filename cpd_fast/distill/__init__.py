"""Distillation losses; knows students and teachers, nothing of pruning."""

from cpd_fast.distill.cirkd import CIRKD, PixelMemory, minibatch_relation
from cpd_fast.distill.losses import ChannelWiseDivergence, ChannelWiseKL, CriterionCWD, LogitKL, register_all
from cpd_fast.distill.widths import FeatureCWD, WithTeacher

__all__ = [
    "CIRKD",
    "ChannelWiseDivergence",
    "ChannelWiseKL",
    "CriterionCWD",
    "FeatureCWD",
    "LogitKL",
    "PixelMemory",
    "WithTeacher",
    "minibatch_relation",
    "register_all",
]

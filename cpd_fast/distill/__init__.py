"""Distillation losses; knows students and teachers, nothing of pruning."""

from cpd_fast.distill.losses import ChannelWiseDivergence, ChannelWiseKL, CriterionCWD, LogitKL, register_all

__all__ = ["ChannelWiseDivergence", "ChannelWiseKL", "CriterionCWD", "LogitKL", "register_all"]

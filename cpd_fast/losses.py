"""Distillation losses under their public names, ``cpd.losses.ChannelWiseKL`` and so on."""

from cpd_fast.distill.losses import ChannelWiseDivergence, ChannelWiseKL, CriterionCWD, LogitKL, register_all

__all__ = ["ChannelWiseDivergence", "ChannelWiseKL", "CriterionCWD", "LogitKL", "register_all"]

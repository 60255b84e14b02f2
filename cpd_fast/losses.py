"""Distillation losses under their public names, ``cpd.losses.ChannelWiseKL`` and so on."""

from cpd_fast.distill import (
    CIRKD,
    ChannelWiseDivergence,
    ChannelWiseKL,
    CriterionCWD,
    FeatureCWD,
    LogitKL,
    PixelMemory,
    WithTeacher,
    minibatch_relation,
    register_all,
)

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

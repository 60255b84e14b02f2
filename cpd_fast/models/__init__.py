"""The networks of the built-in tasks, and two that the CPD paper prunes."""

from cpd_fast.models.deit_upernet import DeiTUPerNet, from_mmseg
from cpd_fast.models.efficientnet_lite import EfficientNetLite0FPN
from cpd_fast.models.seaformer import SeaFormer, SeaFormerConfig
from cpd_fast.models.small_resnet import SmallResNet

__all__ = ["DeiTUPerNet", "EfficientNetLite0FPN", "SeaFormer", "SeaFormerConfig", "SmallResNet", "from_mmseg"]

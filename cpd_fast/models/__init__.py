"""The two networks of the built-in tasks."""

from cpd_fast.models.efficientnet_lite import EfficientNetLite0FPN
from cpd_fast.models.small_resnet import SmallResNet

__all__ = ["EfficientNetLite0FPN", "SmallResNet"]

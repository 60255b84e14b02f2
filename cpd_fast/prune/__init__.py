"""Run a model as if channels were removed, at its original shapes; and single weights that stay removed."""

from cpd_fast.prune.masked import MaskedModel, MaskHandle, attach_masks, masked
from cpd_fast.prune.weights import WeightMasks

__all__ = ["MaskHandle", "MaskedModel", "WeightMasks", "attach_masks", "masked"]

"""Run a model as if channels were removed, at its original shapes."""

from cpd_fast.prune.masked import MaskedModel, MaskHandle, attach_masks, masked

__all__ = ["MaskHandle", "MaskedModel", "attach_masks", "masked"]

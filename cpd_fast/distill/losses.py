"""Distillation losses as modules: called with student and teacher predictions, they return one scalar."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from cpd_fast.errors import ShapeError
from cpd_fast.ops.channel_kl import channel_kl
from cpd_fast.ops.class_kl import class_kl

NORM_TYPES = ("none", "channel", "spatial", "channel_mean")
DIVERGENCES = ("mse", "kl")


def _check_positive(owner: str, name: str, value: float) -> None:
    """Refuse a temperature that is not one.

    Raises:
        ValueError: If it is not a positive finite number.
    """
    if not 0.0 < value < math.inf:
        raise ValueError(f"{owner}: {name} must be a positive finite number, got {value}")


class ChannelWiseKL(nn.Module):
    """Channel-wise distillation (CWD): KL between the spatial distributions of each channel, averaged over N and C.

    ``loss_weight * tau^2 / (N * C) * sum KL(softmax(teacher / tau) || softmax(student / tau))``, softmax over pixels.
    The sum over pixels is not divided by their number: the loss does not scale with resolution.

    The teacher receives no gradient. ``-inf`` (masked logits) and NaN mean what :func:`cpd_fast.ops.channel_kl` says.
    An empty batch gives 0.

    Args:
        tau: Temperature, > 0. Logits: 1 (mmrazor, weight 5 to 10) or 4 (TorchDistiller, weight 3).
        loss_weight: Factor on the loss. Logits want 3 to 10, features 35 to 50.
        resize: Let student and teacher differ in H and W; the smaller is read through bilinear interpolation.
        align_corners: Of the interpolation.

    Raises:
        ValueError: If ``tau`` is not positive.

    Source: Shu et al., arXiv:2011.13256.

    Example:
        >>> import torch
        >>> student = torch.zeros(2, 3, 4, 4, requires_grad=True)
        >>> float(ChannelWiseKL(tau=4.0)(student, torch.ones(2, 3, 4, 4)))
        0.0
    """

    def __init__(
        self, tau: float = 1.0, loss_weight: float = 1.0, *, resize: bool = False, align_corners: bool = False
    ) -> None:
        super().__init__()
        _check_positive(type(self).__name__, "tau", tau)
        self.tau = tau
        self.loss_weight = loss_weight
        self.resize = resize
        self.align_corners = align_corners

    def forward(self, preds_S: Tensor, preds_T: Tensor, weight: Tensor | None = None) -> Tensor:
        """Compare student and teacher activations of shape ``(N, C, H, W)``; the result is a scalar.

        ``weight`` is one value a pixel, ``(N, H, W)``: see :func:`cpd_fast.ops.channel_kl`.
        """
        # The weight goes in as a scale, so that the kernel's gradient is final and backward is free.
        num_maps = preds_S.shape[:2].numel()
        scale = self.loss_weight / max(num_maps, 1)
        options: dict[str, Any] = {"weight": weight, "resize": self.resize, "align_corners": self.align_corners}
        return channel_kl(preds_S, preds_T, self.tau, scale=scale, **options).sum()

    def extra_repr(self) -> str:
        """The arguments, for ``print(module)``."""
        return f"tau={self.tau}, loss_weight={self.loss_weight}"


class ChannelWiseDivergence(ChannelWiseKL):
    """Drop-in for mmrazor's class of this name: same constructor, call and value.

    Where the original returns NaN (masked logits) this returns what :func:`cpd_fast.ops.channel_kl` documents. It
    accepts channels-last activations, and the teacher receives no gradient (mmrazor runs it under ``no_grad``).
    """


class LogitKL(nn.Module):
    """Hinton's distillation loss: KL over classes, averaged over samples (and pixels, for logit maps).

    ``loss_weight * T^2 * mean KL(softmax(teacher / T) || softmax(student / T))`` over the K classes of logits
    ``(N, K)`` or ``(N, K, H, W)``. Equal to ``F.kl_div(..., reduction="batchmean") * T^2`` for ``(N, K)``.

    Args:
        temperature: T, > 0.
        loss_weight: Factor on the loss.
        resize: Let student and teacher differ in H and W; the smaller is read through bilinear interpolation.
        align_corners: Of the interpolation.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Hinton et al., arXiv:1503.02531, section 2.

    Example:
        >>> import torch
        >>> float(LogitKL(temperature=4.0)(torch.zeros(2, 10), torch.zeros(2, 10)))
        0.0
    """

    def __init__(
        self, temperature: float = 4.0, loss_weight: float = 1.0, *, resize: bool = False, align_corners: bool = False
    ) -> None:
        super().__init__()
        _check_positive(type(self).__name__, "temperature", temperature)
        self.temperature = temperature
        self.loss_weight = loss_weight
        self.resize = resize
        self.align_corners = align_corners

    def forward(self, preds_S: Tensor, preds_T: Tensor, weight: Tensor | None = None) -> Tensor:
        """Compare student and teacher logits; the result is a scalar.

        ``weight`` is one value a pixel, ``(N, H, W)`` (``(N,)`` for ``(N, K)``): the mean is then a weighted mean, as
        in ``torch.nn.functional.cross_entropy``, and a pixel of weight 0 is ignored.
        """
        options: dict[str, Any] = {"weight": weight, "resize": self.resize, "align_corners": self.align_corners}
        if weight is not None:
            total = class_kl(preds_S, preds_T, self.temperature, scale=self.loss_weight, **options).sum()
            return total / weight.to(total.dtype).sum().clamp(min=torch.finfo(total.dtype).tiny)
        pixels = (max(a, b) for a, b in zip(preds_S.shape[2:], preds_T.shape[2:], strict=False))
        scale = self.loss_weight / max(preds_S.shape[:1].numel() * math.prod(pixels), 1)
        return class_kl(preds_S, preds_T, self.temperature, scale=scale, **options).sum()

    def extra_repr(self) -> str:
        """The arguments, for ``print(module)``."""
        return f"temperature={self.temperature}, loss_weight={self.loss_weight}"


class CriterionCWD(nn.Module):
    """Drop-in for TorchDistiller's class of this name: same constructor, call and values.

    KL with ``norm_type`` channel or spatial runs on the fused kernels, in the log domain: finite where the original's
    ``softmax().log()`` underflows to NaN (logits of scale 50 at temperature 1).

    Args:
        norm_type: ``"channel"`` (softmax over pixels), ``"spatial"`` (softmax over channels), ``"channel_mean"`` (mean
            of each map) or ``"none"`` (raw activations, of the first sample only: so does the original).
        divergence: ``"kl"`` or ``"mse"``.
        temperature: T, > 0; used by ``"kl"`` only (so does the original).

    Raises:
        ValueError: If an argument is none of these.
    """

    def __init__(self, norm_type: str = "none", divergence: str = "mse", temperature: float = 1.0) -> None:
        super().__init__()
        if norm_type not in NORM_TYPES:
            raise ValueError(f"CriterionCWD: norm_type must be one of {', '.join(NORM_TYPES)}, got {norm_type!r}")
        if divergence not in DIVERGENCES:
            raise ValueError(f"CriterionCWD: divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
        _check_positive("CriterionCWD", "temperature", temperature)
        self.norm_type = norm_type
        self.divergence = divergence
        self.temperature = temperature if divergence == "kl" else 1.0

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """Compare student and teacher activations of shape ``(N, C, H, W)``; the result is a scalar.

        Raises:
            ShapeError: If the activations have no pixels: classification logits.
        """
        if preds_S.dim() != 4:
            raise ShapeError(
                f"CriterionCWD: expected activations (N, C, H, W), got shape {tuple(preds_S.shape)}; use LogitKL for "
                "classification logits"
            )
        n, c, h, w = preds_S.shape
        over_channels = self.norm_type in ("channel", "channel_mean")
        scale = 1.0 / max(n * c if over_channels else n * h * w, 1)
        if self.divergence == "kl" and self.norm_type == "channel":
            return channel_kl(preds_S, preds_T, self.temperature, scale=scale).sum()
        if self.divergence == "kl" and self.norm_type == "spatial":
            return class_kl(preds_S, preds_T, self.temperature, scale=scale).sum()
        student, teacher = (self._normalize(x / self.temperature) for x in (preds_S, preds_T.detach()))
        if self.norm_type == "none":  # the original takes the raw first sample
            student, teacher = preds_S[0], preds_T[0].detach()
        if self.divergence == "mse":
            return (student - teacher).square().sum() * scale
        return nn.functional.kl_div(student.log(), teacher, reduction="sum") * (scale * self.temperature**2)

    def _normalize(self, x: Tensor) -> Tensor:
        if self.norm_type == "channel":
            return x.flatten(2).softmax(-1)
        if self.norm_type == "spatial":
            return x.softmax(1)
        return x.flatten(2).mean(-1) if self.norm_type == "channel_mean" else x

    def extra_repr(self) -> str:
        """The arguments, for ``print(module)``."""
        return f"norm_type={self.norm_type!r}, divergence={self.divergence!r}, temperature={self.temperature}"


def register_all() -> list[str]:
    """Put the losses into the ``MODELS`` registries of MMEngine, mmseg and mmrazor, where those are installed.

    A config that says ``type='ChannelWiseDivergence'`` then builds the fused one. In a config file one line does it:
    ``custom_imports = dict(imports=["cpd_fast.mmlab"], allow_failed_imports=False)``; in a script, call this function.

    Returns:
        The registries that were found, e.g. ``["mmengine", "mmrazor"]``.
    """
    found = []
    for package in ("mmengine", "mmseg", "mmrazor"):
        try:
            registry = importlib.import_module(f"{package}.registry").MODELS
            if package == "mmrazor":
                importlib.import_module("mmrazor.models.losses")  # so that ours comes last
        except ImportError:
            continue
        for loss in (ChannelWiseDivergence, ChannelWiseKL, LogitKL, CriterionCWD):
            registry.register_module(module=loss, force=True)
        found.append(package)
    return found

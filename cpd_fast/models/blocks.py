"""Parts that several networks share; names of children are those of mmseg's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, and ReLU unless ``act`` is False (mmcv's module of this name).

    Example:
        >>> ConvModule(3, 8, 3)(torch.zeros(1, 3, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.activate = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs, H, W)`` -> ``(N, outputs, H, W)``."""
        return self.activate(self.bn(self.conv(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is dropped with probability ``rate`` and scaled up otherwise.

    Source: Huang et al., arXiv:1603.09382.

    Example:
        >>> DropPath(0.5).eval()(torch.ones(2, 3)).sum().item()
        6.0
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; samples along dim 0."""
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)


def enlarge(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear interpolation of ``(N, C, H, W)`` to the height and width of ``like``."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

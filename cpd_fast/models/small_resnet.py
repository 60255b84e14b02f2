"""A ResNet small enough to train on a CPU in minutes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class SmallResNet(nn.Module):
    """Basic-block ResNet (He et al., arXiv 1512.03385) with a stride-2 stem, for pictures of about 28x28.

    Takes images ``(N, in_channels, H, W)``, returns logits ``(N, num_classes)``.

    Args:
        num_classes: Number of classes.
        widths: Channels of each stage; every stage but the first halves the resolution.
        blocks: Blocks a stage.
        in_channels: Channels of the pictures.

    Example:
        >>> import torch
        >>> net = SmallResNet(10).eval()
        >>> tuple(net(torch.zeros(2, 1, 28, 28)).shape), sum(p.numel() for p in net.parameters())
        ((2, 10), 308074)
    """

    def __init__(
        self, num_classes: int, widths: Sequence[int] = (32, 64, 128), blocks: int = 1, in_channels: int = 1
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        layers: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(_Block(before, width, stride=2 if stage and not block else 1))
                before = width
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` -> logits ``(N, num_classes)``."""
        return self.classify(self.pool(self.layers(self.stem(x))).flatten(1))


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> ``(N, width, H', W')``."""
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + self.shortcut(x))

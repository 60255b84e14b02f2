"""The built-in networks have the sizes, weights and shapes they promise."""

import pytest
import torch

from cpd_fast.errors import DataError
from cpd_fast.models import EfficientNetLite0FPN, SmallResNet


def lite0():
    try:
        return EfficientNetLite0FPN(num_classes=5)
    except DataError as e:
        pytest.skip(str(e))


def test_lite0_fpn_loads_imagenet_weights():
    net = lite0()
    assert sum(p.numel() for p in net.parameters()) == 3_028_165
    assert net.encoder.stem.weight.double().norm().item() == pytest.approx(22.6732, abs=1e-3)
    assert net(torch.zeros(2, 3, 96, 64)).shape == (2, 5, 96, 64)


def test_lite0_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(DataError, match="pip install efficientnet_lite_pytorch==0.1.0"):
        EfficientNetLite0FPN(5)


def test_small_resnet_sizes():
    net = SmallResNet(10)
    assert sum(p.numel() for p in net.parameters()) == 308_074
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)

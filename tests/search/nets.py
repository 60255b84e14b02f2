"""A network of a millisecond with batch norms, for searches."""

import torch
from torch import nn

import cpd_fast as cpd
from tests.nets import informative


def small(width=24, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 20, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 3, 1),
    )  # fmt: skip
    return informative(net, seed)


def setting(width=24, seed=0):
    """Model, graph and two calibration batches."""
    net = small(width, seed)
    x = torch.randn(2, 16, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    return net, cpd.comb(net, x[0, :1]), list(x)


def output_variance(net):
    """A quality that every plan has another value of."""
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    return float(net(x).double().var())

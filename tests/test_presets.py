"""The presets run to their targets in a training loop."""

import pytest
import torch
from torch.nn import functional as F

import cpd_fast as cpd
from cpd_fast.errors import PlanError
from cpd_fast.presets import PRESETS, preset
from cpd_fast.schedule import holds
from tests.helpers import TwoConv

X = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("name", PRESETS)
def test_reaches_the_target(name):
    model = TwoConv()
    pruner = cpd.Pruner(model, X, cpd.Target(macs=0.5), **preset(name, interval=2, steps=3))
    x, y = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    for _ in range(40):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pruner.step(lambda: F.cross_entropy(model(x), y))
    assert pruner.done and holds(pruner.graph, cpd.Target(macs=0.5), pruner.plan)
    small = pruner.compact().eval()
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-5, atol=1e-6)


def test_unknown():
    with pytest.raises(PlanError, match="preset 'finest': expected one of best, published, released"):
        preset("finest")

"""Masked weights stay at zero through every optimizer."""

import pytest
import torch
from torch import nn

from cpd_fast.errors import PlanError
from cpd_fast.prune import WeightMasks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, weight_decay=0.1),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))


def steps(net, optimizer, n=4):
    for i in range(n):
        x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_nothing_comes_back(kind):
    net = network()
    optimizer = OPTIMIZERS[kind](net.parameters())
    steps(net, optimizer)  # momentum is there when the masks come
    masks = WeightMasks(net)
    masks.prune(0.5)
    masks.attach(optimizer)
    for _ in range(3):
        steps(net, optimizer)
        for name, mask in masks.state_dict().items():
            p = net.get_parameter(name)
            assert torch.equal(p[~mask], torch.zeros(int((~mask).sum()))) and (p[mask] != 0).all()
            assert not p.grad[~mask].any()
            assert all(
                not v[~mask].any() for v in optimizer.state[p].values() if torch.is_tensor(v) and v.shape == p.shape
            )
    masks.remove()
    steps(net, optimizer, 1)
    back = [(net.get_parameter(n)[~m] != 0).any() for n, m in masks.state_dict().items()]
    assert kind != "sgd" or any(back)  # without the masks they would


def test_the_smallest_of_all_layers_go():
    net = network()
    masks = WeightMasks(net)
    before = torch.cat([net.get_parameter(n).detach().abs().flatten() for n in masks.nonzeros()])
    for _ in range(3):
        masks.prune(0.2)
    left = torch.cat([net.get_parameter(n).detach().abs().flatten() for n in masks.nonzeros()])
    n = len(before)
    for _ in range(3):
        n -= round(0.2 * n)
    assert sum(masks.nonzeros().values()) == n == int((left > 0).sum())
    assert torch.equal(left[left > 0].sort().values, before.sort().values[-n:])
    assert masks.density == pytest.approx(0.8**3, abs=0.01)


def test_norms_and_biases_are_left_alone_and_tied_weights_count_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    net[2].weight = net[0].weight
    assert sorted(WeightMasks(net).nonzeros()) == ["0.weight", "3.in_proj_weight", "3.out_proj.weight"]


def test_wrong_use():
    with pytest.raises(PlanError, match="no convolution or linear"):
        WeightMasks(nn.BatchNorm2d(3))
    masks = WeightMasks(network())
    with pytest.raises(PlanError, match=r"fraction=1: expected a number in \[0, 1\)"):
        masks.prune(1)
    with pytest.raises(PlanError, match=r"masks of another model: 0\.weight: expected shape .*got no mask"):
        masks.load_state_dict({})
    net = network()
    with torch.no_grad():
        net[0].weight[0] = float("nan")
    with pytest.raises(PlanError, match="18 weights are not finite"):
        WeightMasks(net).prune(0.2)

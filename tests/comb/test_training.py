"""What a forward does in train mode only is found, although the model is not traced in train mode as a whole."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from cpd_fast.comb import comb
from cpd_fast.comb.meta import clone_to_meta
from cpd_fast.comb.training import TrainingWatch
from cpd_fast.types import ChannelGraph


class Centred(nn.Module):
    """Takes the mean over channels away, in train mode only."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True) if self.training else x


def centre(module, x):
    return x - x.mean(1, keepdim=True) if module.training else x


HELPERS = {"centre": centre}


class ByHelper(nn.Module):
    def forward(self, x):
        return HELPERS["centre"](self, x)


class ByName(nn.Module):
    def forward(self, x):
        mode = getattr(self, "train" + "ing")
        return x - x.mean(1, keepdim=True) if mode else x


class OfItsChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = nn.Identity()

    def forward(self, x):
        return x - x.mean(1, keepdim=True) if self.child.training else self.child(x)


class Frozen(Centred):
    """Refuses train mode, as backbones with fixed norms do."""

    def train(self, mode=True):
        return super().train(False)


class DropPath(nn.Module):
    def forward(self, x):
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.9) if self.training else x


class Swapped(nn.Module):
    """Reverses its channels in train mode: no other norm or site, other couplings."""

    def forward(self, x):
        return x.flip(1) if self.training else x


class Counting(nn.Module):
    """Another way at its second call in train mode."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x


class Net(nn.Module):
    def __init__(self, part, inplace=False):
        super().__init__()
        self.first, self.norm, self.part = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), part
        self.second, self.last, self.inplace = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1), inplace

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        y = self.part(x)
        if self.inplace:
            y += self.second(x)
        return self.last(y + self.second(x))


class Root(Net):
    def forward(self, x):
        if self.training:
            x = x.roll(1, 0)
        return super().forward(x)


X = torch.zeros(2, 3, 8, 8)
MATTERS = {  # network, and whether a trace in train mode as a whole is needed
    "plain": (lambda: Net(nn.Dropout()), False),
    "drop path": (lambda: Net(DropPath()), False),
    "drop path and a child that centres": (lambda: Net(nn.Sequential(DropPath(), Centred())), True),
    "centred": (lambda: Net(Centred()), True),
    "centred by a helper": (lambda: Net(ByHelper()), True),
    "centred by name": (lambda: Net(ByName()), True),
    "read of a child": (lambda: Net(OfItsChild()), True),
    "own train": (lambda: Net(Frozen()), True),
    "channels reversed": (lambda: Net(Swapped()), True),
    "counting": (lambda: Net(Counting()), True),
    "root": (lambda: Root(nn.Identity()), True),
    "written in place": (lambda: Net(nn.Dropout(), inplace=True), True),
    "statistics over channels": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5), nn.Linear(6, 2)), True),
}  # fmt: skip


def described(graph: ChannelGraph) -> tuple:
    sites = sorted((s.module, s.op, s.call, s.channels.tolist()) for s in graph.norm_sites)
    reasons = [(g.name, g.prunable, (g.reason or "").split(" (in ")[0]) for g in graph.groups]
    return graph.fingerprint, sites, reasons, [(s.op, s.module, s.shape, s.constants) for s in graph.steps]


@pytest.mark.parametrize("name", MATTERS)
def test_the_graph_is_that_of_two_whole_traces(name, monkeypatch):
    build, matters = MATTERS[name]
    net, x = build().train(), torch.zeros(2, 5, 4) if name == "statistics over channels" else X
    found, room = [], importlib.import_module("cpd_fast.comb")
    monkeypatch.setattr(room, "TrainingWatch", lambda m: found.append(TrainingWatch(m)) or found[-1])
    graph = comb(net, x)
    assert found[0].matters is matters
    assert net.training and "training" not in vars(nn.Module)
    monkeypatch.setattr(room, "TrainingWatch", lambda m: None)
    assert described(graph) == described(comb(net, x))


@pytest.mark.parametrize("name", ["centred", "centred by a helper", "centred by name", "read of a child"])
def test_a_mean_over_channels_in_train_mode_is_known_to_masks(name):
    graph = comb(MATTERS[name][0](), X)
    assert "mean" in {s.op for s in graph.norm_sites}
    assert "mean" not in {s.op for s in comb(MATTERS["plain"][0](), X).norm_sites}


def test_reversed_channels_in_train_mode_are_no_longer_free():
    free = {g.name for g in comb(Net(nn.Dropout()), X).prunable_groups}
    assert "first" in free and "first" not in {g.name for g in comb(Net(Swapped()), X).prunable_groups}


def test_a_model_is_left_in_its_mode_after_a_failing_trace():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    with pytest.raises(Exception, match="no"):
        comb(nn.Sequential(nn.Conv2d(3, 4, 1), Fails()), X)
    assert "training" not in vars(nn.Module)


def test_copies_share_what_the_model_shares():
    net = Net(nn.Dropout())
    net.second.weight = net.first.weight
    net.extra = net.shared = {"first": net.first, "sizes": [1, 2], "t": torch.ones(2)}
    net.register_forward_pre_hook(lambda m, a: None)
    clone, deep = clone_to_meta(net), copy.deepcopy(net)
    assert clone.second.weight is clone.first.weight and clone.extra is clone.shared
    assert clone.extra["first"] is clone.first and clone.extra["sizes"] is not net.extra["sizes"]
    assert not clone._forward_pre_hooks and len(net._forward_pre_hooks) == 1
    assert [n for n, _ in clone.named_modules()] == [n for n, _ in deep.named_modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(clone.modules(), deep.modules(), strict=True))
    mine = {id(v) for m in net.modules() for v in vars(m).values() if isinstance(v, (dict, list, set))}
    assert not mine & {id(v) for m in clone.modules() for v in vars(m).values()}

"""Students that hold as many weights as a pruned teacher: the paper's plans, residual stages, any network."""

import pytest
import torch
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import PlanError
from cpd_fast.models import SmallResNet
from cpd_fast.prune import WeightMasks
from cpd_fast.schedule import match_plan, plan_cost
from tests.nets import NETS

TEACHER = [64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512]
# shipped with the paper's code: widths of VGG19 students for 36, 59 and 79 % of the weights pruned
SHIPPED = {
    36: [53, 61, 128, 121, 258, 241, 258, 236, 485, 410, 406, 374, 340, 358, 390, 399],
    59: [44, 56, 116, 112, 238, 227, 240, 209, 408, 348, 339, 246, 196, 214, 367, 272],
    79: [40, 49, 111, 97, 225, 187, 224, 170, 356, 233, 220, 99, 111, 84, 297, 122],
}


@pytest.fixture(scope="module")
def vgg19():
    layers, before = [], 3
    for width in TEACHER:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100)).to("meta")
    return net, cpd.comb(net, torch.zeros(1, 3, 32, 32))


def convs(net):
    return [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("percent", SHIPPED)
def test_the_plans_of_the_paper_from_their_layer_densities(vgg19, percent):
    net, graph = vgg19
    shipped, dense = SHIPPED[percent], [w for w in TEACHER if w != "M"]
    density = [o * i / (t * s) for o, i, t, s in zip(shipped, [3, *shipped], dense, [3, *dense], strict=False)]
    nonzeros = {
        f"{name}.weight": round(min(d, 1) * net.get_submodule(name).weight.numel())
        for name, d in zip(convs(net), density, strict=True)
    }
    plan = match_plan(graph, nonzeros)
    found = [len(plan.get(name, range(width))) for name, width in zip(convs(net), dense, strict=True)]
    capped = [min(w, t) for w, t in zip(shipped, dense, strict=True)]  # two layers of st36 are wider than the teacher
    # behind a capped layer the next is wider by as much, to hold the same number of weights
    wanted = [min(t, round(n / (9 * i))) for n, i, t in zip(nonzeros.values(), [3, *found], dense, strict=False)]
    assert found == wanted
    if percent != 36:
        assert found == shipped
    assert all(abs(a - b) <= 1 + 0.01 * b for a, b in zip(found, capped, strict=True))


def test_a_residual_stage_gets_one_width():
    """The paper's ResNet students: one width a stage, at which the stage holds what is left of the teacher's."""
    net = SmallResNet(10, widths=(16, 32, 64), blocks=2)
    graph = cpd.comb(net, torch.zeros(1, 1, 28, 28))
    masks = WeightMasks(net)
    masks.prune(0.59)
    plan = match_plan(graph, masks.nonzeros())
    widths = {g.name: len(plan.get(g.name, range(g.n_channels))) for g in graph.groups if g.prunable}
    stages = [[v for k, v in widths.items() if k.startswith(p)] for p in (("stem", "layers.0", "layers.1"),
              ("layers.2", "layers.3"), ("layers.4", "layers.5"))]  # fmt: skip
    assert all(len(set(s)) == 1 for s in stages), widths
    left, small = sum(masks.nonzeros().values()), cpd.compact(net, graph, plan)
    held = sum(small.get_parameter(k).numel() for k in masks.nonzeros())
    assert held == pytest.approx(left, rel=0.04)
    for stage, width in enumerate((16, 32, 64)):  # no other width comes closer
        own = [n for n in masks.nonzeros() if n.startswith((("stem", "layers.0", "layers.1"),
               ("layers.2", "layers.3"), ("layers.4", "layers.5"))[stage])]  # fmt: skip
        want = sum(masks.nonzeros()[n] for n in own)
        before = stages[stage - 1][0] if stage else 1

        def weights(w, stage=stage, before=before):
            return 9 * (before * w + 3 * w * w) + before * w if stage else 9 * (w + 4 * w * w)

        best = min(range(1, width + 1), key=lambda w: abs(weights(w) - want))
        assert stages[stage][0] == best


@pytest.mark.parametrize("name", sorted(NETS))
def test_any_combed_network(name):
    build, shape, _ = NETS[name]
    torch.manual_seed(0)
    net = build().eval()
    graph = cpd.comb(net, torch.zeros(shape))
    if not graph.prunable_groups:
        pytest.skip("nothing is prunable")
    masks = WeightMasks(net)
    dense = match_plan(graph, masks.nonzeros())
    assert plan_cost(graph, dense) == plan_cost(graph)  # a dense teacher's student is as wide
    masks.prune(0.7)
    plan = match_plan(graph, masks.nonzeros())
    plan.check(graph)
    assert all(1 <= len(kept) <= graph[group].n_channels for group, kept in plan.items())
    cpd.compact(net, graph, plan)(torch.zeros(shape))


def test_an_emptied_layer_keeps_one_channel():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = cpd.comb(net, torch.zeros(1, 4))
    assert len(match_plan(graph, {"0.weight": 0})["0"]) == 1


def test_wrong_counts_are_refused():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = cpd.comb(net, torch.zeros(1, 4))
    with pytest.raises(PlanError, match=r"nonzeros: 0\.weight: expected 0 to 32 weights, got 33"):
        match_plan(graph, {"0.weight": 33})
    with pytest.raises(PlanError, match="no parameter 'one.weight'; comb the teacher"):
        match_plan(graph, {"one.weight": 3})

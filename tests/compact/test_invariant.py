"""The invariant of the library: masked(model)(x) == compact(model)(x), and everything that goes with it."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from cpd_fast.comb import comb as trace_groups
from cpd_fast.compact import Scale, compact
from cpd_fast.errors import CompactError, PlanError
from cpd_fast.models import EfficientNetLite0FPN
from cpd_fast.pipeline import comb
from cpd_fast.prune import attach_masks, masked
from cpd_fast.schedule import plan_cost, random_plan
from cpd_fast.types import PrunePlan
from tests.nets import NETS, FusedAttention, Residual, informative, relative_error, tensors_of

TIMM = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "mobilenetv2_100",
    "vgg11_bn",
    "densenet121",
    "regnety_002",
    "convnext_atto",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "efficientnet_lite0_fpn",
]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def build_timm(name):
    torch.manual_seed(0)
    if name == "efficientnet_lite0_fpn":
        model = EfficientNetLite0FPN(num_classes=5, pretrained=False)
        return informative(model), torch.randn(2, 3, 96, 96, generator=generator(1))
    kw = {"img_size": 96} if name.startswith("deit") else {}
    return informative(timm.create_model(name, num_classes=10, **kw)), torch.randn(2, 3, 96, 96, generator=generator(1))


def check(model, x, keep, dtype, tolerance):
    model, x = model.to(dtype), x.to(dtype)
    graph = comb(model, x)
    plan = random_plan(graph, keep=keep, generator=generator(3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = compact(model, graph, plan)
    with torch.no_grad():
        dense = model(x)
        with masked(model, graph, plan) as m:
            seen = m(x)
        got = small(x)
    assert relative_error(seen, got) < tolerance
    removed = any(len(plan.get(g.name, range(g.n_channels))) < g.n_channels for g in graph.prunable_groups)
    assert not removed or relative_error(dense, got) > 1e-3, "a mask that changes nothing proves nothing"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    predicted, real = plan_cost(graph, plan), plan_cost(comb(small, x))
    assert (predicted.params, predicted.macs) == (real.params, real.macs)
    if not any(isinstance(m, Scale) for m in small.modules()):  # which is one more op
        assert predicted.activation_bytes == real.activation_bytes
    assert real.params == sum(p.numel() for p in small.parameters())
    return small, graph, plan


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("net", NETS)
def test_tiny_nets(net, dtype, tolerance, keep):
    build, shape, _ = NETS[net]
    torch.manual_seed(0)
    check(informative(build()), torch.randn(shape, generator=generator(2)), keep, dtype, tolerance)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("name", TIMM)
def test_timm_networks(name, keep):
    model, x = build_timm(name)
    small, _, _ = check(model, x, keep, torch.float64, 1e-10)
    if keep == 0.5:  # the compacted model is an ordinary one: it trains, and fp32 holds
        model, x = build_timm(name)
        small, graph, plan = check(model, x, keep, torch.float32, 1e-5)
        loss = sum(t.square().mean() for t in tensors_of(small.train()(x)))
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())


@pytest.mark.parametrize("net", NETS)
def test_an_empty_plan_changes_nothing_bit_for_bit(net):
    build, shape, _ = NETS[net]
    model, x = informative(build()), torch.randn(shape)
    graph = comb(model, x)
    empty = PrunePlan({}, graph.fingerprint)
    everything = PrunePlan({g.name: range(g.n_channels) for g in graph.groups}, graph.fingerprint)
    for plan in (empty, everything):
        with torch.no_grad(), masked(model, graph, plan) as m:
            same = [m(x), compact(model, graph, plan)(x)]
        for out in same:
            assert all(torch.equal(a, b) for a, b in zip(tensors_of(out), tensors_of(model(x)), strict=True))


@pytest.mark.parametrize("granularity", ["dim", "head"])
def test_heads_and_dims(granularity):
    model, x = informative(FusedAttention(heads=4)).double(), torch.randn(2, 5, 3).double()
    graph = comb(model, x, granularity=granularity)
    plan = random_plan(graph, keep=0.5, generator=generator(0))
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan) as m:
        assert relative_error(m(x), small(x)) < 1e-12
    assert (small.heads, small.head_dim) == ((4, 2) if granularity == "dim" else (2, 4))


def test_a_compacted_model_can_be_compacted_again():
    model, x = build_timm("deit_tiny_patch16_224")
    model, x = model.double(), x.double()
    for seed in (0, 1):
        graph = comb(model, x)
        plan = random_plan(graph, keep=0.6, generator=generator(seed))
        small = compact(model, graph, plan)
        with torch.no_grad(), masked(model, graph, plan) as m:
            assert relative_error(m(x), small(x)) < 1e-10
        model = small


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("net", ["resnext50_32x4d", "deit_tiny_patch16_224", "residual", "fused_attention"])
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
    lambda p: torch.optim.AdamW(p, lr=1e-2),
], ids=["sgd", "adamw"])  # fmt: skip
def test_the_next_step_equals_the_step_of_the_masked_model(net, make):
    if net in NETS:
        build, shape, _ = NETS[net]
        model, x = informative(build()), torch.randn(shape, generator=generator(1))
    else:
        model, x = build_timm(net)
    model, x, y = model.double(), x.double(), torch.tensor([0, 1])
    graph = comb(model, x)
    plan = random_plan(graph, keep=0.5, generator=generator(0))
    handle = attach_masks(model, graph, plan)
    optimizer = make(model.parameters())
    for _ in range(2):
        step(model, optimizer, x, y)
    handle.remove()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    small = compact(model, graph, plan, optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}
    step(small, optimizer, x, y)
    handle = attach_masks(twin, graph, plan)
    step(twin, twin_optimizer, x, y)
    with torch.no_grad():
        assert relative_error(twin(x), small(x)) < 1e-9
    handle.remove()


def test_gradients_of_masked_weights_are_zero_and_others_are_those_of_the_compacted_model():
    model, x = informative(Residual()).double(), torch.randn(2, 3, 6, 6).double()
    graph = comb(model, x)
    plan = random_plan(graph, keep=0.5, generator=generator(0))
    small = compact(model, graph, plan)
    masked(model, graph, plan)(x).square().sum().backward()
    small(x).square().sum().backward()
    alive = graph.alive(plan)
    for name, p in model.named_parameters():
        keep = np.ones(tuple(p.shape), bool)
        for m in graph.tensors[name].maps:
            keep &= alive[m]
        keep = torch.from_numpy(keep)
        assert (p.grad[~keep] == 0).all()
        assert torch.allclose(p.grad[keep], small.get_parameter(name).grad.flatten(), rtol=1e-12)


def test_masks_can_follow_each_other_and_come_off():
    model, x = informative(Residual()), torch.randn(2, 3, 6, 6)
    graph = comb(model, x)
    plans = [random_plan(graph, keep=0.5, generator=generator(s)) for s in (0, 1)]
    dense = model(x)
    handle = attach_masks(model, graph, plans[0])
    first = model(x)
    handle.update(plans[1])
    second = model(x)
    handle.update(plans[0])
    assert torch.equal(model(x), first) and not torch.equal(first, second)
    handle.remove()
    assert torch.equal(model(x), dense) and not model._forward_hooks and not model._forward_pre_hooks


def test_a_forward_that_raises_leaves_the_model_whole():
    model, x = informative(FusedAttention()), torch.randn(2, 5, 3)
    graph = comb(model, x)
    plan = random_plan(graph, keep=0.5, generator=generator(0))
    before = model(x)
    ids = [id(p) for p in model.parameters()]
    for run in (masked(model, graph, plan), model):
        handle = attach_masks(model, graph, plan) if run is model else None
        with pytest.raises(RuntimeError):
            run(torch.randn(2, 5, 4))
        if handle:
            handle.remove()
    assert [id(p) for p in model.parameters()] == ids and torch.equal(model(x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inplace_keeps_the_module_objects():
    model, x = informative(FusedAttention()), torch.randn(2, 5, 3)
    graph = comb(model, x)
    plan = random_plan(graph, keep=0.5, generator=generator(0))
    expected, qkv = compact(model, graph, plan)(x), model.qkv
    assert compact(model, graph, plan, inplace=True) is model
    assert model.qkv is qkv and qkv.out_features == 12 and torch.equal(model(x), expected)


def test_plans_that_do_not_fit():
    model, x = Residual(), torch.randn(2, 3, 6, 6)
    graph = comb(model, x)
    other = comb(FusedAttention(), torch.randn(2, 5, 3))
    with pytest.raises(PlanError, match="plan of another model"):
        masked(model, graph, random_plan(other, keep=0.5))
    with pytest.raises(PlanError, match="the graph expects shape|no module"):
        compact(FusedAttention(), graph, PrunePlan({}, graph.fingerprint))
    for kept, message in (
        ({"conv1": []}, "keeps no channel"),
        ({"conv1": [8]}, "out of range"),
        ({"head": [0]}, "frozen: is an output"),
        ({"nope": [0]}, "no coupled group is named"),
    ):
        with pytest.raises(PlanError, match=message):
            compact(model, graph, PrunePlan(kept, graph.fingerprint))
    attention = PrunePlan({"qkv": [0, 1, 4, 5, 6]}, other.fingerprint)
    with pytest.raises(PlanError, match="must keep equally many"):
        compact(FusedAttention(), other, attention)
    untied = PrunePlan({"qkv": [0, 1, 4, 5]}, other.fingerprint)
    with pytest.raises(PlanError, match="as many channels a block"):
        compact(FusedAttention(), other, untied)


class HardCoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.fc(x) * torch.linspace(0, 1, 8))


def test_a_hard_coded_size_is_refused_and_nothing_is_lost():
    model, x = HardCoded(), torch.randn(2, 3)
    assert "could not be repaired" in comb(model, x)["fc"].reason  # what the public comb finds out beforehand
    graph = trace_groups(model, x)
    plan = PrunePlan({"fc": [0, 1, 2]}, graph.fingerprint)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    params = [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(CompactError, match="holds a size that cpd_fast could not repair"):
        compact(model, graph, plan, optimizer=optimizer, inplace=True)
    assert model.fc.weight.shape == (8, 3)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == params == [id(p) for p in model.parameters()]


class InnerWidthOfInput(nn.Module):
    """Attention of older ViTs: the inner width is taken to be that of the input."""

    def __init__(self):
        super().__init__()
        self.fc_in, self.qkv, self.proj = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        x = self.fc_in(x)
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.out(x + self.proj((attention @ v).transpose(1, 2).reshape(n, t, c)))


def test_sizes_that_the_forward_mixes_up_are_put_into_its_calls():
    model, x = informative(InnerWidthOfInput()).double(), torch.randn(2, 5, 3).double()
    graph = comb(model, x)
    assert {g.name for g in graph.prunable_groups} == {"fc_in", "qkv", "qkv#2"}
    plan = PrunePlan(
        {"fc_in": [0, 2, 3, 5, 7], "qkv": [0, 1, 2, 5, 6, 7], "qkv#2": [0, 1, 3, 4, 5, 6]}, graph.fingerprint
    )
    small = compact(model, graph, plan)
    assert isinstance(small, InnerWidthOfInput) and small.state_dict().keys() == model.state_dict().keys()
    for batch in (2, 5):  # sizes of batch and tokens still follow the input
        x = torch.randn(batch, 4 + batch, 3).double()
        with torch.no_grad(), masked(model, graph, plan) as m:
            assert relative_error(m(x), small(x)) < 1e-12
            assert relative_error(copy.deepcopy(small)(x), small(x)) == 0
    exported = torch.export.export(small, (x,), strict=False).module()
    assert relative_error(exported(x), small(x)) < 1e-12


def test_channels_last_and_dtype_survive():
    model = informative(Residual()).to(memory_format=torch.channels_last, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 6, 6)
    graph = comb(model, x.bfloat16())
    small = compact(model, graph, random_plan(graph, keep=0.5, generator=generator(0)))
    assert small.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}

"""Inputs that break lesser tools."""

import copy
import functools
import gc
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import cpd_fast as cpd
from cpd_fast.cli.models import Logits
from cpd_fast.compact import compact
from cpd_fast.errors import TraceError
from cpd_fast.pipeline import comb
from cpd_fast.prune import attach_masks, masked
from cpd_fast.schedule import random_plan
from tests.nets import FusedAttention, Residual, informative, relative_error


def prove(model, inputs, keep=0.5, tolerance=1e-9):
    """masked equals compacted for a random plan; returns the compacted model."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    graph = comb(model, inputs)
    plan = random_plan(graph, keep=keep, generator=torch.Generator().manual_seed(0))
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan) as m:
        assert relative_error(m(*args, **kwargs), small(*args, **kwargs)) < tolerance
    return graph, plan, small


@dataclass
class Output:
    logits: torch.Tensor
    features: list[torch.Tensor]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(5, 8), nn.Linear(8, 2)
        self.embed = nn.Embedding(7, 8)

    def forward(self, x, *, y, index):
        h = F.relu_(self.a(x)) + self.b(y)
        h += self.embed(index)
        return Output(self.out(h), [h.detach().sum(-1)])


def test_keyword_inputs_integer_inputs_and_dataclass_outputs():
    model = informative(TwoInputs()).double()
    inputs = {"x": torch.randn(4, 3).double(), "y": torch.randn(4, 5).double(), "index": torch.arange(4)}
    graph = comb(model, inputs)
    plan = random_plan(graph, keep=0.5)
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan) as m:
        seen, got = m(**inputs), small(**inputs)
    assert relative_error(seen.logits, got.logits) < 1e-12
    assert small.embed.weight.shape == (7, 4) and small.embed.embedding_dim == 4


class DropPath(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block, self.out = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        y = self.block(x)
        if self.training:
            y = y * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.8) / 0.8
        return self.out(self.drop((x + y).mean((2, 3))))


def test_a_model_in_train_mode_with_dropout_and_drop_path_stays_in_it():
    model = informative(DropPath()).train()
    graph = comb(model, torch.randn(2, 3, 8, 8))
    small = compact(model, graph, random_plan(graph, keep=0.5))
    assert model.training and small.training
    model.eval()
    prove(model.double(), (torch.randn(2, 3, 8, 8).double(),))


def test_frozen_parameters_stay_frozen_and_hooks_go_along():
    model = informative(Residual()).double()
    model.conv1.weight.requires_grad_(False)
    seen = []
    model.conv2.register_forward_hook(lambda m, a, o: seen.append(tuple(o.shape)))
    _, _, small = prove(model, (torch.randn(2, 3, 6, 6).double(),))
    assert not small.conv1.weight.requires_grad and small.conv2.weight.requires_grad
    assert len(seen) == 2 and seen[1][1] == 3


def test_weight_norm_keeps_the_axis_that_its_norm_runs_over():
    conv = parametrizations.weight_norm(nn.Conv2d(4, 8, 3))
    model = informative(nn.Sequential(nn.Conv2d(3, 4, 1), conv, nn.ReLU(), nn.Conv2d(8, 2, 1))).double()
    graph, _, small = prove(model, (torch.randn(1, 3, 8, 8).double(),))
    assert small[1].parametrizations.weight.original1.shape == (4, 4, 3, 3)
    (group,) = graph.prunable_groups
    assert "1.parametrizations.weight.original0" in {s.param for s in group.slices}
    assert "weight_norm runs over this axis" in graph.explain("0.weight")


def test_old_style_weight_norm_with_a_computed_attribute_can_be_copied():
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(8, 2, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(1, 3, 8, 8))  # its weight now carries a graph, which deepcopy refuses
    comb(model, torch.randn(1, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Gqa(nn.Module):
    """Grouped-query attention: 4 query heads share 2 key and value heads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 16), nn.Linear(6, 8), nn.Linear(6, 8)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, -1).transpose(1, 2)
        k = self.k(x).view(n, t, 2, -1).transpose(1, 2).repeat_interleave(2, 1)
        v = self.v(x).view(n, t, 2, -1).transpose(1, 2).repeat_interleave(2, 1)
        attention = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.out((attention @ v).transpose(1, 2).flatten(2))


def test_grouped_query_attention_is_exact():
    prove(informative(Gqa()).double(), (torch.randn(2, 5, 6).double(),))


def test_recurrent_layers_stay_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.rnn, self.out = nn.Linear(3, 6), nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)
            self.wide = nn.Linear(4, 8)
            self.back = nn.Linear(8, 4)

        def forward(self, x):
            y, _ = self.rnn(self.stem(x))
            return self.out(y + self.back(self.wide(y).relu()))

    graph, _, _ = prove(informative(Net()).double(), (torch.randn(2, 5, 3).double(),))
    assert [g.name for g in graph.prunable_groups] == ["wide"]
    assert "recurrent layer" in graph["stem"].reason


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.filter = nn.Parameter(torch.randn(6, 4, 2))

    def forward(self, x):
        f = torch.fft.rfft2(self.conv(x))
        return self.out(torch.fft.irfft2(f * torch.view_as_complex(self.filter), s=x.shape[-2:]))


def test_complex_tensors():
    graph, _, small = prove(informative(Complex()).double(), (torch.randn(2, 3, 6, 6).double(),))
    assert small.conv.out_channels == 4 and small.filter.shape == (6, 4, 2)


class Views(nn.Module):
    """Weights that are views and parts of parameters, and a buffer that follows channels."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(2, 8, 3))
        self.register_buffer("offset", torch.randn(8))
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        a, b = self.both.unbind(0)
        return self.out((F.linear(x, a) * F.linear(x, b.view(8, 3)) + self.offset).relu_())


def test_views_of_parameters_and_buffers_that_follow_channels():
    _, _, small = prove(informative(Views()).double(), (torch.randn(4, 3).double(),))
    assert small.both.shape == (2, 4, 3) and small.offset.shape == (4,)


class Sizes(nn.Module):
    """Sizes in a list, and a table that the first forward caches in a buffer."""

    def __init__(self):
        super().__init__()
        self.widths = [6, 8]
        self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 2)
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x):
        if len(self.table) != len(x):
            self.table = torch.linspace(0, 1, len(x)).to(x).view(-1)
        x = self.a(x).view(-1, 2, self.widths[0] // 2).flatten(1) * self.table[:, None]
        return self.out(self.b(x).view(-1, self.widths[1]))


def test_sizes_in_a_list_and_a_buffer_that_a_forward_replaces():
    model = informative(Sizes()).double()
    graph, _, small = prove(model, (torch.randn(4, 3).double(),))
    assert {g.name for g in graph.prunable_groups} == {
        "a",
        "b",
    } and small.a.out_features == 4 - small.a.out_features % 2


@functools.lru_cache
def positions(n):
    return torch.linspace(0, 1, n)


class Cached(nn.Module):
    """A table that a function remembers, and checks for NaN in training."""

    @staticmethod
    @functools.lru_cache
    def order(n):
        return torch.arange(n)

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        y = self.a(x) * positions(x.shape[1])[self.order(x.shape[1])].to(x)[:, None]
        if not torch.isfinite(y).all() or torch.isnan(y).any():
            y = y.clamp(-1, 1)
        return self.o(y)


def test_remembered_tables_and_checks_for_nan():
    model, x = informative(Cached()).double(), torch.randn(2, 5, 3).double()
    _, _, small = prove(model, (x,))
    assert small.a.out_features == 4
    for remembered in (positions, Cached.order):
        assert remembered(5).device.type == "cpu"  # no meta tensor was left there
        assert remembered.cache_info().currsize == 1


class Masked(nn.Module):
    """A path that depends on numbers alone, and one that depends on data."""

    def __init__(self, data):
        super().__init__()
        self.data, self.a, self.o = data, nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        steps = torch.arange(x.shape[1])
        if (steps.diff() == 1).all() and torch.tensor([1, 2]).tolist() == [1, 2]:
            x = self.a(x)
        if self.data and (x > 0).any():
            x = x * 2
        return self.o(x)


def test_paths_that_depend_on_numbers_are_followed_and_those_on_data_refused():
    x = torch.randn(2, 5, 3).double()
    graph, _, small = prove(informative(Masked(data=False)).double(), (x,))
    assert small.a.out_features == 4
    with pytest.raises(TraceError, match=r"data-dependent control flow.*test_awkward_models.py:\d+.*reads the value"):
        comb(informative(Masked(data=True)).double(), x)


def test_wrappers_of_data_parallel_training(tmp_path):
    model, x = informative(Residual()).double(), torch.randn(2, 3, 6, 6).double()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for outer in (wrapped, torch.compile(wrapped), nn.DataParallel(model)):
            graph = comb(outer, x)
            plan = random_plan(graph, keep=0.5, generator=torch.Generator().manual_seed(0))
            small = compact(outer, graph, plan)
            assert type(small) is Residual and graph.fingerprint == comb(model, x).fingerprint
            with torch.no_grad(), masked(model, graph, plan) as m:
                assert relative_error(m(x), small(x)) < 1e-12
        del wrapped, outer
        gc.collect()  # or it ends the group: waiting for gloo's thread, which waits for the interpreter's lock
    finally:
        torch.distributed.destroy_process_group()


def test_half_precision_and_autocast():
    model = informative(FusedAttention()).bfloat16()
    graph = comb(model, torch.randn(2, 5, 3).bfloat16())
    small = compact(model, graph, random_plan(graph, keep=0.5))
    assert small(torch.randn(2, 5, 3).bfloat16()).dtype == torch.bfloat16
    model, x = informative(FusedAttention()), torch.randn(2, 5, 3)
    graph = comb(model, x)
    plan = random_plan(graph, keep=0.5, generator=torch.Generator().manual_seed(0))
    small = compact(model, graph, plan)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), masked(model, graph, plan) as m:
        assert relative_error(m(x).float(), small(x).float()) < 0.05


def test_checkpointing_and_the_masked_model_compose():
    model, x = informative(Residual()).double(), torch.randn(2, 3, 6, 6).double()
    graph = comb(model, x)
    plan = random_plan(graph, keep=0.5, generator=torch.Generator().manual_seed(0))
    with masked(model, graph, plan) as m:
        from torch.utils.checkpoint import checkpoint

        checkpoint(m, x, use_reentrant=False).square().sum().backward()
        first = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        m(x).square().sum().backward()
    assert all(torch.equal(p.grad, first[n]) for n, p in model.named_parameters())


def test_a_copy_of_a_masked_model_is_masked_by_itself():
    model, x = informative(Residual()), torch.randn(2, 3, 6, 6)
    graph = comb(model, x)
    handle = attach_masks(model, graph, random_plan(graph, keep=0.5))
    twin = copy.deepcopy(model)
    out = model(x)
    handle.remove()
    assert torch.equal(twin(x), out) and not torch.equal(model(x), out)


class Captures(nn.Module):
    """A forward that reads what a hook of its own has noted, as those of transformers do."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.a.register_forward_hook(lambda m, args, out: CAPTURED.append(out))

    def forward(self, x):
        CAPTURED.clear()
        y = self.b(self.a(x))
        return self.o(y + CAPTURED[0])


CAPTURED: list[torch.Tensor] = []


def test_a_forward_that_relies_on_its_own_hooks():
    graph, _, small = prove(informative(Captures()).double(), (torch.randn(2, 3, 4, 4).double(),))
    assert graph.needs_hooks and small.a.out_channels == 4


def test_hooks_that_a_first_forward_puts_on():
    """Networks of transformers get theirs at their first forward, and then hold a note that they have them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.SegformerConfig(
        num_labels=3, depths=[1, 1], hidden_sizes=[8, 16], decoder_hidden_size=16, num_attention_heads=[1, 2],
        num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2],
    )  # fmt: skip
    model = informative(Logits(transformers.SegformerForSemanticSegmentation(config))).double().eval()
    x = torch.randn(2, 3, 16, 16).double()
    graph = comb(model, x)  # has no hooks yet
    plan = random_plan(graph, keep=0.5)
    model(x)
    assert any(m._forward_hooks for m in model.modules())
    small = compact(model, graph, plan)
    with torch.no_grad(), cpd.masked(model, graph, plan, execution="compact") as m:
        assert relative_error(m(x), small(x)) < 1e-12
    with torch.no_grad(), cpd.masked(model, graph, plan, execution="full_width") as m:
        assert relative_error(m(x), small(x)) < 1e-12
    assert not comb(model, x).needs_hooks  # and now has


def test_compacting_a_masked_model_takes_the_masks_off_the_result():
    model, x = informative(Residual()).double(), torch.randn(2, 3, 6, 6).double()
    graph = comb(model, x)
    plan = random_plan(graph, keep=0.5)
    handle = attach_masks(model, graph, plan)
    small = compact(model, graph, plan)
    assert relative_error(model(x), small(x)) < 1e-12 and not small._forward_pre_hooks
    handle.remove()


def test_something_that_is_no_module():
    with pytest.raises(TraceError, match="expected a torch.nn.Module, got NoneType"):
        comb(None, torch.randn(1))


def test_compiled_and_exported_results():
    model, x = informative(FusedAttention()), torch.randn(2, 5, 3)
    _, _, small = prove(model.double(), (x.double(),))
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x.double()), small(x.double())) < 1e-12
    exported = torch.export.export(small, (x.double(),)).module()
    assert relative_error(exported(x.double()), small(x.double())) < 1e-12


class Switched(nn.Module):
    """A path that depends on a padding mask of the model's own making, on a table and on a small buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 8), nn.Linear(8, 2)
        self.register_buffer("probability", torch.tensor([1.0, 0.0]))

    def forward(self, x, mask=None):
        if mask is None:
            mask = torch.ones(len(x), 800, 1200)
        small = F.interpolate(mask[None].float(), size=(4, 5)).to(torch.bool)[0]
        starts = torch.empty(2, dtype=torch.long)
        starts[0] = 0
        starts[1] = starts[0] + 7
        y = self.a(x)
        if (~small).any() or starts[1] != 7 or not self.probability[0] > 0.5:
            y = y * 2
        return self.o(y)


def test_values_that_depend_on_nothing_given_are_known():
    model, x = informative(Switched()).double(), torch.randn(2, 5, 3).double()
    with torch.no_grad():
        model.probability.copy_(torch.tensor([1.0, 0.0]))
    _, _, small = prove(model, (x,))
    assert small.a.out_features == 4 and small.probability.tolist() == [1.0, 0.0]
    with pytest.raises(TraceError, match="reads the value"):
        comb(model, (x, torch.ones(2, 8, 8)))  # a mask that is given may be any


class Overwritten(nn.Module):
    """Values that were known, until something given is written over a part of them."""

    def __init__(self, write):
        super().__init__()
        self.write, self.o = write, nn.Linear(3, 2)

    def forward(self, x):
        table = torch.zeros(4)
        part = table[1:]
        self.write(table, part, x.flatten()[:4])
        return self.o(x) if bool((part == 0).all()) and bool((table == 0).all()) else x


@pytest.mark.parametrize(
    "write",
    [
        lambda table, part, x: table.copy_(x),
        lambda table, part, x: part.copy_(x[1:]),
        lambda table, part, x: part[:2].add_(x[:2]),
        lambda table, part, x: torch.mul(x, 2, out=table),
        lambda table, part, x: table.uniform_(),
    ],
    ids=["whole", "part", "part of a part", "out", "random"],
)
def test_a_value_is_forgotten_once_something_given_is_written_there(write):
    with pytest.raises(TraceError, match="reads the value"):
        comb(Overwritten(write), torch.randn(2, 3))

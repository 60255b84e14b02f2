"""Comb: the groups of tiny nets, written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpd_fast.comb import comb, register_rule
from cpd_fast.comb.calls import RULES
from cpd_fast.errors import PlanError, TraceError, UnsupportedOpError
from tests.nets import NETS, FusedAttention, Residual


@pytest.mark.parametrize("net", NETS)
def test_groups_are_those_written_by_hand(net):
    build, shape, expected = NETS[net]
    graph = comb(build(), torch.randn(shape))
    found = {
        g.name: (g.n_channels, len(g.blocks), {(s.param, s.dim): s.index.shape[1] for s in g.slices})
        for g in graph.prunable_groups
    }
    assert found == expected


def test_indices_of_a_depthwise_multiplier():
    build, shape, _ = NETS["depthwise"]
    group = comb(build(), torch.randn(shape))["pw"]
    rows = next(s.index for s in group.slices if s.param == "dw.weight")
    assert rows.tolist() == [[2 * i, 2 * i + 1] for i in range(6)]


def test_columns_of_a_grouped_convolution_are_pairs():
    build, shape, _ = NETS["grouped"]
    columns = next(s for s in comb(build(), torch.randn(shape))["pw"].slices if s.param == "conv.weight")
    assert columns.dims == (0, 1) and not columns.produces
    # channel 5 is column 1 of conv group 1, whose rows are 6..11, in a weight of 4 columns
    assert columns.index[5].tolist() == [row * 4 + 1 for row in range(6, 12)]


def test_parts_of_an_attention_are_tied():
    graph = comb(FusedAttention(), torch.randn(2, 5, 3))
    assert graph["qkv"].tie is not None and graph["qkv"].tie == graph["qkv#2"].tie
    assert graph["proj_in"].tie is None


def test_whole_heads_as_channels():
    graph = comb(FusedAttention(heads=3), torch.randn(2, 5, 3), granularity="head")
    group = graph["qkv"]
    assert group.n_channels == 3 and group.balance is None
    index = {s.param: s.index for s in group.slices}
    assert index["qkv.weight"][1].tolist() == [12 * part + 4 + i for part in range(3) for i in range(4)]
    assert index["proj.weight"][1].tolist() == [4, 5, 6, 7]


def test_reasons_for_what_is_frozen():
    graph = comb(Residual(), torch.randn(2, 3, 6, 6))
    assert "head.weight" in graph.explain("head.weight") and "output of the model" in graph.explain("head.weight")
    assert "consumes 6 channels of stem (prunable)" in graph.explain("head.weight")
    assert "no such parameter" in graph.explain("nope")
    assert "stem" in str(graph) and "frozen" in str(graph)


def test_groups_do_not_depend_on_batch_or_resolution():
    a, b = (comb(Residual(), torch.randn(n, 3, s, s)) for n, s in ((1, 8), (5, 11)))
    assert a.fingerprint == b.fingerprint


def test_the_model_is_left_as_it_was():
    model = Residual().train()
    seen = []
    model.conv1.register_forward_hook(lambda *_: seen.append(1))
    before = {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    comb(model, torch.randn(2, 3, 6, 6))
    assert model.training and not seen and len(model.conv1._forward_hooks) == 1
    for k, v in model.state_dict(keep_vars=True).items():
        assert id(v) == before[k][0] and torch.equal(v, before[k][1])


def test_a_wrapper_is_looked_through():
    model = Residual()
    compiled = torch.compile(model)
    assert comb(compiled, torch.randn(2, 3, 6, 6)).fingerprint == comb(model, torch.randn(2, 3, 6, 6)).fingerprint


def test_ignore_by_name_pattern_and_module():
    model = Residual()
    x = torch.randn(2, 3, 6, 6)
    for what in ("conv1", "conv?", model.conv1):
        group = comb(model, x, ignore=[what])["conv1"]
        assert not group.prunable and group.reason == "ignored on request"
    with pytest.raises(PlanError, match="'conv9' matches no module or parameter"):
        comb(model, x, ignore=["conv9"])
    with pytest.raises(PlanError, match="is not a module of this model"):
        comb(model, x, ignore=[nn.Linear(1, 1)])


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.cdist(self.fc(x), self.fc(x)))


def test_an_operator_without_rule_is_an_error_that_helps():
    with pytest.raises(
        UnsupportedOpError, match=r"aten\._?cdist.*test_comb\.py:\d+.*register_rule.*on_unknown='freeze'"
    ):
        comb(Odd(), torch.randn(1, 4, 4))


def test_an_operator_without_rule_can_be_frozen():
    graph = comb(Odd(), torch.randn(1, 4, 4), on_unknown="freeze")
    assert not graph.prunable_groups
    assert any("has no channel rule" in (g.reason or "") for g in graph.groups)


def test_a_rule_can_be_registered():
    lib = torch.library.Library("cpd_test", "FRAGMENT")
    lib.define("swish_gate(Tensor x, Tensor gate) -> Tensor")
    lib.impl("swish_gate", lambda x, gate: x * gate.sigmoid(), "CompositeExplicitAutograd")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(torch.ops.cpd_test.swish_gate(self.a(x), self.b(x)))

    try:
        with pytest.raises(UnsupportedOpError, match="cpd_test.swish_gate"):
            comb(Net(), torch.randn(2, 3))
        register_rule("cpd_test.swish_gate")(lambda t, call: t.meet(*call.args, out=call.out))
        (group,) = comb(Net(), torch.randn(2, 3)).prunable_groups
        assert group.n_channels == 6 and len(group.slices) == 5
    finally:
        RULES.pop("cpd_test.swish_gate", None)
        lib._destroy()


def test_data_dependent_control_flow_names_its_line():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            y = self.fc(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(TraceError, match=r"data-dependent control flow.*test_comb\.py:\d+"):
        comb(Net(), torch.randn(2, 3))


def test_wrong_example_inputs():
    with pytest.raises(TraceError, match="forward failed on the example inputs"):
        comb(Residual(), torch.randn(2, 4, 6, 6))
    with pytest.raises(TraceError, match="expected a tensor, a tuple of arguments or a dict"):
        comb(Residual(), "picture")
    with pytest.raises(ValueError, match="expected one of error, freeze"):
        comb(Residual(), torch.randn(2, 3, 6, 6), on_unknown="guess")


def test_a_channel_axis_that_meets_tokens_is_frozen():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):  # (N, 5, 3): 5 tokens and 5 channels
            y = self.fc(x)
            return self.out(y + y.transpose(1, 2))

    graph = comb(Mixer(), torch.randn(2, 5, 3))
    assert not graph.prunable_groups
    assert any("carries no channels" in (g.reason or "") for g in graph.groups)


def test_a_softmax_over_channels_is_a_place_where_masks_count_channels():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.out(F.softmax(self.fc(x), -1))

    graph = comb(Net(), torch.randn(2, 3))
    assert graph["fc"].prunable and [(s.op, s.channels.shape) for s in graph.norm_sites] == [("softmax", (1, 5))]


def test_a_large_model_is_combed_without_its_weights():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8192, 1), nn.Conv2d(8192, 16384, 3), nn.Conv2d(16384, 2, 1))
    graph = comb(model, torch.zeros(1, 3, 8, 8))
    assert [g.n_channels for g in graph.prunable_groups] == [8192, 16384]

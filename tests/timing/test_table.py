"""A table of layers predicts latency, and plans for a latency converge: with clocks that are made up."""

import contextlib
import json

import numpy as np
import pytest
import torch
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import BackendError, PlanError
from cpd_fast.models import SmallResNet
from cpd_fast.timing import LatencyTable, Layer, cache_folder, plan_for_latency
from cpd_fast.timing.layers import layer_of, layer_timer, macs_of, onnx_layer
from tests.nets import Depthwise, FusedAttention, Grouped, Transposed

X = torch.zeros(1, 1, 28, 28)


def macs_clock(layer):
    """A machine on which a layer takes 1 us a thousand MACs."""
    return macs_of(layer) * 1e-6 + 1e-4


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = SmallResNet(10).eval()
    graph = cpd.comb(model, X)
    return model, graph, cpd.score(model, graph, criterion=cpd.Magnitude())


def table_of(net, **options):
    return LatencyTable(
        net[0], net[1], X, threads=1, **{"cache": False, "measure": macs_clock, "dense_ms": 20.0, **options}
    )


class PadsItself(nn.Conv2d):
    """As EfficientNets of TensorFlow: padding is in the forward, and in none of the attributes."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 2, 1, 2)))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: SmallResNet(10), (1, 1, 28, 28)),
        (Grouped, (2, 3, 6, 6)),
        (Depthwise, (2, 3, 6, 6)),
        (Transposed, (2, 3, 6, 6)),
        (FusedAttention, (2, 5, 3)),
        (lambda: nn.Sequential(PadsItself(3, 8, 5, 2), PadsItself(8, 4, 5)), (1, 3, 6, 6)),
    ],
    ids=["resnet", "grouped", "depthwise", "transposed", "attention", "padding"],
)
def test_layers_are_those_of_the_graph(make, shape):
    """Their MACs, computed here from kernel and stride, are those that comb counted in these modules."""
    from cpd_fast.timing.table import _layers

    model, x = make().eval(), torch.zeros(shape)
    graph = cpd.comb(model, x)
    names = {n for n, m in model.named_modules() if layer_of(m, (1, 1, 1, 1)) or isinstance(m, nn.Linear)}
    counted = sum(int(t.coefficient * np.prod(np.broadcast_shapes(*(m.shape for m in t.maps)) if t.maps else 1))
                  for t in graph.terms if t.kind == "macs" and t.module in names)  # fmt: skip
    assert sum(macs_of(layer) for _, layer in _layers(model, graph)) == counted > 0


def test_prediction_follows_the_compacted_layers(net):
    """On a machine where time is MACs, the prediction is the MACs of the compacted layers, up to interpolation."""
    from cpd_fast.timing.table import _layers

    model, graph, scores = net
    table = table_of(net, measure=lambda layer: macs_of(layer) * 1e-6, dense_ms=1e9)
    for macs in (0.8, 0.5, 0.2):
        plan = cpd.plan(graph, scores, cpd.Target(macs=macs))
        small = cpd.compact(model, graph, plan)
        real = sum(macs_of(layer) * 1e-6 for _, layer in _layers(small, cpd.comb(small, X)))
        assert table._layers_ms(plan) == pytest.approx(real, rel=0.02)


def test_dense_network_is_predicted_as_measured(net):
    assert table_of(net)(None) == pytest.approx(20.0)
    assert table_of(net, dense_ms=1.0)(None) == pytest.approx(1.0)  # faster than its layers one by one


def test_prediction_never_grows_when_channels_go(net):
    """Not even where odd widths are slow."""
    table = table_of(net, measure=lambda layer: macs_clock(layer) * (3 if layer.c_out % 3 else 1))
    macs = np.linspace(1, 0.05, 40)
    ms = [table(cpd.plan(net[1], net[2], cpd.Target(macs=m))) for m in macs]
    assert all(b <= a + 1e-12 for a, b in zip(ms, ms[1:], strict=False)) and ms[-1] < 0.5 * ms[0]


def test_plan_takes_a_table(net):
    table = table_of(net)
    plan = cpd.plan(net[1], net[2], cpd.Target(latency_ms=0.5), latency=table)
    assert table(plan) <= 10.0 < table(cpd.plan(net[1], net[2], cpd.Target(latency_ms=0.6), latency=table))


@pytest.mark.parametrize(
    ("target", "twist"), [(0.5, 1.0), (0.5, 0.6), (cpd.Target(latency_ms=7.0), 1.6)], ids=["true", "slower", "faster"]
)
def test_real_network_meets_the_target_where_the_table_is_wrong(net, target, twist):
    """The network takes another share of the dense latency than predicted, and drifts by 1 % a measurement."""
    table, drift = table_of(net), []

    def measure(small):
        drift.append(1)
        macs = cpd.cost(small, X).macs / cpd.cost(net[0], X).macs
        return tuple(20.0 * share * 1.01 ** len(drift) for share in (1.0, macs**twist * 0.9 + 0.1))

    found = plan_for_latency(net[0], net[1], net[2], target, X, table=table, measure=measure, round_to=1)
    assert abs(found.measured_ms / found.goal_ms - 1) <= 0.05
    assert len(found.tries) == len(drift) <= 6
    assert abs(found.off) == min(abs(t.off) for t in found.tries)
    assert abs(found.off) <= 0.02 or len(found.tries) >= 4
    if twist != 1.0:
        assert abs(found.tries[0].off) > 0.05  # the table alone would have missed


def test_coarse_plans_stay_below_the_target(net):
    """Two widths only: nothing is within 5 %, so the one that is fast enough is taken."""
    options = {"round_to": 32, "table": table_of(net)}
    measure = lambda small: (20.0, 20.0 * cpd.cost(small, X).macs / cpd.cost(net[0], X).macs)  # noqa: E731
    found = plan_for_latency(net[0], net[1], net[2], 0.9, X, measure=measure, **options)
    assert found.measured_ms < found.goal_ms and len(found.plan)


def test_widths_are_as_round_as_the_target_lets_them_be():
    """Multiples of 8 where one of those networks is near enough, else of 4, of 2 or any."""
    torch.manual_seed(0)
    model = SmallResNet(10, (8, 16, 32)).eval()
    graph = cpd.comb(model, X)
    net = model, graph, cpd.score(model, graph, criterion=cpd.Magnitude())
    steps = {}

    def measure(small):
        return 20.0, 20.0 * cpd.cost(small, X).macs / cpd.cost(net[0], X).macs

    for share in np.linspace(0.95, 0.35, 7):
        found = plan_for_latency(net[0], net[1], net[2], share, X, table=table_of(net), measure=measure)
        assert abs(found.off) <= 0.05 and found.tries[found.chosen].plan == found.plan
        widths = [len(v) for v in found.plan.values()]
        steps[share] = next(u for u in (8, 4, 2, 1) if all(w % u == 0 for w in widths))
        if steps[share] < 8:  # multiples of 8 reach nothing as fast, or nothing as near
            with contextlib.suppress(PlanError):
                tried = plan_for_latency(*net, share, X, table=table_of(net), measure=measure, round_to=8)
                assert abs(tried.off) > 0.05
    assert 8 in steps.values() and min(steps.values()) < 8


def test_what_is_just_allowed_is_narrowed_down(net):
    """4 % above the target may be 8 % the next time; where plans come no closer it is taken all the same."""

    def find(round_to):
        share = []  # of the goal, a MAC; so that the first network is 4 % above it

        def measure(small):
            macs = cpd.cost(small, X).macs
            share.append(1.04 / macs)
            return 20.0, 10.0 * share[0] * macs

        return plan_for_latency(net[0], net[1], net[2], 0.5, X, table=table_of(net), measure=measure, round_to=round_to)

    found, coarse = find(1), find(16)
    assert found.tries[0].off == pytest.approx(0.04) and abs(found.off) <= 0.02 and found.chosen > 0
    assert 0.02 < abs(coarse.off) <= 0.05 and len(coarse.tries) > 1


def test_target_that_is_never_met_says_what_was_measured(net):
    with pytest.raises(PlanError, match=r"10\.000 ms were not reached: measured were 20\.000 ms \(predicted"):
        plan_for_latency(net[0], net[1], net[2], 0.5, X, table=table_of(net), measure=lambda small: (20.0, 20.0))


def test_other_targets_are_refused(net):
    with pytest.raises(PlanError, match=r"expected Target\(latency_ms=\.\.\.\)"):
        plan_for_latency(net[0], net[1], net[2], cpd.Target(macs=0.5), X, table=table_of(net))


def test_cache_is_read_again_and_belongs_to_a_machine(net, tmp_path, monkeypatch):
    first = table_of(net, cache=tmp_path)
    again = table_of(net, cache=tmp_path, measure=lambda layer: pytest.fail("measured again"))
    assert first.measured > 10 and again.measured == 0
    plan = cpd.random_plan(net[1], keep=0.5)
    assert again(plan) == first(plan)
    (file,) = tmp_path.iterdir()
    assert "latency-v1" in file.name and json.loads(file.read_text())["machine"]["threads"] == "1"
    LatencyTable(net[0], net[1], X, threads=2, cache=tmp_path, measure=macs_clock, dense_ms=1.0)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda doc: "{",
        lambda doc: "[]",
        lambda doc: json.dumps({**doc, "version": 2}),
        lambda doc: json.dumps({**doc, "machine": {"processor": "another"}}),
        lambda doc: json.dumps({**doc, "ms": {k: -1.0 for k in doc["ms"]}}),
        lambda doc: json.dumps({**doc, "ms": {k: "x" for k in doc["ms"]}}),
    ],
    ids=["broken", "list", "version", "machine", "negative", "text"],
)
def test_file_that_does_not_fit_is_measured_anew(net, tmp_path, damage):
    table_of(net, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(damage(json.loads(file.read_text())))
    assert table_of(net, cache=tmp_path).measured > 10
    assert json.loads(file.read_text())["version"] == 1


def test_cache_that_cannot_be_written_is_named(net, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"the latency table cannot be written .*give cache=False"):
        table_of(net, cache=tmp_path / "file")


def test_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cpd_fast"


def test_backends_without_a_table_are_named():
    with pytest.raises(BackendError, match="no latency table for backend 'compile': .* onnxruntime, eager"):
        layer_timer("compile", 1)


LAYERS = [
    Layer("conv", 3, 8, 1, (1,), (9, 9), (3, 3), (2, 2), (1, 1), (1, 1)),
    Layer("conv", 8, 8, 8, (1,), (9, 9), (3, 3), (1, 1), (1, 1), (2, 2)),
    Layer("conv_transpose", 4, 6, 2, (1,), (5, 5), (2, 2), (2, 2), (0, 0), (1, 1)),
    Layer("conv", 4, 4, 1, (1,), (12,), (3,), (1,), (1,), (1,)),
    Layer("linear", 6, 5, 1, (2, 7), ()),
    Layer("linear", 6, 5, 1, (2,), ()),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: v.key)
def test_layer_files_are_the_layers(layer, monkeypatch):
    """What ONNX Runtime is timed on computes what PyTorch's layer does."""
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    module = layer.module()
    monkeypatch.setattr(Layer, "module", lambda self: module)
    x = torch.randn(layer.input_shape)
    got = ort.InferenceSession(onnx_layer(layer), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(got, module(x).detach().numpy(), atol=1e-5)


def test_depthwise_layers_keep_their_multiplier():
    layer = Layer("conv", 8, 16, 8, (1,), (4, 4), (3, 3), (1, 1), (1, 1), (1, 1)).at(3, 0)
    assert (layer.c_in, layer.c_out, layer.groups) == (3, 6, 3)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_real_clocks_give_times(backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    assert 0 < layer_timer(backend, 1)(LAYERS[0]) < 1000

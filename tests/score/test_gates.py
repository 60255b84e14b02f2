import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import ScoreError
from cpd_fast.score import GateHessian, GroupFisher, score
from tests.helpers import build_graph, grouped, two_conv


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def data(*shape, classes, n=6):
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, *shape, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g)


def gated_loss(model, batch, at, split=False):
    """The loss as a function of gates on the inputs of modules, ``at[module] = (offset, width)`` in one vector."""

    def loss(gates):
        def gate(module, args, name):
            x = args[0]
            start, n = at[name]
            g = gates[..., start : start + n]
            shape = [n if d == (1 if isinstance(module, nn.Conv2d) else x.dim() - 1) else 1 for d in range(x.dim())]
            if split:
                shape[0] = len(x)
            return (x * g.reshape(shape), *args[1:])

        hooks = [
            model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: gate(m, a, name)) for name in at
        ]
        try:
            return cross_entropy(model, batch)
        finally:
            for h in hooks:
                h.remove()

    return loss


def true_diagonal(model, batch, at):
    total = max(o + n for o, n in at.values())
    ones = torch.ones(total, dtype=torch.float64)
    return torch.autograd.functional.hessian(gated_loss(model, batch, at), ones).diagonal()


NETS = {
    "two_conv": (two_conv, {"conv2": (0, 8), "fc": (8, 6)}),
    "grouped": (grouped, {"conv2": (0, 8), "fc": (8, 12)}),
}


@pytest.mark.parametrize("engine", ["retained", "finite_difference"])
@pytest.mark.parametrize("net", NETS)
def test_mean_within_its_own_confidence_of_the_gates_full_hessian(net, engine):
    make, at = NETS[net]
    model, graph = make()
    model = model.double().eval()
    batch = data(3, 8, 8, classes=4)
    half = true_diagonal(model, batch, at) / 2
    scores = score(model, graph, [batch], cross_entropy, GateHessian(200, engine=engine, signed=True, step=1e-5))
    z = torch.cat([
        (scores[n].double() - half[o : o + w]) / scores.stderr[n].double().clamp(min=1e-9)
        for n, (o, w) in zip(["conv1", "conv2"], at.values(), strict=True)
    ])
    assert z.abs().max() < 4
    assert 0.2 < z.square().mean() < 2.2
    assert min(s.min() for s in (scores["conv1"], scores["conv2"])) > -1e-4  # ReLU: Gauss-Newton, not negative


def test_samples_have_probes_of_their_own():
    """The error falls with the batch: the same sample eight times over tells eight times as much."""
    model, graph = two_conv()
    x, y = data(3, 8, 8, classes=4, n=1)
    x, y = x.float(), y
    one, eight = (
        score(model, graph, [(x.repeat(n, 1, 1, 1), y.repeat(n))], cross_entropy, GateHessian(64)) for n in (1, 8)
    )
    ratio = one.stderr["conv1"].norm() / eight.stderr["conv1"].norm()
    assert 2 < ratio < 4  # sqrt(8) = 2.8


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.a, self.b = nn.Conv2d(5, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        h = self.stem(x)
        return self.fc((h + self.b(self.a(h).tanh())).mean((2, 3)))


def test_one_gate_serves_all_consumers_of_a_group():
    torch.manual_seed(0)
    model = Residual().double()
    batch = data(3, 6, 6, classes=4)
    graph = cpd.comb(model, batch[0][:1])
    half = true_diagonal(model, batch, {"a": (0, 5), "fc": (0, 5)}) / 2
    scores = score(model, graph, [batch], cross_entropy, GateHessian(400, signed=True))
    name = next(g.name for g in graph.groups if g.n_channels == 5)
    z = (scores[name].double() - half) / scores.stderr[name].double()
    assert z.abs().max() < 4


class Mixed(nn.Module):
    """A layer whose rows are no multiple of the batch: gates cannot be a sample's own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.p = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        h = self.a(x).tanh()
        return self.b(h) + self.p(torch.cat([h, h[:1]])).mean(0)


def test_gates_are_shared_where_rows_are_no_samples():
    torch.manual_seed(0)
    model = Mixed().double()
    graph = build_graph(model, {"a": {"n": 5}}, {"a.weight": {0: "a"}, "b.weight": {1: "a"}, "p.weight": {1: "a"}})
    batch = data(4, classes=3)
    half = true_diagonal(model, batch, {"b": (0, 5), "p": (0, 5)}) / 2
    scores = score(model, graph, [batch], cross_entropy, GateHessian(400, signed=True))
    assert ((scores["a"].double() - half) / scores.stderr["a"].double()).abs().max() < 4


def test_a_gate_behind_a_batch_norm_does_not_see_the_scale_before_it():
    """A convolution ten times as large before a batch norm with statistics to match: the same network."""
    torch.manual_seed(1)
    model, graph = two_conv()
    batch = data(3, 8, 8, classes=4)[0].float(), data(3, 8, 8, classes=4)[1]
    model.train()
    model.bn1.momentum = None
    with torch.no_grad():
        model(batch[0])
    model.eval()
    before = score(model, graph, [batch], cross_entropy, GateHessian(8))
    with torch.no_grad():
        model.conv1.weight[:4] *= 10
        model.conv1.bias[:4] *= 10
        model.bn1.running_mean[:4] *= 10
        model.bn1.running_var[:4] = (model.bn1.running_var[:4] + model.bn1.eps) * 100 - model.bn1.eps
    after = score(model, graph, [batch], cross_entropy, GateHessian(8))
    torch.testing.assert_close(after["conv1"], before["conv1"], rtol=1e-3, atol=1e-6)
    assert after["conv1"].min() > 0


def test_masked_models_and_frozen_weights():
    model, _ = two_conv()
    graph = cpd.comb(model, torch.zeros(1, 3, 8, 8))
    model.conv2.weight.requires_grad_(False)
    batch = data(3, 8, 8, classes=4)[0].float(), data(3, 8, 8, classes=4)[1]
    plan = cpd.PrunePlan({"conv1": [1, 2, 3, 7]}, graph.fingerprint)
    handle = cpd.attach_masks(model, graph, plan)
    try:
        masked = score(model, graph, [batch], cross_entropy, GateHessian(100), plan=plan)
    finally:
        handle.remove()
    assert masked["conv1"][[0, 4, 5, 6]].abs().max() == 0
    assert not model.conv2.weight.requires_grad
    small = cpd.compact(model, graph, plan)
    compacted = score(small, cpd.comb(small, torch.zeros(1, 3, 8, 8)), [batch], cross_entropy, GateHessian(100))
    error = masked.stderr["conv1"][[1, 2, 3, 7]] + compacted.stderr["conv1"]
    assert ((masked["conv1"][[1, 2, 3, 7]] - compacted["conv1"]).abs() <= 3 * error).all()
    assert compacted["conv1"].max() > 0


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


def test_auto_says_what_it_took_and_why():
    model, graph = two_conv()
    batch = data(3, 8, 8, classes=4)[0].float(), data(3, 8, 8, classes=4)[1]
    scores = score(model, graph, [batch], cross_entropy, GateHessian(2))
    assert scores.info["engine"] == "retained"
    assert "double backward" in scores.info["engine_reason"]
    exact = score(model, graph, [batch], cross_entropy, GateHessian(2, engine="retained"))
    assert all(torch.equal(scores[n], exact[n]) for n in scores)

    def odd(m, b):
        return cross_entropy(m, b) + torch.cdist(m(b[0]), b[0][:, 0, 0, :4], p=3.0).mean()

    scores = score(model, graph, [batch, batch], odd, GateHessian(2))
    assert scores.info["engine"] == "finite_difference"
    assert "cdist" in scores.info["engine_reason"]
    forced = score(model, graph, [batch, batch], odd, GateHessian(2, engine="finite_difference"))
    assert forced.info["engine_reason"] == "asked for"
    assert all(torch.equal(scores[n], forced[n]) for n in scores)  # the same probes


def test_errors():
    model, graph = two_conv()
    batch = data(3, 8, 8, classes=4)[0].float(), data(3, 8, 8, classes=4)[1]
    for bad, match in (
        ({"num_probes": 0}, "num_probes must be at least 1"),
        ({"engine": "x"}, "expected one of auto, retained, "),
        ({"step": 0.0}, "step must be positive"),
    ):
        with pytest.raises(ScoreError, match=match):
            GateHessian(**bad)
    with pytest.raises(ScoreError, match="GateHessian: a custom autograd.Function .*GateHessian.engine='finite_diff"):
        score(
            model,
            graph,
            [batch],
            lambda m, b: F.cross_entropy(OnceDifferentiable.apply(m(b[0])), b[1]),
            GateHessian(engine="retained"),
        )

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 6))

        def forward(self, x):
            return (x @ self.w.T).relu() @ self.v.T

    model = Odd()
    graph = build_graph(model, {"w": {"n": 6}}, {"w": {0: "w"}, "v": {1: "w"}})
    for criterion in (GateHessian(), GroupFisher()):
        with pytest.raises(ScoreError, match="no convolution or linear layer of 1 prunable groups was called: w"):
            score(model, graph, [torch.randn(5, 4)], lambda m, x: m(x).square().mean(), criterion)


class Attends(nn.Module):
    """Self-attention by ``nn.MultiheadAttention``, or by the same layers one by one."""

    def __init__(self, packed):
        super().__init__()
        self.packed = packed
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        if packed:
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        else:
            self.q, self.k, self.v, self.project = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        h = self.embed(x)
        if self.packed:
            return self.out(self.attention(h, h, h, need_weights=False)[0].mean(1))
        q, k, v = (f(h).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.project(y).mean(1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("criterion", [GroupFisher(), GateHessian(400)], ids=str)
def test_packed_projections_of_multi_head_attention_are_gated_like_layers(criterion, frozen):
    torch.manual_seed(0)
    packed, apart = Attends(True), Attends(False)
    with torch.no_grad():
        for i, layer in enumerate((apart.q, apart.k, apart.v)):
            layer.weight.copy_(packed.attention.in_proj_weight[8 * i : 8 * i + 8])
            layer.bias.copy_(packed.attention.in_proj_bias[8 * i : 8 * i + 8])
    for name, layer in (("embed", apart.embed), ("out", apart.out), ("attention.out_proj", apart.project)):
        layer.load_state_dict(packed.get_submodule(name).state_dict())
    batch = torch.randn(5, 4, 6), torch.randint(3, (5,))
    graphs = [cpd.comb(m, batch[0]) for m in (packed, apart)]
    for model in (packed, apart):
        model.requires_grad_(not frozen)
    found = [score(m, g, [batch], cross_entropy, criterion) for m, g in zip((packed, apart), graphs, strict=True)]
    assert "forward" not in vars(packed.attention)
    rtol, share = (1e-4, 1e-6) if isinstance(criterion, GroupFisher) else (0.3, 0.2)  # the other draws its probes
    for a, b in (("attention.in_proj_weight", "q"), ("attention.in_proj_weight#2", "v"), ("embed", "embed")):
        torch.testing.assert_close(found[0][a], found[1][b], rtol=rtol, atol=share * float(found[1][b].max()))

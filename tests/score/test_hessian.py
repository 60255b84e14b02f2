import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import ScoreError
from cpd_fast.ops import ReversibleStep
from cpd_fast.score import GateHessian, HessianTrace, Taylor, merge_scores, score
from cpd_fast.score._probes import Probes
from cpd_fast.types import Scores
from tests.helpers import build_graph, grouped, mlp, two_conv


class Quadratic(nn.Module):
    """loss = 1/2 sum a * w^2: the Hessian is diagonal."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.arange(1.0, 13).reshape(4, 3))
        self.register_buffer("a", torch.linspace(-1, 3, 12).reshape(4, 3))

    def forward(self):
        return 0.5 * (self.a * self.w**2).sum()


def quadratic():
    model = Quadratic()
    return model, build_graph(model, {"rows": {"n": 4}, "columns": {"n": 3}}, {"w": {0: "rows", 1: "columns"}})


def data(*shape, classes, n=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, *shape, generator=g, dtype=dtype), torch.randint(classes, (n,), generator=g)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def true_scores(model, graph, batch):
    """From the full Hessian, element by element: no probe, no layout."""
    model.eval()
    params = dict(model.named_parameters())
    names, sizes = list(params), [p.numel() for p in params.values()]

    def loss(flat):
        parts = dict(
            zip(names, [f.view(params[n].shape) for n, f in zip(names, flat.split(sizes), strict=True)], strict=True)
        )
        return F.cross_entropy(torch.func.functional_call(model, parts, (batch[0],)), batch[1])

    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    diagonal = torch.autograd.functional.hessian(loss, flat).diagonal()
    diag = {n: d.view(params[n].shape) for n, d in zip(names, diagonal.split(sizes), strict=True)}
    out = {g.name: torch.zeros(g.n_channels, dtype=torch.float64) for g in graph.groups}
    for g in graph.groups:
        for s in g.slices:
            if s.param not in params:
                continue
            sizes_ = [params[s.param].shape[d] for d in s.dims]
            others = [d for d in range(params[s.param].dim()) if d not in s.dims]
            h = diag[s.param].permute(*s.dims, *others).reshape(int(torch.tensor(sizes_).prod()), -1)
            w = params[s.param].detach().permute(*s.dims, *others).reshape(h.shape)
            for c in range(g.n_channels):
                rows = torch.from_numpy(s.index[c])
                out[g.name][c] += h[rows].sum() / (2 * h[rows].numel()) * w[rows].square().sum()
    return out


NETS = {
    "mlp": (lambda: mlp(), (5,), 3),
    "two_conv": (lambda: two_conv(act=nn.Tanh), (3, 8, 8), 4),
    "grouped": (lambda: grouped(), (3, 5, 5), 4),
}


@pytest.mark.parametrize("engine", ["retained", "streaming", "finite_difference"])
def test_one_probe_is_exact_on_a_diagonal_hessian(engine):
    model, graph = quadratic()
    model.double()
    scores = score(model, graph, [None], lambda m, _: m(), HessianTrace(1, engine=engine, signed=True))
    for name, dim in (("rows", 1), ("columns", 0)):
        p = model.w.shape[dim]
        expected = model.a.sum(dim) / (2 * p) * model.w.detach().square().sum(dim)
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-6, atol=1e-7)
    again = score(model, graph, [None], lambda m, _: m(), HessianTrace(1, engine=engine))
    assert torch.equal(again["rows"], scores["rows"].abs())
    assert scores["rows"][0] < 0


@pytest.mark.parametrize("net", NETS)
def test_mean_within_its_own_confidence_of_the_full_hessian(net):
    make, shape, classes = NETS[net]
    model, graph = make()
    model.double()
    batch = data(*shape, classes=classes)
    truth = true_scores(model, graph, batch)
    scores = score(model, graph, [batch], cross_entropy, HessianTrace(400, signed=True))
    z = torch.cat([(scores[n].double() - truth[n]) / scores.stderr[n].double().clamp(min=1e-12) for n in truth])
    assert z.abs().max() < 4
    assert 0.3 < z.square().mean() < 2  # unbiased, and the standard error is honest
    assert scores.info["observations"] == 400


def test_batches_average():
    model, graph = mlp()
    model.double()
    a, b = data(5, classes=3), data(5, classes=3, n=9)
    truth = {
        n: (x + y) / 2
        for (n, x), y in zip(true_scores(model, graph, a).items(), true_scores(model, graph, b).values(), strict=True)
    }
    criterion = HessianTrace(100, signed=True)
    scores = score(model, graph, [a, b], cross_entropy, criterion)
    alone = [score(model, graph, [x], cross_entropy, criterion) for x in (a, b)]
    for n in truth:
        of_probes = (alone[0].stderr[n] ** 2 + alone[1].stderr[n] ** 2).sqrt() / 2
        assert ((scores[n] - truth[n]).abs() / of_probes).max() < 4


@pytest.mark.parametrize("net", NETS)
def test_finite_difference_agrees_with_retained(net):
    make, shape, classes = NETS[net]
    model, graph = make()
    model.double()
    batch = data(*shape, classes=classes)
    exact, near = (
        score(model, graph, [batch], cross_entropy, HessianTrace(3, engine=e))
        for e in ("retained", "finite_difference")
    )
    for n in exact:
        torch.testing.assert_close(near[n], exact[n], rtol=1e-4, atol=1e-7)
    if net == "grouped":
        return  # a step across the kink of a ReLU is a jump of the gradient: rare, but large in fp32
    model.float()
    batch = (batch[0].float(), batch[1])
    single = score(model, graph, [batch], cross_entropy, HessianTrace(3, engine="finite_difference"))
    for n in exact:
        torch.testing.assert_close(single[n], exact[n], rtol=0.05, atol=float(exact[n].abs().max()) * 0.01)


def test_probes_are_signs_and_a_function_of_seed_probe_and_parameter():
    like = [torch.empty(3, 5), torch.empty(7, dtype=torch.float64), torch.empty(2, 4, 3, 3).half()]
    one, two = (Probes(torch.Generator().manual_seed(1)) for _ in range(2))
    for i, t in enumerate(like):
        v = one.signs(t, 4, i)
        assert v.dtype == t.dtype and v.shape == t.shape and torch.equal(v, two.signs(t, 4, i))
    assert set(one.signs(torch.empty(400, 1000), 0, 0).unique().tolist()) == {-1.0, 1.0}
    flat = [p.signs(torch.empty(5000), k, i) for p, k, i in ((one, 0, 0), (one, 1, 0), (one, 0, 1))]
    flat.append(Probes(torch.Generator().manual_seed(2)).signs(torch.empty(5000), 0, 0))
    products = torch.stack(flat) @ torch.stack(flat).T / 5000
    assert products.fill_diagonal_(0).abs().max() < 0.07  # five standard errors
    assert one.next(3) == 0 and one.next() == 3


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("criterion", [HessianTrace(2), HessianTrace(2, engine="finite_difference"), Taylor()], ids=str)
def test_the_model_is_left_as_it_was(criterion):
    model, graph = two_conv()
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before, rng = snapshot(model), torch.get_rng_state()
    batch = data(3, 8, 8, classes=4, dtype=torch.float32)

    def noisy(m, b):
        return cross_entropy(m, (b[0] + torch.rand(()), b[1]))

    with torch.no_grad():
        score(model, graph, [batch], noisy, criterion)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training and not model.bn1.training and model.conv1.training
    assert not model.conv1.weight.requires_grad and model.conv2.weight.requires_grad
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert model.conv1.weight.grad is None and model.conv2.weight.grad is None


def test_frozen_parameters_score_as_if_they_were_not():
    model, graph = two_conv()
    batch = data(3, 8, 8, classes=4, dtype=torch.float32)
    free = score(model, graph, [batch], cross_entropy, HessianTrace(2))
    for p in model.conv1.parameters():
        p.requires_grad_(False)
    frozen = score(model, graph, [batch], cross_entropy, HessianTrace(2))
    assert all(torch.equal(free[n], frozen[n]) for n in free)
    assert free["conv1"].abs().sum() > 0


def test_unused_parameters_score_zero():
    model, graph = mlp()
    for engine in ("retained", "finite_difference"):
        scores = score(
            model, graph, [torch.randn(4, 5)], lambda m, x: m[0](x).pow(2).mean(), HessianTrace(2, engine=engine)
        )
        assert scores["2"].abs().sum() == 0 and scores["0"].abs().sum() > 0


def test_a_loss_linear_in_the_parameters_scores_zero():
    model, graph = mlp(widths=(5, 4, 3))
    scores = score(model, graph, [torch.randn(4, 5)], lambda m, x: m[0](x).sum(), HessianTrace(2))
    assert scores["0"].abs().sum() == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_finite_difference_restores_bit_for_bit_when_interrupted(error):
    model, graph = two_conv()
    before, calls = snapshot(model), []

    def loss(m, b):
        calls.append({k: v.clone() for k, v in m.state_dict().items()})
        if len(calls) == 3:
            raise error("stop")
        return cross_entropy(m, b)

    batch = data(3, 8, 8, classes=4, dtype=torch.float32)
    with pytest.raises(error):
        score(model, graph, [batch], loss, HessianTrace(3, engine="finite_difference"))
    assert not torch.equal(calls[2]["conv1.weight"], before["conv1.weight"])  # it was moved
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("when", ["before", "after"])
def test_restores_through_a_second_interrupt(monkeypatch, when):
    model, graph = two_conv()
    before, state = snapshot(model), {"left": 1, "calls": 0}
    back = ReversibleStep.back

    def interrupted(self):
        state["left"] -= 1
        if when == "after":
            back(self)
        raise KeyboardInterrupt

    def loss(m, b):
        state["calls"] += 1
        if state["calls"] == 3:
            monkeypatch.setattr(ReversibleStep, "back", lambda self: (interrupted if state["left"] else back)(self))
        return cross_entropy(m, b)

    batch = data(3, 8, 8, classes=4, dtype=torch.float32)
    with pytest.raises(KeyboardInterrupt):
        score(model, graph, [batch], loss, HessianTrace(1, engine="finite_difference"))
    assert state == {"left": 0, "calls": 3}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mean(1))


def test_fused_attention_has_a_double_backward_here():
    torch.manual_seed(0)
    model = Attention()
    graph = build_graph(model, {"out": {"n": 6}}, {"out.weight": {1: "out"}, "qkv.weight": {1: "out"}})
    batch = data(5, 6, classes=3, dtype=torch.float32)
    scores = score(model, graph, [batch], cross_entropy, HessianTrace(2))
    assert torch.isfinite(scores["out"]).all() and scores["out"].abs().sum() > 0


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


class Encoder(nn.Module):
    """Multi-head attention in eval mode, which has a fused path of its own beside F.scaled_dot_product_attention."""

    def __init__(self, need_weights):
        super().__init__()
        self.need_weights = need_weights
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)

    def forward(self, x):
        h = self.embed(x)
        h = h + self.attention(h, h, h, need_weights=self.need_weights)[0]
        return self.out(self.layer(h).mean(1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_has_a_double_backward_here(need_weights, frozen):
    """Its fused paths have none: gradients keep the module's off, double_differentiable the functional one's."""
    torch.manual_seed(0)
    model = Encoder(need_weights).double()
    x = torch.randn(4, 5, 6, dtype=torch.float64), torch.randint(3, (4,))
    graph = cpd.comb(model.float(), x[0].float())
    model = model.double().requires_grad_(not frozen)
    exact = score(model, graph, [x], cross_entropy, HessianTrace(3, engine="retained"))
    near = score(model, graph, [x], cross_entropy, HessianTrace(3, engine="finite_difference", step=1e-6))
    largest = max(float(v.max()) for v in exact.values())
    for n in exact:
        torch.testing.assert_close(near[n], exact[n], rtol=1e-3, atol=1e-5 * largest)
    assert set(score(model, graph, [x], cross_entropy, GateHessian(3))) == {g.name for g in graph.groups}


def test_the_seed_is_the_generators_whatever_its_device():
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    model, graph = mlp()
    batch = data(5, classes=3, dtype=torch.float32)
    for device in devices:
        of = [
            score(
                model, graph, [batch], cross_entropy, HessianTrace(1, generator=torch.Generator(device).manual_seed(s))
            )
            for s in (1, 1, 2)
        ]
        assert all(torch.equal(of[0][n], of[1][n]) for n in of[0])
        assert not all(torch.equal(of[0][n], of[2][n]) for n in of[0])


@pytest.mark.parametrize("signed", [False, True])
def test_merged_runs_are_the_mean_of_their_probes(signed):
    """Ranks have probes of their own: means are merged with their signs, magnitudes taken of the result."""
    model, graph = mlp()
    batch = data(5, classes=3, dtype=torch.float32)
    parts, plain = [], []
    for seed in (0, 1):
        made = {"generator": torch.Generator().manual_seed(seed)}
        parts.append(score(model, graph, [batch], cross_entropy, HessianTrace(3, signed=signed, **made)))
        made = {"generator": torch.Generator().manual_seed(seed)}
        plain.append(score(model, graph, [batch], cross_entropy, HessianTrace(3, signed=True, **made)))
    parts = [Scores(dict(p), criterion="same", fingerprint=p.fingerprint, stderr=p.stderr, info=p.info) for p in parts]
    merged = merge_scores(parts)
    assert any((plain[0][n] * plain[1][n] < 0).any() for n in plain[0])  # signs matter
    for n in merged:
        mean = (plain[0][n] + plain[1][n]) / 2
        torch.testing.assert_close(merged[n], mean if signed else mean.abs(), rtol=1e-5, atol=1e-8)
    assert merged.info["observations"] == 6


def test_a_model_without_parameters_of_the_graph():
    graph = build_graph(nn.Linear(2, 2), {"a": {"n": 2}}, {})
    with pytest.raises(ScoreError, match="no channel owns a parameter of this model: there is nothing to score"):
        score(nn.Linear(2, 2), graph, [torch.ones(1, 2)], lambda m, x: m(x).sum())


def test_errors():
    model, graph = two_conv()
    batch = data(3, 8, 8, classes=4, dtype=torch.float32)
    cases = [
        (lambda m, b: m(b[0]), r"the loss must be a scalar, got shape \(6, 4\)"),
        (lambda m, b: 3.0, "the loss must be a scalar tensor, got float"),
        (lambda m, b: cross_entropy(m, b).detach(), "the loss has no graph"),
        (lambda m, b: cross_entropy(m, b) * float("nan"), "the loss is nan"),
        (
            lambda m, b: F.cross_entropy(OnceDifferentiable.apply(m(b[0])), b[1]),
            "custom autograd.Function .*engine='fin",
        ),
        (lambda m, b: torch.cdist(m(b[0]), b[0][:, 0, 0, :4], p=3.0).mean(), "cdist.* has no double backward"),
    ]
    for loss, match in cases:
        with pytest.raises(ScoreError, match=match):
            score(model, graph, [batch], loss, HessianTrace(engine="retained"))
    with pytest.raises(ScoreError, match="HessianTrace: no batches; give at least one"):
        score(model, graph, [], cross_entropy)
    with pytest.raises(ScoreError, match=r"HessianTrace needs batches and loss_fn"):
        score(model, graph)
    for bad, match in (
        ({"num_probes": 0}, "num_probes must be at least 1"),
        ({"engine": "x"}, "expected one of auto, retained, "),
        ({"step": -1.0}, "step must be positive"),
    ):
        with pytest.raises(ScoreError, match=match):
            HessianTrace(**bad)
    other, _ = mlp()
    with pytest.raises(ScoreError, match="graph of another model: the model has no parameter conv1.weight"):
        score(other, graph, [batch], cross_entropy)
    model.conv1 = nn.Conv2d(3, 9, 3)
    with pytest.raises(ScoreError, match=r"conv1.weight has shape \(9, 3, 3, 3\), the graph expects \(8, 3, 3, 3\)"):
        score(model, graph, [batch], cross_entropy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype):
    """Retained products accumulate in fp32; a finite difference refuses."""
    model, graph = two_conv(act=nn.Tanh)
    batch = data(3, 8, 8, classes=4, dtype=torch.float32)
    exact = score(model, graph, [batch], cross_entropy, HessianTrace(2))
    model.to(dtype)
    half = (batch[0].to(dtype), batch[1])
    scores = score(model, graph, [half], lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]), HessianTrace(2))
    for n in exact:
        torch.testing.assert_close(scores[n], exact[n], rtol=0.1, atol=0.05 * float(exact[n].abs().max()))
    with pytest.raises(ScoreError, match="a finite difference needs fp32 parameters, conv1.weight is torch"):
        score(model, graph, [half], cross_entropy, HessianTrace(engine="finite_difference"))


def test_channels_last_weights():
    model, graph = two_conv()
    batch = data(3, 8, 8, classes=4, dtype=torch.float32)
    plain = score(model, graph, [batch], cross_entropy, HessianTrace(2))
    model.to(memory_format=torch.channels_last)
    for n, v in score(model, graph, [batch], cross_entropy, HessianTrace(2)).items():
        torch.testing.assert_close(v, plain[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["retained", "streaming", "finite_difference"])
def test_not_finite_names_the_parameter(engine):
    model, graph = mlp()

    def loss(m, x):  # finite, but its curvature is not
        return m(x).pow(2).mean() + (m[2].weight[0] * 0).abs().pow(0.5).sum()

    with pytest.raises(ScoreError, match="HessianTrace: values of parameter 2.weight are not finite"):
        score(model, graph, [torch.randn(4, 5)], loss, HessianTrace(2, engine=engine, step=1e-3))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_wrappers_are_looked_through():
    model, graph = mlp()
    batch = data(5, classes=3, dtype=torch.float32)
    plain = score(model, graph, [batch], cross_entropy)
    with contextlib.suppress(Exception):
        compiled = torch.compile(model, backend="eager")
        assert all(torch.equal(v, plain[k]) for k, v in score(compiled, graph, [batch], cross_entropy).items())
    wrapped = nn.DataParallel(model)
    assert all(torch.equal(v, plain[k]) for k, v in score(wrapped, graph, [batch], cross_entropy).items())

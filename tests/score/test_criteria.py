import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpd_fast.errors import ScoreError
from cpd_fast.schedule import plan_cost
from cpd_fast.score import BNScale, GroupFisher, HessianTrace, Magnitude, Random, Taylor, merge_scores, score
from cpd_fast.score._moments import Moments
from cpd_fast.score.criterion import Context, Criterion
from cpd_fast.types import PrunePlan
from tests.helpers import build_graph, grouped, mlp, two_conv


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(*shape, classes, count=2, n=5):
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(n, *shape, generator=g), torch.randint(classes, (n,), generator=g)) for _ in range(count)]


def grads_of(model, batch):
    model.eval()
    return dict(
        zip(
            [n for n, _ in model.named_parameters()],
            torch.autograd.grad(cross_entropy(model, batch), list(model.parameters())),
            strict=True,
        )
    )


def test_taylor_is_cpds_formula():
    model, graph = two_conv()
    data = batches(3, 8, 8, classes=4)
    scores = score(model, graph, data, cross_entropy, Taylor())
    expected = torch.zeros(8)
    for batch in data:
        g, p = grads_of(model, batch), dict(model.named_parameters())
        acts = {"conv1.weight": 512, "conv1.bias": 512, "bn1.weight": 512, "bn1.bias": 512}
        for name, a in acts.items():
            # mean over 4 producing parameters, 2 batches; 7 tensors in the group (conv2's columns, 2 statistics)
            expected += (
                (p[name] * g[name]).flatten(1).sum(1).square() / a / 4 / 7 / 2
                if p[name].dim() > 1
                else (p[name] * g[name]).square() / a / 4 / 7 / 2
            )
    torch.testing.assert_close(scores["conv1"], expected.detach(), rtol=1e-5, atol=0)
    plain = score(model, graph, data, cross_entropy, Taylor(normalize_cost=False))
    torch.testing.assert_close(plain["conv1"], expected.detach() * 512 * 7, rtol=1e-5, atol=0)


def test_taylor_counts_remaining_activations_under_a_plan():
    model, graph = two_conv()
    (batch,) = batches(3, 8, 8, classes=4, count=1)
    g = grads_of(model, batch)
    dense = Taylor().from_gradients(Context(model, graph), g)
    half = Taylor().from_gradients(Context(model, graph, plan=PrunePlan({"conv1": [0, 1, 2, 3]}, "hand")), g)
    torch.testing.assert_close(half[:4], dense[:4] * 2)
    assert half[4:8].abs().sum() == 0


class Gated(nn.Module):
    """two_conv or grouped with a gate on what each group feeds."""

    def __init__(self, model, gates):
        super().__init__()
        self.model, self.gates = model, gates

    def forward(self, x):
        hooks = [
            self.model.get_submodule(m).register_forward_pre_hook(
                lambda mod, a, g=g: (a[0] * (g.view(-1, *[1] * (a[0].dim() - 2))),)
            )
            for m, g in self.gates.items()
        ]
        try:
            return self.model(x)
        finally:
            for h in hooks:
                h.remove()


@pytest.mark.parametrize("net", ["two_conv", "grouped"])
def test_group_fisher_is_the_squared_gate_gradient_of_every_sample(net):
    model, graph = {"two_conv": two_conv, "grouped": grouped}[net]()
    model.eval()
    ((x, y),) = batches(3, 8, 8, classes=4, count=1)
    scores = score(model, graph, [(x, y)], cross_entropy, GroupFisher())
    widths = {g.name: g.n_channels for g in graph.groups}
    expected = {n: torch.zeros(w) for n, w in widths.items()}
    for i in range(len(x)):
        gates = {
            "conv2": torch.ones(widths["conv1"], requires_grad=True),
            "fc": torch.ones(widths["conv2"], requires_grad=True),
        }
        loss = F.cross_entropy(Gated(model, gates)(x[i : i + 1]), y[i : i + 1]) / len(x)
        first, second = torch.autograd.grad(loss, list(gates.values()))
        expected["conv1"] += first**2
        expected["conv2"] += second**2
    for n in expected:
        torch.testing.assert_close(scores[n], expected[n], rtol=1e-4, atol=1e-9)


def test_group_fisher_tokens_belong_to_their_sample():
    """Tokens folded into dim 0 before a linear layer: summed inside each sample before squaring."""

    class Tokens(nn.Module):
        def __init__(self, fold):
            super().__init__()
            self.fold, self.a, self.b, self.c = fold, nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):  # (N, T, 4)
            h = self.a(x).relu()
            h = self.b(h.flatten(0, 1)).view(*x.shape[:2], 5) if self.fold else self.b(h)
            return self.c(h.mean(1))

    torch.manual_seed(0)
    model = Tokens(True)
    graph = build_graph(model, {"a": {"n": 6}}, {"a.weight": {0: "a"}, "b.weight": {1: "a"}})
    data = batches(7, 4, classes=3, count=1)
    folded = score(model, graph, data, cross_entropy, GroupFisher())
    model.fold = False
    torch.testing.assert_close(folded["a"], score(model, graph, data, cross_entropy, GroupFisher())["a"])
    assert folded["a"].sum() > 0


def test_group_fisher_gates_producers_where_nothing_consumes():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)

        def forward(self, x):
            return (self.q(x) @ self.k(x).transpose(1, 2)).mean(2)

    torch.manual_seed(0)
    model = Attention()
    graph = build_graph(model, {"d": {"n": 6}}, {"q.weight": {0: "d"}, "k.weight": {0: "d"}})
    ((x, y),) = batches(3, 4, classes=3, count=1)
    scores = score(model, graph, [(x, y)], cross_entropy, GroupFisher())
    expected = torch.zeros(6)
    for i in range(len(x)):
        gate = torch.ones(6, requires_grad=True)
        logits = ((model.q(x[i : i + 1]) * gate) @ (model.k(x[i : i + 1]) * gate).transpose(1, 2)).mean(2)
        expected += torch.autograd.grad(F.cross_entropy(logits, y[i : i + 1]) / len(x), gate)[0] ** 2
    torch.testing.assert_close(scores["d"], expected, rtol=1e-4, atol=1e-9)


def test_group_fisher_says_which_groups_it_cannot_see():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 6))

        def forward(self, x):
            return (x @ self.w.T).relu() @ self.v.T

    model = Odd()
    graph = build_graph(model, {"w": {"n": 6}}, {"w": {0: "w"}, "v": {1: "w"}})
    with pytest.raises(
        ScoreError, match="GroupFisher: no convolution or linear layer of 1 prunable groups was called: w"
    ):
        score(model, graph, batches(4, classes=3), cross_entropy, GroupFisher())


def test_magnitude_by_hand():
    model, graph = grouped()
    scores = score(model, graph, criterion=Magnitude(p=1))
    w = model.conv2.weight.detach().abs().sum((2, 3))  # (12, 2)
    columns = torch.stack([w[c // 2 * 3 : c // 2 * 3 + 3, c % 2].sum() for c in range(8)])
    rows = model.conv1.weight.detach().abs().flatten(1).sum(1)
    torch.testing.assert_close(scores["conv1"], (rows + columns) / 2)
    assert scores.info["normalize"] == "mean"


def test_bn_scale():
    model, graph = two_conv()
    nn.init.normal_(model.bn1.weight)
    with pytest.raises(ScoreError, match="BNScale: 1 prunable groups run through no normalisation with a scale: conv2"):
        score(model, graph, criterion=BNScale())
    graph = build_graph(
        model, {"conv1": {"n": 8}}, {"conv1.weight": {0: "conv1"}, "bn1.weight": {0: "conv1"}, "bn1.bias": {0: "conv1"}}
    )
    assert torch.equal(score(model, graph, criterion=BNScale())["conv1"], model.bn1.weight.detach().abs())


def test_random_is_repeatable_and_follows_its_generator():
    model, graph = mlp()
    a, b = (score(model, graph, criterion=Random()) for _ in range(2))
    assert torch.equal(a["0"], b["0"])
    g = torch.Generator().manual_seed(9)
    c, d = (score(model, graph, criterion=Random(g)) for _ in range(2))
    assert not torch.equal(c["0"], d["0"])


class Given(Criterion):
    """Observations that come with the batch: ``closure()`` is ``(k, n_channels)``."""

    def observe(self, context, closure):
        yield from closure()

    def __repr__(self):
        return "Given()"


def test_standard_errors_are_over_batches():
    """Probes of one batch share it: 50 of them tell no more about other batches than its mean does."""
    model, graph = mlp()
    n = graph.n_channels
    g = torch.Generator().manual_seed(0)
    data = [torch.randn(n, generator=g) + 0.01 * torch.randn(50, n, generator=g) for _ in range(6)]
    scores = score(model, graph, data, lambda m, b: b, Given())
    means = torch.stack([d.mean(0) for d in data]).double()
    expected = means.std(0) / 6**0.5
    got = torch.cat([scores.stderr[k] for k in scores]).double()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    assert (scores.info["observations"], scores.info["batches"]) == (300, 6)
    alone = score(model, graph, data[:1], lambda m, b: b, Given())
    got = torch.cat([alone.stderr[k] for k in alone])
    torch.testing.assert_close(got, data[0].std(0) / 50**0.5, rtol=1e-5, atol=0)


@pytest.mark.parametrize("criterion", [Given(), Taylor(), GroupFisher()], ids=str)
def test_merged_ranks_equal_one_run(criterion):
    model, graph = mlp()
    if isinstance(criterion, Given):
        data, loss = [torch.randn(k, graph.n_channels) for k in (3, 5, 1, 3)], lambda m, b: b
    else:
        data, loss = batches(5, classes=3, count=4), cross_entropy
    for cut in (1, 2):
        parts = [score(model, graph, d, loss, criterion) for d in (data[:cut], data[cut:])]
        whole, merged = score(model, graph, data, loss, criterion), merge_scores(parts)
        for n in whole:
            torch.testing.assert_close(merged[n], whole[n], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(merged.stderr[n], whole.stderr[n], rtol=1e-4, atol=1e-9)
        assert merged.info["observations"] == whole.info["observations"]
        assert merged.info["batches"] == whole.info["batches"]


def test_merge_refuses_a_mixture():
    model, graph = mlp()
    a, b = score(model, graph, criterion=Magnitude()), score(model, graph, criterion=Magnitude(p=1))
    with pytest.raises(ScoreError, match=r"cannot merge Magnitude\(p=1\) of model hand with Magnitude\(p=2\)"):
        merge_scores([a, b])
    with pytest.raises(ScoreError, match="no scores to merge"):
        merge_scores([])


def test_moments_against_the_textbook():
    x = torch.randn(7, 3, dtype=torch.float64)
    m, other = Moments(3), Moments(3)
    for row in x[:4]:
        m.add(row)
    m.add(torch.tensor([1.0, float("inf"), 2.0]), skip_nonfinite=True)
    for row in x[4:]:
        other.add(row)
    m.merge(other)
    torch.testing.assert_close(m.mean, x.mean(0))
    torch.testing.assert_close(m.stderr, x.std(0) / 7**0.5)
    again = Moments(3)
    again.load_state_dict(m.state_dict())
    assert torch.equal(again.m2, m.m2)


def test_moments_gather_all_ranks(monkeypatch):
    x, ranks = torch.randn(6, 3, dtype=torch.float64), [Moments(3), Moments(3)]
    for i, row in enumerate(x):
        ranks[i % 2].add(row)
    states = [m.state_dict() for m in ranks]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda out, _: out.__setitem__(slice(None), states))
    for m in ranks:
        m.gather()
        torch.testing.assert_close(m.mean, x.mean(0))
        torch.testing.assert_close(m.stderr, x.std(0) / 6**0.5)
    assert torch.equal(ranks[0].mean, ranks[1].mean)


@pytest.mark.parametrize("criterion", [HessianTrace(), GroupFisher(), Magnitude()], ids=str)
def test_only_first_order_criteria_read_training_gradients(criterion):
    model, graph = mlp()
    with pytest.raises(ScoreError, match=f"{type(criterion).__name__} cannot be computed from the gradients"):
        criterion.from_gradients(Context(model, graph), {})


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    model = Tied()
    graph = build_graph(model, {"a": {"n": 4}}, {"a.weight": {0: "a"}})
    assert plan_cost(graph).params == 16
    (batch,) = batches(4, classes=4, count=1)
    scores = score(model, graph, [batch], cross_entropy, Taylor(normalize_cost=False))
    g = torch.autograd.grad(cross_entropy(model, batch), model.a.weight)[0]
    torch.testing.assert_close(scores["a"], (model.a.weight * g).sum(1).square().detach())

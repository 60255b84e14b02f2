"""What the engines of HessianTrace promise: which runs and why, when it stops, and where finite differences work."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import ScoreError
from cpd_fast.memory import Part
from cpd_fast.score import GateHessian, HessianTrace, _finite, _layout, _probes, hessian, score
from cpd_fast.score._finite import Differences
from cpd_fast.score._layout import Layout
from cpd_fast.score._moments import Moments
from cpd_fast.score.criterion import Context
from tests.helpers import build_graph, mlp, two_conv


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def data(*shape, classes, n=6, seed=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=g, dtype=dtype), torch.randint(classes, (n,), generator=g)


def close(a, b, tolerance):
    for n in b:
        assert (a[n] - b[n]).abs().sum() <= tolerance * b[n].abs().sum(), n


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mean(1))


def attention():
    torch.manual_seed(0)
    model = Attention()
    return model, build_graph(model, {"out": {"n": 6}}, {"out.weight": {1: "out"}, "qkv.weight": {1: "out"}})


def test_streaming_is_retained_with_a_fresh_graph_a_probe():
    model, graph = two_conv(act=nn.Tanh)
    batch, calls = data(3, 8, 8, classes=4), []

    def loss(m, b):
        calls.append(1)
        return cross_entropy(m, b)

    exact = score(model, graph, [batch], cross_entropy, HessianTrace(3, engine="retained"))
    fresh = score(model, graph, [batch], loss, HessianTrace(3, engine="streaming"))
    close(fresh, exact, 1e-6)
    assert len(calls) == 3
    assert fresh.info["engine"] == "streaming"


@pytest.mark.parametrize("engine", ["retained", "finite_difference"])
def test_every_body_gives_the_same_scores(monkeypatch, engine):
    """Same seed, same probes bit for bit; sums differ in their order alone. (CUDA bodies: tests/ops, host model.)"""
    places = [
        (_probes, "rademacher"), (_probes, "fill_rademacher_"), (_layout, "hutchinson_reduce"),
        (_layout, "channel_sums"), (hessian, "squared_norms"), (_finite, "ReversibleStep"),
    ]  # fmt: skip
    model, graph = mlp(widths=(5, 6, 3))
    batch = data(5, classes=3)
    criterion = HessianTrace(2, engine=engine, signed=True, step=1e-3)
    scores = {}
    for backend in ("reference", "cpu", "triton"):
        if backend == "cpu" and ": cpu" not in cpd.ops.explain_backend("rademacher", torch.empty(1)).splitlines()[0]:
            continue
        with monkeypatch.context() as patch:
            for module, name in places:
                patch.setattr(module, name, partial(getattr(cpd.ops, name), backend=backend))
            scores[backend] = score(model, graph, [batch], cross_entropy, criterion)
    assert "triton" in scores
    for backend in scores:
        close(scores[backend], scores["reference"], 1e-5 if engine == "retained" else 2e-3)


def test_auto_says_what_it_took_and_why():
    model, graph = two_conv(act=nn.Tanh)
    batch = data(3, 8, 8, classes=4)
    scores = score(model, graph, [batch, batch], cross_entropy, HessianTrace(2))
    assert scores.info["engine"] == "retained"
    assert "double backward" in scores.info["engine_reason"]
    assert "by retained" in repr(scores)

    def odd(m, b):
        return cross_entropy(m, b) + torch.cdist(m(b[0]), b[0][:, 0, 0, :4], p=3.0).mean()

    scores = score(model, graph, [batch, batch], odd, HessianTrace(2))
    assert scores.info["engine"] == "finite_difference"
    assert "cdist" in scores.info["engine_reason"]
    assert "has no double backward" in scores.info["engine_reason"]
    forced = score(model, graph, [batch, batch], odd, HessianTrace(2, engine="finite_difference"))
    assert all(torch.equal(scores[n], forced[n]) for n in scores)


def relative_error(engine_scores, exact):
    return sum(float((engine_scores[n] - exact[n]).abs().sum()) for n in exact) / sum(
        float(exact[n].abs().sum()) for n in exact
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_is_chosen_and_its_error_is_honest(dtype):
    model, graph = two_conv(act=nn.Tanh)
    model.to(dtype)
    batch = data(3, 8, 8, classes=4, dtype=dtype)
    exact = score(model, graph, [batch], cross_entropy, HessianTrace(1, engine="retained", signed=True))
    near = score(model, graph, [batch], cross_entropy, HessianTrace(1, engine="finite_difference", signed=True))
    error = relative_error(near, exact)
    assert 0.1 * error < near.info["step_error"] + 1e-7 < 30 * error + 1e-6
    assert error < (0.02 if dtype == torch.float32 else 1e-4)
    # a step far too short drowns in rounding, one far too long in the third derivative
    for step in (near.info["step"] / 300, near.info["step"] * 300):
        criterion = HessianTrace(1, engine="finite_difference", signed=True, step=step)
        worse = score(model, graph, [batch], cross_entropy, criterion)
        assert relative_error(worse, exact) > 4 * error
        assert worse.info["step_error"] is None


def test_an_uncertain_difference_warns():
    model, graph = two_conv(act=nn.Tanh)
    batch = data(3, 8, 8, classes=4)

    def loss(m, b):  # its gradient turns around faster than any step that rounding leaves
        return torch.sin(m(b[0]) * 1e5).mean()

    with pytest.warns(UserWarning, match="finite differences of this model are off by about"):
        score(model, graph, [batch], loss, HessianTrace(1, engine="finite_difference"))


def test_finite_difference_through_fused_attention():
    model, graph = attention()
    batch = data(5, 6, classes=3)
    exact = score(model, graph, [batch], cross_entropy, HessianTrace(4, engine="retained"))
    near = score(model, graph, [batch], cross_entropy, HessianTrace(4, engine="finite_difference"))
    close(near, exact, 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_difference_under_autocast(dtype):
    """Rounding of half precision needs a longer step: it is found, and the scores come out to a few per cent."""
    model, graph = two_conv(act=nn.Tanh)
    batch = data(3, 8, 8, classes=4, n=32)

    def half(m, b):
        with torch.autocast("cpu", dtype):
            y = m(b[0])
        return F.cross_entropy(y.float(), b[1])

    exact = score(model, graph, [batch], cross_entropy, HessianTrace(4, engine="retained", signed=True))
    near = score(model, graph, [batch], half, HessianTrace(4, engine="finite_difference", signed=True, loss_scale=256))
    plain = score(model, graph, [batch], cross_entropy, HessianTrace(4, engine="finite_difference", signed=True))
    assert near.info["step"] > 4 * plain.info["step"]
    assert relative_error(near, exact) < 0.3


def test_loss_scale_keeps_small_fp16_gradients():
    model, graph = two_conv(act=nn.Tanh)
    batch = data(3, 8, 8, classes=4, n=32)

    def tiny(m, b):
        with torch.autocast("cpu", torch.float16):
            y = m(b[0])
        return F.cross_entropy(y.float(), b[1]) * 1e-4

    def exact(m, b):
        return cross_entropy(m, b) * 1e-4

    truth = score(model, graph, [batch], exact, HessianTrace(4, engine="retained", signed=True))
    options = {"engine": "finite_difference", "signed": True, "step": 0.02}
    scaled = score(model, graph, [batch], tiny, HessianTrace(4, loss_scale=2.0**20, **options))
    plain = score(model, graph, [batch], tiny, HessianTrace(4, **options))
    assert relative_error(scaled, truth) < 0.3 < 0.6 < relative_error(plain, truth)
    retained = score(model, graph, [batch], exact, HessianTrace(4, signed=True, engine="retained", loss_scale=2.0**16))
    close(retained, truth, 1e-4)
    with pytest.raises(ScoreError, match=r"values of parameter .* are not finite; .* lower the loss scale"):
        score(model, graph, [batch], tiny, HessianTrace(1, loss_scale=2.0**100, **options))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_finite_difference_runs_the_compiled_model(backend):
    model, graph = two_conv(act=nn.Tanh)
    batch = data(3, 8, 8, classes=4)
    plain = score(model, graph, [batch], cross_entropy, HessianTrace(2, engine="finite_difference"))
    compiled = torch.compile(model, backend=backend)
    seen = []

    def loss(m, b):
        seen.append(type(m).__name__)
        return cross_entropy(m, b)

    before = {k: v.clone() for k, v in model.state_dict().items()}
    scores = score(compiled, graph, [batch], loss, HessianTrace(2, engine="finite_difference"))
    close(scores, plain, 0.02)
    assert set(seen) == {"OptimizedModule"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    seen.clear()
    close(score(compiled, graph, [batch], loss, HessianTrace(2)), plain, 0.02)
    assert set(seen) == {"TwoConv"}  # a compiled graph has no double backward


def test_a_distributed_wrapper_is_looked_through(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, graph = two_conv(act=nn.Tanh)
        batch = data(3, 8, 8, classes=4)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for engine in ("retained", "finite_difference"):
            plain = score(model, graph, [batch], cross_entropy, HessianTrace(2, engine=engine))
            scores = score(wrapped, graph, [batch], cross_entropy, HessianTrace(2, engine=engine))
            assert all(torch.equal(scores[n], plain[n]) for n in plain)
        cross_entropy(wrapped.train(), batch).backward()  # and training goes on as before
        assert model.conv1.weight.grad is not None
        del wrapped
        gc.collect()  # or it ends the group: waiting for gloo's thread, which waits for the interpreter's lock
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_of_a_finite_difference_are_dropped_as_they_come(monkeypatch):
    """Gradients are reduced inside the backward pass; what autograd hands out holds no memory."""
    monkeypatch.setattr(_finite, "_WAITING", 1000)
    reductions = []
    reduce = Layout.reduce_probe
    monkeypatch.setattr(Layout, "reduce_probe", lambda self, v, *a: reductions.append(dict(v)) or reduce(self, v, *a))
    model, graph = two_conv()
    context = Context(model, graph)
    batch, kept = data(3, 8, 8, classes=4), []
    grad = torch.autograd.grad

    def spy(*args, **kwargs):
        kept.extend(grad(*args, **kwargs))
        return tuple(kept)

    torch.autograd.grad = spy
    try:
        list(Differences(context, [Part(1.0, lambda: cross_entropy(model, batch))]).products([0], 1e-3))
    finally:
        torch.autograd.grad = grad
    assert len(kept) == 2 * len(context.tensors)
    assert len(reductions) >= 4 and sum(len(r) for r in reductions) == len(kept)
    assert all(g.untyped_storage().nbytes() <= 8 for g in kept)


def test_stop_ends_a_batch_when_it_is_precise():
    model, graph = mlp()
    batch = data(5, classes=3)
    scores = score(model, graph, [batch], cross_entropy, HessianTrace(200, stop=0.6, check_every=5))
    taken = scores.info["observations"]
    assert 5 <= taken < 100 and taken % 5 == 0
    assert scores.info["relative_error"] <= 0.6
    finer = score(model, graph, [batch], cross_entropy, HessianTrace(200, stop=0.4, check_every=5))
    assert 200 > finer.info["observations"] > 1.5 * taken  # 2.25 times as many, about
    spread = sum(v.sum() for v in finer.stderr.values())
    size = sum(v.abs().sum() for v in finer.values())
    assert float(spread / size) == pytest.approx(finer.info["relative_error"], rel=1e-4)


def test_stop_ends_the_run_when_the_batches_agree():
    model, graph = mlp()
    same = [data(5, classes=3)] * 50
    scores = score(model, graph, same, cross_entropy, HessianTrace(2, stop=0.5))
    assert 4 <= scores.info["batches"] < 50
    other = [data(5, classes=3, seed=s) for s in range(6)]
    scores = score(model, graph, other, cross_entropy, HessianTrace(2, stop=1e-6))
    assert scores.info["batches"] == 6


def test_stop_looks_only_now_and_then(monkeypatch):
    looks = []
    monkeypatch.setattr(Moments, "relative_error", lambda self: looks.append(int(self.count)) or 1.0)
    model, graph = mlp()
    score(model, graph, [data(5, classes=3)], cross_entropy, HessianTrace(20, stop=0.1, check_every=8))
    assert looks == [8, 16, 20]  # the last for scores.info


def test_errors():
    model, graph = mlp()
    for bad, match in (
        ({"stop": 0.0}, "stop must be a positive relative error, got 0.0"),
        ({"check_every": 0}, "check_every must be at least 1"),
        ({"loss_scale": 0.0}, "loss_scale must be positive and finite"),
        ({"generator": 3}, r"generator must be a torch.Generator \(of any device\), got int"),
    ):
        with pytest.raises(ScoreError, match=match):
            HessianTrace(**bad)
    loose = nn.Linear(5, 3)
    for engine in ("retained", "finite_difference"):
        with pytest.raises(ScoreError, match=r"the loss depends on none of the 5 scored parameters \(0.bias"):
            score(
                model,
                graph,
                [data(5, classes=3)],
                lambda m, b: cross_entropy(loose, b),
                HessianTrace(engine=engine),
            )
    with pytest.raises(ScoreError, match="GateHessian: .*cdist.*engine='finite_difference'"):
        score(
            model,
            graph,
            [data(5, classes=3)],
            lambda m, b: torch.cdist(m(b[0]), b[0][:, :3], p=3.0).mean(),
            GateHessian(engine="retained"),
        )


def test_tied_parameters_are_moved_and_reduced_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    torch.manual_seed(0)
    model = Tied()
    graph = build_graph(model, {"a": {"n": 4}}, {"a.weight": {0: "a"}})
    batch = data(4, classes=4)
    exact = score(model, graph, [batch], cross_entropy, HessianTrace(4, engine="retained"))
    near = score(model, graph, [batch], cross_entropy, HessianTrace(4, engine="finite_difference"))
    close(near, exact, 0.01)
    w = model.a.weight

    def loss(flat):
        return F.cross_entropy(F.linear(F.linear(batch[0], flat.view(4, 4)).tanh(), flat.view(4, 4)), batch[1])

    diagonal = torch.autograd.functional.hessian(loss, w.detach().flatten()).diagonal().view(4, 4)
    truth = diagonal.sum(1) / 8 * w.detach().square().sum(1)
    many = score(model, graph, [batch], cross_entropy, HessianTrace(200, signed=True))
    assert ((many["a"] - truth).abs() / many.stderr["a"]).max() < 4

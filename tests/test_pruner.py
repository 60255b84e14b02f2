import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import PlanError, ScoreError
from cpd_fast.pruner import Pruner
from cpd_fast.schedule import Greedy, plan_cost
from cpd_fast.score import BNScale, GroupFisher, HessianTrace, Magnitude, Random, Taylor, _probes
from tests.helpers import Grouped, TwoConv
from tests.ranks import run_ranks

X = torch.zeros(1, 3, 8, 8)


def net(seed=0, make=TwoConv):
    torch.manual_seed(seed)
    return make()


def batch(i, n=8):
    g = torch.Generator().manual_seed(i)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randint(4, (n,), generator=g)


def train(model, pruner, optimizer, steps, first=0):
    for i in range(first, first + steps):
        x, y = batch(i)
        F.cross_entropy(model(x), y).backward()
        pruner.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()


def removed(pruner):
    return {(n, c) for n, kept in pruner.plan.items() for c in range(pruner.graph[n].n_channels) if c not in kept}


CRITERIA = [
    Taylor(),
    HessianTrace(2),
    HessianTrace(1, engine="finite_difference"),
    GroupFisher(),
    Magnitude(),
    Random(),
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("make", [TwoConv, Grouped])
def test_reaches_the_target_step_by_step_and_compacts(make, criterion):
    model = net(make=make)
    pruner = Pruner(model, X, cpd.Target(macs=0.4), criterion, Greedy(interval=2, steps=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    dense, gone = plan_cost(pruner.graph).macs, set()
    for event in range(4):
        assert not pruner.done
        train(model, pruner, optimizer, 2, first=2 * event)
        now = plan_cost(pruner.graph, pruner.plan).macs
        assert now <= dense * (1 - 0.6 * (1 - (1 - (event + 1) / 4) ** 3)) * (1 + 1e-6)
        assert removed(pruner) >= gone  # monotone
        gone = removed(pruner)
        pruner.plan.check(pruner.graph)
    assert pruner.done and gone
    train(model, pruner, optimizer, 2, first=8)
    assert removed(pruner) == gone
    x, _ = batch(99)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        small = pruner.compact(optimizer).eval()
        torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)  # still masked
    assert sum(p.numel() for p in small.parameters()) == plan_cost(pruner.graph, pruner.plan).params
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}


def test_compact_in_place():
    model = net()
    pruner = Pruner(model, X, cpd.Target(params=0.5), schedule=Greedy(interval=1, steps=1))
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    expected = model.eval()(batch(7)[0])
    assert pruner.compact(inplace=True) is model
    torch.testing.assert_close(model(batch(7)[0]), expected, rtol=1e-5, atol=1e-6)
    assert model.conv1.out_channels < 8 or model.conv2.out_channels < 6


RESUMED = {
    "Taylor": Taylor(),
    "HessianTrace": HessianTrace(1),
    "HessianTrace, differences": HessianTrace(1, engine="finite_difference"),
    "Random": Random(torch.Generator().manual_seed(4)),
}


@pytest.mark.parametrize("criterion", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("stop", [3, 5, 6])
def test_resumes_bit_for_bit(criterion, stop):
    """Killed in the middle of an interval, at its end, or between: the same plan and the same weights."""
    if isinstance(criterion, Random):
        criterion.generator.manual_seed(4)

    def start():
        model = net()
        made = Pruner(model, X, cpd.Target(macs=0.4), copy.deepcopy(criterion), Greedy(interval=3, steps=3))
        return model, made, torch.optim.Adam(model.parameters(), lr=0.01)

    model, pruner, optimizer = start()
    train(model, pruner, optimizer, 9)
    second, again, other = start()
    train(second, again, other, stop)
    file = io.BytesIO()
    torch.save({"m": second.state_dict(), "p": again.state_dict(), "o": other.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    third, resumed, last = start()
    third.load_state_dict(saved["m"])
    last.load_state_dict(saved["o"])
    resumed.load_state_dict(saved["p"])
    assert resumed.plan == again.plan and resumed.iteration == stop
    train(third, resumed, last, 9 - stop, first=stop)
    assert resumed.done and resumed.plan == pruner.plan
    assert all(torch.equal(v, resumed.scores[k]) for k, v in pruner.scores.items())
    for k, v in model.state_dict().items():
        assert torch.equal(v, third.state_dict()[k]), k


def test_taylor_accumulates_what_training_computes():
    """Two steps of an interval: the score is the mean of the two observations."""
    model = net()
    pruner = Pruner(model, X, cpd.Target(macs=0.5), Taylor(normalize_cost=False), Greedy(interval=2, steps=1))
    name = next(g.name for g in pruner.graph.prunable_groups if g.n_channels == 6)
    expected = torch.zeros(6)
    for i in range(2):
        x, y = batch(i)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        w, b = model.conv2.weight, model.conv2.bias
        expected += ((w * w.grad).flatten(1).sum(1) ** 2 + (b * b.grad) ** 2).detach() / 2 / 2
        pruner.step()
    torch.testing.assert_close(pruner.scores[name], expected, rtol=1e-5, atol=1e-12)


def test_scores_under_masks_are_those_of_the_compacted_model():
    """What is scored is the network that remains: same Hessian term, norms and parameter counts."""
    model = net(make=lambda: TwoConv(nn.Tanh)).double()
    x, y = batch(0)
    x = x.double()
    graph = cpd.comb(model, X.double())
    plan = cpd.random_plan(graph, keep=0.6, generator=torch.Generator().manual_seed(1))
    small = cpd.compact(model, graph, plan)
    small_graph = cpd.comb(small, X.double())
    masks = cpd.attach_masks(model, graph, plan)

    def loss(m, _):
        return F.cross_entropy(m(x), y)

    exact = [HessianTrace(150), GroupFisher(), Magnitude(), Taylor()]
    for criterion in exact:
        big = cpd.score(model, graph, [None], loss, criterion, plan=plan)
        less = cpd.score(small, small_graph, [None], loss, criterion)
        for name, kept in plan.items():
            ours, theirs = big[name][list(kept)], less[name]
            if isinstance(criterion, HessianTrace):
                spread = (big.stderr[name][list(kept)] ** 2 + less.stderr[name] ** 2).sqrt()
                assert ((ours - theirs).abs() / spread).max() < 4.5
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-12)
    masks.remove()


def test_steps_that_a_loss_scaler_skips_count_for_nothing():
    model = net()
    pruner = Pruner(model, X, cpd.Target(macs=0.5), Taylor(), Greedy(interval=2, steps=1))
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    pruner.step()
    model.conv1.weight.grad.fill_(float("inf"))
    assert pruner.step()
    assert pruner.scores.info["observations"] == 1


def test_an_interval_without_finite_gradients_names_the_parameter():
    model = net()
    pruner = Pruner(model, X, cpd.Target(macs=0.5), Taylor(), Greedy(interval=1, steps=1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.conv2.bias.grad.fill_(float("nan"))
    with pytest.raises(ScoreError, match="Taylor: values of parameter conv2.bias are not finite"):
        pruner.step()


@pytest.mark.parametrize(
    "schedule", [Greedy(interval=1, steps=3), cpd.OneGroup(interval=1)], ids=["greedy", "one group"]
)
def test_a_latency_by_a_table_and_measured_afterwards(schedule):
    """On a machine where channels bring less than the table says: the plan goes on from the pruner's."""
    model = net()
    graph = cpd.comb(model, X)
    at_work = lambda layer: layer.c_in * layer.c_out / 100  # noqa: E731
    table = cpd.LatencyTable(model, graph, X, "eager", 1, cache=False, measure=at_work, dense_ms=4.0)
    pruner = Pruner(model, X, cpd.Target(latency_ms=0.8), schedule=schedule, graph=graph, latency=table)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    told = [4.0]
    while not pruner.done:
        train(model, pruner, optimizer, 1)
        told.append(table(pruner.plan))
    assert told == sorted(told, reverse=True) and told[-1] <= 3.2

    pruner.remove()  # the model is whole again
    dense = plan_cost(graph).macs

    def measure(small):
        return 4.0, 4.0 * (0.4 + 0.6 * cpd.cost(small, X).macs / dense)

    found = cpd.plan_for_latency(model, graph, pruner.scores, 0.8, X, "eager", 1, table, measure, start=pruner.plan)
    assert abs(found.off) <= 0.05
    assert not (graph.alive(found.plan) & ~graph.alive(pruner.plan)).any() and found.plan != pruner.plan
    small = cpd.compact(model, graph, found.plan, optimizer=optimizer)
    assert measure(small)[1] == pytest.approx(found.measured_ms)


def test_errors():
    model = net()
    with pytest.raises(PlanError, match="macs=0.001 cannot be reached"):
        Pruner(model, X, cpd.Target(macs=0.001))
    with pytest.raises(PlanError, match="nothing is prunable"):
        Pruner(model, X, cpd.Target(macs=0.5), ignore=["conv1", "conv2"])
    with pytest.raises(
        PlanError, match=r"no latency table; pass latency=cpd.LatencyTable\(model, graph, example_inputs"
    ):
        Pruner(model, X, cpd.Target(latency_ms=0.5))
    with pytest.raises(PlanError, match="latency_ms=0.01 cannot be reached"):
        Pruner(model, X, cpd.Target(latency_ms=0.01), latency=lambda plan: 3.0)
    pruner = Pruner(model, X, cpd.Target(macs=0.5))
    with pytest.raises(ScoreError, match="no parameter has a gradient: call pruner.step.. after loss.backward"):
        pruner.step()
    pruner = Pruner(net(), X, cpd.Target(macs=0.5), HessianTrace(), Greedy(interval=1))
    with pytest.raises(ScoreError, match=r"HessianTrace needs the loss itself: call pruner.step\(closure\)"):
        pruner.step()
    assert pruner.iteration == 0
    with pytest.raises(ScoreError, match="BNScale: 1 prunable groups run through no normalisation"):
        Pruner(net(), X, cpd.Target(macs=0.5), BNScale(), Greedy(interval=1)).step()


def test_frozen_channels_do_not_go_first():
    """A frozen stem has no gradients: scored 0 it would be the first to go."""
    model = net()
    model.bn1.requires_grad_(False)
    pruner = Pruner(model, X, cpd.Target(macs=0.5), schedule=Greedy(interval=1, steps=1))
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    assert pruner.step()  # the convolution is trained
    pruner.remove()
    model.conv1.requires_grad_(False)
    for ignored in ((), ("conv1",)):
        pruner = Pruner(model, X, cpd.Target(macs=0.9), schedule=Greedy(interval=1, steps=1), ignore=ignored)
        if ignored:
            assert pruner.step()
        else:
            with pytest.raises(ScoreError, match=r"group conv1: every parameter .* is frozen .* out with ignore="):
                pruner.step()
        pruner.remove()


def test_state_of_another_model():
    pruner = Pruner(net(), X, cpd.Target(macs=0.5))
    other = Pruner(net(make=Grouped), X, cpd.Target(macs=0.5))
    with pytest.raises(PlanError, match="pruner state of another model"):
        pruner.load_state_dict(other.state_dict())
    with pytest.raises(PlanError, match="pruner state version 99, this cpd_fast reads 2"):
        pruner.load_state_dict({**pruner.state_dict(), "version": 99})


def test_absolute_targets_and_linear_ramp():
    model = net()
    graph = cpd.comb(model, X)
    dense = plan_cost(graph)
    pruner = Pruner(
        model, X, cpd.Target(params=dense.params // 2), Random(), Greedy(1, steps=2, ramp="linear"), graph=graph
    )
    pruner.step()
    assert dense.params // 2 < plan_cost(graph, pruner.plan).params <= 0.76 * dense.params
    pruner.step()
    assert plan_cost(graph, pruner.plan).params <= dense.params // 2
    assert pruner.done and not pruner.step()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"interval": 0}, "interval and steps must be at least 1, got 0 and 10"),
        ({"steps": 0}, "must be at least 1, got 50 and 0"),
        ({"ramp": "square"}, "ramp='square': expected one of cubic, linear, cosine"),
    ],
)
def test_bad_schedules(arguments, match):
    with pytest.raises(PlanError, match=match):
        Greedy(**arguments)


def test_moving_average_of_scores():
    """An interval's scores count (1 - a), all before it together a; a resumed run remembers them."""

    def start():
        return Pruner(net(), X, cpd.Target(macs=0.5), Taylor(), Greedy(interval=1, steps=3), score_ema=0.75)

    pruner, raw, wanted = start(), [], None
    finish = pruner.criterion.finish
    for i in range(3):
        x, y = batch(i)
        pruner.model.zero_grad()
        F.cross_entropy(pruner.model(x), y).backward()
        if i == 2:
            state = copy.deepcopy(pruner.state_dict())
            weights = copy.deepcopy([p.grad for p in pruner.model.parameters()])
        moments = copy.deepcopy(pruner._moments)
        gradients = {n: p.grad for n, p in pruner._context.params.items()}
        moments.add(pruner.criterion.from_gradients(pruner._context, gradients))
        raw.append(dict(finish(pruner._context, moments)))
        wanted = raw[0] if wanted is None else {k: 0.75 * wanted[k] + 0.25 * v for k, v in raw[-1].items()}
        pruner.step()
        for name, value in wanted.items():
            torch.testing.assert_close(pruner.scores[name], value)
    resumed = start()
    resumed.load_state_dict(state)
    for p, g in zip(resumed.model.parameters(), weights, strict=True):
        p.grad = g
    resumed.step()
    assert resumed.plan == pruner.plan
    with pytest.raises(ScoreError, match="score_ema=1: expected a share"):
        Pruner(net(), X, cpd.Target(macs=0.5), score_ema=1)


def test_exploding_scores_stop_with_a_message():
    model = net()
    pruner = Pruner(model, X, cpd.Target(macs=0.5), Taylor(), Greedy(interval=1, steps=1))
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e25)
    with pytest.raises(ScoreError, match=r"overflow although the gradients are finite: .*scaler.unscale_\(optimizer\)"):
        pruner.step()
    assert not pruner.plan  # nothing was removed
    huge = {"a": torch.tensor([1.0, 1e60], dtype=torch.float64)}
    with pytest.raises(ScoreError, match=r"t: 1 of 2 scores of group a are not finite .*beyond what fp32 holds"):
        cpd.Scores(huge, criterion="t", fingerprint="f")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loss_scaler_and_autocast(dtype):
    """AMP as on a GPU: steps that overflow are skipped by the scaler and by the scores alike."""

    def run(scale):
        model = net()
        pruner = Pruner(model, X, cpd.Target(macs=0.5), Taylor(), Greedy(interval=4, steps=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 0)
        for i in range(4):
            x, y = batch(i)
            if i == 1:
                x = x * (float("inf") if scale else 1)
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if i == 1 and not scale:
                optimizer.zero_grad()
                pruner.iteration += 1  # the same interval without the bad batch
                continue
            changed = pruner.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert changed
        return pruner

    scaled, plain = run(256.0), run(0)
    assert scaled.scores.info["observations"] == 3
    assert scaled.plan == plain.plan
    for name, value in plain.scores.items():
        torch.testing.assert_close(scaled.scores[name], value, rtol=0.05, atol=1e-9)
    small = scaled.compact()
    with torch.autocast("cpu", dtype):
        assert small(batch(9)[0]).isfinite().all()


CRITERIA_OF_RANKS = {  # and a rank's mean loss over half of the samples: what its square does to per-sample gradients
    Taylor(): 1,
    HessianTrace(num_probes=2): 1,
    GroupFisher(): 2,
    Magnitude(): 1,
}


def _distributed(rank):
    _probes._PROBES_OF_A_RANK = 0  # ranks take other probes each, for less noise; here they are to take the same
    model = net()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 0.0  # the only thing that each rank sees its own batch of
            m.eval()
    wrapped = model if rank is None else torch.nn.parallel.DistributedDataParallel(model)
    plans = []
    for criterion in CRITERIA_OF_RANKS:
        pruner = Pruner(wrapped, X, cpd.Target(macs=0.6), criterion, Greedy(interval=2, steps=2), score_ema=0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for i in range(4):
            x, y = batch(i, 8)
            if rank is not None:
                x, y = x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4]
            F.cross_entropy(wrapped(x), y).backward()
            pruner.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        plans.append((pruner.plan.to_json(), {k: v.clone() for k, v in pruner.scores.items()}))
        pruner.remove()
    return plans, {k: v.detach().clone() for k, v in model.state_dict().items()}


def test_two_ranks_prune_as_one_process_on_the_joined_batch(monkeypatch):
    ranks = run_ranks(_distributed)
    monkeypatch.setattr(_probes, "_PROBES_OF_A_RANK", 0)
    alone, weights = _distributed(None)
    assert ranks[0][0][0][0] == ranks[1][0][0][0]
    for (plan, scores), other in zip(ranks[0][0], ranks[1][0], strict=True):
        assert plan == other[0]  # the same plan on both ranks
        assert all(torch.equal(scores[k], other[1][k]) for k in scores)
    for (plan, scores), (same_plan, same), factor in zip(ranks[0][0], alone, CRITERIA_OF_RANKS.values(), strict=True):
        assert plan == same_plan
        for k in scores:
            torch.testing.assert_close(scores[k], factor * same[k], rtol=5e-3, atol=5e-3 * float(scores[k].max()))
    for k, v in weights.items():
        torch.testing.assert_close(ranks[0][1][k], v, rtol=1e-4, atol=1e-6)

"""``Pruner.backward``: HessianTrace beside a training step, whose own gradient is one end of the difference."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import ScoreError
from cpd_fast.memory import Part, PeakMemory
from cpd_fast.score import GateHessian, GroupFisher, HessianTrace, Taylor, _probes
from cpd_fast.score._finite import Differences
from cpd_fast.score.criterion import Context
from tests.ranks import run_ranks

X = torch.zeros(1, 3, 8, 8)
ALWAYS = cpd.Greedy(interval=100, steps=2)


class Net(nn.Module):
    """All that a second forward could disturb: batch norm, dropout, a buffer that counts, another that is replaced."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.replaced = self.replaced + 1
            x = x * (1 + 0.1 * self.calls + 0.1 * self.replaced)
        x = self.conv2(torch.tanh(self.bn(self.conv1(x))))
        return self.head(self.dropout(torch.tanh(x)).mean((2, 3)))


def net(seed=0, dropout=0.2):
    torch.manual_seed(seed)
    return Net(dropout)


def batch(i, n=8):
    g = torch.Generator().manual_seed(i)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randint(4, (n,), generator=g)


def loss_of(model, i=0, n=8, share=1.0):
    x, y = batch(i, n)
    return lambda: F.cross_entropy(model(x), y) * share


def made(model, criterion=None, schedule=ALWAYS, example=X):
    criterion = HessianTrace(step=1e-3, signed=True) if criterion is None else criterion
    return cpd.Pruner(model, example, cpd.Target(macs=0.5), criterion, schedule, probe_every=1)


def look(pruner, *closures, scaler=None):
    """Observations of one step, ``(num_probes, n_channels)``; nothing is removed."""
    for closure in closures:
        pruner.backward(closure, scaler)
    return torch.stack(list(pruner._in_training.take()))


def state(model):
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    grads = {f"{k}.grad": p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach().clone() for k, v in {**found, **grads, "random": torch.get_rng_state()}.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for k in one:
        assert torch.equal(one[k], other[k]), k


def test_products_are_those_of_a_difference_of_two_gradients_bit_for_bit():
    model = net().train()
    before = copy.deepcopy(dict(model.named_buffers()))
    torch.manual_seed(7)
    context = Context(model, cpd.comb(model, X))

    def put_back():
        for name, b in model.named_buffers():
            b.copy_(before[name])

    def from_the_start():
        put_back()
        return loss_of(model)()

    criterion = HessianTrace(3, step=1e-3)
    ours = criterion.in_training(context)
    expected = Differences(context, [Part(1.0, from_the_start)]).products(range(3), 1e-3)
    expected = [ours._channels(pieces) for pieces in expected]
    put_back()
    torch.manual_seed(7)
    ours.backward(loss_of(model), None, None)
    for mine, other in zip(ours.take(), expected, strict=True):
        assert mine.abs().max() > 0
        assert torch.equal(mine, other)


def test_they_are_the_curvature_of_the_training_loss():
    """Against double backward in train mode: batch statistics, and the dropout of this very iteration."""
    model = net().double().train()
    pruner = made(model, HessianTrace(2, signed=True), example=X.double())
    torch.manual_seed(3)
    x, y = (t.double() if t.is_floating_point() else t for t in batch(0))
    found = look(pruner, lambda: F.cross_entropy(model(x), y))

    def again():
        torch.manual_seed(3)
        return F.cross_entropy(model(x), y)

    context = Context(model, pruner.graph)
    exact = torch.stack(list(HessianTrace(2, engine="retained").observe(context, again)))
    assert (found - exact).abs().sum() < 1e-4 * exact.abs().sum()
    assert pruner._context.step.error < 1e-3


def test_training_goes_on_as_if_nothing_had_looked():
    """Weights, gradients, buffers, momentum and random numbers, masks on and off, under clipping and accumulation."""
    watched, plain = net(), net()
    pruner = made(watched, HessianTrace(2), cpd.Greedy(interval=2, steps=2))
    masks = cpd.attach_masks(plain, pruner.graph)
    histories, plans = [], []
    for model in (watched, plain):
        optimizer, history = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
        torch.manual_seed(5)
        for i in range(5):
            for part in range(2):
                closure = loss_of(model, 2 * i + part, share=0.5)
                if model is watched:
                    pruner.backward(closure)
                else:
                    closure().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            history.append(state(model))
            if model is watched:
                pruner.step()
                plans.append(pruner.plan)
            else:
                masks.update(plans[i])
            optimizer.step()
            optimizer.zero_grad()
            history.append(state(model))
        histories.append(history)
    assert plans[-1] and pruner.scores.info["observations"] == 4
    assert float(watched.calls) == float(watched.replaced) == 10
    for one, other in zip(*histories, strict=True):
        same(one, other)


def test_micro_batches_add_up():
    model = net().eval()
    x, y = batch(0)
    parts = [lambda s=s: F.cross_entropy(model(x[s]), y[s]) / 2 for s in (slice(4), slice(4, 8))]
    whole, divided = look(made(model), loss_of(model)), look(made(model), *parts)
    assert (whole - divided).abs().sum() < 2e-3 * whole.abs().sum()


def test_within_a_memory_limit():
    """Micro-batches of unequal shares give the curvature and the gradients of the batch, inside the predicted peak."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.Tanh(), nn.Conv2d(48, 48, 3), nn.Tanh(), nn.Flatten(), nn.Linear(768, 4)
    )
    mine = batch(1, 14)

    def loss_fn(m, b):
        return F.cross_entropy(m(b[0]), b[1])

    whole = made(model)
    expected = look(whole, lambda: loss_fn(model, mine))
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    pruner = made(model)
    roomy = cpd.fit_memory(model, mine, loss_fn, memory_limit="1GiB", backward=pruner.backward).choice
    part = tuple(t[:5] for t in mine)
    limit = cpd.fit_memory(model, part, loss_fn, memory_limit="1GiB", backward=pruner.backward).choice.predicted_peak
    fit = cpd.fit_memory(model, mine, loss_fn, memory_limit=limit, backward=pruner.backward)
    assert roomy.micro_batch is None and fit.choice.micro_batch == 5  # and 4 at the end
    tracker = PeakMemory([*model.parameters(), *mine])
    with tracker:
        loss = fit.backward(mine)
    assert 0.5 * fit.choice.predicted_peak < tracker.peak <= fit.choice.predicted_peak
    assert loss == pytest.approx(float(loss_fn(model, mine).detach()), rel=1e-5)
    found = torch.stack(list(pruner._in_training.take()))
    assert (found - expected).abs().sum() < 2e-3 * expected.abs().sum()
    for p, g in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g)

    beside = [p.grad.clone() for p in model.parameters()]  # bit for bit those of the fit alone
    model.zero_grad()
    alone = cpd.fit_memory(model, mine, loss_fn, memory_limit="1GiB")
    alone._choices[next(iter(alone._choices))] = fit.choice
    alone.backward(mine)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), beside, strict=True))


def test_scaler_and_autocast():
    """fp16 with a GradScaler: the scale falls out; a batch that overflows counts for nothing, and training goes on."""

    def run(scale, outside=False):
        model = net(dropout=0.0)
        pruner = made(model, HessianTrace(step=0.05), cpd.Greedy(interval=4, steps=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for i in range(4):
            x, y = batch(i)
            x = x * float("inf") if i == 1 and scale > 1 else x

            def closure(x=x, y=y):
                with torch.autocast("cpu", torch.float16):
                    return F.cross_entropy(model(x), y)

            # a block around both passes keeps half-precision copies of weights
            with torch.autocast("cpu", torch.float16) if outside else nullcontext():
                pruner.backward(closure, scaler)
            scaler.unscale_(optimizer)
            pruner.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            model.bn.reset_running_stats()  # of the batch that overflowed
        return pruner

    scaled, plain, inside = run(256.0), run(1.0), run(256.0, outside=True)
    assert all(torch.equal(v, inside.scores[k]) for k, v in scaled.scores.items())
    assert (scaled.scores.info["observations"], plain.scores.info["observations"]) == (3, 4)
    for name, value in plain.scores.items():
        assert 0 < value.sum() < 4 * scaled.scores[name].sum() < 16 * value.sum()


def test_without_looking_it_is_backward():
    for criterion in (Taylor(), HessianTrace()):
        model, other = net(), net()
        pruner = cpd.Pruner(model, X, cpd.Target(macs=0.5), criterion, cpd.Greedy(interval=3, warmup=1))
        torch.manual_seed(1)
        assert pruner.backward(loss_of(model)).requires_grad is False
        pruner.step()
        torch.manual_seed(1)
        loss_of(other)().backward()
        same(state(model), state(other))


def test_looks_at_what_probe_every_says():
    pruner = made(net(), schedule=cpd.Greedy(interval=4, steps=2, warmup=1))
    pruner._probe_every = 3
    waiting = []
    for i in range(5):
        pruner.backward(loss_of(pruner.model, i))
        waiting.append(pruner._in_training.waits)
        pruner.step()
    assert waiting == [False, False, False, True, True]  # the third after the warm-up, and the interval's last
    assert pruner.scores.info["observations"] == 2
    assert pruner.scores.info["engine_reason"] == "from the gradient of the training step"


def test_hooks_that_write_into_gradients_come_too_late():
    model = net(dropout=0.0)
    plain = look(made(model), loss_of(model))
    model = net(dropout=0.0)

    def triple(p):
        p.grad.mul_(3)

    model.conv2.weight.register_post_accumulate_grad_hook(triple)
    assert torch.equal(look(made(model), loss_of(model)), plain)


def test_a_compiled_model():
    model = net(dropout=0.0)
    compiled = torch.compile(model, backend="aot_eager")
    plain = look(made(model), loss_of(model))
    assert (look(made(compiled), loss_of(compiled)) - plain).abs().sum() < 0.02 * plain.abs().sum()


def test_errors():
    model = net()
    for criterion in (GateHessian(), GroupFisher()):
        with pytest.raises(ScoreError, match=f"{type(criterion).__name__} looks at the loss in eval mode"):
            made(model, criterion).backward(loss_of(model))
    for bad in (HessianTrace(engine="retained"), HessianTrace(stop=0.1)):
        with pytest.raises(ScoreError, match="use engine='auto' and stop=None .got"):
            made(model, bad).backward(loss_of(model))
    with pytest.raises(ScoreError, match="probe_every=0: expected iterations"):
        cpd.Pruner(model, X, cpd.Target(macs=0.5), probe_every=0)
    pruner = made(model)
    with pytest.raises(ScoreError, match="the loss is nan"):
        pruner.backward(lambda: loss_of(model)() * torch.nan)
    assert all(p.grad is None for p in model.parameters())
    batches = iter([loss_of(model, i) for i in range(9)])
    with pytest.raises(ScoreError, match="when called again at the same weights .* draw the batch outside of it"):
        pruner.backward(lambda: next(batches)())
    pruner = made(model)
    pruner.backward(loss_of(model))
    with pytest.raises(ScoreError, match=r"pruner.backward has looked at this iteration; call pruner.step\(\) without"):
        pruner.step(loss_of(model))
    with pytest.raises(ScoreError, match=r"also takes pruner.backward\(closure\) in place of loss.backward"):
        made(model).step()
    model.conv1.weight.requires_grad_(False)
    with pytest.raises(ScoreError, match=r"1 scored parameters are frozen \(conv1.weight"):
        pruner.backward(loss_of(model))
    model.conv1.weight.requires_grad_(True)
    with pytest.raises(ScoreError, match="the loss depends on none of the"):
        loose = nn.Linear(2, 2)
        pruner.backward(lambda: loose(torch.ones(1, 2)).sum())
    optimizer = torch.optim.SGD([model.head.weight], lr=0.1)
    hook = model.head.weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(ScoreError, match="the backward pass itself changed the parameters"):
        pruner.backward(loss_of(model))
    hook.remove()


def test_an_exception_at_moved_parameters_leaves_all_in_place():
    model, pruner, calls = net(), None, []
    pruner = made(model)
    plain = copy.deepcopy(model)
    torch.manual_seed(2)
    loss_of(plain)().backward()
    expected = state(plain)

    def closure():
        calls.append(1)
        value = loss_of(model)()
        if len(calls) == 3:  # 1: training, 2: is it a function, 3: moved
            raise RuntimeError("out of memory")
        return value

    torch.manual_seed(2)
    with pytest.raises(RuntimeError, match="out of memory"):
        pruner.backward(closure)
    same(state(model), expected)


# -------------------------------------------------------------------------------------------------------------- ranks
def _ranks(rank):
    _probes._PROBES_OF_A_RANK = 0  # ranks take other probes each; here they are to take the same
    model = net(dropout=0.0).train()
    model.bn.eval()
    wrapped = model if rank is None else nn.parallel.DistributedDataParallel(model)
    if rank is not None:
        with pytest.raises(ScoreError, match="make it with the wrapper"):
            made(model).backward(lambda: wrapped(batch(0)[0]).sum())
        wrapped, synced = nn.parallel.DistributedDataParallel(model), []

        def loss(of, i=2 * rank):
            model.calls.zero_(), model.replaced.zero_()
            synced.append((wrapped.require_backward_grad_sync, wrapped.require_forward_param_sync))
            return loss_of(of, i, n=4)()

        alone = look(made(model), lambda: loss(model))
        model.zero_grad()
        among = look(made(wrapped), lambda: loss(wrapped))
        assert torch.equal(alone, among)  # the rank's own gradient, not the average that takes its place
        assert synced[3:] == [(True, True), (False, False), (False, False)]
        model.zero_grad()
    pruner = made(wrapped, schedule=cpd.Greedy(interval=2, steps=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.calls.zero_(), model.replaced.zero_()
    for i in range(4):
        x, y = batch(i)
        if rank is not None:
            x, y = x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4]
        pruner.backward(lambda x=x, y=y: F.cross_entropy(wrapped(x), y))
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()
    return pruner.plan.to_json(), dict(pruner.scores), {k: v.detach().clone() for k, v in model.state_dict().items()}


def test_two_ranks_prune_as_one_process_on_the_joined_batch(monkeypatch):
    one, other = run_ranks(_ranks)
    monkeypatch.setattr(_probes, "_PROBES_OF_A_RANK", 0)
    plan, scores, weights = _ranks(None)
    assert one[0] == other[0] == plan
    for name, value in scores.items():
        assert torch.equal(one[1][name], other[1][name])
        torch.testing.assert_close(one[1][name], value, rtol=0.02, atol=0.02 * float(value.abs().max()))
    for name, value in weights.items():
        if name not in ("calls", "replaced"):
            torch.testing.assert_close(one[2][name], value, rtol=1e-4, atol=1e-6)
            assert torch.equal(one[2][name], other[2][name])

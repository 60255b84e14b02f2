"""Compact execution of masked models: exact, reversible, and at home in training."""

import copy
import gc
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

import cpd_fast as cpd
from cpd_fast.compact import Resizer
from cpd_fast.compact.resize import _structure
from cpd_fast.errors import CompactError, PlanError
from cpd_fast.prune import execution as executions
from cpd_fast.prune.execution import CompactExecution
from cpd_fast.prune.full_width import FullWidthExecution
from tests.nets import NETS, Residual, informative, relative_error, tensors_of


def generator(seed):
    return torch.Generator().manual_seed(seed)


def plan_of(graph, seed=0, keep=0.5):
    return cpd.random_plan(graph, keep=keep, generator=generator(seed))


def convnet():
    """BatchNorm, a depthwise and a ragged grouped convolution."""
    torch.manual_seed(0)
    return informative(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
        )
    )  # fmt: skip


X = torch.randn(4, 3, 10, 10, generator=generator(1))


def kept(graph, plan, name):
    keep = np.ones(graph.tensors[name].shape, bool)
    for m in graph.tensors[name].maps:
        keep &= graph.alive(plan)[m]
    return torch.from_numpy(keep)


# ------------------------------------------------------------------------------------------------------------ exact
@pytest.mark.parametrize("keep", [0.8, 0.4])
@pytest.mark.parametrize("net", NETS)
def test_compact_execution_is_what_compaction_returns(net, keep):
    build, shape, _ = NETS[net]
    torch.manual_seed(0)
    model, x = informative(build()).double(), torch.randn(shape, generator=generator(2)).double()
    graph = cpd.comb(model, x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    m = cpd.masked(model, graph, plan_of(graph))
    dense = model(x)
    for seed in (0, 1):
        plan = plan_of(graph, seed, keep)
        m.update(plan)
        with torch.no_grad():
            assert relative_error(m(x), cpd.compact(model, graph, plan)(x)) < 1e-10
    if any(g.n_channels > 1 for g in graph.prunable_groups):
        assert m.execution == "compact" or "holds a size" in m.explain() or "hooks" in m.explain()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for name, module in model.named_modules():
        now = vars(module)
        assert all(now[k] is v or now[k] == v for k, v in attributes[name].items() if not isinstance(v, dict))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(model(x)), tensors_of(dense), strict=True))


def test_small_groups_run_the_op_that_picks_their_kernel(monkeypatch):
    torch.manual_seed(0)
    model = informative(nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.Conv2d(16, 3, 1),
    ))  # fmt: skip
    graph = cpd.comb(model, X)
    plan, calls = plan_of(graph, keep=0.75), []
    op = executions.grouped_conv2d
    monkeypatch.setattr(executions, "grouped_conv2d", lambda x, *rest: calls.append(x.shape[1]) or op(x, *rest))
    m, small = cpd.masked(model, graph, plan, execution="compact"), cpd.compact(model, graph, plan)
    assert "ops.grouped_conv2d picks the kernel of 1 grouped" in m.explain()
    out, wanted = m(X), small(X)
    assert calls == [12] and relative_error(out, wanted) < 1e-5 and "_conv_forward" not in vars(model[3])
    out.square().sum().backward()
    small(X).square().sum().backward()
    gradient = model[3].weight.grad[kept(graph, plan, "3.weight")]
    torch.testing.assert_close(gradient, small[3].weight.grad.flatten(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(m, X, check_trace=False)(X), wanted)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    ["resnet18", pytest.param("deit_tiny_patch16_224", marks=SLOW), pytest.param("regnety_002", marks=SLOW)],
)
def test_sizes_by_arithmetic_are_those_of_the_proof(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, **({"img_size": 64} if "deit" in name else {}))
    graph = cpd.comb(model, torch.randn(1, 3, 64, 64))
    resizer = Resizer(model, graph)
    assert resizer.proof.startswith("by arithmetic")
    plan = plan_of(graph, 5, 0.3)
    found, proven = resizer(plan), _structure(model, graph, plan)
    assert found.attributes == proven.attributes and found.attributes
    assert {n: k.shape for n, k in found.kept.items()} == {n: k.shape for n, k in proven.kept.items()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [convnet, Residual], ids=["convnet", "residual"])
def test_training_is_that_of_the_compacted_model(make, layout):
    model = informative(make()).double().to(memory_format=layout).train()
    x = X.double()
    graph = cpd.comb(model, x)
    plan = plan_of(graph)
    small = cpd.compact(model, graph, plan).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    m = cpd.masked(model, graph, plan, execution="compact")
    m(x).square().sum().backward()
    small(x).square().sum().backward()
    left = small.state_dict()
    for name, p in model.named_parameters():
        keep = kept(graph, plan, name)
        assert (p.grad[~keep] == 0).all() and (p.dim() < 4 or p.grad.is_contiguous(memory_format=layout))
        assert torch.allclose(p.grad[keep], small.get_parameter(name).grad.flatten(), rtol=1e-9)
    for name, buffer in model.named_buffers():  # running statistics: kept ones move, the others stand still
        if name in graph.tensors:
            keep = kept(graph, plan, name)
            assert torch.allclose(buffer[keep], left[name].flatten(), rtol=1e-12)
            assert torch.equal(buffer[~keep], before[name][~keep])


def test_second_derivatives_reach_the_weights():
    model = informative(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))).double()
    x = torch.randn(5, 3).double()
    graph = cpd.comb(model, x)
    m = cpd.masked(model, graph, plan_of(graph), execution="compact")
    w, v = model[0].weight, torch.randn(8, 3).double()
    (g,) = torch.autograd.grad(m(x).square().sum(), w, create_graph=True)
    (hv,) = torch.autograd.grad((g * v).sum(), w)
    eps, gs = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            w += sign * eps * v
        gs.append(torch.autograd.grad(m(x).square().sum(), w)[0])
        with torch.no_grad():
            w -= sign * eps * v
    assert torch.allclose(hv, (gs[0] - gs[1]) / (2 * eps), rtol=1e-5, atol=1e-7) and hv.abs().max() > 0


# ------------------------------------------------------------------------------------------- updates, hooks, copies
def test_plans_follow_each_other_bit_for_bit_and_writes_through_data_are_seen():
    model = convnet().eval()
    graph = cpd.comb(model, X)
    a, b = plan_of(graph, 0), plan_of(graph, 1)
    dense = model(X)
    handle = cpd.attach_masks(model, graph, a)
    first = model(X)
    handle.update(b)
    second = model(X)
    handle.update(a)
    assert torch.equal(model(X), first) and not torch.equal(first, second)
    model[0].weight.data.mul_(2)
    assert not torch.equal(model(X), first)
    model[0].weight.data.div_(2)
    handle.remove()
    assert torch.equal(model(X), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("execution", ["compact", "full_width"])
def test_cached_weights_are_taken_out_once_a_plan(execution, monkeypatch):
    model = convnet().eval()
    graph = cpd.comb(model, X)
    a, b = plan_of(graph, 0), plan_of(graph, 1)
    masked = cpd.masked(model, graph, a, execution=execution)
    taken = []
    for kind in (CompactExecution, FullWidthExecution):
        value = kind.value
        monkeypatch.setattr(
            kind, "value", lambda self, s, t, value=value: taken.append(s.is_parameter) or value(self, s, t)
        )

    def look():
        taken.clear()
        with torch.no_grad():
            return masked(X), sum(taken)

    plain, once = look()
    with masked.cached_weights():
        first, second = look(), look()
        assert torch.equal(first[0], plain) and torch.equal(second[0], plain)
        assert first[1] == once > 0 and second[1] == 0
        masked.update(b)
        other = look()
        assert not torch.equal(other[0], plain) and other[1] > 0 and look()[1] == 0
        model[0].weight.data.mul_(2)
        assert torch.equal(look()[0], other[0])  # as documented
        masked(X).sum().backward()  # a graph needs weights of its own
        assert model[0].weight.grad.abs().sum() > 0
    assert not torch.equal(look()[0], other[0]) and look()[1] > 0


def test_hooks_on_submodules_run_and_see_compact_activations():
    model = convnet().eval()
    graph = cpd.comb(model, X)
    seen = []
    model[3].register_forward_hook(lambda m, i, o: seen.append((m, o.shape[1])))
    plan = plan_of(graph)
    cpd.masked(model, graph, plan)(X)
    cpd.masked(model, graph, plan, execution="full_width")(X)
    assert seen == [(model[3], 4), (model[3], 8)]


def test_a_copy_of_a_masked_model_has_masks_of_its_own():
    model = convnet().eval()
    graph = cpd.comb(model, X)
    handle = cpd.attach_masks(model, graph, plan_of(graph))
    wanted = model(X)
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(twin(X), wanted) and not torch.equal(model(X), wanted)
    assert [tuple(p.shape) for p in twin.parameters()] == [tuple(p.shape) for p in model.parameters()]


def test_what_cannot_run_compact_says_so():
    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x) * torch.linspace(0, 1, 8))

    from cpd_fast.comb import comb as trace_groups

    model, x = Drawn(), torch.randn(2, 3)
    graph = trace_groups(model, x)
    plan = cpd.PrunePlan({"a": [0, 1, 2]}, graph.fingerprint)
    m = cpd.masked(model, graph, plan)
    assert m.execution == "full_width" and "holds a size that cpd_fast could not repair" in m.explain()
    assert "full width" in repr(m)
    with pytest.raises(CompactError, match="execution='compact' is not possible: .*could not repair"):
        cpd.masked(model, graph, plan, execution="compact")
    with pytest.raises(PlanError, match="execution='quick': expected one of auto, compact, full_width"):
        cpd.masked(model, graph, plan, execution="quick")


# --------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.05),
], ids=["sgd", "adamw"])  # fmt: skip
@pytest.mark.parametrize("execution", ["compact", "full_width"])
@pytest.mark.parametrize("regrow", [False, True])
def test_optimizers_do_not_revive_masked_weights(make, execution, regrow):
    model = convnet().train()
    graph = cpd.comb(model, X)
    optimizer = make(model.parameters())

    def steps(n=3):
        for _ in range(n):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()

    steps()  # momentum is there when the masks come
    plan = plan_of(graph)
    handle = cpd.attach_masks(model, graph, plan, execution=execution, regrow=regrow)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps()
    still = [torch.equal(p[~k], before[n][~k]) and not torch.equal(p[k], before[n][k])
             for n, p in model.named_parameters() if not (k := kept(graph, plan, n)).all()]  # fmt: skip
    assert still and (not any(still) if regrow else all(still))
    handle.remove()
    name = "0.weight"
    gone = ~kept(graph, plan, name)
    steps(1)
    assert not torch.equal(model.get_parameter(name)[gone], before[name][gone])


def test_masks_that_are_collected_within_a_step_do_not_disturb_it():
    model = convnet()
    graph = cpd.comb(model, X)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    gone = [cpd.masked(model, graph, plan_of(graph))]
    hook = register_optimizer_step_post_hook(lambda *_: (gone.clear(), gc.collect()))
    last = cpd.masked(model, graph, plan_of(graph))
    model(X).sum().backward()
    optimizer.step()
    hook.remove()
    assert not gone and last.plan


def test_masks_that_move_inside_a_step_hold_from_there_on():
    """Loops that hand the optimizer a closure prune in it, before the weights move (Lightning does)."""
    model = convnet().train()
    graph = cpd.comb(model, X)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
    handle, plan = cpd.attach_masks(model, graph), plan_of(graph)

    def closure(plan):
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        handle.update(plan)
        return loss

    optimizer.step(lambda: closure(handle.plan))  # momentum is there when the masks come
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        optimizer.step(lambda: closure(plan))
    masked = [n for n in before if not kept(graph, plan, n).all()]
    assert masked
    for n in masked:
        gone = ~kept(graph, plan, n)
        assert torch.equal(model.get_parameter(n)[gone], before[n][gone])


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.reentrant = convnet(), reentrant

    def forward(self, x):
        x = self.body[:3](x)
        if self.reentrant is None:
            return self.body[3:](x)
        return checkpoint(self.body[3:], x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("execution", ["compact", "full_width"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_run_again_under_the_masks(reentrant, execution):
    grads = []
    for how in (None, reentrant):
        model = Checkpointed(how).double()
        model.eval()
        graph = cpd.comb(model, X.double())
        m = cpd.masked(model, graph, plan_of(graph), execution=execution)
        m(X.double()).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
        assert all(tuple(p.shape) == graph.tensors[n].shape for n, p in model.named_parameters() if n in graph.tensors)
    assert all(torch.allclose(g, grads[1][n], rtol=1e-12) for n, g in grads[0].items())


def test_autocast():
    model = convnet().train()
    graph = cpd.comb(model, X)
    plan = plan_of(graph)
    small = cpd.compact(model, graph, plan)
    with torch.autocast("cpu", torch.bfloat16):
        out, wanted = cpd.masked(model, graph, plan)(X), small(X)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_scores_of_a_masked_model_see_its_original_shapes():
    model = convnet().eval()
    graph = cpd.comb(model, X)
    plan = plan_of(graph)
    loss = lambda m, b: m(b).square().sum()  # noqa: E731
    for criterion in (cpd.HessianTrace(2), cpd.GroupFisher(), cpd.GateHessian(1)):
        found = []
        for execution in ("auto", "full_width"):
            handle = cpd.attach_masks(model, graph, plan, execution=execution)
            found.append(cpd.score(model, graph, [X], loss, criterion, plan=plan))
            handle.remove()
        for name in found[0]:
            torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-5)


def _rank(rank, port, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = convnet().double().eval()
    graph = cpd.comb(model, X.double())
    parallel = nn.parallel.DistributedDataParallel(model)
    handle = cpd.attach_masks(parallel, graph, plan_of(graph), execution="compact")
    optimizer = torch.optim.SGD(parallel.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for seed in (0, 1):
        handle.update(plan_of(graph, seed))
        optimizer.zero_grad()
        parallel(X.double()[2 * rank : 2 * rank + 2]).square().sum().backward()
        optimizer.step()
    results[rank] = {n: p.detach().numpy() for n, p in model.named_parameters()}
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (port, results), nprocs=2)
        found = [dict(results[r]) for r in (0, 1)]
    model = convnet().double().eval()
    graph = cpd.comb(model, X.double())
    handle = cpd.attach_masks(model, graph)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for seed in (0, 1):
        handle.update(plan_of(graph, seed))
        optimizer.zero_grad()
        (model(X.double()).square().sum() / 2).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert np.allclose(found[0][name], p.detach().numpy(), rtol=1e-9)
        assert np.array_equal(found[0][name], found[1][name])


def test_torch_compile_recompiles_a_bounded_number_of_times():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(4, 6)
    graph = cpd.comb(model, x)
    torch._dynamo.reset()
    compilations = []

    def backend(gm, inputs):
        compilations.append(1)
        return gm.forward

    m = cpd.masked(torch.compile(model, backend=backend), graph, plan_of(graph))
    for seed in range(12):
        plan = plan_of(graph, seed, 0.25 + 0.05 * seed)
        m.update(plan)
        with torch.no_grad():
            torch.testing.assert_close(m(x), cpd.compact(model, graph, plan)(x), rtol=1e-5, atol=1e-6)
    assert m.execution == "full_width" and 0 < len(compilations) <= 2
    torch._dynamo.reset()

"""Hessian-trace scoring against what PyHessian and HAP do, and the first-order criteria against a training step.

Run: ``pytest bench/bench_score.py --benchmark-enable --benchmark-only -m "slow or not slow"``. Every provider of a
group does the same work: one forward and backward with graph, then PROBES Hessian-vector products and their
reduction to channels. The anchors are re-creations: PyHessian's ``hessian.trace`` (masked Rademacher, one ``.item()``
a probe) and HAP's ``get_trace_hut`` (one ``.dot().item()`` a channel).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import cpd_fast as cpd
from cpd_fast.score import Context, quiet
from cpd_fast.score._conv import DoubleDifferentiable
from cpd_fast.score.hessian import _probe

PROBES = 2
WORKLOADS = {  # name: (model, batch, pixels); small enough for one core, so that side work shows
    "resnet18": ("resnet18", 8, 64),
    "mobilenetv2": ("mobilenetv2_100", 4, 64),
    "resnet50": ("resnet50", 2, 112),
    "resnext50": ("resnext50_32x4d", 2, 64),
    "deit_s": ("deit_small_patch16_224", 2, 112),
}
ORDINARY = {"mobilenetv2"}  # the others only where they are asked for
workloads = pytest.mark.parametrize(
    "workload", [pytest.param(w, marks=() if w in ORDINARY else pytest.mark.slow) for w in WORKLOADS]
)


@pytest.fixture(scope="module")
def made():
    try:
        import timm
    except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision built for another torch
        pytest.skip(f"timm does not load: {e}")
    cache = {}

    def make(workload):
        if workload not in cache:
            cache.clear()
            name, n, pixels = WORKLOADS[workload]
            torch.manual_seed(0)
            model = timm.create_model(name, **({"img_size": pixels} if "deit" in name else {})).eval()
            batch = (torch.randn(n, 3, pixels, pixels), torch.randint(1000, (n,)))
            cache[workload] = (model, cpd.comb(model, batch[0]), batch)
        return cache[workload]

    return make


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def ours(model, graph, batch):
    cpd.score(model, graph, [batch], loss_fn, cpd.HessianTrace(PROBES))


def finite_difference(model, graph, batch):
    cpd.score(model, graph, [batch], loss_fn, cpd.HessianTrace(PROBES, engine="finite_difference"))


def pyhessian(model, graph, batch):
    params = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn(model, batch)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    traces = []
    for _ in range(PROBES):
        v = [torch.randint_like(p, high=2) for p in params]
        for z in v:
            z[z == 0] = -1
        hv = torch.autograd.grad(grads, params, grad_outputs=v, retain_graph=True)
        traces.append(sum(torch.sum(x * y) for x, y in zip(hv, v, strict=True)).cpu().item())


def hap(model, graph, batch):
    params = [p for p in model.parameters() if p.requires_grad and p.dim() in (2, 4)]
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn(model, batch)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    traces = [[0.0] * len(p) for p in params]
    for _ in range(PROBES):
        v = [torch.randint_like(p, high=2) * 2 - 1 for p in params]
        hv = torch.autograd.grad(grads, params, grad_outputs=v, retain_graph=True)
        hv, v = [h.detach().cpu() for h in hv], [z.detach().cpu() for z in v]
        for i, (h, z) in enumerate(zip(hv, v, strict=True)):
            for c in range(len(h)):
                traces[i][c] += h[c].flatten().dot(z[c].flatten()).item()


def training_step(model, graph, batch):
    torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))


def first_order(criterion):
    return lambda model, graph, batch: cpd.score(model, graph, [batch], loss_fn, criterion)


SECOND_ORDER = {
    "cpd_fast": ours,
    "finite_difference": finite_difference,
    "pyhessian": pyhessian,
    "hap": hap,
    "training_step": training_step,
}
FIRST_ORDER = {
    "taylor": first_order(cpd.Taylor()),
    "group_fisher": first_order(cpd.GroupFisher()),
    "magnitude": first_order(cpd.Magnitude()),
    "training_step": training_step,
}


def check(model, graph, batch):
    """One probe by our engine and by PyTorch's own double backward: the same Hessian-vector product and row sums."""
    context = Context(model, graph)
    with quiet(context), sdpa_kernel(SDPBackend.MATH):
        v = _probe(context.tensors, torch.Generator().manual_seed(1))
        products = []
        for mode in (DoubleDifferentiable(), torch.enable_grad()):
            with mode:
                loss = loss_fn(model, batch)
            grads = torch.autograd.grad(loss, context.tensors, create_graph=True)
            products.append(torch.autograd.grad(grads, context.tensors, v, materialize_grads=True))
    for mine, theirs in zip(*products, strict=True):
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm() + 1e-4
    cells = context.layout.cells(context.layout.reduce_product(context.by_name(v), context.by_name(products[0])))
    run = next(r for r in context.layout.runs if r.slice.dims == (0,) and r.slice.index.shape[1] == 1)
    i = list(context.params).index(run.slice.param)
    rows = (v[i] * products[1][i]).flatten(1).sum(1) if v[i].dim() > 1 else v[i] * products[1][i]
    expected = rows[torch.from_numpy(run.slice.index[:, 0])]
    got = cells[run.start : run.start + run.group.n_channels]
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()) + 1e-6)


@workloads
@pytest.mark.parametrize("provider", SECOND_ORDER)
def test_hessian(benchmark, made, workload, provider):
    torch.set_num_threads(1)
    model, graph, batch = made(workload)
    if provider == "cpd_fast":
        check(model, graph, batch)
    benchmark.group = f"hessian-{workload}"
    benchmark.extra_info |= {"probes": PROBES, "dtype": "fp32", "threads": 1, "batch": list(batch[0].shape)}
    benchmark.pedantic(SECOND_ORDER[provider], (model, graph, batch), rounds=3, warmup_rounds=int(benchmark.enabled))


@workloads
@pytest.mark.parametrize("provider", FIRST_ORDER)
def test_first_order(benchmark, made, workload, provider):
    torch.set_num_threads(1)
    model, graph, batch = made(workload)
    benchmark.group = f"first-order-{workload}"
    benchmark.extra_info |= {"dtype": "fp32", "threads": 1, "batch": list(batch[0].shape)}
    benchmark.pedantic(FIRST_ORDER[provider], (model, graph, batch), rounds=3, warmup_rounds=int(benchmark.enabled))

"""Scoring against PyHessian (PyPI) and HAP's loop, a probe at a time, and first-order criteria against a training step.

Run: ``python -m bench.bench_score [--json FILE] [WORKLOAD ...]``; ``pytest bench/bench_score.py`` checks that all
providers of one workload run and that the engines agree. Times are process CPU time on one thread, minima over rounds,
all of a workload in one process and in turns. Providers of a probe have their graph at hand; the graph is timed alone.

HAP is re-created from its published code (``get_trace_hut``): H v and v are copied to the CPU, one ``.dot().item()`` a
channel. PyHessian runs as it is, with attention in its explicit form (its fused form has no double backward).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import conftest  # noqa: F401  (lets a CUDA build of torchvision import beside a CPU torch)
import cpd_fast as cpd
from cpd_fast.memory import BatchLoss
from cpd_fast.score import Context, quiet
from cpd_fast.score._double import double_differentiable
from cpd_fast.score._finite import Differences

WORKLOADS = {  # name: (model, batch, pixels); small enough for one core, so that side work shows
    "mobilenetv2": ("mobilenetv2_100", 4, 64),
    "resnet18": ("resnet18", 8, 64),
    "resnext50": ("resnext50_32x4d", 2, 64),
    "deit_s": ("deit_small_patch16_224", 2, 112),
    "resnet50": ("resnet50", 2, 112),
}
CALLS, PASSES = 2, 6  # timed calls of each provider in a row, and how often that is repeated
SPREAD_PROBES = 6
PRECISION = 0.1  # relative error that "time to 10 %" means


def make(name):
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    model_name, n, pixels = WORKLOADS[name]
    torch.manual_seed(0)
    model = timm.create_model(model_name, **({"img_size": pixels} if "deit" in model_name else {})).eval()
    batch = (torch.randn(n, 3, pixels, pixels), torch.randint(1000, (n,)))
    return model, cpd.comb(model, batch[0]), batch


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def clock(call):
    start = time.process_time()
    call()
    return time.process_time() - start


# ------------------------------------------------------------------------------------- a probe, graph at hand
# Each provider is a generator: it prepares, then yields a function that does the work of one probe.
def training_step(model, graph, batch):
    yield lambda: torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))


def ours(model, graph, batch):
    """Product, probe, reduction to channels and scores: all that a probe more costs."""
    context = Context(model, graph)
    criterion = cpd.HessianTrace(2 + CALLS, engine="retained")
    with quiet(context):
        observations = criterion.observe(context, BatchLoss(loss_fn, model, batch))
        next(observations)
        yield lambda: next(observations)


def product_alone(model, graph, batch):
    context = Context(model, graph)
    with quiet(context):
        with double_differentiable():
            loss = loss_fn(model, batch)
        grads = torch.autograd.grad(loss, context.tensors, create_graph=True)
        v = [context.probes.signs(t.detach(), 0, i) for i, t in enumerate(context.tensors)]
        yield lambda: torch.autograd.grad(grads, context.tensors, v, retain_graph=True, allow_unused=True)


def beside_product(model, graph, batch):
    """What a probe does but the product: signs, sums, channels. Timed by itself, it does not drown in the product."""
    context = Context(model, graph)
    layout, values = context.layout, [torch.randn_like(t) for t in context.tensors]
    signs, scale = [torch.empty_like(v) for v in values], torch.rand(layout.n_cells)

    def work():
        context.probes.fill(signs, 1, range(len(signs)))
        layout.scaled_channels(layout.reduce_probe(values, context.probes.seed, 1), scale)

    yield work


def finite_difference(model, graph, batch):
    context = Context(model, graph)
    with quiet(context):
        differences = Differences(context, BatchLoss(loss_fn, model, batch).parts)
        products = differences.products(range(1 + CALLS), 1e-4)
        next(products)  # the gradient where the parameters are, once a batch
        yield lambda: next(products)


def gate_hessian(model, graph, batch):
    context = Context(model, graph)
    with quiet(context):
        observations = cpd.GateHessian(2 + CALLS).observe(context, BatchLoss(loss_fn, model, batch))
        next(observations)
        yield lambda: next(observations)


def pyhessian(model, graph, batch):
    from pyhessian import hessian

    model = copy.deepcopy(model)  # it leaves .grad with graphs behind
    with sdpa_kernel(SDPBackend.MATH):
        computer = hessian(model, F.cross_entropy, data=batch, cuda=False)
    yield lambda: computer.trace(maxIter=1)
    for p in model.parameters():
        p.grad = None


def hap(model, graph, batch):
    params = [p for p in model.parameters() if p.dim() in (2, 4)]
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn(model, batch)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    traces = [[0.0] * len(p) for p in params]

    def probe():
        v = [torch.randint_like(p, high=2) for p in params]
        for z in v:
            z[z == 0] = -1
        hv = torch.autograd.grad(grads, params, grad_outputs=v, retain_graph=True)
        hv, v = [h.detach().cpu() for h in hv], [z.detach().cpu() for z in v]
        for i, (h, z) in enumerate(zip(hv, v, strict=True)):
            for c in range(len(h)):
                traces[i][c] += h[c].flatten().dot(z[c].flatten()).item()

    yield probe


PROBES = {
    "training_step": training_step,
    "cpd_fast": ours,
    "product_alone": product_alone,
    "beside_product": beside_product,
    "finite_difference": finite_difference,
    "gate_hessian": gate_hessian,
    "pyhessian": pyhessian,
    "hap": hap,
}


def milliseconds(providers, args, calls=CALLS, passes=PASSES):
    """Least CPU time of a call of each provider, which take turns."""
    best = dict.fromkeys(providers, float("inf"))
    for _ in range(passes):
        for name, provider in providers.items():
            steps = provider(*args)
            call = next(steps)
            best[name] = min(best[name], *(1e3 * clock(call) for _ in range(calls)))
            next(steps, None)
            del steps, call
            gc.collect()
    return best


def spread_of_one_probe(model, graph, batch, criterion):
    """Sum of the standard deviations of one probe over the sum of the magnitudes of the means."""
    scores = cpd.score(model, graph, [batch], loss_fn, criterion)
    deviation = sum(float(s.sum()) for s in scores.stderr.values()) * criterion.num_probes**0.5
    return deviation / sum(float(v.abs().sum()) for v in scores.values())


def allocator_peak(call):
    """Most bytes that PyTorch's CPU allocator had given out at once, by its own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    live = peak = 0
    for e in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if e.name() == "[memory]":
            live += e.nbytes()
            peak = max(peak, live)
    return peak


def measure(name):
    model, graph, batch = make(name)
    ms = milliseconds(PROBES, (model, graph, batch))
    step = ms["training_step"]
    spread = spread_of_one_probe(model, graph, batch, cpd.HessianTrace(SPREAD_PROBES, engine="retained"))
    gates = spread_of_one_probe(model, graph, batch, cpd.GateHessian(SPREAD_PROBES))
    resident = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers(), *batch])
    moved = cpd.HessianTrace(1, engine="finite_difference", step=1e-4)
    peaks = {
        "training_step": allocator_peak(lambda: next(training_step(model, graph, batch))()),
        "finite_difference": allocator_peak(lambda: cpd.score(model, graph, [batch], loss_fn, moved)),
    }
    return {
        "batch": list(batch[0].shape),
        "ms": ms,
        "product_over_step": ms["product_alone"] / step,
        "side_work_share": ms["beside_product"] / (ms["product_alone"] + ms["beside_product"]),
        "side_work_share_by_difference": (ms["cpd_fast"] - ms["product_alone"]) / ms["cpd_fast"],
        "finite_difference_over_step": ms["finite_difference"] / step,
        "finite_difference_memory_over_step": (resident + peaks["finite_difference"])
        / (resident + peaks["training_step"]),
        "pyhessian_over_ours": ms["pyhessian"] / ms["cpd_fast"],
        "hap_over_ours": ms["hap"] / ms["cpd_fast"],
        "spread_of_one_probe": spread,
        "spread_of_one_gate_probe": gates,
        "seconds_to_10_percent": {
            k: ms[k] / 1e3 * (s / PRECISION) ** 2
            for k, s in (
                ("cpd_fast", spread),
                ("finite_difference", spread),
                ("pyhessian", spread),
                ("hap", spread),
                ("gate_hessian", gates),
            )
        },
    }


# ------------------------------------------------------------------------------------------ per-sample Fisher
def score_with(criterion):
    def provider(model, graph, batch):
        yield lambda: cpd.score(model, graph, [batch], loss_fn, criterion)

    return provider


def torch_pruning_hessian(model, graph, batch):
    """GroupHessianImportance as its docstring shows: one backward a sample."""
    import torch_pruning as tp

    model = copy.deepcopy(model)

    def all_samples():
        importance = tp.importance.GroupHessianImportance()
        for loss in F.cross_entropy(model(batch[0]), batch[1], reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)

    yield all_samples


FISHER = {
    "training_step": training_step,
    "taylor": score_with(cpd.Taylor()),
    "group_fisher": score_with(cpd.GroupFisher()),
    "gate_hessian_1_probe": score_with(cpd.GateHessian()),
}


def measure_fisher(n=32, pixels=64):
    WORKLOADS["fisher"] = ("resnet50", n, pixels)
    args = make("fisher")
    ms = milliseconds(FISHER, args, calls=1)
    ms |= milliseconds({"torch_pruning_group_hessian": torch_pruning_hessian}, args, calls=1, passes=1)
    return {
        "model": "resnet50",
        "batch": [n, 3, pixels, pixels],
        "ms": ms,
        "over_step": {k: v / ms["training_step"] for k, v in ms.items()},
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workloads", nargs="*", default=[*WORKLOADS, "fisher"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PROBES, help="measure this one and a training step again, keep the rest")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = {"threads": 1, "dtype": "fp32", "torch": torch.__version__, "machine": platform.machine()}
    for name in asked.workloads:
        if asked.json and asked.json.exists():
            results |= json.loads(asked.json.read_text())
        if asked.only:
            again = milliseconds({k: PROBES[k] for k in ("training_step", asked.only)}, make(name), passes=4)
            results[name][f"{asked.only}_over_step"] = again[asked.only] / again["training_step"]
        else:
            results[name] = measure_fisher() if name == "fisher" else measure(name)
        print(name, json.dumps(results[name], indent=1), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(results, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------- as a test
def test_engines_agree_and_providers_run():
    """One product by our convolutions and by PyTorch's own double backward; every provider does its work once."""
    torch.set_num_threads(1)
    model, graph, batch = make("mobilenetv2")
    context = Context(model, graph)
    with quiet(context), sdpa_kernel(SDPBackend.MATH):
        v = [context.probes.signs(t.detach(), 0, i) for i, t in enumerate(context.tensors)]
        products = []
        for mode in (double_differentiable(), torch.enable_grad()):
            with mode:
                loss = loss_fn(model, batch)
            grads = torch.autograd.grad(loss, context.tensors, create_graph=True)
            products.append(torch.autograd.grad(grads, context.tensors, v, materialize_grads=True))
    for mine, theirs in zip(*products, strict=True):
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm() + 1e-4
    for name, provider in PROBES.items():
        if name == "pyhessian":
            pytest.importorskip("pyhessian")
        steps = provider(model, graph, batch)
        next(steps)()
        next(steps, None)


@pytest.mark.parametrize("provider", [p for p in FISHER if p != "training_step"])
def test_first_order(benchmark, provider):
    torch.set_num_threads(1)
    model, graph, batch = make("mobilenetv2")
    benchmark.pedantic(next(FISHER[provider](model, graph, batch)), rounds=1)


if __name__ == "__main__":
    main()

"""What a training iteration costs with a Pruner in the loop, beside the same iteration without.

Run: ``python -m bench.bench_pruner [--json FILE] [NETWORK ...]``; ``pytest bench/bench_pruner.py`` checks that every
provider trains and that masked channels get no gradient. Times are process CPU time on one thread, minima, all of a
network in one process and in turns; ``--providers`` measures some of them anew, against a plain iteration of the same
run (``over_plain``). An iteration is zero_grad, forward, backward, step of SGD with momentum.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import conftest  # noqa: F401  (lets a CUDA build of torchvision import beside a CPU torch)
import cpd_fast as cpd

NETWORKS = {  # name: (model, batch, pixels)
    "resnet18": ("resnet18", 32, 64),
    "mobilenetv2": ("mobilenetv2_100", 32, 64),
    "resnet50": ("resnet50", 16, 64),
    "deit_s": ("deit_small_patch16_224", 8, 112),
}
CALLS, PASSES = 2, 5
ALWAYS, ONCE = cpd.Greedy(interval=10**6, steps=2), cpd.Greedy(interval=1, steps=2)


def make(name):
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    model_name, n, pixels = NETWORKS[name]
    torch.manual_seed(0)
    model = timm.create_model(model_name, **({"img_size": pixels} if "deit" in model_name else {})).train()
    return model, (torch.randn(n, 3, pixels, pixels), torch.randint(1000, (n,)))


class Loop:
    """One network in training; ``pruner`` steps in every iteration, where there is one."""

    def __init__(self, model, batch, pruner=None, looked_at=None, runs_backward=False):
        self.model, self.batch, self.pruner, self.looked_at = model, batch, pruner, looked_at
        self.runs_backward = runs_backward
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def loss(self, samples=None):
        return F.cross_entropy(self.model(self.batch[0][:samples]), self.batch[1][:samples])

    def __call__(self):
        self.optimizer.zero_grad()
        if self.runs_backward:
            self.pruner.backward(self.loss)
            self.pruner.step()
            self.optimizer.step()
            return
        self.loss().backward()
        if self.pruner is not None:
            self.pruner.step(partial(self.loss, self.looked_at))
        self.optimizer.step()


def plain(model, batch):
    return Loop(model, batch)


def taylor(model, batch):
    """Scores accumulate; nothing is masked yet."""
    pruner = cpd.Pruner(model, batch[0][:1], cpd.Target(macs=0.5), cpd.Taylor(), ALWAYS)
    return Loop(model, batch, pruner)


def taylor_masked(model, batch):
    """After the first removals, at about 0.56 of the MACs: scores accumulate under masks."""
    pruner = cpd.Pruner(model, batch[0][:1], cpd.Target(macs=0.5), cpd.Taylor(), ONCE)
    loop = Loop(model, batch, pruner)
    loop()
    pruner.schedule = ALWAYS
    assert pruner.plan and not pruner.done
    return loop


def masks_alone(model, batch):
    """The masks of ``taylor_masked`` without scoring."""
    loop = taylor_masked(model, batch)
    loop.pruner = None
    return loop


def probed(criterion, parts, model, batch):
    """A probe in every iteration, by a closure over one of ``parts`` parts of the batch."""
    pruner = cpd.Pruner(model, batch[0][:1], cpd.Target(macs=0.5), criterion, ALWAYS, probe_every=1)
    return Loop(model, batch, pruner, max(len(batch[0]) // parts, 1))


def in_training(model, batch):
    """A probe in every iteration, with the gradient of the training step as one end of the difference."""
    pruner = cpd.Pruner(model, batch[0][:1], cpd.Target(macs=0.5), cpd.HessianTrace(), ALWAYS, probe_every=1)
    return Loop(model, batch, pruner, runs_backward=True)


PROVIDERS = {
    "plain": plain,
    "taylor": taylor,
    "masks_alone": masks_alone,
    "taylor_masked": taylor_masked,
    "hessian_trace_in_training": in_training,
    "hessian_trace": partial(probed, cpd.HessianTrace(), 1),
    "hessian_trace_of_a_quarter": partial(probed, cpd.HessianTrace(), 4),
    "gate_hessian": partial(probed, cpd.GateHessian(), 1),
    "gate_hessian_of_a_half": partial(probed, cpd.GateHessian(), 2),
}


def measure(name, providers=tuple(PROVIDERS), passes=PASSES):
    model, batch = make(name)
    loops = {k: PROVIDERS[k](copy.deepcopy(model), batch) for k in dict.fromkeys(["plain", *providers])}
    best = dict.fromkeys(loops, float("inf"))
    for _ in range(passes):
        for k, loop in loops.items():
            loop()
            for _ in range(CALLS):
                start = time.process_time()
                loop()
                best[k] = min(best[k], 1e3 * (time.process_time() - start))
            gc.collect()
    over = {k: v / best["plain"] for k, v in best.items()}
    return {"batch": list(batch[0].shape), "ms": best, "over_plain": over}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--providers", nargs="*", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--passes", type=int, default=PASSES)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = {"threads": 1, "dtype": "fp32", "torch": torch.__version__, "machine": platform.machine()}
    for name in asked.networks:
        if asked.json and asked.json.exists():
            results |= json.loads(asked.json.read_text())
        new, known = measure(name, asked.providers, asked.passes), results.get(name, {})
        if known:
            del new["ms"]  # of another run than the plain iteration's; its ratio is what counts
            new["over_plain"] = known["over_plain"] | new["over_plain"]
        results[name] = known | new
        print(name, json.dumps(results[name], indent=1), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(results, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------- as a test
@pytest.mark.parametrize("provider", PROVIDERS)
def test_iteration(benchmark, provider):
    torch.set_num_threads(1)
    model, (images, labels) = make("resnet18")
    loop = PROVIDERS[provider](model, (images[:4], labels[:4]))
    loop()
    if loop.pruner is not None and loop.pruner.plan:
        graph = loop.pruner.graph
        group, kept = next(iter(loop.pruner.plan.items()))
        gone = sorted(set(range(graph[group].n_channels)) - set(kept))
        weight = next(s for s in graph[group].slices if s.produces)
        rows = model.get_parameter(weight.param).grad[gone]
        assert gone and not rows.any()
    benchmark.pedantic(loop, rounds=1)


if __name__ == "__main__":
    main()

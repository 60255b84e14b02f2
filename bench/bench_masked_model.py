"""A masked network beside the dense one, dense-times-mask and the compacted one; and switching among random plans.

Run: ``python -m bench.bench_masked_model [--json FILE] [NETWORK ...]``. Process CPU time on one thread, minima of calls
that take turns in one process. Outputs are compared before anything is timed. ``masked`` takes weights out in every
forward, ``masked_cached`` once (``cached_weights``) where no gradient is wanted. ``switching`` evaluates every plan on
one batch of ``SWITCH_BATCH`` pictures.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

import conftest  # noqa: F401  (lets a CUDA build of torchvision import beside a CPU torch)
import cpd_fast as cpd

NETWORKS = {
    "resnet50": "resnet50",
    "resnext50": "resnext50_32x4d",
    "mobilenetv2": "mobilenetv2_100",
    "deit_s": "deit_small_patch16_224",
}
PIXELS, BATCH, SWITCH_BATCH, KEEP = 112, 32, 4, 0.5


def clock(call):
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def in_turns(calls, rounds):
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            best[name] = min(best[name], clock(call))
    return best


def make(name):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(NETWORKS[name], **({"img_size": PIXELS} if "deit" in name else {})).eval()
    return model, cpd.comb(model, torch.randn(1, 3, PIXELS, PIXELS))


def plan_of(graph, seed=0):
    return cpd.random_plan(graph, keep=KEEP, generator=torch.Generator().manual_seed(seed))


def check(a, b):
    assert (a - b).abs().max() <= 1e-4 * b.abs().max(), "masked and compacted outputs differ"


def step(model, x):
    def run():
        for p in model.parameters():
            p.grad = None
        model(x).square().sum().backward()

    return run


def forward(model, x):
    def run():
        with torch.no_grad():
            model(x)

    return run


def whole(model, graph, rounds):
    x, plan = torch.randn(BATCH, 3, PIXELS, PIXELS), plan_of(graph)
    small = cpd.compact(model, graph, plan)
    masked = cpd.masked(model, graph, plan, execution="compact")
    cached = cpd.masked(model, graph, plan, execution="compact")
    full = cpd.masked(model, graph, plan, execution="full_width")
    with torch.no_grad():
        for m in (masked, full):
            check(m(x[:4]), small(x[:4]))
    nets = {"dense": model, "dense_times_mask": full, "compacted": small, "masked": masked, "masked_cached": cached}
    result = {}
    for what, make_call in (("forward", forward), ("forward_backward", step)):
        with cached.cached_weights():
            ms = in_turns({k: make_call(m, x) for k, m in nets.items()}, rounds)
        result[what] = {"ms": ms, "masked_over_compacted": ms["masked"] / ms["compacted"]}
    return result


def switching(model, graph, plans):
    x = torch.randn(SWITCH_BATCH, 3, PIXELS, PIXELS)
    masked = cpd.masked(model, graph, plan_of(graph), execution="compact")
    full = cpd.masked(model, graph, plan_of(graph), execution="full_width")
    total = dict.fromkeys(("masked", "dense_times_mask", "compacting_anew", "update"), 0.0)
    update = float("inf")
    with torch.no_grad():
        for seed in range(plans):
            plan, outs = plan_of(graph, seed), {}
            moved = clock(lambda p=plan: masked.update(p))
            update, total["update"] = min(update, moved), total["update"] + moved
            total["masked"] += moved + clock(lambda o=outs: o.update(masked=masked(x)))
            total["dense_times_mask"] += clock(lambda p=plan: (full.update(p), full(x)))
            total["compacting_anew"] += clock(lambda p=plan, o=outs: o.update(small=cpd.compact(model, graph, p)(x)))
            check(outs["masked"], outs["small"])
    return {
        "plans": plans,
        "batch": SWITCH_BATCH,
        "ms": total,
        "update_ms": update,
        "compacting_anew_over_masked": total["compacting_anew"] / total["masked"],
        "dense_times_mask_over_masked": total["dense_times_mask"] / total["masked"],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=[*NETWORKS])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plans", type=int, default=100)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = {"threads": 1, "dtype": "fp32", "torch": torch.__version__, "machine": platform.machine(), "keep": KEEP}
    for name in asked.networks:
        if asked.json and asked.json.exists():
            results |= json.loads(asked.json.read_text())
        model, graph = make(name)
        results[name] = {
            "batch": [BATCH, 3, PIXELS, PIXELS],
            **whole(model, graph, asked.rounds),
            "switching": switching(model, graph, asked.plans),
        }
        print(name, json.dumps(results[name], indent=1), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

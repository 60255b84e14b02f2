"""A masked convolution against the dense one, the dense one times a mask, and the physically smaller one.

Run: ``python -m bench.ops.bench_masked_conv --json bench/results/masked_conv.json [LAYER ...]`` for the table, or
``pytest bench/ops/bench_masked_conv.py --benchmark-enable --benchmark-only``. ``ours`` keeps activations compact, as
between coupled layers; ``ours.full`` reads and writes full width; either runs the body that the chooser picks. Forward
and backward (of input and weight), fp32. Times are minima of calls that take turns in one process; ``of_dense`` is one
over the dense layer's. On the CPU freed memory is kept, so that fresh pages are not part of anybody's time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast.ops import explain_backend, masked_conv2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# C_in, C_out, kernel, pixels a side, groups, stride
LAYERS = {
    "resnet50.3x3_64": (64, 64, 3, 56, 1, 1),
    "resnet50.3x3_128": (128, 128, 3, 28, 1, 1),
    "resnet50.3x3_256": (256, 256, 3, 14, 1, 1),
    "resnet50.3x3_512": (512, 512, 3, 7, 1, 1),
    "resnet50.1x1_64_256": (64, 256, 1, 56, 1, 1),
    "resnet50.1x1_256_1024": (256, 1024, 1, 14, 1, 1),
    "resnet50.1x1_2048_512": (2048, 512, 1, 7, 1, 1),
    "resnext50.stage1": (128, 128, 3, 56, 32, 1),
    "resnext50.stage2_s2": (256, 256, 3, 56, 32, 2),
    "resnext50.stage2": (256, 256, 3, 28, 32, 1),
    "resnext50.stage3_s2": (512, 512, 3, 28, 32, 2),
    "resnext50.stage3": (512, 512, 3, 14, 32, 1),
    "resnext50.stage4": (1024, 1024, 3, 7, 32, 1),
    "mobilenetv2.dw_32": (32, 32, 3, 112, 32, 1),
    "mobilenetv2.dw_96_s2": (96, 96, 3, 112, 96, 2),
    "mobilenetv2.dw_144": (144, 144, 3, 56, 144, 1),
    "mobilenetv2.dw_192": (192, 192, 3, 28, 192, 1),
    "mobilenetv2.dw_384": (384, 384, 3, 14, 384, 1),
    "mobilenetv2.dw_576": (576, 576, 3, 14, 576, 1),
    "mobilenetv2.dw_960": (960, 960, 3, 7, 960, 1),
}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DENSITIES = [1.0, 0.75, 0.5, 0.25, 0.0]
PROVIDERS = ["dense_times_mask", "compacted", "ours", "ours.full"]
BATCH = 8


def clock() -> float:
    """Wall time on a GPU after its work, this process's own time on a CPU that others share."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def keep_memory() -> None:
    """Have malloc keep what is freed, where it can be told so."""
    if DEVICE == "cpu" and platform.system() == "Linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 1 << 30)  # no maps of their own for large tensors
        ctypes.CDLL(None).mallopt(-1, (1 << 31) - 1)  # and nothing given back


def live(channels: int, groups: int, density: float) -> Tensor:
    """Some channels of a plain layer; whole groups of a depthwise one; the same number of every other group."""
    g = torch.Generator().manual_seed(0)
    mask = torch.zeros(groups, channels // groups, dtype=torch.bool)
    if groups == channels:
        mask[torch.randperm(groups, generator=g)[: round(density * groups)]] = True
    else:
        for row in mask:
            row[torch.randperm(mask.shape[1], generator=g)[: round(density * mask.shape[1])]] = True
    return mask.flatten().to(DEVICE)


def aim(layer: str, density: float) -> float:
    """Most of the dense time that a layer should take."""
    if density == 1:
        return 1.03
    return density**2 + 0.06 if LAYERS[layer][4] == 1 else 1.15 * density + 0.05


def steps(layer: str, density: float, memory_format: torch.memory_format) -> tuple[dict[str, Callable], dict[str, str]]:
    """What every provider does, forward and backward of sum(y * y); and which bodies run."""
    c_in, c_out, k, side, groups, stride = LAYERS[layer]
    x = torch.randn(BATCH, c_in, side, side, device=DEVICE).contiguous(memory_format=memory_format)
    weight = torch.randn(c_out, c_in // groups, k, k, device=DEVICE).contiguous(memory_format=memory_format)
    out, inp = live(c_out, groups, density), live(c_in, groups, density)
    if groups == c_in:
        inp = out
    small_x = x[:, inp].contiguous(memory_format=memory_format)
    masks = out.float()[:, None, None], inp.float()[:, None, None]
    alive = max(groups if groups != c_in else int(out.sum()), 1)
    rows, columns = out.nonzero().flatten(), inp.reshape(groups, -1)
    per_out = c_out // groups
    small = torch.stack([weight[i][columns[i // per_out]] for i in rows.tolist()]) if len(rows) else weight[:0]
    small = small.contiguous(memory_format=memory_format)
    for t in (x, small_x, weight, small):
        t.requires_grad_()
    place = {"padding": k // 2, "stride": stride}
    ours = place | {"groups": groups, "out_keep": out, "in_keep": inp}
    compact = {"compact_input": True, "compact_output": True}

    def train(y: Tensor, *inputs: Tensor) -> Tensor:
        torch.autograd.grad(y, inputs, y.detach())
        return y

    calls = {
        "dense": lambda: train(F.conv2d(x, weight, groups=groups, **place), x, weight),
        "dense_times_mask": lambda: train(F.conv2d(x * masks[1], weight, groups=groups, **place) * masks[0], x, weight),
        "compacted": lambda: train(F.conv2d(small_x, small, groups=alive, **place), small_x, small),
        "ours": lambda: train(masked_conv2d(small_x, weight, **ours, **compact), small_x, weight),
        "ours.full": lambda: train(masked_conv2d(x, weight, **ours), x, weight),
    }
    if not len(rows):
        del calls["compacted"]  # there is no such layer
    bodies = {
        "ours": explain_backend("masked_conv2d", small_x, weight, groups=groups, **compact),
        "ours.full": explain_backend("masked_conv2d", x, weight, groups=groups),
    }
    return calls, {name: text.split(":")[1].split()[0] for name, text in bodies.items()}


def check(layer: str, density: float, calls: dict[str, Callable]) -> None:
    exact = calls["dense_times_mask"]()
    for provider, call in calls.items():
        if provider in ("dense", "dense_times_mask"):
            continue
        y = call()
        wanted = exact if y.shape == exact.shape else exact[:, live(exact.shape[1], LAYERS[layer][4], density)]
        torch.testing.assert_close(y, wanted, rtol=1e-3, atol=1e-3)


def in_turns(calls: dict[str, Callable], seconds: float) -> dict[str, float]:
    """Least milliseconds of every call; at least 7 turns."""
    best, begin, turns = dict.fromkeys(calls, math.inf), time.perf_counter(), 0
    while turns < 7 or (time.perf_counter() - begin < seconds and turns < 200):
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
        turns += 1
    return {name: 1e3 * b for name, b in best.items()}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("layer", LAYERS)
def bench_masked_conv2d(benchmark, layer, memory_format, density, provider):
    benchmark.group = f"masked_conv2d {layer} {memory_format} density {density}"
    if benchmark.disabled and (density != 0.5 or not layer.endswith(("3x3_512", "stage4", "dw_960"))):
        pytest.skip("one density of small layers is enough to see that it runs")
    calls, bodies = steps(layer, density, FORMATS[memory_format])
    if provider not in calls:
        pytest.skip("no such layer")
    check(layer, density, calls)
    if benchmark.disabled:
        benchmark(calls[provider])
        return
    best = {}
    pair = {name: calls[name] for name in ("dense", provider)}
    benchmark.pedantic(lambda: best.update(in_turns(pair, 0.2)), rounds=1, warmup_rounds=1)
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)",
        "dtype": "fp32",
        "body": bodies.get(provider),
        "best_ms": round(best[provider], 3),
        "of_dense": round(best[provider] / best["dense"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("layers", nargs="*", default=[*LAYERS])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=0.5, help="for a layer at one density")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    results = {"batch": BATCH, "dtype": "fp32", "threads": 1, "torch": torch.__version__, "machine": platform.machine()}
    for layer in asked.layers:
        if asked.json and asked.json.exists():
            results |= json.loads(asked.json.read_text())
        results[layer] = {}
        for name, memory_format in FORMATS.items():
            for density in DENSITIES:
                calls, bodies = steps(layer, density, memory_format)
                check(layer, density, calls)
                best = in_turns(calls, asked.seconds)
                results[layer][f"{name} {density}"] = {
                    "dense_ms": round(best["dense"], 3),
                    "aim": round(aim(layer, density), 3),
                    "of_dense": {k: round(ms / best["dense"], 3) for k, ms in best.items() if k != "dense"},
                    "bodies": bodies if 0 < density < 1 else "library" if density else "none",
                }
                print(layer, name, density, json.dumps(results[layer][f"{name} {density}"]), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

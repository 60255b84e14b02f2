"""A masked convolution against the dense one, the dense one times a mask, and the physically smaller one.

Run: ``pytest bench/ops/bench_masked_conv.py --benchmark-enable --benchmark-only``. ``ours`` keeps activations compact,
as between coupled layers; ``ours.full`` reads and writes full width. ``extra_info["of_dense"]`` is the least time over
the dense layer's, both taken turn about in this process. Forward and backward, batch 4, fp32, channels-last.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast.ops import masked_conv2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# C_in, C_out, kernel, pixels a side, groups
LAYERS = {
    "resnet50.3x3_128": (128, 128, 3, 28, 1),
    "resnet50.3x3_256": (256, 256, 3, 14, 1),
    "resnet50.1x1_256_1024": (256, 1024, 1, 14, 1),
    "resnext50.stage1": (128, 128, 3, 56, 32),
    "resnext50.stage3": (512, 512, 3, 14, 32),
    "mobilenetv2.dw_144": (144, 144, 3, 56, 144),
    "mobilenetv2.dw_576": (576, 576, 3, 14, 576),
}
DENSITIES = [1.0, 0.75, 0.5, 0.25, 0.0]
PROVIDERS = ["dense_times_mask", "compacted", "ours", "ours.full"]


def clock() -> float:
    """Wall time on a GPU after its work, this process's own time on a CPU that others share."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


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


def steps(layer: str, density: float) -> dict[str, Callable[[], Tensor]]:
    """What every provider does: forward and backward of sum(y * y)."""
    c_in, c_out, k, side, groups = LAYERS[layer]
    x = torch.randn(4, c_in, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c_out, c_in // groups, k, k, device=DEVICE).contiguous(memory_format=torch.channels_last)
    out, inp = live(c_out, groups, density), live(c_in, groups, density)
    if groups == c_in:
        inp = out
    small_x = x[:, inp].contiguous(memory_format=torch.channels_last)
    masks = out.float()[:, None, None], inp.float()[:, None, None]
    alive = max(groups if groups != c_in else int(out.sum()), 1)
    rows, columns = out.nonzero().flatten(), inp.reshape(groups, -1)
    per_out = c_out // groups
    small = torch.stack([weight[i][columns[i // per_out]] for i in rows.tolist()]) if len(rows) else weight[:0]
    small = small.contiguous(memory_format=torch.channels_last)
    for t in (x, small_x, weight, small):
        t.requires_grad_()
    pad = {"padding": k // 2}
    keep = {"out_keep": out, "in_keep": inp}

    def train(y: Tensor, *inputs: Tensor) -> Tensor:
        torch.autograd.grad(y, inputs, y.detach())
        return y

    return {
        "dense": lambda: train(F.conv2d(x, weight, groups=groups, **pad), x, weight),
        "dense_times_mask": lambda: train(F.conv2d(x * masks[1], weight, groups=groups, **pad) * masks[0], x, weight),
        "compacted": lambda: (
            train(F.conv2d(small_x, small, groups=alive, **pad), small_x, small) if len(rows) else small_x
        ),
        "ours": lambda: train(
            masked_conv2d(
                small_x,
                weight,
                groups=groups,
                **keep,
                **pad,
                compact_input=True,
                compact_output=True,
                backend="compact",
            ),
            small_x,
            weight,
        ),
        "ours.full": lambda: train(masked_conv2d(x, weight, groups=groups, **keep, **pad), x, weight),
    }


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("layer", LAYERS)
def bench_masked_conv2d(benchmark, layer, density, provider):
    benchmark.group = f"masked_conv2d {layer} density {density}"
    if benchmark.disabled and density != 0.5:
        pytest.skip("one density is enough to see that it runs")
    run = steps(layer, density)
    exact = run["dense_times_mask"]()
    y = run[provider]()
    if provider != "compacted" or density > 0:
        wanted = exact if y.shape == exact.shape else exact[:, live(exact.shape[1], LAYERS[layer][4], density)]
        torch.testing.assert_close(y, wanted, rtol=1e-3, atol=1e-3)
    if benchmark.disabled:
        benchmark(run[provider])
        return
    seconds: dict[str, list[float]] = {"dense": [], provider: []}

    def turn() -> None:
        for name, taken in seconds.items():
            start = clock()
            run[name]()
            taken.append(clock() - start)

    benchmark.pedantic(turn, rounds=15, warmup_rounds=2)
    dense, ours = (min(taken[2:]) for taken in seconds.values())
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)",
        "dtype": "fp32",
        "best_ms": round(ours * 1e3, 3),
        "of_dense": round(ours / dense, 3),
    }

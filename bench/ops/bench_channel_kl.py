"""channel_kl and class_kl, forward and backward: everyday eager forms, torch.compile and ours, on shapes that occur.

    pytest bench/ops/bench_channel_kl.py --benchmark-enable --benchmark-only --benchmark-sort=name

Each provider is checked against float64 before it is timed. ``extra_info`` holds the share of the floor: the least
traffic of a fused loss and gradient, 3 units (read student, read teacher, write the gradient), at the copy bandwidth
measured in the same process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast.losses import ChannelWiseKL, LogitKL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TAU = 4.0

SHAPES = {
    "cpu": {
        "ade20k.logits": (2, 150, 128, 128),
        "cityscapes.logits": (4, 19, 128, 256),
        "segformer_b0.stage2": (4, 64, 64, 64),
        "resnet50.layer3": (8, 256, 14, 14),
    },
    "cuda": {
        "ade20k.logits": (16, 150, 128, 128),
        "ade20k.logits_full": (2, 150, 512, 512),
        "psp.features": (16, 512, 64, 64),
    },
}[DEVICE]


def torchdistiller(student: Tensor, teacher: Tensor) -> Tensor:
    """Softmax, then its logarithm, then KLDivLoss: the form of TorchDistiller."""
    n, c = student.shape[:2]
    ps, pt = ((x / TAU).reshape(n, c, -1).softmax(-1) for x in (student, teacher.detach()))
    return F.kl_div(ps.log(), pt, reduction="sum") * (TAU**2 / (n * c))


def mmrazor(student: Tensor, teacher: Tensor) -> Tensor:
    """p (log p - log q) with separate soft- and log-softmaxes: the form of mmrazor."""
    n, c = student.shape[:2]
    s, t = (x.reshape(n * c, -1) / TAU for x in (student, teacher))
    pt = F.softmax(t, 1)
    return (pt * F.log_softmax(t, 1) - pt * F.log_softmax(s, 1)).sum() * (TAU**2 / (n * c))


def kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    n, c = student.shape[:2]
    s, t = (F.log_softmax(x.flatten(2) / TAU, -1) for x in (student, teacher))
    return F.kl_div(s, t, reduction="sum", log_target=True) * (TAU**2 / (n * c))


def class_eager(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.log_softmax(x / TAU, 1) for x in (student, teacher))
    return F.kl_div(s, t, reduction="none", log_target=True).sum(1).mean() * TAU**2


Loss = Callable[[Tensor, Tensor], Tensor]
CHANNEL: dict[str, Callable[[], Loss]] = {
    "eager.torchdistiller": lambda: torchdistiller,
    "eager.mmrazor": lambda: mmrazor,
    "eager.kl_div": lambda: kl_div,
    "compile.mmrazor": lambda: torch.compile(mmrazor, dynamic=False),
    "compile.kl_div": lambda: torch.compile(kl_div, dynamic=False),
    "ours": lambda: ChannelWiseKL(TAU),
}
CLASS: dict[str, Callable[[], Loss]] = {
    "eager": lambda: class_eager,
    "compile": lambda: torch.compile(class_eager, dynamic=False),
    "ours": lambda: LogitKL(TAU),
}


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy that does not fit the caches."""
    source = torch.ones(2**26, device=DEVICE)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        start = clock()
        target.copy_(source)
        seconds.append(clock() - start)
    return 2 * source.nbytes / min(seconds)


def clock() -> float:
    """Wall time on a GPU after its work, this process's own time on a CPU that others share."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def run(benchmark, loss: Loss, shape: tuple[int, ...], exact: Loss) -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=g).to(DEVICE) for _ in range(2))
    student.requires_grad_()

    def step() -> Tensor:
        student.grad = None
        value = loss(student, teacher)
        value.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return value

    value = step()
    small = slice(0, 1)  # float64 on everything would take longer than the benchmark
    twin = student.detach()[small].double().requires_grad_()
    expected = exact(twin, teacher[small].double())
    expected.backward()
    if shape[0] == 1:
        torch.testing.assert_close(value.detach().double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(student.grad[small].double() * shape[0], twin.grad, rtol=1e-3, atol=1e-8)

    if benchmark.disabled:
        benchmark(step)
        return
    seconds = []

    def timed() -> None:
        start = clock()
        step()
        seconds.append(clock() - start)

    benchmark.pedantic(timed, rounds=15, warmup_rounds=2)
    floor = 3 * student.nbytes / copy_bandwidth()
    best = min(seconds[2:])
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)",
        "dtype": "fp32",
        "bytes": 3 * student.nbytes,
        "best_ms": round(best * 1e3, 3),
        "gb_per_s": round(3 * student.nbytes / best / 1e9, 1),
        "times_floor": round(best / floor, 2),
    }


@pytest.mark.parametrize("provider", CHANNEL)
@pytest.mark.parametrize("shape", SHAPES)
def bench_channel_kl(benchmark, shape, provider):
    benchmark.group = f"channel_kl {shape} {'x'.join(map(str, SHAPES[shape]))}"
    if benchmark.disabled and provider.startswith("compile"):
        pytest.skip("compiling takes half a minute; run with --benchmark-enable")
    run(benchmark, CHANNEL[provider](), SHAPES[shape], mmrazor)


@pytest.mark.parametrize("provider", CLASS)
@pytest.mark.parametrize("shape", ["ade20k.logits", "cityscapes.logits"] if DEVICE == "cpu" else ["ade20k.logits"])
def bench_class_kl(benchmark, shape, provider):
    benchmark.group = f"class_kl {shape} {'x'.join(map(str, SHAPES[shape]))}"
    if benchmark.disabled and provider.startswith("compile"):
        pytest.skip("compiling takes half a minute; run with --benchmark-enable")
    run(benchmark, CLASS[provider](), SHAPES[shape], class_eager)


@pytest.mark.parametrize("provider", ["eager.torchdistiller", "eager.mmrazor", "ours"])
@pytest.mark.skipif(DEVICE != "cuda", reason="peak memory is read from the CUDA allocator")
def bench_peak_memory(benchmark, provider):
    """Peak extra memory of a step, in units of one activation tensor."""
    student, teacher = (torch.randn(SHAPES["ade20k.logits"], device=DEVICE) for _ in range(2))
    student.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(lambda: CHANNEL[provider]()(student, teacher).backward(), rounds=1)
    benchmark.extra_info["peak_units"] = (torch.cuda.max_memory_allocated() - before) / student.nbytes

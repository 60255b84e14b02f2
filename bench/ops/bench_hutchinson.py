"""Everything of a Hutchinson probe but the Hessian-vector product: making the signs, and summing v * (H v) to channels.

    pytest bench/ops/bench_hutchinson.py --benchmark-enable --benchmark-only --benchmark-sort=name

On the parameter lists of five models, each provider checked before it is timed, process CPU time on one thread. The
floor of the sums is one read of H v, at the bandwidth (bytes read and written) of a copy in the same process.

``pyhessian``: its ``group_product``, the package's own, which sums to one number; its lines that make signs, as
``hessian.trace`` has them (HAP's are the same). ``hap``: its loop, a ``.dot().item()`` a channel, re-created.
``torch_rows``: ``(h * z).reshape(rows, -1).sum(1)``. These three sum rows at most; ours sums rows and columns, and
makes the signs once more meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import conftest  # noqa: F401  (lets a CUDA build of torchvision import beside a CPU torch)
from bench.ops.bench_channel_kl import copy_bandwidth
from cpd_fast.ops import ReduceTable, fill_rademacher_, hutchinson_reduce, rademacher, squared_norms

MODELS = ["resnet18", "resnet50", "mobilenetv2_100", "resnext50_32x4d", "deit_small_patch16_224"]
SEED, PROBE = 2021, 3
_parameters: dict[str, list[Tensor]] = {}


def parameters(name: str) -> list[Tensor]:
    if name not in _parameters:
        timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
        _parameters.clear()  # one model at a time
        _parameters[name] = [p.detach() for p in timm.create_model(name).parameters()]
    return _parameters[name]


def table_of(tensors: list[Tensor]) -> ReduceTable:
    """Rows of every tensor, and columns of those that have them."""
    return ReduceTable(tensors, [(i, (d,)) for i, t in enumerate(tensors) for d in range(min(t.dim(), 2))])


def best_ms(call: Callable[[], object], rounds: int = 7) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return 1e3 * min(seconds)


def measure(benchmark, tensors: list[Tensor], call: Callable[[], object], rounds: int = 10) -> None:
    if benchmark.disabled:
        benchmark(call)
        return
    benchmark.pedantic(call, rounds=2, warmup_rounds=1)
    best, size = best_ms(call, rounds), sum(t.nbytes for t in tensors)
    benchmark.extra_info |= {
        "device": f"cpu, {torch.get_num_threads()} thread(s)",
        "bytes": size,
        "best_ms": round(best, 3),
        "times_floor": round(best / (1e3 * size / copy_bandwidth()), 2),
    }


def pyhessian_signs(tensors: list[Tensor]) -> list[Tensor]:
    v = [torch.randint_like(p, high=2) for p in tensors]
    for z in v:
        z[z == 0] = -1
    return v


SIGNS: dict[str, Callable[[list[Tensor], list[Tensor]], list[Tensor]]] = {
    "pyhessian": lambda tensors, room: pyhessian_signs(tensors),
    "bernoulli": lambda tensors, room: [torch.empty_like(p).bernoulli_(0.5).mul_(2).sub_(1) for p in tensors],
    "ours": lambda tensors, room: fill_rademacher_(room, SEED, PROBE) or room,
    "ours_new_memory": lambda tensors, room: [rademacher(p, SEED, PROBE, i) for i, p in enumerate(tensors)],
}


@pytest.mark.parametrize("provider", SIGNS)
@pytest.mark.parametrize("model", MODELS)
def bench_signs(benchmark, model, provider):
    tensors = parameters(model)
    benchmark.group = f"signs {model}"
    room = [torch.empty_like(p) for p in tensors]
    made = SIGNS[provider](tensors, room)
    assert all(bool((v.abs() == 1).all()) for v in made) and abs(torch.cat([v.flatten() for v in made]).mean()) < 1e-2
    measure(benchmark, tensors, lambda: SIGNS[provider](tensors, room))


def hap_loop(h: list[Tensor], v: list[Tensor]) -> list[list[float]]:
    return [[a.flatten().dot(b.flatten()).item() for a, b in zip(x, z, strict=True)] for x, z in zip(h, v, strict=True)]


def pyhessian_sum(h: list[Tensor], v: list[Tensor]) -> Tensor:
    return pytest.importorskip("pyhessian.utils").group_product(h, v)


@pytest.mark.parametrize("provider", ["copy", "hap", "pyhessian", "torch_rows", "ours", "ours_squared_norms"])
@pytest.mark.parametrize("model", MODELS)
def bench_sums(benchmark, model, provider):
    tensors = parameters(model)
    benchmark.group = f"sums {model}"
    torch.manual_seed(0)
    h = [torch.randn_like(p) for p in tensors]
    v, table = [rademacher(p, SEED, PROBE, i) for i, p in enumerate(tensors)], table_of(tensors)
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: [a.copy_(b) for a, b in zip(v, h, strict=True)],
        "hap": lambda: hap_loop(h, v),
        "pyhessian": lambda: pyhessian_sum(h, v),
        "torch_rows": lambda: [(a * b).reshape(len(a), -1).sum(1) for a, b in zip(h, v, strict=True)],
        "ours": lambda: hutchinson_reduce(table, h, SEED, PROBE),
        "ours_squared_norms": lambda: squared_norms(table, h),
    }
    rows = [(a.double() * b.double()).reshape(len(a), -1).sum(1) for a, b in zip(h, v, strict=True)]
    starts = dict(zip(range(len(table.starts)), table.starts, strict=True))
    if provider == "ours":
        got, at = calls[provider](), 0
        for i, expected in enumerate(rows):
            begin = starts[at]
            torch.testing.assert_close(got[begin : begin + len(expected)].double(), expected, rtol=1e-4, atol=1e-3)
            at += min(tensors[i].dim(), 2)
    elif provider in ("hap", "torch_rows"):
        for part, expected in zip(calls[provider](), rows, strict=True):
            torch.testing.assert_close(torch.as_tensor(part).double(), expected, rtol=1e-4, atol=1e-3)
    elif provider == "pyhessian":
        assert float(calls[provider]()) == pytest.approx(float(torch.cat(rows).sum()), rel=1e-2, abs=5.0)
    measure(benchmark, tensors, calls[provider], rounds=2 if provider == "hap" else 10)

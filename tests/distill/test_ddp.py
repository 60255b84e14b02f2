"""The losses under DistributedDataParallel: two gloo processes give the gradients of one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from cpd_fast.losses import ChannelWiseKL, LogitKL


def student() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Conv2d(3, 5, 3, padding=1)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(4, 3, 8, 8, generator=g), torch.randn(4, 5, 8, 8, generator=g)


def total(model: torch.nn.Module, x: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return ChannelWiseKL(2.0, 3.0)(y, teacher) + LogitKL(2.0)(y, teacher)


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(student())
    x, teacher = (v[2 * rank : 2 * rank + 2] for v in batch())
    for _ in range(2):  # a second step meets the buckets of the first
        model.zero_grad()
        total(model, x, teacher).backward()
    torch.save([p.grad for p in model.parameters()], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = student()
    total(model, *batch()).backward()
    for first, second, own in zip(*ranks, model.parameters(), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, own.grad, rtol=1e-5, atol=1e-7)

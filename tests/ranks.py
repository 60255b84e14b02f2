"""Two real processes that talk over gloo."""

from __future__ import annotations

import gc
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(work: Callable[[int], Any], world: int = 2) -> list[Any]:
    """What ``work(rank)``, a function of a module, returns in each of ``world`` processes."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(work, port, world, folder), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, work: Callable[[int], Any], port: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(work(rank), Path(folder) / f"{rank}.pt")
    gc.collect()  # what is left of DDP must not end the group later, nor a rank leave while the other still talks
    dist.barrier()
    dist.destroy_process_group()

"""A worker of a search that logs its evaluations; ``serve``: many, in forks; ``STORAGE OUT``: a rank under torchrun."""

import os
import signal
import sys
import time

import torch

import cpd_fast as cpd
from tests.forks import serve
from tests.search.nets import output_variance, setting

N = 12


def work(storage, log, die_at=0, pause=0.0, **options):
    """Search; at the ``die_at``-th evaluation the process dies by kill -9."""
    torch.set_num_threads(1)
    net, graph, calibration = setting()
    seen = 0

    def evaluate(candidate):
        nonlocal seen
        seen += 1
        with open(log, "a") as f:
            f.write(f"{os.getpid()}\n")
        if seen == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)
        return output_variance(candidate)

    options = {"num_candidates": N, "heartbeat_s": 1, **options}
    return cpd.search(net, graph, cpd.Target(macs=0.5), calibration, evaluate, storage=storage, **options)


def ranks(storage, out):
    """Under torchrun: all ranks share the study; each writes what it was given and what it did."""
    torch.distributed.init_process_group("gloo")
    found = work(storage, os.devnull, pause=0.1)
    rank = torch.distributed.get_rank()
    mine = sum(c.worker == f"rank {rank}" for c in found.candidates)
    with open(f"{out}.{rank}", "w") as f:
        f.write(f"{mine} {len(found.candidates)} {found.value} {hash(found.plan.to_json())}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    serve(work) if sys.argv[1:] == ["serve"] else ranks(*sys.argv[1:])

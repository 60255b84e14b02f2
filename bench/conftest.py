"""Benchmarks run on one thread unless OMP_NUM_THREADS says otherwise, on a GPU when there is one."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

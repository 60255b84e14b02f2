"""Benchmarks run on one thread unless OMP_NUM_THREADS says otherwise, on a GPU when there is one."""

import os

import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

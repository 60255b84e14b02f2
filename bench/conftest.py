"""Benchmarks run on one thread unless OMP_NUM_THREADS says otherwise, on a GPU when there is one.

CPD_EMULATE=2080ti: a larger GPU with the memory of an RTX 2080 Ti and without tf32, which Turing does not have.
bench/gpu.sh builds the kernels of sm_75 for it. Times are still the larger GPU's.
"""

import os

import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

if os.environ.get("CPD_EMULATE") == "2080ti" and torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 11 * 2**30 / total))
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

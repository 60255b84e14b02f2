"""``cpd-fast doctor``: what is installed, and what runs here."""

from __future__ import annotations

import importlib.util
import os

from rich.console import Console
from rich.table import Table


def command() -> None:
    """Say what is installed and which backends run here, and why not the others."""
    from cpd_fast.recipes.environment import environment

    out = Table("what", "state", box=None, pad_edge=False)
    for name, text in environment().items():
        out.add_row(name, text)
    for name, state in _backends().items():
        out.add_row(name, state)
    Console(highlight=False).print(out)


def _backends() -> dict[str, str]:
    """Which backend runs here, or why it does not."""
    import torch

    cuda = torch.cuda.is_available()
    native = importlib.util.find_spec("cpd_fast._native") is not None
    why_no_gpu = "torch is a CPU build" if torch.version.cuda is None else "no CUDA device"
    triton = importlib.util.find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return {
        "backend reference": "runs",
        "backend cpu": "runs"
        if native
        else "no: cpd_fast._native was not built (needs a C++ compiler at install time)",
        "backend cuda": "runs"
        if cuda and native
        else f"no: {why_no_gpu if not cuda else 'cpd_fast._native is missing'}",
        "backend triton": "runs"
        if triton and cuda
        else "runs in its interpreter (slow)"
        if triton and interpreted
        else f"no: {'triton is not installed' if not triton else why_no_gpu}",
        "latency onnxruntime": "runs"
        if importlib.util.find_spec("onnxruntime")
        else "no: onnxruntime is not installed; pip install onnxruntime",
    }

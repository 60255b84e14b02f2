"""Versions and device, for reports and for ``cpd-fast doctor``."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from cpd_fast.machine import cpu_name

PACKAGES = ("cpd_fast", "torch", "numpy", "triton", "onnx", "onnxscript", "onnxruntime", "timm", "safetensors")


def version(package: str) -> str | None:
    """Installed version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, str]:
    """What a number was measured with: versions, device, threads."""
    found = {name: v for name in PACKAGES if (v := version(name))}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "python": platform.python_version(),
        **found,
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{cpu_name()}, {os.cpu_count()} cores",
        **gpu,
        "threads": str(torch.get_num_threads()),
    }

"""``cpd-fast doctor``: what is installed, and what runs here."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sysconfig
from typing import Annotated

import typer

from cpd_fast.cli.shared import as_json, show_table

OPTIONAL = {  # what each package is for, and how it is installed
    "onnxscript": ("export to ONNX", "pip install 'cpd_fast[export]'"),
    "onnxruntime": ("latency of ONNX files", "pip install 'cpd_fast[export]'"),
    "timm": ("models timm/NAME", "pip install timm"),
    "segmentation_models_pytorch": ("models smp/DECODER:ENCODER", "pip install segmentation-models-pytorch"),
    "transformers": ("models hf/FOLDER", "pip install transformers"),
    "PIL": ("pictures of folders and reports", "pip install pillow"),
    "optuna": ("searches", "pip install 'cpd_fast[search]'"),
    "tensorboard": ("scalars for TensorBoard", "pip install tensorboard"),
}


def command(json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Say what is installed and which backends run here, and why not the others."""
    from cpd_fast.recipes.environment import environment

    found = {**environment(), **_hardware(), **_backends(), **_optional()}
    if json:
        as_json(found)
    else:
        show_table(("what", "state"), list(found.items()), numbers=False)


def _hardware() -> dict[str, str]:
    import torch

    built = torch.version.cuda
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if built else []
    named = [f"{g.name}, sm_{g.major}{g.minor}, {g.total_memory / 2**30:.0f} GiB" for g in gpus]
    return {
        "gpu": "; ".join(named) or ("none: torch is a CPU build" if built is None else "none: no CUDA device"),
        "compiled for": _compiled_for(),
    }


def _compiled_for() -> str:
    """Instruction sets and GPU architectures of the compiled library."""
    try:
        native = importlib.import_module("cpd_fast._native")
    except ImportError as e:
        return f"not built ({e}); needs a C++ compiler at install time" if _native_is_there() else "not built"
    archs = architectures(getattr(native, "cuda_archs", ""))
    cuda = archs or ("yes" if native.has_cuda else "not compiled (no nvcc at install time)")
    return f"CPU {native.current_isa()} (of {', '.join(native.supported_isas())}); CUDA {cuda}"


def architectures(text: str) -> str:
    """CMake's list of architectures as people know them.

    Example:
        >>> architectures("75-real, 90")
        'sm_75, sm_90 (and later ones, through PTX)'
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    listed = ", ".join(f"sm_{name.partition('-')[0]}" for name in names)
    return listed + (" (and later ones, through PTX)" if any(not name.endswith("-real") for name in names) else "")


def _native_is_there() -> bool:
    return importlib.util.find_spec("cpd_fast._native") is not None


def _backends() -> dict[str, str]:
    """Which backend runs here, or why it does not."""
    import torch

    cuda = torch.cuda.is_available()
    native = _native_is_there()
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
        **_latency_backends(),
    }


def _latency_backends() -> dict[str, str]:
    import shutil

    compiler = shutil.which(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++") or shutil.which("g++")
    found = {
        "latency eager": "runs",
        "latency compile": "runs" if compiler else "no: torch.compile needs a C++ compiler on the PATH",
    }
    if importlib.util.find_spec("onnxruntime") is None:
        why = "no: onnxruntime is not installed; pip install onnxruntime"
        return found | {"latency onnxruntime": why, "latency onnxruntime-cuda": why}
    import onnxruntime

    there = onnxruntime.get_available_providers()
    cuda = (
        "runs" if "CUDAExecutionProvider" in there else "no: this onnxruntime has no CUDA; pip install onnxruntime-gpu"
    )
    return found | {"latency onnxruntime": "runs", "latency onnxruntime-cuda": cuda}


def _optional() -> dict[str, str]:
    """Packages that some commands need."""
    return {
        f"package {name}": f"installed ({what})" if importlib.util.find_spec(name) else f"missing ({what}): {how}"
        for name, (what, how) in OPTIONAL.items()
    }

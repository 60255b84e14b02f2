"""Optional packages: imported before the work that ends in them, so that nobody learns of a missing one after hours."""

from __future__ import annotations

import importlib

from cpd_fast.errors import BackendError

ONNX = ("onnx", "onnxscript", "onnxruntime")
PICTURES, SCALARS, SEARCH = "PIL.Image", "torch.utils.tensorboard", "optuna"
_PIP = {PICTURES: "pillow", SCALARS: "tensorboard"}  # where the name of the module is not that of what is installed


def require(*modules: str) -> None:
    """Import modules of optional packages.

    Raises:
        BackendError: If some cannot be imported; names all of them, why, and how to install them.
    """
    faults = {}
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as e:  # broken packages raise more than ImportError
            name = _PIP.get(module, module)
            absent = isinstance(e, ModuleNotFoundError) and e.name in (name, module, module.partition(".")[0])
            faults[name] = "is not installed" if absent else f"cannot be imported ({e})"
    if faults:
        named = ", ".join(f"{name} {reason}" for name, reason in faults.items())
        raise BackendError(f"{named}; install it with: pip install {' '.join(faults)}")

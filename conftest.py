"""What tests, benchmarks and doctests need first: one thread, the Triton interpreter, a torchvision that loads."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

# What the search for doctests must not import: a script that runs in an environment of its own, and integrations whose
# library is absent.
_LIBRARIES = {"huggingface": "transformers", "lightning": "lightning", "mmengine": "mmengine"}
collect_ignore = ["bench/wheel_check.py"] + [
    f"cpd_fast/integrations/{name}.py" for name, library in _LIBRARIES.items() if not importlib.util.find_spec(library)
]


def _declare_torchvision_ops() -> object | None:
    """Let a torchvision built for CUDA import beside a CPU-only torch: its two operators exist, but have no body.

    timm imports torchvision; models and transforms work, ``nms`` and ``roi_align`` do not.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        import sys

        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_torchvision_library = _declare_torchvision_ops()  # declarations last as long as this object

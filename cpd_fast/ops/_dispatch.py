"""Who runs an op, and why: the one place that picks a backend and turns tensors into pointers.

A backend says no with a reason. Left alone, the first backend without one runs; ``backend="triton"`` turns that
backend's reason into the error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpd_fast.errors import BackendError

BACKENDS = ("cuda", "cpu", "triton", "reference")
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


@functools.cache
def _native() -> ModuleType | str:
    """The compiled library, or why there is none."""
    try:
        return importlib.import_module("cpd_fast._native")
    except ImportError as e:
        return f"the compiled library cannot be loaded ({e}); reinstall cpd_fast with a C++ compiler at hand"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interprets_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_pointers(tensor: Tensor) -> str | None:
    """Kernels read memory: a tensor must have some, of a kind they know."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "does not run inside torch.func transforms (vmap, grad, jvp)"
    if tensor.dtype not in DTYPE_CODES:
        return f"needs float32, float64, float16 or bfloat16, got {tensor.dtype}"
    return None


def _why_not_cpu(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return f"needs CPU tensors, got {tensor.device}"
    native = _native()
    return native if isinstance(native, str) else _why_not_pointers(tensor)


def _why_not_cuda(tensor: Tensor) -> str | None:
    if tensor.device.type != "cuda":
        return f"needs CUDA tensors, got {tensor.device}"
    native = _native()
    if isinstance(native, str):
        return native
    if not native.has_cuda:
        return "the compiled library has no CUDA code (nvcc was missing at build time); rebuild with CPD_CUDA=ON"
    return _why_not_pointers(tensor)


def _why_not_triton(tensor: Tensor) -> str | None:
    if not _has_triton():
        return "needs Triton, which is not installed"
    if tensor.device.type != "cuda" and not _interprets_triton():
        return f"needs CUDA tensors (or TRITON_INTERPRET=1 before start), got {tensor.device}"
    if tensor.dtype == torch.float64:
        return "computes in float32; float64 runs on the other backends"
    return _why_not_pointers(tensor)


def why_not_resized(student: Tensor, teacher: Tensor) -> str | None:
    """Why the GPU bodies for pixel weights and two sizes cannot take these maps, if they cannot: 32-bit positions."""
    pixels = math.prod(max(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    longest = max(*student.shape[2:], *teacher.shape[2:])
    if pixels > 2**30 or (student.shape != teacher.shape and longest > 32767):
        return f"needs maps of at most 2^30 pixels, and 32767 a side to be resized, got {tuple(student.shape)}"
    return None


_WHY_NOT: dict[str, Callable[[Tensor], str | None]] = {
    "cuda": _why_not_cuda,
    "cpu": _why_not_cpu,
    "triton": _why_not_triton,
    "reference": lambda tensor: None,
}


def choose(op: str, tensor: Tensor, backend: str | None = None) -> str:
    """Name the backend that runs ``op`` on ``tensor``.

    Raises:
        BackendError: If the backend asked for does not exist or cannot run this call.
    """
    if backend is None:
        # Triton on the CPU is an interpreter for tests: only on demand.
        skip = "triton" if tensor.device.type == "cpu" else ""
        return next(name for name in BACKENDS if name != skip and _WHY_NOT[name](tensor) is None)
    if backend not in BACKENDS:
        raise BackendError(f"{op}: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if reason := _WHY_NOT[backend](tensor):
        raise BackendError(f"{op}: backend {backend!r} {reason}")
    return backend


# Ops that have other bodies than the usual four say themselves which one runs.
EXPLAINERS: dict[str, Callable[..., str]] = {}


def explain_backend(op: str, *args: Any, **options: Any) -> str:
    """Say which backend would run ``op`` on these arguments, and why the others do not.

    Args:
        op: Name of an op of :mod:`cpd_fast.ops`.
        *args: What the op would be called with; the first tensor decides.
        **options: What it would be given by name, where that decides as well (masked layers).

    Returns:
        One line a backend; the first names the one that runs.

    Raises:
        ValueError: If no argument is a tensor.

    Example:
        >>> print(explain_backend("channel_kl", torch.zeros(1, 2, 3, 3)).splitlines()[0].split(":")[0])
        channel_kl
    """
    tensor = next((a for a in args if isinstance(a, Tensor)), None)
    if tensor is None:
        raise ValueError(f"explain_backend({op!r}): give the arguments of the op, at least one of them a tensor")
    if op in EXPLAINERS:
        return EXPLAINERS[op](op, *args, **options)
    chosen = choose(op, tensor)
    detail = f" ({_native().current_isa()})" if chosen == "cpu" else ""  # type: ignore[union-attr]
    lines = [f"{op}: {chosen}{detail}"]
    for name in BACKENDS:
        if name != chosen:
            lines.append(f"  not {name}: {_WHY_NOT[name](tensor) or 'comes later in the order'}")
    return "\n".join(lines)


def is_watched(*tensors: Tensor) -> bool:
    """Whether a compiler, tracer, dispatch mode or tensor subclass looks on: then ops must go through torch.ops."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    )


class Layout(NamedTuple):
    """A dense tensor as ``(outer, reduce, inner)``, inner contiguous, with the format that makes it so."""

    outer: int
    reduce: int
    inner: int
    memory_format: torch.memory_format


def layout_of(student: Tensor, over: str) -> Layout:
    """How ``student`` (N, C, ...) looks to a kernel that reduces over its ``"space"`` or its ``"classes"``.

    Contiguous and channels-last tensors are taken as they are; others will be copied to contiguous.
    """
    n, c = student.shape[:2]
    space = math.prod(student.shape[2:])
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(student.dim())
    is_last = last is not None and not student.is_contiguous() and student.is_contiguous(memory_format=last)
    memory_format = last if is_last and last is not None else torch.contiguous_format
    if over == "space":
        return Layout(n, space, c, memory_format) if is_last else Layout(n * c, space, 1, memory_format)
    if is_last or space == 1:
        return Layout(n * space, c, 1, memory_format)
    return Layout(n, c, space, memory_format)


def softmax_kl(
    backend: str,
    over: str,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    scale: float,
    *,
    grad: Tensor | None = None,
    want_loss: bool = True,
    want_grad: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Run the kernel behind channel_kl (``over="space"``) and class_kl (``over="classes"``).

    Returns:
        The loss, shape without the reduced dims, and the student's gradient for the incoming ``grad`` (ones if None).
    """
    shape = student.shape[:2] if over == "space" else student.shape[:1] + student.shape[2:]
    layout = layout_of(student, over)
    student = student.detach().contiguous(memory_format=layout.memory_format)
    teacher = teacher.detach().contiguous(memory_format=layout.memory_format)
    accumulate = torch.float64 if student.dtype == torch.float64 else torch.float32
    loss = torch.empty(shape, dtype=accumulate, device=student.device) if want_loss else None
    dstudent = torch.empty_like(student) if want_grad else None
    if grad is not None:
        grad = grad.to(accumulate).contiguous()
    if layout.outer == 0 or student.numel() == 0:
        return loss, dstudent
    numbers = (1.0 / temperature, scale * temperature**2, scale * temperature)
    sizes = layout[:3]
    if backend == "triton":
        kernels = importlib.import_module("cpd_fast.kernels.channel_kl")
        with _on(student):
            kernels.channel_kl_launch(student, teacher, grad, loss, dstudent, *sizes, *numbers)
        return loss, dstudent
    native: Any = _native()
    pointers = [0 if t is None else t.data_ptr() for t in (student, teacher, grad, loss, dstudent)]
    code = DTYPE_CODES[student.dtype]
    if backend == "cpu":
        native.channel_kl(code, *pointers, *sizes, *numbers, torch.get_num_threads())
    else:
        with _on(student):
            scratch = student.new_empty(native.channel_kl_cuda_scratch(code, *sizes), dtype=torch.uint8)
            native.channel_kl_cuda(code, *pointers, scratch.data_ptr(), *sizes, *numbers, _stream(student))
    return loss, dstudent


def resized_kl(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    scale: float,
    over: str,
    align_corners: bool,
    *,
    grad: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Run the kernel for pixel weights and maps of two sizes: the loss, or the gradient if ``grad`` is given."""
    student, teacher = (x.detach().contiguous() for x in (student, teacher))
    n, c = student.shape[:2]
    spaces = [x.shape[2:] if x.dim() == 4 else (1, math.prod(x.shape[2:])) for x in (student, teacher)]
    sizes = (n, c, *spaces[0], *spaces[1])
    accumulate = torch.float64 if student.dtype == torch.float64 else torch.float32
    pixels = [max(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    shape = (n, c) if over == "space" else (n, *pixels)
    loss = torch.empty(shape, dtype=accumulate, device=student.device) if grad is None else None
    dstudent = torch.empty_like(student) if grad is not None else None
    weight, grad = (None if x is None else x.to(accumulate).contiguous() for x in (weight, grad))
    numbers = (1.0 / temperature, scale * temperature**2, scale * temperature)
    tensors = (student, teacher, weight, grad, loss, dstudent)
    if backend == "triton":
        kernels = importlib.import_module("cpd_fast.kernels.resized_kl")
        with _on(student):
            kernels.resized_kl_launch(*tensors, sizes, over == "classes", align_corners, *numbers)
        return loss, dstudent
    native: Any = _native()
    code, pointers = DTYPE_CODES[student.dtype], [0 if x is None else x.data_ptr() for x in tensors]
    flags = (over == "classes", align_corners)
    if backend == "cpu":
        native.resized_kl(code, *pointers, *sizes, *flags, *numbers, torch.get_num_threads())
    else:
        with _on(student):
            scratch = student.new_empty(native.resized_kl_cuda_scratch(code, *sizes, flags[0]), dtype=torch.uint8)
            native.resized_kl_cuda(code, *pointers, scratch.data_ptr(), *sizes, *flags, *numbers, _stream(student))
    return loss, dstudent


def scale_rows(backend: str, over: str, dstudent: Tensor, grad: Tensor) -> Tensor:
    """Multiply a gradient made ahead of time by the incoming one, in place; free where that is 1."""
    if dstudent.numel() == 0:
        return dstudent
    if dstudent.device.type == "cpu" and not any(grad.stride()) and grad.reshape(-1)[0].item() == 1.0:
        return dstudent  # one number, spread: the gradient of a plain sum
    layout = layout_of(dstudent, over)
    grad = grad.to(dstudent.dtype).contiguous()
    code, pointers = DTYPE_CODES[dstudent.dtype], (grad.data_ptr(), dstudent.data_ptr())
    native: Any = _native()
    if backend == "cpu":
        native.scale_rows(code, *pointers, *layout[:3], torch.get_num_threads())
    elif backend == "cuda":
        with _on(dstudent):
            native.scale_rows_cuda(code, *pointers, *layout[:3], _stream(dstudent))
    else:
        grad = grad.reshape(grad.shape + (1,) * (dstudent.dim() - 2)) if over == "space" else grad.unsqueeze(1)
        dstudent.mul_(grad).masked_fill_(grad == 0, 0.0)  # whatever it was, NaN as well
    return dstudent


def _on(tensor: Tensor) -> Any:
    """The tensor's CUDA device as the current one; nothing on the CPU."""
    return torch.cuda.device_of(tensor)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream

"""Which body runs a masked layer, and why the others do not."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from cpd_fast.errors import BackendError
from cpd_fast.ops import _direct, _dispatch
from cpd_fast.ops._masked_channels import why_not_compact
from cpd_fast.ops.elements import is_channels_last

BODIES = {
    "cuda": "CUDA kernels that read and write through index lists",
    "cpu": "native kernels that read and write through index lists",
    "triton": "Triton kernels that read and write through index lists",
    "compact": "the library's kernels on weights without masked channels",
    "reference": "the library's kernels at full width",
}
DIRECT = ("cuda", "cpu", "triton")
LATER = "comes later in the order"


class Layer:
    """A masked linear layer, as far as it decides who runs it."""

    def why_not(self, body: str) -> str | None:
        """Why a body cannot run; None if it can."""
        return "is for convolutions" if body in DIRECT else None

    def slower(self, body: str) -> str | None:
        """Why a body that could run is not the one to choose, as measured."""
        del body
        return None


class Convolution(Layer):
    """A masked convolution, as far as it decides who runs it."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
        self.x, self.weight, self.bias, self.groups = x, weight, bias, groups

    @functools.cached_property
    def _why_not_direct(self) -> str | None:
        return _direct.why_not(self.x, self.weight, self.bias, self.groups)

    def why_not(self, body: str) -> str | None:
        """Why a body cannot run; None if it can."""
        if body not in DIRECT:
            return None
        why = self._why_not_direct or _dispatch._WHY_NOT[body](self.x)
        height, width = self.x.shape[2:]
        if why is None and body != "cpu" and (max(height, width) > 2**24 or height * width > 2**28):
            return f"needs planes of at most 2^28 pixels, and 2^24 a side, got {(height, width)}"
        return why

    def slower(self, body: str) -> str | None:
        """Why a body that could run is not the one to choose, as measured."""
        x = self.x
        if x.device.type != "cpu":
            return None
        if body == "triton":
            return "is an interpreter here, for tests"
        if body != "cpu" or self.weight.shape[:2] != (self.groups, 1):
            return None
        if is_channels_last(x):
            return "is slower than the library on channels-last activations of depthwise layers"
        if x.is_contiguous() and x.shape[2] * x.shape[3] <= 64:
            return "is slower than the library on depthwise planes of at most 64 pixels"
        return None


def choose(op: str, backend: str | None, layer: Layer, watched: str | None) -> str:
    """Name the body that runs. Compilers trace this: they never come to ``layer``.

    Args:
        op: For messages.
        backend: The one asked for; None: the first that can run and is not slower than a later one.
        layer: What is to run.
        watched: Why only the reference may, if so; see :func:`why_not_compact`.

    Raises:
        BackendError: If the one asked for does not exist or cannot run this call.
    """
    if backend is not None and backend not in BODIES:
        raise BackendError(f"{op}: unknown backend {backend!r}; choose one of {', '.join(BODIES)}")
    if watched is not None:
        if backend not in (None, "reference"):
            raise BackendError(f"{op}: backend {backend!r} {watched}")
        return "reference"
    if backend is None:
        return next(name for name in BODIES if layer.why_not(name) is None and layer.slower(name) is None)
    if reason := layer.why_not(backend):
        raise BackendError(f"{op}: backend {backend!r} {reason}")
    return backend


def explain(op: str, *args: Any, **options: Any) -> str:
    """What :func:`cpd_fast.ops.explain_backend` says of masked layers."""
    layer: Layer
    if op == "masked_linear":
        tensors, layer = [t for t in args[:3] if isinstance(t, Tensor)], Layer()
    else:
        names = ("x", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, args, strict=False)) | options
        x, weight, bias = given["x"], given["weight"], given.get("bias")
        tensors = [t for t in (x, weight, bias) if t is not None]
        layer = Convolution(x, weight, bias, given.get("groups", 1))
    watched = why_not_compact(*tensors)
    chosen = choose(op, None, layer, watched)
    detail = f", {_dispatch._native().current_isa()}" if chosen == "cpu" else ""  # type: ignore[union-attr]
    lines = [f"{op}: {chosen} ({BODIES[chosen]}{detail})"]
    for name in BODIES:
        if name != chosen:
            lines.append(f"  not {name}: {watched or layer.why_not(name) or layer.slower(name) or LATER}")
    return "\n".join(lines)

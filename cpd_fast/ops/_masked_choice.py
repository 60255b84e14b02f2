"""Which body runs a masked layer, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
Reasons = dict[str, str | None]
Verdict = tuple[Reasons, Reasons]  # why bodies cannot run; why those that can had better not
LATER = "comes later in the order"


class Call(NamedTuple):
    """What decides about a convolution."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    groups: int
    compact_input: bool
    compact_output: bool

    def reasons(self) -> Reasons:
        """Why a body cannot run."""
        why = _direct.why_not(self.x, self.weight, self.bias, self.groups)
        direct = {name: why or _dispatch._WHY_NOT[name](self.x) for name in DIRECT}
        if max(self.x.shape[2:]) > 2**24 or self.x.shape[2] * self.x.shape[3] > 2**28:
            large = f"needs planes of at most 2^28 pixels, and 2^24 a side, got {tuple(self.x.shape[2:])}"
            direct |= {name: direct[name] or large for name in ("cuda", "triton")}
        return direct | {"compact": None, "reference": None}

    def slower(self) -> Reasons:
        """Why a body that could run is not the one to choose, as measured."""
        if self.x.device.type != "cpu":
            return {}
        slower: Reasons = {"triton": "is an interpreter here, for tests"}
        if self.weight.shape[:2] != (self.groups, 1):
            return slower
        if self.compact_input and self.compact_output and is_channels_last(self.x):
            slower["cpu"] = "is slower than the library on compact channels-last activations of depthwise layers"
        if self.x.is_contiguous() and self.x.shape[2] * self.x.shape[3] <= 64:
            slower["cpu"] = "is slower than the library on depthwise planes of at most 64 pixels"
        return slower

    def verdict(self) -> Verdict:
        """Both."""
        return self.reasons(), self.slower()


def linear_verdict() -> Verdict:
    """The same of linear layers."""
    return dict.fromkeys(DIRECT, "is for convolutions") | {"compact": None, "reference": None}, {}


def choose(op: str, backend: str | None, call: Callable[[], Verdict], *tensors: Tensor) -> str:
    """Name the body that runs. Compilers trace this: they never come to ``call``.

    Raises:
        BackendError: If the one asked for does not exist or cannot run this call.
    """
    if backend is not None and backend not in BODIES:
        raise BackendError(f"{op}: unknown backend {backend!r}; choose one of {', '.join(BODIES)}")
    compact = why_not_compact(*tensors)
    if compact is not None:
        reasons, slower = {n: None if n == "reference" else compact for n in BODIES}, {}
    else:
        reasons, slower = call()
    if backend is None:
        return next(name for name in BODIES if reasons[name] is None and slower.get(name) is None)
    if reasons[backend]:
        raise BackendError(f"{op}: backend {backend!r} {reasons[backend]}")
    return backend


def explain(op: str, *args: Any, **options: Any) -> str:
    """What :func:`cpd_fast.ops.explain_backend` says of masked layers."""
    call: Callable[[], Verdict]
    if op == "masked_linear":
        tensors, call = [t for t in args[:3] if isinstance(t, Tensor)], linear_verdict
    else:
        names = ("x", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, args, strict=False)) | options
        x, weight, bias = given["x"], given["weight"], given.get("bias")
        tensors = [t for t in (x, weight, bias) if t is not None]
        compact = bool(given.get("compact_input")), bool(given.get("compact_output"))
        call = Call(x, weight, bias, given.get("groups", 1), *compact).verdict
    chosen = choose(op, None, call, *tensors)
    compact_reason = why_not_compact(*tensors)
    reasons, slower = call() if compact_reason is None else (dict.fromkeys(BODIES, compact_reason), {})
    detail = f", {_dispatch._native().current_isa()}" if chosen == "cpu" else ""  # type: ignore[union-attr]
    lines = [f"{op}: {chosen} ({BODIES[chosen]}{detail})"]
    lines += [f"  not {n}: {reasons[n] or slower.get(n) or LATER}" for n in BODIES if n != chosen]
    return "\n".join(lines)

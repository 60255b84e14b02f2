"""What channel_kl and class_kl share: the reference, argument checks, the eager fast path and the registration.

Both are ``scale * T^2 * KL(softmax(teacher / T) || softmax(student / T))``, over the pixels of each channel map
(``over="space"``) or over the classes of each pixel (``over="classes"``).

Meanings (kernels and reference agree): teacher ``-inf`` adds nothing; student ``-inf`` where the teacher is not gives
an infinite loss with a finite gradient; a distribution that is ``-inf`` everywhere, of either, gives loss 0 and
gradient 0; NaN and ``+inf`` give NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cpd_fast.errors import BackendError, ShapeError
from cpd_fast.ops import _dispatch

LIBRARY = torch.library.Library("cpd_fast", "FRAGMENT")


# ---------------------------------------------------------------------------------------------------------- reference


def _log_softmax(x: Tensor, temperature: float, over: str) -> Tensor:
    """Log-probabilities ``(N, C, H*W)`` in fp32 or better; NaN where all is ``-inf``."""
    x = x.flatten(2) if x.dim() > 2 else x
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.log_softmax(x / temperature, dim=-1 if over == "space" else 1)


def _empty(student: Tensor, teacher: Tensor, over: str) -> Tensor:
    """Which distributions are ``-inf`` everywhere, in either tensor; the reduced dim stays as 1."""
    dim = -1 if over == "space" else 1
    s, t = (x.detach().flatten(2) if x.dim() > 2 else x.detach() for x in (student, teacher))
    return ((s == -math.inf).all(dim, keepdim=True) & ~t.isnan().any(dim, keepdim=True)) | (
        (t == -math.inf).all(dim, keepdim=True) & ~s.isnan().any(dim, keepdim=True)
    )


def reference(student: Tensor, teacher: Tensor, temperature: float, scale: float, over: str) -> Tensor:
    """The loss in plain PyTorch: any device, autograd, double backward and torch.func transforms."""
    dim = -1 if over == "space" else 1
    empty = _empty(student, teacher, over)
    shape = student.flatten(2).shape if student.dim() > 2 else student.shape
    s = student.reshape(shape).masked_fill(empty, 0.0)
    t = teacher.detach().reshape(shape).masked_fill(empty, 0.0)
    log_ps, log_pt = _log_softmax(s, temperature, over), _log_softmax(t, temperature, over)
    pt = log_pt.exp()
    terms = torch.where(pt == 0, 0.0, pt * (log_pt - log_ps))
    loss = scale * temperature**2 * terms.sum(dim).masked_fill(empty.squeeze(dim), 0.0)
    return loss if over == "space" else loss.reshape(student.shape[:1] + student.shape[2:])


def reference_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, temperature: float, scale: float, over: str
) -> Tensor:
    """``grad * scale * T * (softmax(student / T) - softmax(teacher / T))``, itself differentiable."""
    empty = _empty(student, teacher, over)
    shape = student.flatten(2).shape if student.dim() > 2 else student.shape
    s, t = (x.reshape(shape).masked_fill(empty, 0.0) for x in (student, teacher.detach()))
    ps, pt = (_log_softmax(x, temperature, over).exp() for x in (s, t))
    g = grad.to(ps.dtype).reshape(empty.shape)
    # Multiplied in fp32, cast last: in half precision the factors alone would underflow.
    dstudent = (scale * temperature * g * (ps - pt)).masked_fill(empty, 0.0)
    return dstudent.to(student.dtype).reshape(student.shape)


def _upsample(x: Tensor, dim: int, out: int, align_corners: bool) -> Tensor:
    """Linear interpolation along ``dim``, at the positions of :func:`torch.nn.functional.interpolate`.

    Written out, since there 0 times infinity is NaN: here a value that a pixel does not lie at does not matter to it.
    """
    length = x.shape[dim]
    i = torch.arange(out, dtype=torch.float64, device=x.device)
    if align_corners:
        at = i * ((length - 1) / max(out - 1, 1))
    else:
        at = ((i + 0.5) * (length / out) - 0.5).clamp(min=0.0)
    first = at.long().clamp(max=length - 1)
    share = (at - first).to(x.dtype)
    share = share if dim == -1 else share.unsqueeze(-1)
    before, after = x.index_select(dim, first), x.index_select(dim, (first + 1).clamp(max=length - 1))
    return torch.where(share == 0, before, (1 - share) * before + share * after)


def reference_resized(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    scale: float,
    over: str,
    align_corners: bool,
) -> Tensor:
    """The loss with weights for pixels, between maps of two sizes: the smaller is upsampled, in fp32 or better."""
    accumulate = torch.float64 if student.dtype == torch.float64 else torch.float32
    size = larger_size(student, teacher)
    s, t = (
        x
        if x.shape[2:] == size
        else _upsample(_upsample(x.to(accumulate), -2, size[0], align_corners), -1, size[1], align_corners)
        for x in (student, teacher.detach())
    )
    if weight is None:
        return reference(s, t, temperature, scale, over)
    looked_at = weight.unsqueeze(1) != 0
    if over == "classes":
        # Pixels that are not looked at keep their NaN to themselves, in the gradient as well.
        s, t = (x.masked_fill(~looked_at, 0.0) for x in (s, t))
        return weight.to(accumulate) * reference(s, t, temperature, scale, over)
    # softmax(x / T + log w) = w exp(x / T) / sum, and log w leaves the ratio of the two softmaxes.
    shift = temperature * weight.to(accumulate).log().unsqueeze(1)
    s, t = (torch.where(looked_at, x.to(accumulate) + shift, -math.inf) for x in (s, t))
    return reference(s, t, temperature, scale, over)


# -------------------------------------------------------------------------------------------------------------- checks


def larger_size(student: Tensor, teacher: Tensor) -> torch.Size:
    """Height and width that both are compared at."""
    return torch.Size(max(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))


def _check_resize(op: str, student: Tensor, teacher: Tensor) -> None:
    """Check that one of two maps can be read as if it were of the other's size.

    Raises:
        ShapeError: If not.
    """
    shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    if student.dim() != 4 or teacher.dim() != 4:
        raise ShapeError(f"{op}: resize needs maps (N, C, H, W), got {shapes}")
    if student.shape[:2] != teacher.shape[:2]:
        raise ShapeError(
            f"{op}: resize changes H and W only; N and C must be the same, got {shapes}; align channels (1x1 "
            "convolution)"
        )
    if larger_size(student, teacher) not in (student.shape[2:], teacher.shape[2:]):
        raise ShapeError(
            f"{op}: resize reads the smaller map at the larger's size, but neither of {shapes} is the larger in both "
            "height and width"
        )


def _check_weight(op: str, weight: Tensor, student: Tensor, teacher: Tensor, resize: bool) -> Tensor:
    """The weight as a tensor (N, H, W) without gradient.

    Raises:
        ShapeError: If its shape or device does not fit.
    """
    size = larger_size(student, teacher) if resize else student.shape[2:]
    expected = student.shape[:1] + size
    if weight.dim() == len(expected) + 1 and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    if weight.shape != expected:
        raise ShapeError(
            f"{op}: weight must have one value a pixel, shape {tuple(expected)}, got {tuple(weight.shape)}"
        )
    if weight.device != student.device:
        raise ShapeError(f"{op}: weight must be on the student's device {student.device}, got {weight.device}")
    return weight.detach()


def check(op: str, student: Tensor, teacher: Tensor, temperature: float, resize: bool = False) -> None:
    """Check what kernels trust.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        ValueError: If ``temperature`` is not a positive number.
    """
    if not student.is_floating_point() or not teacher.is_floating_point():
        raise ShapeError(
            f"{op}: expected floating-point activations, got {student.dtype} (student) and {teacher.dtype} (teacher); "
            "pass logits or features, not labels"
        )
    if resize:
        _check_resize(op, student, teacher)
    elif student.shape != teacher.shape:
        raise ShapeError(
            f"{op}: student and teacher must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; align channels (1x1 convolution) and pass resize=True if H and W differ"
        )
    if student.device != teacher.device:
        raise ShapeError(
            f"{op}: student and teacher must be on one device, got {student.device} and {teacher.device}; "
            f"move the teacher's output with .to({str(student.device)!r})"
        )
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be a positive finite number, got {temperature}")


def promote(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both to the wider dtype: under autocast a teacher may be fp32 beside an fp16 student."""
    if student.dtype == teacher.dtype:
        return student, teacher
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)


# ---------------------------------------------------------------------------------------------------- eager fast path


class FusedKl(torch.autograd.Function):
    """Kernel calls under autograd with half the overhead of a registered op, and the gradient made with the loss.

    In fp32 and fp64 the forward pass also writes the gradient for an incoming one of 1, so that inputs are read once;
    the backward pass multiplies by what came in, unless that is 1. Half types compute it in the backward pass: there
    the incoming gradient may be the loss scale without which it would underflow.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, scale: float, over: str, backend: str
    ) -> Tensor:
        ahead = ctx.needs_input_grad[0] and student.dtype in (torch.float32, torch.float64)
        loss, ctx.dstudent = _dispatch.softmax_kl(backend, over, student, teacher, temperature, scale, want_grad=ahead)
        ctx.save_for_backward(student, teacher)
        ctx.call = (temperature, scale, over, backend)
        assert loss is not None
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        student, teacher = ctx.saved_tensors  # also what notices a second backward pass without retain_graph
        temperature, scale, over, backend = ctx.call
        if torch.is_grad_enabled():  # create_graph=True: the result must be differentiable
            return reference_backward(grad, student, teacher, temperature, scale, over), None, None, None, None, None
        dstudent, ctx.dstudent = ctx.dstudent, None
        if dstudent is not None:
            dstudent = _dispatch.scale_rows(backend, over, dstudent, grad)
        else:
            _, dstudent = _dispatch.softmax_kl(
                backend, over, student, teacher, temperature, scale, grad=grad, want_loss=False, want_grad=True
            )
        return dstudent, None, None, None, None, None


class FusedResizedKl(torch.autograd.Function):
    """The kernels for weights and for maps of two sizes; the gradient is made in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        student: Tensor,
        teacher: Tensor,
        weight: Tensor | None,
        temperature: float,
        scale: float,
        over: str,
        align_corners: bool,
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, weight)
        ctx.backend, ctx.call = backend, (temperature, scale, over, align_corners)
        loss, _ = _dispatch.resized_kl(backend, student, teacher, weight, *ctx.call)
        assert loss is not None
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        student, teacher, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the result must be differentiable
            loss = reference_resized(student, teacher, weight, *ctx.call)
            (dstudent,) = torch.autograd.grad(loss, student, grad, create_graph=True)
        else:
            _, dstudent = _dispatch.resized_kl(ctx.backend, student, teacher, weight, *ctx.call, grad=grad)
        return None, dstudent, None, None, None, None, None, None


def _call_resized(
    op: str,
    over: str,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    scale: float,
    weight: Tensor | None,
    align_corners: bool,
    backend: str | None,
) -> Tensor:
    """Weights inside the kernel, or two sizes: a kernel, else the reference."""
    numbers = (temperature, scale, over, align_corners)
    watched = backend is None and _dispatch.is_watched(student, teacher)
    chosen = "reference" if watched else _dispatch.choose(op, student, backend)
    if chosen in ("cuda", "triton") and (reason := _dispatch.why_not_resized(student, teacher)):
        if backend is not None:
            raise BackendError(f"{op}: backend {backend!r} {reason}")
        chosen = "reference"
    if chosen == "reference" or not student.shape[0]:
        return reference_resized(student, teacher, weight, *numbers)
    return FusedResizedKl.apply(chosen, student, teacher, weight, *numbers)


def call(
    op: str,
    over: str,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    scale: float,
    backend: str | None,
    weight: Tensor | None = None,
    resize: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """Check, promote, then run: the registered op where somebody looks on, else the fast path or the reference."""
    check(op, student, teacher, temperature, resize)
    student, teacher = promote(student, teacher)
    if weight is not None:
        weight = _check_weight(op, weight, student, teacher, resize)
    # Half types make the gradient in the backward pass, where a weight of 0 alone does not keep NaN out.
    inside = weight is not None and (over == "space" or student.dtype not in (torch.float32, torch.float64))
    if student.shape != teacher.shape or inside:
        return _call_resized(op, over, student, teacher, temperature, scale, weight, align_corners, backend)
    if weight is not None:
        watched = _dispatch.is_watched(student, teacher)
        if not watched and _dispatch.choose(op, student, backend) == "reference":
            return reference_resized(student, teacher, weight, temperature, scale, over, align_corners)
        loss = call(op, over, student, teacher, temperature, scale, backend)
        return torch.where(weight == 0, 0.0, weight.to(loss.dtype) * loss)
    if backend is None and _dispatch.is_watched(student, teacher):
        return getattr(torch.ops.cpd_fast, op)(student, teacher, temperature, scale)
    chosen = _dispatch.choose(op, student, backend)
    if chosen == "reference":
        return reference(student, teacher, temperature, scale, over)
    return FusedKl.apply(student, teacher, temperature, scale, over, chosen)


# -------------------------------------------------------------------------------------------------------- registration


def register(op: str, over: str) -> None:
    """Define ``cpd_fast::<op>`` and ``cpd_fast::<op>_backward`` with bodies, fakes and autograd."""
    LIBRARY.define(f"{op}(Tensor student, Tensor teacher, float temperature, float scale) -> Tensor")
    LIBRARY.define(
        f"{op}_backward(Tensor grad, Tensor student, Tensor teacher, float temperature, float scale) -> Tensor"
    )

    def forward(student: Tensor, teacher: Tensor, temperature: float, scale: float) -> Tensor:
        chosen = _dispatch.choose(op, student)
        if chosen == "reference":
            return reference(student, teacher, temperature, scale, over)
        loss, _ = _dispatch.softmax_kl(chosen, over, student, teacher, temperature, scale)
        assert loss is not None
        return loss

    def backward(grad: Tensor, student: Tensor, teacher: Tensor, temperature: float, scale: float) -> Tensor:
        chosen = _dispatch.choose(op, student)
        if chosen == "reference":
            return reference_backward(grad, student, teacher, temperature, scale, over)
        _, dstudent = _dispatch.softmax_kl(
            chosen, over, student, teacher, temperature, scale, grad=grad, want_loss=False, want_grad=True
        )
        assert dstudent is not None
        return dstudent

    def fake(student: Tensor, teacher: Tensor, temperature: float, scale: float) -> Tensor:
        shape = student.shape[:2] if over == "space" else student.shape[:1] + student.shape[2:]
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        return student.new_empty(shape, dtype=dtype)

    def fake_backward(grad: Tensor, student: Tensor, teacher: Tensor, temperature: float, scale: float) -> Tensor:
        return torch.empty_like(student, memory_format=_dispatch.layout_of(student, over).memory_format)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.numbers = inputs[2:]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        return getattr(torch.ops.cpd_fast, f"{op}_backward")(grad, student, teacher, *ctx.numbers), None, None, None

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.numbers = inputs[3:]

    def differentiate_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        # d/dgrad and d/dstudent of grad * scale * T * (ps - pt): linear in grad, a softmax in student.
        grad, student, teacher = ctx.saved_tensors
        temperature, scale = ctx.numbers
        dims = tuple(range(2, student.dim())) if over == "space" else (1,)
        unit = reference_backward(torch.ones_like(grad), student, teacher, temperature, scale, over)
        dgrad = (v * unit).sum(dims).to(grad.dtype)
        flat = student.flatten(2) if student.dim() > 2 else student
        ps = _log_softmax(flat, temperature, over).exp().reshape(student.shape).nan_to_num(0.0)
        g = grad.reshape(grad.shape + (1,) * len(dims)) if over == "space" else grad.unsqueeze(1)
        dstudent = scale * g * ps * (v - (ps * v).sum(dims, keepdim=True))
        return dgrad, dstudent.to(student.dtype), None, None, None

    LIBRARY.impl(op, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{op}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cpd_fast::{op}", fake, lib=LIBRARY)
    torch.library.register_fake(f"cpd_fast::{op}_backward", fake_backward, lib=LIBRARY)
    torch.library.register_autograd(f"cpd_fast::{op}", differentiate, setup_context=save, lib=LIBRARY)
    torch.library.register_autograd(
        f"cpd_fast::{op}_backward", differentiate_backward, setup_context=save_backward, lib=LIBRARY
    )

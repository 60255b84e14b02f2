"""Triton body of channel_kl and class_kl: KL between two softmaxes along one dim, and its gradient.

Tensors are ``(outer, reduce, inner)``, inner contiguous: ``inner == 1`` is a contiguous row (channel_kl on NCHW), else
neighbouring columns run side by side (class_kl on NCHW, channel_kl on channels-last). The formulas and the meaning of
-inf and NaN are those of ``csrc/cpu/channel_kl.cpp``. A program owns BLOCK_I columns: sweep 1 keeps running maxima and
sums, sweep 2 reads again and writes the gradient, 5 units of traffic; a column that fits one block is read once,
3 units.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


@triton.jit
def _difference(x, base):
    # x - base for a maximum that may be -inf: then every x is -inf (or NaN), and any finite base serves.
    return x - tl.where(base == float("-inf"), 0.0, base)


@triton.jit
def channel_kl_kernel(
    student_ptr,  # (outer, reduce, inner), fp32, fp16 or bf16
    teacher_ptr,  # the same
    grad_ptr,  # (outer, inner) fp32, read if HAS_GRAD
    loss_ptr,  # (outer, inner) fp32, written if WANT_LOSS
    dstudent_ptr,  # like student, written if WANT_DSTUDENT
    reduce,
    inner,
    column_blocks,  # blocks of BLOCK_I columns in inner
    log2e_over_t,  # log2(e) / T: exponentials are taken to base 2
    loss_scale,
    grad_scale,
    HAS_GRAD: tl.constexpr,
    WANT_LOSS: tl.constexpr,
    WANT_DSTUDENT: tl.constexpr,
    IS_ROW: tl.constexpr,  # inner == 1: the compiler then sees contiguous loads
    ONE_BLOCK: tl.constexpr,  # reduce <= BLOCK_R: nothing is read twice
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One program: BLOCK_I columns of one outer index, all of the reduced dim."""
    program = tl.program_id(0).to(tl.int64)
    if IS_ROW:  # said apart, so that the compiler can prove rows aligned and use 16-byte loads
        outer = program
        i = tl.arange(0, BLOCK_I)  # (BLOCK_I,)
        row_length = reduce
    else:
        outer = program // column_blocks
        i = (program % column_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
        row_length = reduce * inner.to(tl.int64)
    in_columns = i < inner
    stride = 1 if IS_ROW else inner
    base = outer * row_length + i[None, :]
    r0 = tl.arange(0, BLOCK_R)

    ms = tl.full((BLOCK_I,), float("-inf"), tl.float32)
    mt = tl.full((BLOCK_I,), float("-inf"), tl.float32)
    zs = tl.zeros((BLOCK_I,), tl.float32)
    zt = tl.zeros((BLOCK_I,), tl.float32)
    a = tl.zeros((BLOCK_I,), tl.float32)  # sum of et (y - x), in units of ln 2
    es = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    et = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    for start in range(0, reduce, BLOCK_R):
        r = start + r0
        at = base + r[:, None].to(tl.int64) * stride
        inside = (r[:, None] < reduce) & in_columns[None, :]
        s = tl.load(student_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
        new_ms = tl.maximum(ms, tl.max(s, axis=0))
        new_mt = tl.maximum(mt, tl.max(t, axis=0))
        # Bring the sums so far to the new maxima; an empty history has nothing to bring.
        shift_s = tl.where(ms == float("-inf"), 0.0, _difference(new_ms, ms) * log2e_over_t)
        shift_t = tl.where(mt == float("-inf"), 0.0, _difference(new_mt, mt) * log2e_over_t)
        fade = tl.exp2(-shift_t)
        a = tl.where(fade == 0.0, 0.0, fade * (a + zt * (shift_s - shift_t)))
        zs = zs * tl.exp2(-shift_s)
        zt = zt * fade
        ms = new_ms
        mt = new_mt
        x = _difference(s, ms[None, :]) * log2e_over_t
        y = _difference(t, mt[None, :]) * log2e_over_t
        es = tl.exp2(x)
        et = tl.exp2(y)
        zs += tl.sum(es, axis=0)
        zt += tl.sum(et, axis=0)
        a += tl.sum(tl.where(et == 0.0, 0.0, et * (y - x)), axis=0)

    # All -inf in either tensor is no distribution: no loss, no gradient. NaN among them shows in the sums.
    empty = ((ms == float("-inf")) | (mt == float("-inf"))) & (zs == zs) & (zt == zt)
    column = outer * inner + i
    if WANT_LOSS:
        # ln 2 = 0.693...: back from base 2
        kl = (a / zt + tl.log2(zs / zt)) * 0.6931471805599453
        tl.store(loss_ptr + column, tl.where(empty, 0.0, loss_scale * kl), mask=in_columns)
    if WANT_DSTUDENT:
        g = grad_scale
        if HAS_GRAD:
            g = grad_scale * tl.load(grad_ptr + column, mask=in_columns, other=0.0)
        fs = tl.where(empty, 0.0, g / zs)
        ft = tl.where(empty, 0.0, g / zt)
        if ONE_BLOCK:
            at = base + r0[:, None].to(tl.int64) * stride
            inside = (r0[:, None] < reduce) & in_columns[None, :]
            d = es * fs[None, :] - et * ft[None, :]
            tl.store(dstudent_ptr + at, d.to(dstudent_ptr.dtype.element_ty), mask=inside)
        else:
            for start in range(0, reduce, BLOCK_R):
                r = start + r0
                at = base + r[:, None].to(tl.int64) * stride
                inside = (r[:, None] < reduce) & in_columns[None, :]
                s = tl.load(student_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
                t = tl.load(teacher_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
                ex = tl.exp2(_difference(s, ms[None, :]) * log2e_over_t)
                ey = tl.exp2(_difference(t, mt[None, :]) * log2e_over_t)
                d = ex * fs[None, :] - ey * ft[None, :]
                tl.store(dstudent_ptr + at, d.to(dstudent_ptr.dtype.element_ty), mask=inside)


def launch_config(reduce: int, inner: int) -> dict[str, Any]:
    """Block sizes and warps for a problem: a static table, since autotuning needs a driver."""
    if inner == 1:
        # 4096: two tensors of it stay in registers at 8 warps; larger falls off a cliff (docs/kernels.md).
        block_r = min(max(triton.next_power_of_2(reduce), 128), 4096)
        return {"IS_ROW": True, "BLOCK_R": block_r, "BLOCK_I": 1, "num_warps": 8 if block_r >= 2048 else 4}
    block_i = min(triton.next_power_of_2(inner), 64)  # 64 fp32 columns: two full sectors a warp
    block_r = min(triton.next_power_of_2(reduce), 4096 // block_i)
    return {"IS_ROW": False, "BLOCK_R": block_r, "BLOCK_I": block_i, "num_warps": 8}


def channel_kl_launch(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor | None,
    loss: Tensor | None,
    dstudent: Tensor | None,
    outer: int,
    reduce: int,
    inner: int,
    inv_temperature: float,
    loss_scale: float,
    grad_scale: float,
) -> None:
    """Fill ``loss`` and ``dstudent`` where given; arguments as in ``csrc/channel_kl.h``."""
    config = launch_config(reduce, inner)
    column_blocks = triton.cdiv(inner, config["BLOCK_I"])
    unused = student  # a pointer that no branch reads
    with torch.no_grad():
        channel_kl_kernel[(outer * column_blocks,)](
            student,
            teacher,
            unused if grad is None else grad,
            unused if loss is None else loss,
            unused if dstudent is None else dstudent,
            reduce,
            inner,
            column_blocks,
            inv_temperature * LOG2E,
            loss_scale,
            grad_scale,
            HAS_GRAD=grad is not None,
            WANT_LOSS=loss is not None,
            WANT_DSTUDENT=dstudent is not None,
            ONE_BLOCK=reduce <= config["BLOCK_R"],
            **config,
        )

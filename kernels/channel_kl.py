"""Triton body of channel_kl and class_kl: KL between two softmaxes along one dim, and its gradient.

Tensors are ``(outer, reduce, inner)``, inner contiguous: ``inner == 1`` is a contiguous row (channel_kl on NCHW), else
neighbouring columns run side by side (class_kl on NCHW, channel_kl on channels-last). The formulas and the meaning of
-inf and NaN are those of ``csrc/cpu/channel_kl.cpp``. A program owns BLOCK_I columns: sweep 1 keeps running maxima and
sums, sweep 2 reads again and writes the gradient, 5 units of traffic; a column that fits one block is read once,
3 units. Rows above 16384 are shared by several programs, which meet in a small table of partial sums.
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


@triton.jit
def channel_kl_chunk_kernel(
    student_ptr,  # (rows, reduce), fp32, fp16 or bf16
    teacher_ptr,  # the same
    partials_ptr,  # (5, rows, chunks) fp32: maxima of student and teacher, their sums, a
    reduce,
    chunks,
    log2e_over_t,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sweep 1 of a row that several programs share: the sums of one chunk of it."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    first = (program % chunks) * CHUNK
    r0 = tl.arange(0, BLOCK_R)
    ms = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    mt = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    zs = tl.zeros((BLOCK_R,), tl.float32)
    zt = tl.zeros((BLOCK_R,), tl.float32)
    a = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, CHUNK, BLOCK_R):  # every lane keeps sums of its own: one merge at the end
        r = first + start + r0
        s = tl.load(student_ptr + row * reduce + r, mask=r < reduce, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + row * reduce + r, mask=r < reduce, other=float("-inf")).to(tl.float32)
        new_ms = tl.maximum(ms, s)
        new_mt = tl.maximum(mt, t)
        shift_s = tl.where(ms == float("-inf"), 0.0, _difference(new_ms, ms) * log2e_over_t)
        shift_t = tl.where(mt == float("-inf"), 0.0, _difference(new_mt, mt) * log2e_over_t)
        fade = tl.exp2(-shift_t)
        x = _difference(s, new_ms) * log2e_over_t
        y = _difference(t, new_mt) * log2e_over_t
        et = tl.exp2(y)
        a = tl.where(fade == 0.0, 0.0, fade * (a + zt * (shift_s - shift_t))) + tl.where(et == 0.0, 0.0, et * (y - x))
        zs = zs * tl.exp2(-shift_s) + tl.exp2(x)
        zt = zt * fade + et
        ms = new_ms
        mt = new_mt
    ms, mt, zs, zt, a = _merge(ms, mt, zs, zt, a, log2e_over_t)
    plane = tl.num_programs(0).to(tl.int64)
    tl.store(partials_ptr + program, ms)
    tl.store(partials_ptr + plane + program, mt)
    tl.store(partials_ptr + 2 * plane + program, zs)
    tl.store(partials_ptr + 3 * plane + program, zt)
    tl.store(partials_ptr + 4 * plane + program, a)


@triton.jit
def _merge(ms, mt, zs, zt, a, log2e_over_t):
    # Sums of many parts, each relative to its own maxima, as one.
    top_s = tl.max(ms, axis=0)
    top_t = tl.max(mt, axis=0)
    shift_s = tl.where(ms == float("-inf"), 0.0, _difference(top_s, ms) * log2e_over_t)
    shift_t = tl.where(mt == float("-inf"), 0.0, _difference(top_t, mt) * log2e_over_t)
    fade = tl.exp2(-shift_t)
    a = tl.sum(tl.where(fade == 0.0, 0.0, fade * (a + zt * (shift_s - shift_t))), axis=0)
    return top_s, top_t, tl.sum(zs * tl.exp2(-shift_s), axis=0), tl.sum(zt * fade, axis=0), a


@triton.jit
def channel_kl_finish_kernel(
    student_ptr,
    teacher_ptr,
    partials_ptr,  # (5, rows, chunks) of sweep 1
    grad_ptr,  # (rows,) fp32, read if HAS_GRAD
    loss_ptr,  # (rows,) fp32, written if WANT_LOSS
    dstudent_ptr,  # like student, written if WANT_DSTUDENT
    reduce,
    chunks,
    log2e_over_t,
    loss_scale,
    grad_scale,
    HAS_GRAD: tl.constexpr,
    WANT_LOSS: tl.constexpr,
    WANT_DSTUDENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,  # chunks, raised to a power of two
):
    """Sweep 2: merge the row's partial sums, in the same order everywhere, and write one chunk of the gradient."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    chunk = program % chunks
    plane = tl.num_programs(0).to(tl.int64)
    k = tl.arange(0, CHUNKS)
    at = partials_ptr + row * chunks + k
    there = k < chunks
    ms = tl.load(at, mask=there, other=float("-inf"))
    mt = tl.load(at + plane, mask=there, other=float("-inf"))
    zs = tl.load(at + 2 * plane, mask=there, other=0.0)
    zt = tl.load(at + 3 * plane, mask=there, other=0.0)
    a = tl.load(at + 4 * plane, mask=there, other=0.0)
    ms, mt, zs, zt, a = _merge(ms, mt, zs, zt, a, log2e_over_t)
    empty = ((ms == float("-inf")) | (mt == float("-inf"))) & (zs == zs) & (zt == zt)
    if WANT_LOSS:
        kl = (a / zt + tl.log2(zs / zt)) * 0.6931471805599453
        tl.store(loss_ptr + row, tl.where(empty, 0.0, loss_scale * kl), mask=chunk == 0)
    if WANT_DSTUDENT:
        g = grad_scale
        if HAS_GRAD:
            g = grad_scale * tl.load(grad_ptr + row)
        fs = tl.where(empty, 0.0, g / zs)
        ft = tl.where(empty, 0.0, g / zt)
        for start in range(0, CHUNK, BLOCK_R):
            r = chunk * CHUNK + start + tl.arange(0, BLOCK_R)
            s = tl.load(student_ptr + row * reduce + r, mask=r < reduce, other=float("-inf")).to(tl.float32)
            t = tl.load(teacher_ptr + row * reduce + r, mask=r < reduce, other=float("-inf")).to(tl.float32)
            d = tl.exp2(_difference(s, ms) * log2e_over_t) * fs - tl.exp2(_difference(t, mt) * log2e_over_t) * ft
            tl.store(dstudent_ptr + row * reduce + r, d.to(dstudent_ptr.dtype.element_ty), mask=r < reduce)


LONG_ROW = 16384  # longer rows are shared by several programs, a chunk of this length each


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
    unused = student  # a pointer that no branch reads
    if inner == 1 and reduce > LONG_ROW:
        chunks = triton.cdiv(reduce, LONG_ROW)
        partials = student.new_empty((5, outer, chunks), dtype=torch.float32)
        block = {"CHUNK": LONG_ROW, "BLOCK_R": 2048, "num_warps": 8}
        with torch.no_grad():
            channel_kl_chunk_kernel[(outer * chunks,)](
                student, teacher, partials, reduce, chunks, inv_temperature * LOG2E, **block
            )
            channel_kl_finish_kernel[(outer * chunks,)](
                student,
                teacher,
                partials,
                unused if grad is None else grad,
                unused if loss is None else loss,
                unused if dstudent is None else dstudent,
                reduce,
                chunks,
                inv_temperature * LOG2E,
                loss_scale,
                grad_scale,
                HAS_GRAD=grad is not None,
                WANT_LOSS=loss is not None,
                WANT_DSTUDENT=dstudent is not None,
                CHUNKS=triton.next_power_of_2(chunks),
                **block,
            )
        return
    config = launch_config(reduce, inner)
    column_blocks = triton.cdiv(inner, config["BLOCK_I"])
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

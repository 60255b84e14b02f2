"""Triton body of channel_kl and class_kl with pixel weights, and between maps of two sizes.

Formulas as in ``csrc/cpu/resized_kl.cpp``, steps as in ``csrc/cuda/resized_kl.cu``: upsampled logits exist in registers
only. Sums of chunks of a map, then of the map (pixels), or of a pixel's classes leave maxima and factors of every
distribution in a table of four planes; the gradient is gathered: a lane owns one value of the student and visits the
pixels that were interpolated from it, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from cpd_fast.kernels.channel_kl import LOG2E, _difference, _merge
from torch import Tensor

CHUNK = 8192  # pixels of a map that one program sums
BLOCK = 1024
OPTIONS = {"num_warps": 8, "maxnreg": 128}  # left to itself, ptxas stops at 64 registers on sm_90 and spills


@triton.jit
def _position(i, length, out, CORNERS: tl.constexpr):
    # Where position i of `out` lies among `length` values: first, second and the share of the second. A fraction of
    # whole numbers, exact.
    if CORNERS:
        divisor = tl.maximum(out - 1, 1)
        at = i * (length - 1)
    else:
        divisor = 2 * out
        at = tl.maximum((2 * i + 1) * length - out, 0)
    first = at // divisor
    share = (at - first * divisor).to(tl.float32) / divisor
    return first, tl.minimum(first + 1, length - 1), share


@triton.jit
def _share_of(i, j, length, out, CORNERS: tl.constexpr):
    # How much of value j is in position i.
    first, second, share = _position(i, length, out, CORNERS)
    return tl.where(first == j, 1.0 - share, 0.0) + tl.where(second == j, share, 0.0)


@triton.jit
def _first_position_of(j, length, out, CORNERS: tl.constexpr):
    # The first position that holds something of value j, in length <= out: the first beyond value j - 1.
    before = tl.maximum(j - 1, 0)
    if CORNERS:
        begin = before * (out - 1) // tl.maximum(length - 1, 1) + 1
    else:
        begin = ((2 * before + 1) * out - length) // (2 * length) + 1
    return tl.where(j == 0, 0, begin)


@triton.jit
def _between(first, second, share):
    return tl.where(share == 0.0, first, (1.0 - share) * first + share * second)  # without 0 * infinity


@triton.jit
def _read(ptr, pixel, y, x, inside, h, w, length_h, length_w, SAME: tl.constexpr, CORNERS: tl.constexpr):
    # One tensor's map at pixels of the larger; -inf where masked.
    if SAME:
        value = tl.load(ptr + pixel, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        y0, y1, share_y = _position(y, length_h, h, CORNERS)
        x0, x1, share_x = _position(x, length_w, w, CORNERS)
        p00 = tl.load(ptr + y0 * length_w + x0, mask=inside, other=float("-inf")).to(tl.float32)
        p10 = tl.load(ptr + y1 * length_w + x0, mask=inside, other=float("-inf")).to(tl.float32)
        p01 = tl.load(ptr + y0 * length_w + x1, mask=inside, other=float("-inf")).to(tl.float32)
        p11 = tl.load(ptr + y1 * length_w + x1, mask=inside, other=float("-inf")).to(tl.float32)
        value = _between(_between(p00, p10, share_y), _between(p01, p11, share_y), share_x)
    return value


@triton.jit
def _add(ms, mt, zs, zt, a, s, t, k, log2e_over_t):
    # One more element in every lane, that counts k times.
    new_ms = tl.maximum(ms, s)
    new_mt = tl.maximum(mt, t)
    shift_s = tl.where(ms == float("-inf"), 0.0, _difference(new_ms, ms) * log2e_over_t)
    shift_t = tl.where(mt == float("-inf"), 0.0, _difference(new_mt, mt) * log2e_over_t)
    fade = tl.exp2(-shift_t)
    x = _difference(s, new_ms) * log2e_over_t
    y = _difference(t, new_mt) * log2e_over_t
    et = k * tl.exp2(y)
    a = tl.where(fade == 0.0, 0.0, fade * (a + zt * (shift_s - shift_t))) + tl.where(et == 0.0, 0.0, et * (y - x))
    return new_ms, new_mt, zs * tl.exp2(-shift_s) + k * tl.exp2(x), zt * fade + et, a


@triton.jit
def _kl_and_factors(ms, mt, zs, zt, a, factor):
    # All -inf in either tensor is no distribution: no loss, no gradient. NaN among them shows in the sums.
    empty = ((ms == float("-inf")) | (mt == float("-inf"))) & (zs == zs) & (zt == zt)
    kl = (a / zt + tl.log2(zs / zt)) * 0.6931471805599453
    return tl.where(empty, 0.0, kl), tl.where(empty, 0.0, factor / zs), tl.where(empty, 0.0, factor / zt)


@triton.jit
def resized_kl_chunk_kernel(
    student_ptr,  # (n, c, student_h, student_w), fp32, fp16 or bf16
    teacher_ptr,  # (n, c, teacher_h, teacher_w), the same
    weight_ptr,  # (n, h, w) fp32, read if HAS_WEIGHT
    partials_ptr,  # (5, n * c, chunks) fp32: maxima of student and teacher, their sums, a
    c,
    h,  # of the larger map
    w,
    student_h,
    student_w,
    teacher_h,
    teacher_w,
    chunks,
    log2e_over_t,
    HAS_WEIGHT: tl.constexpr,
    STUDENT_SAME: tl.constexpr,  # the student is the larger: contiguous loads
    TEACHER_SAME: tl.constexpr,
    CORNERS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of one chunk of one map, over pixels."""
    program = tl.program_id(0).to(tl.int64)
    m = program // chunks
    begin = ((program % chunks) * CHUNK).to(tl.int32)
    pixels = h * w
    s_ptr = student_ptr + m * student_h * student_w
    t_ptr = teacher_ptr + m * teacher_h * teacher_w
    ms = tl.full((BLOCK,), float("-inf"), tl.float32)
    mt = tl.full((BLOCK,), float("-inf"), tl.float32)
    zs = tl.zeros((BLOCK,), tl.float32)
    zt = tl.zeros((BLOCK,), tl.float32)
    a = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.minimum(CHUNK, pixels - begin), BLOCK):
        pixel = begin + start + tl.arange(0, BLOCK)
        inside = pixel < pixels
        y = pixel // w
        x = pixel - y * w
        k = tl.full((BLOCK,), 1.0, tl.float32)
        if HAS_WEIGHT:
            k = tl.load(weight_ptr + (m // c) * pixels + pixel, mask=inside, other=0.0)
        s = _read(s_ptr, pixel, y, x, inside, h, w, student_h, student_w, STUDENT_SAME, CORNERS)
        t = _read(t_ptr, pixel, y, x, inside, h, w, teacher_h, teacher_w, TEACHER_SAME, CORNERS)
        s = tl.where(k == 0.0, float("-inf"), s)
        t = tl.where(k == 0.0, float("-inf"), t)
        ms, mt, zs, zt, a = _add(ms, mt, zs, zt, a, s, t, k, log2e_over_t)
    ms, mt, zs, zt, a = _merge(ms, mt, zs, zt, a, log2e_over_t)
    plane = tl.num_programs(0).to(tl.int64)
    tl.store(partials_ptr + program, ms)
    tl.store(partials_ptr + plane + program, mt)
    tl.store(partials_ptr + 2 * plane + program, zs)
    tl.store(partials_ptr + 3 * plane + program, zt)
    tl.store(partials_ptr + 4 * plane + program, a)


@triton.jit
def resized_kl_map_kernel(
    partials_ptr,  # (5, maps, chunks)
    grad_ptr,  # (maps,) fp32, read if HAS_GRAD
    loss_ptr,  # (maps,) fp32, written if WANT_LOSS
    finals_ptr,  # (4, maps) fp32: maxima, grad * grad_scale over the sums
    chunks,
    log2e_over_t,
    loss_scale,
    grad_scale,
    HAS_GRAD: tl.constexpr,
    WANT_LOSS: tl.constexpr,
    CHUNKS: tl.constexpr,  # chunks, raised to a power of two
):
    """One map: its chunks, merged."""
    m = tl.program_id(0).to(tl.int64)
    maps = tl.num_programs(0).to(tl.int64)
    k = tl.arange(0, CHUNKS)
    there = k < chunks
    at = partials_ptr + m * chunks + k
    plane = maps * chunks
    ms = tl.load(at, mask=there, other=float("-inf"))
    mt = tl.load(at + plane, mask=there, other=float("-inf"))
    zs = tl.load(at + 2 * plane, mask=there, other=0.0)
    zt = tl.load(at + 3 * plane, mask=there, other=0.0)
    a = tl.load(at + 4 * plane, mask=there, other=0.0)
    ms, mt, zs, zt, a = _merge(ms, mt, zs, zt, a, log2e_over_t)
    g = grad_scale
    if HAS_GRAD:
        g = grad_scale * tl.load(grad_ptr + m)
    kl, fs, ft = _kl_and_factors(ms, mt, zs, zt, a, g)
    if WANT_LOSS:
        tl.store(loss_ptr + m, loss_scale * kl)
    tl.store(finals_ptr + m, ms)
    tl.store(finals_ptr + maps + m, mt)
    tl.store(finals_ptr + 2 * maps + m, fs)
    tl.store(finals_ptr + 3 * maps + m, ft)


@triton.jit
def resized_kl_pixel_kernel(
    student_ptr,
    teacher_ptr,
    weight_ptr,
    grad_ptr,  # (n, h, w) fp32, read if HAS_GRAD
    loss_ptr,  # (n, h, w) fp32, written if WANT_LOSS
    finals_ptr,  # (4, n, h, w) fp32
    c,
    h,
    w,
    student_h,
    student_w,
    teacher_h,
    teacher_w,
    blocks,  # of BLOCK pixels in a map
    log2e_over_t,
    loss_scale,
    grad_scale,
    HAS_WEIGHT: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    WANT_LOSS: tl.constexpr,
    STUDENT_SAME: tl.constexpr,
    TEACHER_SAME: tl.constexpr,
    CORNERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK pixels of one image go down its classes."""
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    pixels = h * w
    pixel = ((program % blocks) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    inside = pixel < pixels
    y = pixel // w
    x = pixel - y * w
    at = image * pixels + pixel
    k = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_WEIGHT:
        k = tl.load(weight_ptr + at, mask=inside, other=0.0)
    ms = tl.full((BLOCK,), float("-inf"), tl.float32)
    mt = tl.full((BLOCK,), float("-inf"), tl.float32)
    zs = tl.zeros((BLOCK,), tl.float32)
    zt = tl.zeros((BLOCK,), tl.float32)
    a = tl.zeros((BLOCK,), tl.float32)
    for channel in range(0, c):
        m = image * c + channel
        s_ptr = student_ptr + m * student_h * student_w
        t_ptr = teacher_ptr + m * teacher_h * teacher_w
        s = _read(s_ptr, pixel, y, x, inside, h, w, student_h, student_w, STUDENT_SAME, CORNERS)
        t = _read(t_ptr, pixel, y, x, inside, h, w, teacher_h, teacher_w, TEACHER_SAME, CORNERS)
        s = tl.where(k == 0.0, float("-inf"), s)
        t = tl.where(k == 0.0, float("-inf"), t)
        ms, mt, zs, zt, a = _add(ms, mt, zs, zt, a, s, t, 1.0, log2e_over_t)
    g = grad_scale * k
    if HAS_GRAD:
        g = g * tl.load(grad_ptr + at, mask=inside, other=0.0)
    kl, fs, ft = _kl_and_factors(ms, mt, zs, zt, a, g)
    if WANT_LOSS:
        tl.store(loss_ptr + at, tl.where(k == 0.0, 0.0, loss_scale * k * kl), mask=inside)
    plane = tl.num_programs(0).to(tl.int64) // blocks * pixels
    tl.store(finals_ptr + at, ms, mask=inside)
    tl.store(finals_ptr + plane + at, mt, mask=inside)
    tl.store(finals_ptr + 2 * plane + at, fs, mask=inside)
    tl.store(finals_ptr + 3 * plane + at, ft, mask=inside)


@triton.jit
def resized_kl_gather_kernel(
    student_ptr,
    teacher_ptr,
    weight_ptr,
    finals_ptr,  # (4, distributions)
    dstudent_ptr,  # like student
    c,
    h,
    w,
    student_h,
    student_w,
    teacher_h,
    teacher_w,
    blocks,  # of BLOCK values in a map of the student
    most_rows,  # positions that hold something of one value, at most
    most_columns,
    log2e_over_t,
    HAS_WEIGHT: tl.constexpr,
    OVER_CLASSES: tl.constexpr,
    STUDENT_SAME: tl.constexpr,
    TEACHER_SAME: tl.constexpr,
    CORNERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK values of one map of the student, each with all pixels that it is part of."""
    program = tl.program_id(0).to(tl.int64)
    m = program // blocks
    image = m // c
    pixels = h * w
    size = student_h * student_w
    at = ((program % blocks) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    mine = at < size
    j = at // student_w
    i = at - j * student_w
    s_ptr = student_ptr + m * size
    t_ptr = teacher_ptr + m * teacher_h * teacher_w
    plane = tl.num_programs(0).to(tl.int64) // blocks  # maps
    if OVER_CLASSES:
        plane = plane // c * pixels
    else:
        ms = tl.load(finals_ptr + m)
        mt = tl.load(finals_ptr + plane + m)
        fs = tl.load(finals_ptr + 2 * plane + m)
        ft = tl.load(finals_ptr + 3 * plane + m)
    first_y = j
    first_x = i
    if not STUDENT_SAME:
        first_y = _first_position_of(j, student_h, h, CORNERS)
        first_x = _first_position_of(i, student_w, w, CORNERS)
    total = tl.zeros((BLOCK,), tl.float32)
    for dy in range(0, most_rows):
        y = first_y + dy
        share_y = tl.full((BLOCK,), 1.0, tl.float32)
        if not STUDENT_SAME:
            share_y = tl.where(y < h, _share_of(y, j, student_h, h, CORNERS), 0.0)
        for dx in range(0, most_columns):
            x = first_x + dx
            share = share_y
            pixel = at
            if not STUDENT_SAME:
                share = share_y * tl.where(x < w, _share_of(x, i, student_w, w, CORNERS), 0.0)
                pixel = y * w + x
            there = mine & (share != 0.0)
            k = tl.full((BLOCK,), 1.0, tl.float32)
            if HAS_WEIGHT:
                k = tl.load(weight_ptr + image * pixels + pixel, mask=there, other=0.0)
            s = _read(s_ptr, pixel, y, x, there, h, w, student_h, student_w, STUDENT_SAME, CORNERS)
            t = _read(t_ptr, pixel, y, x, there, h, w, teacher_h, teacher_w, TEACHER_SAME, CORNERS)
            s = tl.where(k == 0.0, float("-inf"), s)
            t = tl.where(k == 0.0, float("-inf"), t)
            if OVER_CLASSES:
                final = finals_ptr + image * pixels + pixel
                ms = tl.load(final, mask=there, other=0.0)
                mt = tl.load(final + plane, mask=there, other=0.0)
                fs = tl.load(final + 2 * plane, mask=there, other=0.0)
                ft = tl.load(final + 3 * plane, mask=there, other=0.0)
                k = tl.full((BLOCK,), 1.0, tl.float32)  # is in the factors
            es = tl.exp2(_difference(s, ms) * log2e_over_t)
            et = tl.exp2(_difference(t, mt) * log2e_over_t)
            total += tl.where(there, share * k * (es * fs - et * ft), 0.0)
    tl.store(dstudent_ptr + m * size + at, total.to(dstudent_ptr.dtype.element_ty), mask=mine)


def _most_positions(length: int, out: int, corners: bool) -> int:
    """How many positions can hold something of one of ``length`` values: those less than one value away."""
    if length in (1, out):
        return out if length == 1 else 1
    return min(out, triton.cdiv(2 * (out - 1), length - 1) if corners else triton.cdiv(2 * out, length))


def resized_kl_launch(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    grad: Tensor | None,
    loss: Tensor | None,
    dstudent: Tensor | None,
    sizes: tuple[int, ...],
    over_classes: bool,
    align_corners: bool,
    inv_temperature: float,
    loss_scale: float,
    grad_scale: float,
) -> None:
    """Fill ``loss`` and ``dstudent`` where given; arguments as in ``csrc/channel_kl.h``."""
    n, c, student_h, student_w, teacher_h, teacher_w = sizes
    h, w = max(student_h, teacher_h), max(student_w, teacher_w)
    unused = student  # a pointer that no branch reads
    distributions = n * h * w if over_classes else n * c
    finals = student.new_empty((4, distributions), dtype=torch.float32)
    lengths = (student_h, student_w, teacher_h, teacher_w)
    read: dict[str, Any] = {
        "HAS_WEIGHT": weight is not None,
        "STUDENT_SAME": (student_h, student_w) == (h, w),
        "TEACHER_SAME": (teacher_h, teacher_w) == (h, w),
        "CORNERS": align_corners,
        "BLOCK": BLOCK,
        **OPTIONS,
    }
    pointers = (student, teacher, unused if weight is None else weight)
    incoming = unused if grad is None else grad
    wanted = unused if loss is None else loss
    log2e_over_t = inv_temperature * LOG2E
    with torch.no_grad():
        if over_classes:
            blocks = triton.cdiv(h * w, BLOCK)
            resized_kl_pixel_kernel[(n * blocks,)](
                *pointers, incoming, wanted, finals, c, h, w, *lengths, blocks, log2e_over_t, loss_scale, grad_scale,
                HAS_GRAD=grad is not None, WANT_LOSS=loss is not None, **read,
            )  # fmt: skip
        else:
            chunks = triton.cdiv(h * w, CHUNK)
            partials = student.new_empty((5, n * c, chunks), dtype=torch.float32)
            resized_kl_chunk_kernel[(n * c * chunks,)](
                *pointers, partials, c, h, w, *lengths, chunks, log2e_over_t, CHUNK=CHUNK, **read
            )
            resized_kl_map_kernel[(n * c,)](
                partials, incoming, wanted, finals, chunks, log2e_over_t, loss_scale, grad_scale,
                HAS_GRAD=grad is not None, WANT_LOSS=loss is not None, CHUNKS=triton.next_power_of_2(chunks),
            )  # fmt: skip
        if dstudent is not None:
            blocks = triton.cdiv(student_h * student_w, BLOCK)
            most = (_most_positions(student_h, h, align_corners), _most_positions(student_w, w, align_corners))
            resized_kl_gather_kernel[(n * c * blocks,)](
                *pointers, finals, dstudent, c, h, w, *lengths, blocks, *most, log2e_over_t,
                OVER_CLASSES=over_classes, **read,
            )  # fmt: skip

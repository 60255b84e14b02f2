"""KL over classes: Hinton's distillation loss, for every sample or every pixel."""

from __future__ import annotations

from torch import Tensor

from cpd_fast.errors import ShapeError
from cpd_fast.ops import _softmax_kl


def class_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    *,
    scale: float = 1.0,
    weight: Tensor | None = None,
    resize: bool = False,
    align_corners: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""KL divergence of class distributions, of each sample ``(N, K)`` or each pixel ``(N, K, H, W)``.

    p = softmax(x / T) over the K classes, and KL(p_teacher || p_student) is summed over classes. Logit maps are read in
    place: nothing is transposed. The meaning of ``-inf`` and NaN is that of :func:`channel_kl`, class for pixel.

    Args:
        student: Student logits, shape ``(N, K)`` or ``(N, K, ...)``, any float dtype.
        teacher: Teacher logits, same shape (but for ``resize``) and device; receives no gradient.
        temperature: T > 0, dimensionless. Larger gives the improbable classes more weight.
        scale: Factor on the loss, folded into the kernel (see :func:`channel_kl`).
        weight: One value >= 0 a pixel, shape ``(N, H, W)`` of the larger map, float or bool (False: ignore this pixel);
            receives no gradient. It multiplies the pixel's
            loss.
        resize: Allow student and teacher of different H and W. The smaller is read through bilinear interpolation, so
            that it never exists at the larger size.
        align_corners: Of the interpolation, as in ``torch.nn.functional.interpolate``.
        backend: ``None`` (the first that can run), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        Loss in nats, shape ``(N,)`` or ``(N, ...)``, fp32 (fp64 for fp64 input), scaled by T^2. Not yet averaged, so
        that pixels can be weighted or ignored.

    Raises:
        ShapeError: If shapes or devices differ, a dtype is not floating, or there are no classes.

    Source: Hinton et al., arXiv:1503.02531, section 2 (cross-entropy with soft targets times T^2); KL differs from it
    by the teacher's entropy, which has no gradient.

    Example:
        >>> import torch
        >>> class_kl(torch.zeros(2, 5), torch.zeros(2, 5)).tolist()
        [0.0, 0.0]
    """
    if student.dim() < 2:
        raise ShapeError(f"class_kl: expected logits (N, K) or (N, K, H, W), got shape {tuple(student.shape)}")
    if student.shape[1] == 0:
        raise ShapeError(f"class_kl: expected at least one class, got shape {tuple(student.shape)}")
    return _softmax_kl.call(
        "class_kl",
        "classes",
        student,
        teacher,
        float(temperature),
        float(scale),
        backend,
        weight,
        resize,
        align_corners,
    )


_softmax_kl.register("class_kl", over="classes")

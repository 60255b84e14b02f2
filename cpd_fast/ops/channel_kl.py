"""Channel-wise KL, the loss of CWD."""

from __future__ import annotations

from torch import Tensor

from cpd_fast.errors import ShapeError
from cpd_fast.ops import _softmax_kl


def channel_kl(
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
    r"""Channel-wise KL divergence of spatial distributions, the loss of CWD.

    Each channel map is turned into a distribution over its pixels,
    p_c = softmax(x_c / T), and KL(p_teacher || p_student) is summed over pixels.

    Where logits are ``-inf`` (masks): a teacher's adds nothing; a student's under a finite teacher makes the loss
    infinite, with a finite gradient; a map that is ``-inf`` everywhere gives 0 and no gradient. NaN and ``+inf`` give
    NaN.

    Args:
        student: Student activations, shape ``(N, C, H, W)`` (or ``(N, C, ...)`` with at least one spatial dim), any
            float dtype. Contiguous and channels-last memory is read as it is, other strides cost a copy.
        teacher: Teacher activations, same shape (but for ``resize``) and device; receives no gradient. If its dtype
            differs, both are brought to the wider one.
        temperature: T > 0, dimensionless. Larger looks at more of the map.
        scale: Factor on the loss. Same as multiplying the result, but free: it is folded into the kernel, and the
            gradient pass over the activations is saved when the loss is then only summed.
        weight: One value >= 0 a pixel, shape ``(N, H, W)`` of the larger map, float or bool (False: ignore this pixel);
            receives no gradient. A pixel of weight k counts as k pixels
            of its map, one of weight 0 as none, whatever its logits.
        resize: Allow student and teacher of different H and W. The smaller is read through bilinear interpolation, so
            that it never exists at the larger size.
        align_corners: Of the interpolation, as in ``torch.nn.functional.interpolate``.
        backend: ``None`` (the first that can run, see :func:`explain_backend`), or one of ``"reference"``, ``"cpu"``,
            ``"triton"``, ``"cuda"``.

    Returns:
        Loss in nats, shape ``(N, C)``, fp32 (fp64 for fp64 input), scaled by T^2.
        Not yet averaged.

    Raises:
        ShapeError: If shapes or devices differ, a dtype is not floating, or there are no pixels.

    Source: Shu et al., arXiv:2011.13256, channel-wise loss. The paper also divides
    by C; we leave the mean to the caller so that channels can be weighted.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 2, 3, 3)
        >>> channel_kl(x, x).tolist()
        [[0.0, 0.0]]
    """
    if student.dim() < 3:
        raise ShapeError(
            f"channel_kl: expected activations (N, C, H, W), got shape {tuple(student.shape)}: there is no space to "
            "compare; use class_kl (LogitKL) for classification logits, or channel_kl on feature maps"
        )
    if 0 in student.shape[2:] or 0 in teacher.shape[2:]:
        raise ShapeError(f"channel_kl: expected at least one pixel, got shape {tuple(student.shape)}")
    return _softmax_kl.call(
        "channel_kl",
        "space",
        student,
        teacher,
        float(temperature),
        float(scale),
        backend,
        weight,
        resize,
        align_corners,
    )


_softmax_kl.register("channel_kl", over="space")

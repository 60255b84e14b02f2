"""Losses on features of unequal width: an adapter in front, and what becomes of it when the student is compacted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cpd_fast.distill.losses import ChannelWiseKL
from cpd_fast.errors import ShapeError


class FeatureCWD(nn.Module):
    """Channel-wise distillation of features: a learnt 1x1 adapter takes the student's to the teacher's width.

    ``ChannelWiseKL(tau, loss_weight)(adapter(student), teacher)``. Give ``criterion.parameters()`` to the optimizer.

    Args:
        student_channels: Width of the student's features.
        teacher_channels: Width of the teacher's.
        tau: Temperature, > 0.
        loss_weight: Features want 35 to 50.
        norm: Put batch norm and ReLU behind the convolution, as TorchDistiller does for features after a ReLU.
        resize: Let the maps differ in H and W; see :class:`ChannelWiseKL`.

    Raises:
        ValueError: If ``tau`` is not positive.

    Source: Shu et al., arXiv:2011.13256; the adapter of its release (128 -> 512, batch norm, ReLU).

    Example:
        >>> criterion = FeatureCWD(student_channels=8, teacher_channels=16)
        >>> criterion(torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)).shape
        torch.Size([])
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        tau: float = 1.0,
        loss_weight: float = 50.0,
        *,
        norm: bool = False,
        resize: bool = False,
    ) -> None:
        super().__init__()
        adapter: list[nn.Module] = [nn.Conv2d(student_channels, teacher_channels, 1, bias=not norm)]
        if norm:
            adapter += [nn.BatchNorm2d(teacher_channels), nn.ReLU(inplace=True)]
        self.adapter = nn.Sequential(*adapter)
        self.divergence = ChannelWiseKL(tau, loss_weight, resize=resize)

    def forward(self, feat_S: Tensor, feat_T: Tensor) -> Tensor:
        """Compare features ``(N, student_channels, H, W)`` and ``(N, teacher_channels, H, W)``; a scalar.

        Raises:
            ShapeError: If the widths are not those the adapter was made for.
        """
        conv = self.adapter[0]
        if feat_S.dim() != 4 or feat_S.shape[1] != conv.in_channels or feat_T.shape[1] != conv.out_channels:
            raise ShapeError(
                f"FeatureCWD: made for student and teacher features of {conv.in_channels} and {conv.out_channels} "
                f"channels, got shapes {tuple(feat_S.shape)} and {tuple(feat_T.shape)}; after compaction call "
                "keep_channels(kept)"
            )
        return self.divergence(self.adapter(feat_S), feat_T)

    def keep_channels(self, kept: Sequence[int]) -> None:
        """After the student was compacted: let the adapter read the channels that its features kept.

        Args:
            kept: Sorted indices, e.g. ``plan[group]``.

        Raises:
            ShapeError: If a channel is out of range.
        """
        keep_inputs(self.adapter[0], kept)


def keep_inputs(conv: nn.Module, kept: Sequence[int]) -> None:
    """Cut a 1x1 convolution's input channels in place; its weight becomes a new parameter.

    Raises:
        ShapeError: If ``kept`` is empty or out of range.
    """
    assert isinstance(conv, nn.Conv2d)
    index = torch.as_tensor(list(kept), dtype=torch.long, device=conv.weight.device)
    if not len(index) or int(index.min()) < 0 or int(index.max()) >= conv.in_channels:
        raise ShapeError(f"keep_channels: expected channels within 0..{conv.in_channels - 1}, got {list(kept)[:8]}")
    conv.weight = nn.Parameter(conv.weight.detach()[:, index].clone())
    conv.in_channels = len(index)


class WithTeacher(nn.Module):
    """The task's own loss plus imitation of a teacher: CE + CWD, CE + Hinton, or any sum of these.

    Args:
        task: ``(predictions, labels) -> scalar``, e.g. ``nn.CrossEntropyLoss(ignore_index=255)``.
        *imitate: Losses ``(student, teacher) -> scalar`` on the same predictions, each with its weight inside.

    Example:
        >>> criterion = WithTeacher(nn.CrossEntropyLoss(ignore_index=255), ChannelWiseKL(tau=4.0, loss_weight=3.0))
        >>> logits = torch.zeros(2, 3, 4, 4)
        >>> round(float(criterion(logits, logits, torch.zeros(2, 4, 4, dtype=torch.long))), 4)
        1.0986
    """

    def __init__(self, task: nn.Module, *imitate: nn.Module) -> None:
        super().__init__()
        self.task = task
        self.imitate = nn.ModuleList(imitate)

    def forward(self, preds_S: Tensor, preds_T: Tensor, labels: Tensor) -> Tensor:
        """Student and teacher predictions and labels -> scalar."""
        return sum((f(preds_S, preds_T) for f in self.imitate), self.task(preds_S, labels))

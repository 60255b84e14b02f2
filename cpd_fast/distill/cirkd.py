"""CIRKD: the student imitates how the teacher's pixels relate to each other, within a batch and across the data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpd_fast.distill.losses import LogitKL, _check_positive
from cpd_fast.distill.widths import keep_inputs
from cpd_fast.errors import ShapeError
from cpd_fast.ops.class_kl import class_kl

_CELLS = 2**22  # similarities that exist at once; a block of rows is recomputed for its backward
_POOL_FROM, _POOL = 256, 4  # maps of this height and width or more are pooled 4x4 before pixels meet pixels


def minibatch_relation(feat_S: Tensor, feat_T: Tensor, tau: float = 0.1) -> Tensor:
    r"""Pixel-to-pixel relations between all images of a batch.

    With unit features F, S_ij = F_i^T F_j ``(HW, HW)`` for every pair of images: the mean over rows and pairs of
    KL(softmax(S^T_ij / tau) || softmax(S^S_ij / tau)). Maps of 256x256 and more are average-pooled 4x4 first.

    Args:
        feat_S: Student features ``(N, C, H, W)``, any float dtype.
        feat_T: Teacher features ``(N, C', H, W)``; widths may differ; receives no gradient.
        tau: Temperature, > 0.

    Returns:
        A scalar in nats. No factor tau^2, as in the original. Memory: about 64 MiB beside the features, whatever H and
        W: similarities are computed in blocks of rows, and again for the backward.

    Raises:
        ShapeError: If N, H or W differ, or these are no feature maps.

    Source: Yang et al., arXiv:2204.06986, mini-batch-based pixel-to-pixel distillation.

    Example:
        >>> x = torch.randn(2, 3, 4, 4)
        >>> float(minibatch_relation(x, 2 * x).abs()) < 1e-6
        True
    """
    _check_maps("minibatch_relation", feat_S, feat_T)
    rows_S, rows_T = (_unit_rows(_pooled(f)) for f in (feat_S, feat_T.detach()))  # (N, HW, C)
    n, pixels = rows_S.shape[:2]
    total = rows_S.new_zeros((), dtype=_wide(rows_S))
    for i in range(n):
        for j in range(n):
            total = total + _relation_kl(rows_S[i], rows_T[i], rows_S[j], rows_T[j], tau, 1.0)
    return total / max(n * n * pixels, 1)


class PixelMemory(nn.Module):
    """Class queues of teacher pixels and of region means: plain buffers, saved with any ``state_dict``.

    Every step each image enters, for each of its classes, at most ``pixels_per_class`` of the class's pixels and the
    mean of all of them, as unit vectors; the oldest entries leave. Slots that nothing entered yet hold random unit
    vectors, as in the original. In distributed training the pixels of all ranks enter all queues alike; which pixels
    and which slots are drawn follows from ``seed`` and the number of steps, so that a resumed run draws the same.

    Args:
        num_classes: K.
        channels: Width D of the teacher's features.
        pixel_slots: Pixels a class.
        region_slots: Region means a class.
        pixels_per_class: Pixels that an image may enter a class.
        seed: Of the draws and the first contents.

    Source: the release of arXiv:2204.06986, with its bug mended: it enters pixels ``perm[:k]`` of the image, the first
    ones of any class, where it means the class's own pixels; and it rings around where the original rewrites the end.

    Example:
        >>> memory = PixelMemory(num_classes=2, channels=4, pixel_slots=10, region_slots=5)
        >>> memory.enter(F.normalize(torch.randn(1, 6, 4), dim=2), torch.tensor([[0, 0, 1, 1, 1, 1]]))
        >>> memory.pixel_next.tolist()
        [2, 4]
    """

    pixels: Tensor
    regions: Tensor
    pixel_next: Tensor
    region_next: Tensor
    steps: Tensor

    def __init__(
        self,
        num_classes: int,
        channels: int,
        pixel_slots: int = 20000,
        region_slots: int = 2000,
        pixels_per_class: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.pixels_per_class, self.seed = pixels_per_class, seed
        draw = torch.Generator().manual_seed(seed)
        for name, slots in (("pixels", pixel_slots), ("regions", region_slots)):
            first = F.normalize(torch.randn(num_classes, slots, channels, generator=draw), dim=2)
            self.register_buffer(name, first)  # (K, slots, D)
            self.register_buffer(f"{name[:-1]}_next", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enter(self, units: Tensor, labels: Tensor) -> None:
        """Take in unit features ``(N, HW, D)`` with labels ``(N, HW)``; labels outside [0, K) are ignored."""
        units, labels = _all_ranks(units.to(self.pixels)), _all_ranks(labels)
        draw = self._generator(0)
        for image, label in zip(units, labels, strict=True):
            for k in label.unique().tolist():
                if not 0 <= k < len(self.pixels):
                    continue
                own = (label == k).nonzero().flatten()
                chosen = own[torch.randperm(len(own), generator=draw)[: self.pixels_per_class].to(own.device)]
                _push(self.pixels[k], self.pixel_next, k, image[chosen])
                _push(self.regions[k], self.region_next, k, F.normalize(image[own].mean(0, keepdim=True), dim=1))
        self.steps += 1

    def sample(self, pixels: int, regions: int) -> tuple[Tensor, Tensor]:
        """``pixels // K + 1`` pixels and ``regions // K + 1`` regions of every class, from the same slots of each."""
        draw, k = self._generator(1), len(self.pixels)
        banks = []
        for bank, count in ((self.pixels, pixels // k + 1), (self.regions, regions // k + 1)):
            slots = torch.randperm(bank.shape[1], generator=draw)[:count].to(bank.device)
            banks.append(bank[:, slots].flatten(0, 1).clone())  # later steps overwrite the queues in place
        return banks[0], banks[1]

    def _generator(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + int(self.steps)) * 2 + purpose)


class CIRKD(nn.Module):
    r"""Cross-image relational distillation for segmentation.

    L = w_logit KD + w_batch L_batch + w_pixel L_pixel + w_region L_region, with KD the per-pixel KL over classes,
    L_batch :func:`minibatch_relation`, and, for every anchor pixel a that is not ignored, L_pixel and L_region the mean
    KL between the teacher's and the student's softmax(a . E / tau) over the embeddings E drawn from a
    :class:`PixelMemory` of the teacher. Student features reach the teacher's width through a learnt head of 1x1
    convolution, batch norm, ReLU and 1x1 convolution: give ``criterion.parameters()`` to the optimizer. The queues and
    the head are in ``state_dict()``.

    Args:
        num_classes: K.
        student_channels: Width of the student's features.
        teacher_channels: Width D of the teacher's features.
        logit_weight: w_logit.
        batch_weight: w_batch.
        pixel_weight: w_pixel.
        region_weight: w_region.
        temperature: Of KD; the loss is scaled by its square.
        tau: Temperature of all similarities.
        contrast_pixels: Embeddings drawn from the pixel queues, over all classes.
        contrast_regions: The same for the region queues.
        pixel_slots: Pixels a class in the memory.
        region_slots: Regions a class.
        pixels_per_class: Pixels that an image enters a class and step.
        ignore_index: Label of pixels that are no anchors, enter no queue and are no part of KD.
        seed: Of the memory's draws.

    The memory holds ``K (pixel_slots + region_slots) D`` floats: 0.8 GiB for K = 19, D = 512 and the defaults; ADE20K's
    150 classes want fewer slots.

    Raises:
        ValueError: If a temperature is not positive.

    Source: Yang et al., arXiv:2204.06986; weights, temperatures and sizes are those of its release for Cityscapes.
    Departures: the queue's bug (see :class:`PixelMemory`); plain batch norm in the head
    (``nn.SyncBatchNorm.convert_sync_batchnorm`` makes it the original's); ignored pixels take no part in KD either.

    Example:
        >>> criterion = CIRKD(num_classes=3, student_channels=8, teacher_channels=16, pixel_slots=50, region_slots=20)
        >>> feat_S, feat_T, labels = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4), torch.randint(3, (2, 8, 8))
        >>> logits_S, logits_T = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        >>> criterion(feat_S, feat_T, labels, logits_S, logits_T).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        student_channels: int,
        teacher_channels: int,
        *,
        logit_weight: float = 1.0,
        batch_weight: float = 1.0,
        pixel_weight: float = 0.1,
        region_weight: float = 0.1,
        temperature: float = 1.0,
        tau: float = 0.1,
        contrast_pixels: int = 4096,
        contrast_regions: int = 1024,
        pixel_slots: int = 20000,
        region_slots: int = 2000,
        pixels_per_class: int = 16,
        ignore_index: int = 255,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_positive("CIRKD", "temperature", temperature)
        _check_positive("CIRKD", "tau", tau)
        self.num_classes, self.tau, self.ignore_index = num_classes, tau, ignore_index
        self.logit_weight, self.batch_weight = logit_weight, batch_weight
        self.pixel_weight, self.region_weight = pixel_weight, region_weight
        self.contrast = (contrast_pixels, contrast_regions)
        self.logit_kl = LogitKL(temperature)
        self.project = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.BatchNorm2d(teacher_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        self.memory = PixelMemory(num_classes, teacher_channels, pixel_slots, region_slots, pixels_per_class, seed)

    def forward(
        self,
        feat_S: Tensor,
        feat_T: Tensor,
        labels: Tensor,
        logits_S: Tensor | None = None,
        logits_T: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of all terms, a scalar.

        Args:
            feat_S: Student features ``(N, student_channels, H, W)``.
            feat_T: Teacher features ``(N, teacher_channels, H, W)``; receives no gradient.
            labels: Classes ``(N, H', W')``, integers, read nearest-neighbour at the features' size.
            logits_S: Student logits ``(N, K, h, w)``; without both logits there is no KD term.
            logits_T: Teacher logits, same shape.
        """
        parts = self.parts(feat_S, feat_T, labels, logits_S, logits_T)
        weights = {
            "logit": self.logit_weight,
            "batch": self.batch_weight,
            "pixel": self.pixel_weight,
            "region": self.region_weight,
        }
        return torch.stack([weights[name] * value for name, value in parts.items()]).sum()

    def parts(
        self,
        feat_S: Tensor,
        feat_T: Tensor,
        labels: Tensor,
        logits_S: Tensor | None = None,
        logits_T: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms by name (``batch``, ``pixel``, ``region``, ``logit``), not yet weighted; see :meth:`forward`.

        In training mode the teacher's pixels enter the memory, before it is drawn from.

        Raises:
            ShapeError: If shapes do not fit each other, or the widths the loss was made for.
        """
        _check_maps("CIRKD", feat_S, feat_T)
        wanted = (self.project[0].in_channels, self.project[3].out_channels)
        if (feat_S.shape[1], feat_T.shape[1]) != wanted:
            raise ShapeError(
                f"CIRKD: made for student and teacher features of {wanted[0]} and {wanted[1]} channels, got "
                f"{feat_S.shape[1]} and {feat_T.shape[1]}; after compaction call keep_channels(kept)"
            )
        if labels.dim() != 3 or len(labels) != len(feat_S):
            raise ShapeError(f"CIRKD: expected labels (N, H, W) with N={len(feat_S)}, got shape {tuple(labels.shape)}")
        parts = {"batch": minibatch_relation(feat_S, feat_T, self.tau)}
        parts |= self._contrast(feat_S, feat_T.detach(), labels)
        if logits_S is not None and logits_T is not None:
            kept = _nearest(labels, logits_S.shape[2:]) != self.ignore_index
            parts["logit"] = self.logit_kl(logits_S, logits_T, weight=kept)
        return parts

    def _contrast(self, feat_S: Tensor, feat_T: Tensor, labels: Tensor) -> dict[str, Tensor]:
        small = _nearest(labels, feat_S.shape[2:]).flatten(1)  # (N, HW)
        units_S, units_T = _unit_rows(self.project(feat_S)), _unit_rows(feat_T)
        if self.training:
            self.memory.enter(units_T, small.masked_fill(small == self.ignore_index, -1))
        anchors = small.flatten() != self.ignore_index
        rows_S, rows_T = units_S.flatten(0, 1)[anchors], units_T.flatten(0, 1)[anchors]
        result = {}
        for name, bank in zip(("pixel", "region"), self.memory.sample(*self.contrast), strict=True):
            bank = bank.to(rows_S)
            result[name] = _relation_kl(rows_S, rows_T, bank, bank, self.tau, 1.0) / max(len(rows_S), 1)
        return result

    def keep_channels(self, kept: Sequence[int]) -> None:
        """After the student was compacted: let the head read the channels that its features kept, e.g. ``plan[group]``.

        Raises:
            ShapeError: If a channel is out of range.
        """
        keep_inputs(self.project[0], kept)


# --------------------------------------------------------------------------------------------------------------- parts
def _relation_kl(rows_S: Tensor, rows_T: Tensor, bank_S: Tensor, bank_T: Tensor, tau: float, T: float) -> Tensor:
    """Sum over rows of KL(softmax(rows_T bank_T^T / tau) || softmax(rows_S bank_S^T / tau)), a block at a time."""

    def block(a_S: Tensor, a_T: Tensor, b_S: Tensor, b_T: Tensor) -> Tensor:
        return class_kl(a_S @ b_S.T / tau, a_T @ b_T.T / tau, T).sum()

    total = rows_S.new_zeros((), dtype=_wide(rows_S)) + 0 * rows_S.sum()  # a graph also where there is no row
    step = max(_CELLS // max(len(bank_S), 1), 1)
    for at in range(0, len(rows_S), step):
        part = (rows_S[at : at + step], rows_T[at : at + step], bank_S, bank_T)
        total = total + checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False)
    return total


def _unit_rows(features: Tensor) -> Tensor:
    """``(N, C, H, W)`` -> unit vectors ``(N, HW, C)``, fp32 (fp64 stays)."""
    return F.normalize(features.to(_wide(features)), dim=1).flatten(2).transpose(1, 2)


def _pooled(features: Tensor) -> Tensor:
    if min(features.shape[2:]) < _POOL_FROM:
        return features
    return F.avg_pool2d(features, _POOL, ceil_mode=True)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _nearest(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels ``(N, H, W)`` read at another size, int64."""
    return F.interpolate(labels[:, None].double(), tuple(size), mode="nearest")[:, 0].long()


def _push(queue: Tensor, following: Tensor, k: int, new: Tensor) -> None:
    """Write ``new`` into a ring, from the class's next slot on."""
    new = new[-len(queue) :]
    slots = (int(following[k]) + torch.arange(len(new), device=queue.device)) % len(queue)
    queue[slots] = new
    following[k] = (int(following[k]) + len(new)) % len(queue)


def _all_ranks(x: Tensor) -> Tensor:
    """The batches of all ranks one after the other, in rank order."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _check_maps(owner: str, feat_S: Tensor, feat_T: Tensor) -> None:
    """Refuse what are no two feature maps of the same pixels.

    Raises:
        ShapeError: See above.
    """
    a, b = tuple(feat_S.shape), tuple(feat_T.shape)
    if len(a) != 4 or len(b) != 4 or (a[0], *a[2:]) != (b[0], *b[2:]):
        raise ShapeError(
            f"{owner}: expected features (N, C, H, W) with equal N, H and W, got {a} and {b}; interpolate one first"
        )

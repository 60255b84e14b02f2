"""Rademacher probes as a function of (seed, probe, tensor): made where they are needed, the same on every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpd_fast.errors import ShapeError
from cpd_fast.ops import _dispatch, _philox, _probe_kernels

LIBRARY = torch.library.Library("cpd_fast", "FRAGMENT")


def rademacher(like: Tensor, seed: int, probe: int, tensor: int, *, backend: str | None = None) -> Tensor:
    """Random signs, +1 or -1 with equal probability: one tensor of a Hutchinson probe.

    The signs are those of Philox4x32-10 with key ``seed`` and counter (element div 128, ``tensor``, ``probe``, 0); see
    :mod:`cpd_fast.ops._philox` for the frozen layout. They belong to logical (row-major) elements: a channels-last
    weight gets the same probe as its contiguous copy. Every backend gives the same bits.

    Args:
        like: Gives shape, dtype (any float), device and, as for ``torch.empty_like``, strides. Values are not read.
        seed: Key, in [0, 2^63).
        probe: Number of the probe, in [0, 2^32).
        tensor: Number of the tensor within the probe, in [0, 2^32).
        backend: ``None`` (the first that can run, see :func:`explain_backend`), or one of ``"reference"``, ``"cpu"``,
            ``"triton"``, ``"cuda"``.

    Returns:
        The signs, without gradient.

    Raises:
        ShapeError: If ``like`` is not of floating point.
        ValueError: If a number is out of its range.

    Source: Hutchinson 1990, the estimator; Salmon et al., SC 2011, the generator.

    Example:
        >>> import torch
        >>> rademacher(torch.empty(6), seed=0, probe=0, tensor=0)
        tensor([-1.,  1., -1.,  1., -1.,  1.])
    """
    _philox.check_counter("rademacher", seed, probe, (tensor,))
    _check_floating("rademacher", [like])
    if backend is None and _dispatch.is_watched(like):
        return torch.ops.cpd_fast.rademacher(like.detach(), seed, probe, tensor)
    return _make(_dispatch.choose("rademacher", like, backend), like, seed, probe, tensor)


def fill_rademacher_(
    tensors: Sequence[Tensor],
    seed: int,
    probe: int,
    *,
    ids: Sequence[int] | None = None,
    backend: str | None = None,
) -> None:
    """Write :func:`rademacher` into many tensors: a whole probe in one call.

    Version counters stay as they are, so autograd does not notice.

    Args:
        tensors: What to fill; floating point, on one device. Tensors that are neither contiguous nor channels-last cost
            a copy.
        seed: Key, in [0, 2^63).
        probe: Number of the probe, in [0, 2^32).
        ids: Number of each tensor within the probe; its position if None.
        backend: As for :func:`rademacher`.

    Raises:
        ShapeError: If a tensor is not of floating point, or they are on several devices.
        ValueError: If a number is out of its range.

    Example:
        >>> import torch
        >>> x = torch.zeros(3)
        >>> fill_rademacher_([x], seed=0, probe=0)
        >>> x
        tensor([-1.,  1., -1.])
    """
    _apply("fill_rademacher_", tensors, None, seed, probe, ids, backend)


def perturb_(
    tensors: Sequence[Tensor],
    alpha: float,
    seed: int,
    probe: int,
    *,
    ids: Sequence[int] | None = None,
    backend: str | None = None,
) -> None:
    """Add ``alpha`` times a probe to tensors, in place, without the probe ever existing.

    ``x + alpha * v`` is computed in fp32 (fp64 for fp64 tensors) and rounded once. A central difference goes from
    ``x + h v`` to ``x - h v`` with ``alpha = -2 h``; going back to x itself exactly is up to the caller, who keeps a
    copy.
    Version counters stay as they are, so autograd does not notice.

    Args:
        tensors: What to move; floating point, on one device.
        alpha: Length of the step.
        seed: Key, in [0, 2^63).
        probe: Number of the probe, in [0, 2^32).
        ids: Number of each tensor within the probe; its position if None.
        backend: As for :func:`rademacher`.

    Raises:
        ShapeError: If a tensor is not of floating point, or they are on several devices.
        ValueError: If a number is out of its range.

    Example:
        >>> import torch
        >>> x = torch.ones(3)
        >>> perturb_([x], 0.5, seed=0, probe=0)
        >>> x
        tensor([0.5000, 1.5000, 0.5000])
    """
    _apply("perturb_", tensors, float(alpha), seed, probe, ids, backend)


def reference(like: Tensor, seed: int, probe: int, tensor: int) -> Tensor:
    """The signs in plain PyTorch, on any device."""
    flat = _philox.signs(like.numel(), seed, probe, tensor, like.device)
    return torch.empty_like(like, requires_grad=False).copy_(flat.view(like.shape))


def _make(chosen: str, like: Tensor, seed: int, probe: int, tensor: int) -> Tensor:
    if chosen == "reference":
        return reference(like, seed, probe, tensor)
    out = torch.empty_like(like, requires_grad=False)
    _probe_kernels.rademacher(chosen, [out], None, seed, probe, [tensor])
    return out


def _apply(
    op: str,
    tensors: Sequence[Tensor],
    alpha: float | None,
    seed: int,
    probe: int,
    ids: Sequence[int] | None,
    backend: str | None,
) -> None:
    """Fill (``alpha`` None) or move many tensors.

    Raises:
        ShapeError: If dtypes or devices do not fit.
        ValueError: If a number is out of its range.
    """
    ids = range(len(tensors)) if ids is None else ids
    if len(ids) != len(tensors):
        raise ShapeError(f"{op}: expected one id a tensor, got {len(ids)} ids for {len(tensors)} tensors")
    _philox.check_counter(op, seed, probe, ids)
    _check_floating(op, tensors)
    if not tensors:
        return
    data = [t.data for t in tensors]  # .data: no new version
    watched = backend is None and _dispatch.is_watched(*tensors)
    chosen = "reference" if watched else _dispatch.choose(op, tensors[0], backend)
    if chosen != "reference":
        _probe_kernels.rademacher(chosen, data, alpha, seed, probe, ids)
        return
    make = torch.ops.cpd_fast.rademacher if watched else reference
    for x, i in zip(data, ids, strict=True):
        v = make(x, seed, probe, i)
        if alpha is None:
            x.copy_(v)
        else:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            x.copy_(x.to(wide) + alpha * v.to(wide))


def _check_floating(op: str, tensors: Sequence[Tensor]) -> None:
    """Check dtypes and devices.

    Raises:
        ShapeError: If a tensor is not of floating point or on another device than the first.
    """
    for i, t in enumerate(tensors):
        if not t.is_floating_point():
            raise ShapeError(f"{op}: expected floating-point tensors, got {t.dtype} (tensor {i})")
        if t.device != tensors[0].device:
            raise ShapeError(
                f"{op}: tensors must be on one device, got {tensors[0].device} and {t.device} (tensor {i}); call once "
                "a device"
            )


def _op(like: Tensor, seed: int, probe: int, tensor: int) -> Tensor:
    return _make(_dispatch.choose("rademacher", like), like, seed, probe, tensor)


LIBRARY.define("rademacher(Tensor like, int seed, int probe, int tensor) -> Tensor")
LIBRARY.impl("rademacher", _op, "CompositeExplicitAutograd")


@torch.library.register_fake("cpd_fast::rademacher", lib=LIBRARY)
def _fake(like: Tensor, seed: int, probe: int, tensor: int) -> Tensor:
    return torch.empty_like(like, requires_grad=False)

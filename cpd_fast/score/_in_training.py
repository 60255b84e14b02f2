"""Hessian-vector products beside a training step, whose own gradient is the base of the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpd_fast.errors import ScoreError
from cpd_fast.memory import Closure, Part
from cpd_fast.score._finite import Differences, Step, Sums
from cpd_fast.score.criterion import Context, checked

_SAME_LOSS = 1e-4  # relative; kernels that add in no fixed order differ by less, other batches by more


class InTraining:
    """Runs backward passes of training and, beside each, the same one at moved parameters.

    The gradient that the training step computes anyway is reduced as autograd makes it, before it is accumulated,
    averaged over ranks or clipped. The pass at moved parameters sees the same modes, random numbers and buffers.
    Parameters, ``.grad``, buffers and random state are afterwards what the training step alone leaves. The products of
    several backward passes add up, as their gradients do, until they are taken.

    Args:
        context: Model and graph.
        criterion: Its name, for messages.
        num_probes: For every training step; all its backward passes see the same ones.
        step: Length of the step a parameter; None: chosen at the first pass.
        channels: Observations by channel, from pieces; their disagreement chooses the step.
    """

    def __init__(
        self,
        context: Context,
        criterion: str,
        num_probes: int,
        step: float | None,
        channels: Callable[[Tensor], Tensor],
    ) -> None:
        self._context, self._criterion = context, criterion
        self._num_probes, self._asked, self._channels = num_probes, step, channels
        self._probes: range | None = None
        self._products: Tensor | None = None
        self._is_checked = False
        self.may_overflow = False  # a scaler skips steps that do

    @property
    def waits(self) -> bool:
        """Whether products are there to be taken."""
        return self._products is not None

    def take(self) -> Iterator[Tensor]:
        """The observations of this training step, one a probe; not finite where a gradient was not."""
        products, self._products, self._probes = self._products, None, None
        assert products is not None
        yield from map(self._channels, products)

    def backward(
        self,
        closure: Closure,
        scaler: torch.amp.GradScaler | None,
        ddp: DistributedDataParallel | None,
    ) -> Tensor:
        """``closure()`` and its backward pass, and one more a probe at moved parameters.

        Args:
            closure: The training loss.
            scaler: Scales the loss, for fp16.
            ddp: The wrapper that the closure calls, if any.

        Returns:
            The loss, detached.

        Raises:
            ScoreError: If the loss is not a finite scalar (without a scaler), gives another value when called again,
                or the parameters cannot be moved.
        """
        context = self._context
        self._refuse(ddp)
        if self._probes is None:
            first = context.probes.next(self._num_probes)
            self._probes = range(first, first + self._num_probes)
        random, buffers = _Random(context.model), _Buffers(context.model)
        versions = [p._version for p in context.tensors]
        with _seen_wrapper(context.model) as wrappers:
            loss = closure()
        if wrappers - {ddp, None}:
            raise ScoreError(
                f"{self._criterion}: the closure runs the model inside DistributedDataParallel, which the Pruner was "
                "not given: make it with the wrapper, Pruner(wrapped, ...)"
            )
        self.may_overflow = scaler is not None
        loss = checked(loss, finite=not self.may_overflow)
        scale = 1.0 if scaler is None else scaler.get_scale()
        before = self._backward(loss, scaler, scale, at_once=ddp is not None)
        if [p._version for p in context.tensors] != versions:
            raise ScoreError(
                f"{self._criterion}: the backward pass itself changed the parameters (an optimizer in its hooks?), so "
                "that their gradient is of other weights; call pruner.step(closure) instead"
            )
        left = _Buffers(context.model)

        def again() -> Tensor:
            random.put_back()
            buffers.put_back()
            return closure()

        try:
            with _alone(ddp):
                found = self._differences(again, loss.detach(), before, scale)
        finally:
            left.put_back()
        self._products = found if self._products is None else self._products + found
        return loss.detach()

    def _backward(self, loss: Tensor, scaler: torch.amp.GradScaler | None, scale: float, at_once: bool) -> Tensor:
        """The backward pass of training; ``v . g`` summed to pieces, ``(num_probes, n_pieces)``."""
        context = self._context
        assert self._probes is not None
        # hooks of others may write into a gradient once it is accumulated, which shares memory with ours
        at_once = at_once or any(getattr(p, "_post_accumulate_grad_hooks", None) for p in context.tensors)
        out = context.layout.empty(len(self._probes))
        sums = Sums(context, self._probes, out, 1 / scale, at_once)
        with sums.watching(keep=True):
            (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        context.refuse_unused([out] if sums.count else [None])
        return out

    def _differences(self, again: Closure, loss: Tensor, before: Tensor, scale: float) -> Tensor:
        context, probes = self._context, self._probes
        assert probes is not None
        if self.may_overflow and not bool(before.isfinite().all()):
            return torch.full_like(before, torch.nan)  # the scaler will skip this step
        differences = Differences(context, [Part(1.0, again)], scale, self.may_overflow)
        if not self._is_checked:
            self._check_again(again, loss)
        if context.step is None:
            context.step = Step(self._asked, None) if self._asked else differences.choose(probes[0], self._channels)
        return torch.stack(list(differences.from_base(before, probes, context.step.length)))

    def _check_again(self, again: Closure, loss: Tensor) -> None:
        """Raise where the closure is no function of the weights alone; looked at once.

        Raises:
            ScoreError: If its loss is another when it is called again.
        """
        with torch.no_grad(), torch.random.fork_rng(self._context.cuda_devices):
            value, other = float(loss), float(again())
        if not abs(other - value) <= _SAME_LOSS * max(abs(value), 1e-12):
            raise ScoreError(
                f"{self._criterion}: the closure gave a loss of {value:.7g}, and {other:.7g} when called again at the "
                "same weights with the same random numbers of torch; draw the batch outside of it, and random numbers "
                "from torch alone"
            )
        self._is_checked = True

    def _refuse(self, ddp: DistributedDataParallel | None) -> None:
        context, name = self._context, self._criterion
        frozen = [n for n, p in context.params.items() if not p.requires_grad]
        if frozen:
            raise ScoreError(
                f"{name}: {len(frozen)} scored parameters are frozen ({frozen[0]} ...): a training step has no "
                "gradient of theirs; call pruner.step(closure) instead, or leave them out with ignore="
            )
        if ddp is not None and any(isinstance(m, nn.SyncBatchNorm) for m in context.model.modules()):
            raise ScoreError(
                f"{name}: SyncBatchNorm mixes the ranks' batches, and every rank moves its parameters along probes of "
                "its own; call pruner.step(closure) with the model inside DDP instead"
            )


class _Random:
    """Torch's random state now, on the CPU and where the model is."""

    def __init__(self, model: nn.Module) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices}

    def put_back(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class _Buffers:
    """The model's buffers now: which tensors they are, and what is in them."""

    def __init__(self, model: nn.Module) -> None:
        self._found = [
            (m._buffers, name, b, None if b is None else b.detach().clone())
            for m in model.modules()
            for name, b in m._buffers.items()
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        for owner, name, tensor, value in self._found:
            owner[name] = tensor
            if tensor is not None and value is not None:
                tensor.copy_(value)


@contextmanager
def _seen_wrapper(model: nn.Module) -> Iterator[set[DistributedDataParallel | None]]:
    """Collect the DDP wrappers through which the model is called inside the block."""
    seen: set[DistributedDataParallel | None] = set()

    def look(*_: object) -> None:
        seen.add(getattr(DistributedDataParallel, "_active_ddp_module", None))

    hook = model.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _alone(ddp: DistributedDataParallel | None) -> Iterator[None]:
    """Passes through the wrapper exchange nothing with other ranks, and leave it as it was."""
    if ddp is None:
        yield
        return
    before = ddp.require_backward_grad_sync, ddp.require_forward_param_sync
    ddp.require_backward_grad_sync = ddp.require_forward_param_sync = False
    try:
        yield
    finally:
        ddp.require_backward_grad_sync, ddp.require_forward_param_sync = before

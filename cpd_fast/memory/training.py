"""A training step within a memory limit: micro-batches first, checkpoints where they do not do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.checkpoint import checkpoint

from cpd_fast.errors import MemoryLimitError
from cpd_fast.memory.batches import BatchLoss, Closure, Part, Split, count_samples, first_part, split_batch
from cpd_fast.memory.tensors import RESERVE, WAITING, PeakMemory, bytes_text, device_of, faked, parse_bytes, size_of

LossFn = Callable[..., Tensor]
Backward = Callable[[Closure, torch.amp.GradScaler | None], Tensor]
BATCH_NORM_NEEDS = 16  # samples for statistics worth having (Wu & He, arXiv:1803.08494, figure 1)
_FOREACH_COPIES = 2  # of the parameters, which a multi-tensor optimizer holds for a moment


@dataclass(frozen=True)
class MemoryChoice:
    """How a training step stays within its limit.

    Attributes:
        micro_batch: Samples in one forward; None: the batch undivided.
        half_teacher: Whether the teacher runs in half precision.
        checkpoints: Whether blocks of the model are run again in the backward instead of kept.
        predicted_peak: Bytes that tensors take at the worst moment.
        limit: Bytes allowed.
        why: One line for people.
    """

    micro_batch: int | None
    half_teacher: bool
    checkpoints: bool
    predicted_peak: int
    limit: int
    why: str

    def __str__(self) -> str:
        return self.why


class MemoryFit:
    """What :func:`fit_memory` gives: :meth:`backward` in place of ``loss.backward()``.

    Attributes:
        choice: How the step is made to fit, for the batch it was made with; print it.
        teacher: What to call as the teacher, or None: the one given, or its copy in half precision.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: LossFn,
        optimizer: Optimizer | None,
        limit: int,
        teacher: nn.Module | None,
        split: Split | None,
        backward: Backward | None,
    ) -> None:
        self.model, self.limit = model, limit
        self._loss_fn, self._optimizer, self._split = loss_fn, optimizer, split
        self._own_backward = backward
        self._teachers = {False: teacher}
        self._choices: dict[Any, MemoryChoice] = {}
        self.choice = self._choice(batch)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher that the choice runs."""
        return self._teacher(self.choice.half_teacher)

    def backward(self, batch: Any, scaler: torch.amp.GradScaler | None = None) -> float:
        """Add the gradients of the batch's loss to ``.grad``, within the limit.

        A batch of other shapes is fitted anew. With DDP gradients are exchanged once, in the last micro-batch.

        Args:
            batch: What ``loss_fn`` takes.
            scaler: Scales the loss of each micro-batch, for fp16.

        Returns:
            The loss of the batch: the mean over its samples.

        Raises:
            MemoryLimitError: If a batch of these shapes does not fit.
        """
        choice = self._choice(batch)
        loss = BatchLoss(self._loss(choice.half_teacher), self.model, batch, choice.micro_batch, self._split)
        total = 0.0
        with checkpointed(self.model) if choice.checkpoints else nullcontext():
            for i, part in enumerate(loss.parts):
                waits = i + 1 < len(loss.parts) and hasattr(self.model, "no_sync")
                with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                    total += float((self._own_backward or _backward)(partial(_share_of, part), scaler))
        return total

    def _loss(self, half_teacher: bool) -> Callable[[nn.Module, Any], Tensor]:
        teacher = self._teacher(half_teacher)
        if teacher is None:
            return self._loss_fn
        return lambda model, batch: self._loss_fn(model, teacher, batch)

    def _teacher(self, half: bool) -> nn.Module | None:
        teacher = self._teachers[False]
        if half and True not in self._teachers and teacher is not None:
            self._teachers[True] = HalfPrecision(teacher)
        return self._teachers[half and teacher is not None]

    # ---------------------------------------------------------------------------------------------------- the choice
    def _choice(self, batch: Any) -> MemoryChoice:
        leaves = [t for t in tree_flatten(batch)[0] if isinstance(t, Tensor)]
        shapes = tuple((tuple(t.shape), t.dtype) for t in leaves)
        if shapes not in self._choices:
            self._choices[shapes] = self._choose(batch)
        return self._choices[shapes]

    def _choose(self, batch: Any) -> MemoryChoice:
        samples = count_samples(batch)
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        least = min(BATCH_NORM_NEEDS if norms else 1, samples or 1)
        teacher = self._teachers[False]
        has_full_teacher = teacher is not None and any(p.dtype == torch.float32 for p in teacher.parameters())
        halves = (False, True) if has_full_teacher else (False,)
        tried: dict[str, int] = {}
        found: tuple[int, int, bool, bool] | None = None
        for checkpoints in (False, True):
            for half in halves:
                n, peak = self._largest(batch, samples, 2 if norms else 1, half, checkpoints)
                tried[_how(None, half, checkpoints)] = peak
                if peak <= self.limit and (found is None or n > found[0]):
                    found = (n, peak, half, checkpoints)
                if found is not None and found[0] == samples:
                    break
            if found is not None and found[0] >= least:
                break
        if found is None:
            if samples is None:
                split_batch(batch, 1)  # says why it cannot be divided
            raise MemoryLimitError(
                f"memory_limit: {'2 samples need' if norms else 'one sample needs'} "
                + ", ".join(f"{bytes_text(peak)} {how and f'with {how}'}".rstrip() for how, peak in tried.items())
                + f"; more than {bytes_text(self.limit)}: raise the limit, use smaller inputs or a smaller teacher, or "
                "train in half precision (torch.autocast inside loss_fn)"
            )
        n, peak, half, checkpoints = found
        micro = None if samples is None or n >= samples else n
        why = _how(micro, half, checkpoints) or "the batch undivided"
        why += f": about {bytes_text(peak)} of {bytes_text(self.limit)}"
        if micro is not None and norms:
            why += f"; batch norm sees {micro} samples at a time instead of {samples}"
        return MemoryChoice(micro, half, checkpoints, peak, self.limit, why)

    def _largest(self, batch: Any, samples: int | None, fewest: int, half: bool, checkpoints: bool) -> tuple[int, int]:
        """Most samples a micro-batch that fit, and their peak; ``fewest`` where not even these do."""

        def peak(n: int) -> int:
            return int(self._peak(batch, n, samples, half, checkpoints) / (1 - RESERVE))

        if samples is None:
            return 1, peak(1)
        if (whole := peak(samples)) <= self.limit or samples <= fewest:
            return samples, whole
        few = peak(fewest)
        if few > self.limit:
            return fewest, few
        each = max((whole - few) // (samples - fewest), 1)
        parts = -(-samples // min(samples - 1, fewest + (self.limit - few) // each))
        while True:  # even parts: none is a rest of a few samples
            n = max(-(-samples // parts), fewest)
            if n == fewest or (needed := peak(n)) <= self.limit:
                return n, few if n == fewest else needed
            parts += 1

    def _peak(self, batch: Any, n: int, samples: int | None, half: bool, checkpoints: bool) -> int:
        """Most bytes that tensors take in a step with micro-batches of ``n``.

        Raises:
            MemoryLimitError: If the loss does not run on fake tensors.
        """
        divided = samples is not None and n < samples
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = getattr(self.model, "module", self.model) if hasattr(self.model, "no_sync") else self.model
        teacher = self._teachers[half] if half in self._teachers else self._teacher(half)
        with ExitStack() as stack:
            tensors = list(stack.enter_context(faked(model, mode)))
            if teacher is not None:
                tensors += stack.enter_context(faked(teacher, mode))
            fake = tree_map_only(Tensor, mode.from_tensor, batch)
            inputs = [t for t in tree_flatten(fake)[0] if isinstance(t, Tensor)]
            part = fake
            if divided:  # shares may follow from values, which fake tensors have not
                part = tree_map_only(Tensor, mode.from_tensor, first_part(batch, n, self._split))
            trained = [t for t in tensors if t.requires_grad]
            tracker = PeakMemory([*tensors, *inputs])
            loss_of = self._loss(half)
            if checkpoints:
                stack.enter_context(checkpointed(model))
            stack.enter_context(torch.random.fork_rng([]))
            try:
                with mode, tracker:
                    # the second meets the gradients of the first
                    for _ in range(2 if divided or self._own_backward is not None else 1):
                        (loss_of(model, part) * 1.0).backward()  # type: ignore[no-untyped-call]
            except MemoryLimitError:
                raise
            except Exception as e:
                raise MemoryLimitError(
                    f"memory_limit: the loss does not run on fake tensors ({type(e).__name__}: "
                    f"{str(e).splitlines()[0]}); keep .item(), printing and branches on values out of loss_fn"
                ) from e
            peak, held = tracker.peak, tracker.live
            size = sum(t.numel() * t.element_size() for t in trained)
            for t in trained:
                t.grad = None
        if self._own_backward is not None:  # keeps what takes parameters and buffers back, and gradients that it sums
            peak += size + min(size, WAITING) + 2 * size_of(list(model.buffers()))
        state = int(self._state_ratio() * size)
        return max(peak + state, held + state + _FOREACH_COPIES * size)

    def _state_ratio(self) -> float:
        """Bytes of optimizer state for each byte of a parameter, found on a toy parameter."""
        if self._optimizer is None:
            return 0.0
        toy = nn.Parameter(torch.zeros(64))
        toy.grad = torch.zeros(64)
        group = {k: v for k, v in self._optimizer.param_groups[0].items() if k != "params"}
        other = type(self._optimizer)([{"params": [toy], **group}])  # type: ignore[call-arg]
        other.step()
        return sum(size_of(v) for v in other.state[toy].values() if isinstance(v, Tensor) and v.numel() > 1) / size_of(
            toy
        )


def fit_memory(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    optimizer: Optimizer | None = None,
    memory_limit: int | str | None = None,
    teacher: nn.Module | None = None,
    split: Split | None = None,
    backward: Backward | None = None,
) -> MemoryFit:
    """Make a training step stay within a memory limit; nothing is computed or allocated to find out how.

    In this order: the batch undivided; the teacher in half precision; micro-batches whose gradients add up to those of
    the batch; and only if these had to be smaller than batch norm needs (16 samples; 1 without batch norm), blocks of
    the model run again in the backward instead of kept (checkpoints). Gradients are those of the undivided batch, but
    for what a model computes over the batch: batch norm in train mode takes the statistics of each micro-batch, and
    the choice says so.

    Args:
        model: The model that is trained, in the mode it is trained in; DDP's wrapper is looked through.
        batch: A batch of training: tensors that share dim 0, alone or in tuples, lists and dicts.
        loss_fn: ``(model, batch)``, with a teacher ``(model, teacher, batch)`` -> scalar loss, a mean over samples.
            It may use ``torch.autocast``.
        optimizer: Its state counts; None: none.
        memory_limit: Bytes, or a text such as ``"10GiB"``. None: what the model's GPU has free.
        teacher: Called by ``loss_fn``, in eval mode and under ``torch.no_grad()``; its float32 weights may become
            float16 in a copy, which takes and gives float32.
        split: ``(batch, size) -> micro-batches``, or pairs of one and its share of the batch's loss, e.g. of the
            labelled pixels.
        backward: ``(closure, scaler) -> loss`` in place of ``closure().backward()`` for every micro-batch:
            ``pruner.backward``, whose second pass is then within the limit too.

    Returns:
        A :class:`MemoryFit`; call its ``backward(batch)`` instead of ``loss.backward()``.

    Raises:
        MemoryLimitError: If the limit is none, nothing fits, the batch cannot be divided, or the loss does not run on
            fake tensors.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> batch = torch.randn(4096, 256), torch.randint(10, (4096,))
        >>> loss_fn = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])
        >>> fit = fit_memory(model, batch, loss_fn, optimizer, "16MiB")
        >>> print(fit.choice)
        micro-batches of 1366: about 14.3 MiB of 16.0 MiB
        >>> loss = fit.backward(batch)
        >>> optimizer.step()
    """
    limit = _free_memory(model) if memory_limit is None else parse_bytes(memory_limit)
    return MemoryFit(model, batch, loss_fn, optimizer, limit, teacher, split, backward)


def _share_of(part: Part) -> Tensor:
    """The loss of a micro-batch, as much as it counts for."""
    return part.closure() * part.weight


def _backward(closure: Closure, scaler: torch.amp.GradScaler | None) -> Tensor:
    loss = closure()
    (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _free_memory(model: nn.Module) -> int:
    device = device_of(model)
    if device.type != "cuda":
        raise MemoryLimitError(f"memory_limit: the model is on {device}, which has none of its own; give one: '10GiB'")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_allocated(device)


def _how(micro: int | None, half: bool, checkpoints: bool) -> str:
    parts = [f"micro-batches of {micro}"] if micro is not None else []
    return ", ".join(parts + ["teacher in half precision"] * half + ["checkpoints"] * checkpoints)


class HalfPrecision(nn.Module):
    """A float16 copy of a model that takes and gives float32, for inference.

    Args:
        model: Copied; left as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half().requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, in half precision."""
        to_half = partial(_cast, torch.float32, torch.float16)
        args, kwargs = tree_map_only(Tensor, to_half, (args, kwargs))
        return tree_map_only(Tensor, partial(_cast, torch.float16, torch.float32), self.model(*args, **kwargs))


def _cast(old: torch.dtype, new: torch.dtype, t: Tensor) -> Tensor:
    return t.to(new) if t.dtype == old else t


# -------------------------------------------------------------------------------------------------------- checkpoints
@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Run the model's blocks again in the backward instead of keeping what they computed, inside the block.

    Blocks are the members of the outermost ``nn.Sequential`` and ``nn.ModuleList`` that hold layers of their own
    (``layer1.0`` of a ResNet, ``blocks.3`` of a ViT). Running statistics of batch norms are updated once.
    """
    blocks = blocks_of(model)
    for block in blocks:
        block.forward = partial(_run_again, block, block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _run_again(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts = partial(_contexts, block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _frozen_statistics(block)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norms take the statistics of the batch and leave their running ones as they are."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    saved = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum = 0.0
        m.num_batches_tracked = None
    try:
        yield
    finally:
        for m, (momentum, count) in zip(norms, saved, strict=True):
            m.momentum, m.num_batches_tracked = momentum, count


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """Members of the outermost sequences with at least two layers that have parameters of their own."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            is_block = isinstance(module, nn.Sequential | nn.ModuleList) and _layers(child) > 1
            if is_block and not isinstance(child, nn.Sequential | nn.ModuleList):
                found.append(child)
            else:
                visit(child)

    visit(model)
    return found or [child for child in model.children() if _layers(child) > 1]


def _layers(module: nn.Module) -> int:
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())

"""The training loop of a recipe: a pure function of (state, step), so that a killed run ends as if nothing happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from cpd_fast.data import augmented_batch
from cpd_fast.errors import TrainingError
from cpd_fast.memory import HalfPrecision, MemoryFit, fit_memory
from cpd_fast.recipes.progress import Bar
from cpd_fast.recipes.tasks import Task

_SCALER = {"scale": float, "_growth_tracker": int}  # of a GradScaler's state, what changes
STAGES = ("teacher", "prune", "finetune", "search", "rounds")


def stage_seed(seed: int, stage: str, step: int = 0) -> int:
    """Seed of everything random at one step of one stage."""
    return ((seed * 7 + STAGES.index(stage)) * 1_000_003 + step) % (2**63)


def one_cycle(peak: float, step: int, total: int, warm_up: float = 0.2) -> float:
    """Learning rate that rises linearly for ``warm_up`` of the steps, then falls to about 0 along a cosine."""
    rise = max(1, int(total * warm_up))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def adamw(model: nn.Module, weight_decay: float) -> AdamW:
    """AdamW over all parameters; no decay on vectors (norms and biases)."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    return AdamW([{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}], lr=0.0)


@dataclass(frozen=True)
class Machine:
    """Where a run trains, and how.

    Attributes:
        device: Of models and batches.
        half: Whether forwards run in fp16 under autocast, with scaled losses.
        memory_limit: Bytes or a text such as ``"10GiB"``; ``""``: what a GPU has free, no limit on the CPU.
    """

    device: torch.device = torch.device("cpu")
    half: bool = False
    memory_limit: str = ""

    @property
    def is_limited(self) -> bool:
        """Whether steps are made to fit."""
        return bool(self.memory_limit) or self.device.type == "cuda"

    def place(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A batch, on the device."""
        return batch[0].to(self.device), batch[1].to(self.device)

    @classmethod
    def of(cls, device: str, precision: str, memory_limit: str) -> Machine:
        """From the settings of a run.

        Raises:
            TrainingError: If the device is not there.
        """
        if device == "cuda" and not torch.cuda.is_available():
            why = "torch is a CPU build" if torch.version.cuda is None else "torch finds no CUDA device"
            raise TrainingError(f"device=cuda: {why}; use device=cpu, or see cpd-fast doctor")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(torch.device(device), precision == "fp16", memory_limit)


class Trainer:
    """Trains one model, step by step, within the machine's memory limit.

    Args:
        model: The model, on the machine's device.
        optimizer: Over its parameters.
        loss: ``(model, batch)``, with a teacher ``(model, teacher, batch)`` -> scalar loss, a mean over samples.
        machine: Device, precision and memory limit.
        batch: One batch, whose shapes the step is made to fit; looked at where there is a limit only.
        teacher: Called by the loss.

    Attributes:
        choice: How the step stays within the limit; None without a limit.

    Raises:
        MemoryLimitError: If no step fits.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Callable[..., Tensor],
        machine: Machine,
        batch: Any,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.half)

        def cast(*args: Any) -> Tensor:
            with torch.autocast(machine.device.type, torch.float16, enabled=machine.half):
                return loss(*args)

        self._loss = cast if teacher is None else lambda model, batch: cast(model, teacher, batch)
        self._fit: MemoryFit | None = None
        if machine.is_limited:
            model.train()
            self._fit = fit_memory(model, batch, cast, optimizer, machine.memory_limit or None, teacher)
        self.choice = self._fit.choice if self._fit is not None else None

    def step(self, batch: Any, lr: float, seed: int, between: Callable[[], None] | None = None) -> float:
        """One step; returns the loss.

        Args:
            batch: What the loss takes.
            lr: Learning rate.
            seed: Of dropout and the like.
            between: Called when the gradients are there, before the optimizer moves.

        Raises:
            TrainingError: If the loss is not finite; nothing was updated then.
        """
        torch.manual_seed(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(number := self._backward(batch)):
            raise TrainingError(
                f"the loss is {number} at learning rate {lr:.2g}; lower the learning rate or check the data for NaN"
            )
        self.scaler.unscale_(self.optimizer)
        if between is not None:
            between()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return number

    def _backward(self, batch: Any) -> float:
        if self._fit is not None:
            return self._fit.backward(batch, self.scaler)
        value = self._loss(self.model, batch)
        number = float(value.detach())
        if math.isfinite(number):
            self.scaler.scale(value).backward()  # type: ignore[no-untyped-call]
        return number

    def state(self) -> dict[str, Tensor]:
        """Everything that training has changed, as tensors by name."""
        scale = {k: torch.tensor(float(v)) for k, v in self.scaler.state_dict().items() if k in _SCALER}
        return {**training_state(self.model, self.optimizer), **scale}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state`, on a model of the same structure; without tensors nothing changes."""
        if not tensors:
            return
        restore_training_state(self.model, self.optimizer, tensors)
        found = {k: kind(tensors[k].item()) for k, kind in _SCALER.items() if k in tensors}
        if found and self.scaler.is_enabled():
            self.scaler.load_state_dict({**self.scaler.state_dict(), **found})


def batch_of(task: Task, batch_size: int, seed: int, stage: str, step: int) -> tuple[Tensor, Tensor]:
    """Augmented training batch of one step."""
    return augmented_batch(task.data, batch_size, stage_seed(seed, stage), step)


@contextmanager
def listen(model: nn.Module, at: str | None) -> Iterator[list[Tensor]]:
    """Collect the outputs of module ``at`` (None: of the model) of every forward inside the block."""
    heard: list[Tensor] = []
    inner = model.model if isinstance(model, HalfPrecision) and at else model
    module = inner.get_submodule(at) if at else inner
    hook = module.register_forward_hook(lambda _m, _i, out: heard.append(out))
    try:
        yield heard
    finally:
        hook.remove()


# ----------------------------------------------------------------------------------------------- state as tensors
def training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything that training has changed, as tensors by name: ``model.*`` and ``optimizer.PARAMETER.KEY``."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    names = {id(p): n for n, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            value = value if isinstance(value, Tensor) else torch.tensor(float(value))
            tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
    return tensors


def restore_training_state(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo :func:`training_state`; the model has the same structure, the optimizer is over its parameters."""
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            parameter, key = name.removeprefix("optimizer.").rsplit(".", 1)
            state: dict[str, Any] = optimizer.state[parameters[parameter]]
            state[key] = value.clone() if key == "step" else value.to(parameters[parameter].device, copy=True)


def advance_bar(bar: Bar, loss: float) -> None:
    """One step further, with the loss beside the bar."""
    bar.advance(note=f"loss {loss:.3f}")

"""The training loop of a recipe: a pure function of (state, step), so that a killed run ends as if nothing happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from cpd_fast.data import augmented_batch
from cpd_fast.errors import TrainingError
from cpd_fast.recipes.progress import Bar
from cpd_fast.recipes.tasks import Task

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


def train_step(model: nn.Module, optimizer: Optimizer, lr: float, seed: int, loss: Callable[[], Tensor]) -> float:
    """One step; returns the loss.

    Raises:
        TrainingError: If the loss is not finite; nothing was updated then.
    """
    torch.manual_seed(seed)  # dropout and the like
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    optimizer.zero_grad(set_to_none=True)
    value = loss()
    if not math.isfinite(number := float(value.detach())):
        raise TrainingError(
            f"the loss is {number} at learning rate {lr:.2g}; lower the learning rate or check the data for NaN"
        )
    value.backward()
    optimizer.step()
    return number


def batch_of(task: Task, batch_size: int, seed: int, stage: str, step: int) -> tuple[Tensor, Tensor]:
    """Augmented training batch of one step."""
    return augmented_batch(task.data, batch_size, stage_seed(seed, stage), step)


@contextmanager
def listen(model: nn.Module, at: str | None) -> Iterator[list[Tensor]]:
    """Collect the outputs of module ``at`` (None: of the model) of every forward inside the block."""
    heard: list[Tensor] = []
    module = model.get_submodule(at) if at else model
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
            state[key] = value.clone()


def advance_bar(bar: Bar, loss: float) -> None:
    """One step further, with the loss beside the bar."""
    bar.advance(note=f"loss {loss:.3f}")

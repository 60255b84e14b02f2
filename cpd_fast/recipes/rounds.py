"""The teacher's part of Prune, then Distill: take a fifth of its weights, train again, and so on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cpd_fast.prune import WeightMasks
from cpd_fast.recipes.training import adamw, one_cycle, stage_seed

if TYPE_CHECKING:
    from cpd_fast.recipes.run import Place, Run

PRUNED = "pruned_teacher.safetensors"
MASK, FRACTION = "mask.", 0.2


def prune_in_rounds(run: Run, pruned: nn.Module, at: Place) -> None:
    """Prune and train the copy of the teacher, in place, and write it with the weights that each tensor has left."""
    c = run.config
    masks = WeightMasks(pruned)
    optimizer: Optimizer = adamw(pruned, c.weight_decay)
    trainer = run.trainer("rounds", pruned, optimizer, run.task_loss())
    if at.step:
        trainer.restore(at.tensors)
        masks.load_state_dict({k.removeprefix(MASK): v for k, v in at.tensors.items() if k.startswith(MASK)})
    masks.attach(optimizer)

    def one(step: int) -> float:
        since = step % c.round_steps
        if since == 0:
            masks.prune(FRACTION)
            optimizer.state.clear()
        lr = one_cycle(c.teacher_lr, since, c.round_steps)
        return trainer.step(run.batch("rounds", step), lr, stage_seed(c.seed, "rounds", step))

    def mask_tensors() -> dict[str, Tensor]:
        return {f"{MASK}{k}": v.to(torch.uint8) for k, v in masks.state_dict().items()}

    steps = c.rounds * c.round_steps
    run.loop("rounds", "Prune the teacher", at.step, steps, one, trainer, {}, mask_tensors)
    masks.remove()
    run.write_tensors(PRUNED, pruned.state_dict(), {"nonzeros": masks.nonzeros()})


def pruned_note(run: Run) -> str:
    """What the rounds left, for the report."""
    c = run.config
    return (
        f"Prune, then Distill: {c.rounds} rounds of {c.round_steps} steps left {(1 - FRACTION) ** c.rounds:.0%} of the "
        "teacher's weights; that network teaches."
    )

"""A callback for Hugging Face's Trainer that prunes while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpd_fast.errors import ScoreError
from cpd_fast.integrations._replay import Replay
from cpd_fast.pruner import Pruner
from cpd_fast.types import Target

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as e:
    raise ImportError(
        "cpd_fast.integrations.huggingface needs transformers: pip install 'cpd_fast[huggingface]'"
    ) from e

STATE = "cpd_pruner.pt"


class CPDTrainerCallback(TrainerCallback):
    """Scores every optimizer step and masks channels at the end of every interval; compacts on demand.

    Gradients are read before the optimizer steps, after clipping and unscaling. A criterion that needs the loss itself
    gets the one that the model returns for the last batch before a removal, in eval mode. The pruner's state is
    written into every checkpoint folder of the Trainer and read from the one that it resumes from.

    Args:
        example_inputs: What the model takes: a tensor, a tuple or a dict.
        target: What may remain.
        **how: The other arguments of :class:`cpd_fast.Pruner`, e.g. of ``cpd_fast.presets.preset("published")``.

    Raises:
        ImportError: If transformers is not installed.

    Example:
        >>> from cpd_fast.integrations.huggingface import CPDTrainerCallback  # doctest: +SKIP
        >>> callback = CPDTrainerCallback({"pixel_values": x}, cpd.Target(macs=0.5))  # doctest: +SKIP
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
        >>> small = callback.compact()  # doctest: +SKIP
    """

    def __init__(self, example_inputs: Any, target: Target, **how: Any) -> None:
        self._arguments, self._how = (example_inputs, target), how
        self.pruner: Pruner | None = None
        self._replay: Replay | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Comb the model, and go on where the Trainer does.

        Raises:
            ScoreError: If the checkpoint that is resumed from holds no pruner.
        """
        if self.pruner is None:
            self.pruner = Pruner(objects["model"], *self._arguments, **self._how)
            self._replay = Replay(self.pruner, _loss_of, "CPDTrainerCallback")
        if state.global_step:
            saved = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / STATE
            if not saved.exists():
                raise ScoreError(f"CPDTrainerCallback: {saved} is missing: this checkpoint was made without pruning")
            self.pruner.load_state_dict(torch.load(saved, weights_only=True))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Look at the gradients or, where the criterion needs it, at the loss."""
        assert self._replay is not None
        self._replay.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        """Put the pruner's state beside the Trainer's."""
        if self.pruner is not None and state.is_world_process_zero:
            torch.save(
                self.pruner.state_dict(), Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / STATE
            )

    def compact(self) -> nn.Module:
        """The physically smaller model; the Trainer's own stays masked.

        Raises:
            RuntimeError: Before training.
        """
        if self._replay is None:
            raise RuntimeError("CPDTrainerCallback: nothing to compact before Trainer.train has started")
        return self._replay.compact()


def _loss_of(output: Any) -> Tensor:
    """What the model itself says its loss is.

    Raises:
        ScoreError: If it says nothing: the Trainer works the loss out elsewhere.
    """
    loss = output.get("loss") if hasattr(output, "get") else None
    if loss is None:
        raise ScoreError(
            "CPDTrainerCallback: the criterion needs the loss, and the model returned none: the Trainer computes it "
            "elsewhere (label_smoothing_factor, compute_loss_func); let the model return it, or use Taylor()"
        )
    return loss

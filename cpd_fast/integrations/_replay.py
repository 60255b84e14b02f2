"""The loss of a training step once more, for criteria that need it where a framework owns the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cpd_fast.errors import ScoreError
from cpd_fast.pruner import Pruner


class Replay:
    """Steps a pruner; where its criterion needs the loss, by calling the model as it was last called in train mode.

    Args:
        pruner: Of the model inside any wrapper.
        loss_of: The scalar loss of what the model returns.
        owner: Who asks, for messages.
    """

    def __init__(self, pruner: Pruner, loss_of: Callable[[Any], Tensor], owner: str) -> None:
        self._pruner, self._loss_of, self._owner = pruner, loss_of, owner
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle: RemovableHandle | None = None
        self._watch()

    def _watch(self) -> None:
        if self._pruner.criterion.data == "loss" and not self._pruner.done:
            self._handle = self._pruner.model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _unwatch(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _remember(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():  # not while batch norm is re-estimated
            self._call = args, kwargs

    def loss(self) -> Tensor:
        """The loss of the last training batch (of several that accumulate, the last one), in the model's present mode.

        Raises:
            ScoreError: If the model was not called in train mode since it is watched.
        """
        if self._call is None:
            raise ScoreError(
                f"{self._owner}: the criterion needs the loss of a training batch, and the model was not called in "
                "train mode; use Taylor()"
            )
        args, kwargs = self._call
        return self._loss_of(self._pruner.model(*args, **kwargs))

    def step(self) -> None:
        """Step the pruner; after its last removal let go of the model and of the batch."""
        self._pruner.step(self.loss)
        if self._pruner.done:
            self._unwatch()
            self._call = None

    def compact(self) -> nn.Module:
        """What the pruner compacts; the copy carries no hook of this."""
        self._unwatch()
        try:
            return self._pruner.compact()
        finally:
            self._watch()

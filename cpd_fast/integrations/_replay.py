"""The loss of a training step once more, for criteria that need it where a framework owns the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cpd_fast.errors import ScoreError


class Replay:
    """Remembers what a model was last called with in train mode, and calls it so again.

    Args:
        model: The model inside any wrapper.
        loss_of: The scalar loss of what the model returns.
        owner: Who asks, for messages.
    """

    def __init__(self, model: nn.Module, loss_of: Callable[[Any], Tensor], owner: str) -> None:
        self._model, self._loss_of, self._owner = model, loss_of, owner
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle: RemovableHandle | None = None
        self._watch()

    def _watch(self) -> None:
        self._handle = self._model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():  # not while batch norm is re-estimated
            self._call = args, kwargs

    def __call__(self) -> Tensor:
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
        return self._loss_of(self._model(*args, **kwargs))

    def stop(self) -> None:
        """Let go of the model and of the batch."""
        self._call = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the model carries no hook, so that copies of it carry none."""
        if self._handle is None:
            yield
            return
        self._handle.remove()
        try:
            yield
        finally:
            self._watch()

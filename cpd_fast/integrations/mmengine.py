"""An MMEngine hook that prunes a training run from its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import cpd_fast
from cpd_fast.errors import ScoreError
from cpd_fast.integrations._replay import Replay
from cpd_fast.pruner import Pruner
from cpd_fast.types import Target
from cpd_fast.wrappers import unwrap

try:
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS
    from mmengine.runner import Runner
except ImportError as e:
    raise ImportError("cpd_fast.integrations.mmengine needs MMEngine: pip install 'cpd_fast[mmengine]'") from e

KEY = "cpd_pruner"


@HOOKS.register_module()
class CPDHook(Hook):
    """Prunes the runner's model while it trains; put it into ``custom_hooks`` of any MMEngine config.

        custom_imports = dict(imports=["cpd_fast.integrations.mmengine"])
        custom_hooks = [dict(type="CPDHook", input_shape=(1, 3, 512, 512), target=dict(macs=0.5),
                             schedule=dict(type="Greedy", interval=50, steps=20))]

    Gradients are seen at the optimizer wrapper, after ``loss.backward()``: with accumulation the accumulated ones, with
    ``AmpOptimWrapper`` unscaled ones. A criterion that needs the loss itself (``dict(type="HessianTrace")``, the
    paper's) gets that of the last batch before a removal, in eval mode. The model's tensor mode is what is combed and
    counted: of a segmentor backbone, decode head and auxiliary head. The pruner's state is in every checkpoint, so a
    resumed run goes on with it; ``compact()`` gives the smaller model.

    Args:
        input_shape: Of the example images, e.g. ``(1, 3, 512, 512)``.
        target: Fractions that remain, e.g. ``dict(macs=0.5)``.
        criterion: ``dict(type="Taylor")`` or any other of cpd_fast.
        schedule: ``dict(type="Greedy", interval=50, steps=10)`` or ``dict(type="OneGroup")``.
        ignore: Modules that keep their shapes; see :func:`cpd_fast.comb`.
        heads: Submodules that read the backbone's maps in training only; they are combed and cut along with the rest.
        **options: Other arguments of :class:`cpd_fast.Pruner`, e.g. ``per_cost="macs"`` or ``probe_every=10``.

    Raises:
        ImportError: If MMEngine is not installed.

    Example:
        >>> CPDHook(input_shape=(1, 3, 64, 64), target=dict(macs=0.5)).priority  # doctest: +SKIP
        'NORMAL'
    """

    priority = "NORMAL"

    def __init__(
        self,
        input_shape: tuple[int, ...],
        target: Mapping[str, float],
        criterion: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        ignore: tuple[str, ...] = (),
        heads: tuple[str, ...] = ("auxiliary_head",),
        **options: Any,
    ) -> None:
        self.input_shape, self.target = tuple(input_shape), Target(**target)
        self.criterion = _build(criterion or {"type": "Taylor"})
        self.schedule = _build(schedule or {"type": "Greedy"})
        self.ignore, self.heads, self.options = ignore, heads, options
        self.pruner: Pruner | None = None
        self._replay: Replay | None = None
        self._saved: dict[str, Any] | None = None

    def before_train(self, runner: Runner) -> None:
        """Comb the model and listen at its optimizer wrapper."""
        if self.pruner is not None:
            return
        model = unwrap(runner.model)
        images = torch.zeros(self.input_shape, device=next(model.parameters()).device)
        with _all_outputs(model, self.heads):
            self.pruner = Pruner(
                model, images, self.target, self.criterion, self.schedule, ignore=self.ignore, **self.options
            )
        if self._saved is not None:
            self.pruner.load_state_dict(self._saved)
        self._replay = Replay(self.pruner, partial(_loss_of, model), "CPDHook")
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._step)

    def _step(self, *_: Any) -> None:
        """Step the pruner before each step of the optimizer, with the gradients that it will use."""
        assert self._replay is not None
        self._replay.step()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep the pruner's state of a checkpoint that training resumes from."""
        if runner._resume and KEY in checkpoint:
            self._saved = checkpoint[KEY]
            if self.pruner is not None:
                self.pruner.load_state_dict(self._saved)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Put the pruner's state into the checkpoint."""
        if self.pruner is not None:
            checkpoint[KEY] = self.pruner.state_dict()

    def compact(self) -> nn.Module:
        """The physically smaller model; the runner's own stays masked.

        Raises:
            RuntimeError: Before training.
        """
        if self.pruner is None or self._replay is None:
            raise RuntimeError("CPDHook: nothing to compact before training has started")
        with _all_outputs(self.pruner.model, self.heads):
            small = self._replay.compact()
        small.__class__ = type(self.pruner.model)
        return small


@contextmanager
def _all_outputs(model: Any, heads: tuple[str, ...]) -> Iterator[None]:
    """Inside the block the model's forward takes images and gives all that training reads: main and auxiliary logits.

    Tensor mode leaves auxiliary heads out, and a head that is not traced would not follow the maps that it reads.
    """
    own = type(model)
    present = [h for h in heads if getattr(model, h, None) is not None]

    def forward(self: Any, images: Tensor) -> Any:
        if not present:
            return own.forward(self, images)
        maps = self.extract_feat(images)
        return self.decode_head(maps), *(getattr(self, h)(maps) for h in present)

    model.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})
    try:
        yield
    finally:
        model.__class__ = own


def _loss_of(model: Any, losses: Any) -> Tensor:
    """The scalar that MMEngine trains on.

    Raises:
        ScoreError: If the model's last training call was not in mode ``loss``.
    """
    if not isinstance(losses, Mapping):
        raise ScoreError(
            "CPDHook: the criterion needs the loss, and what the model last returned in training is no dict of losses "
            f"but {type(losses).__name__}; use criterion=dict(type='Taylor')"
        )
    loss: Tensor = model.parse_losses(losses)[0]
    return loss


def _build(spec: Mapping[str, Any]) -> Any:
    kind = spec["type"]
    return getattr(cpd_fast, kind)(**{k: v for k, v in spec.items() if k != "type"})

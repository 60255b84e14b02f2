"""A Lightning callback that prunes while ``Trainer.fit`` trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cpd_fast.errors import ScoreError
from cpd_fast.pruner import Pruner
from cpd_fast.types import Target

try:
    import lightning.pytorch as pl
except ImportError as e:
    raise ImportError("cpd_fast.integrations.lightning needs Lightning: pip install 'cpd_fast[lightning]'") from e


class CPDCallback(pl.Callback):
    """Scores every step and masks channels at the end of every interval; compacts on demand.

    Works under automatic optimization, precision plugins (gradients are read unscaled) and DDP. A criterion that needs
    the loss itself gets it from ``training_step``, called again for the last batch before a removal: in eval mode,
    and with nothing logged. Pruner state is part of Lightning's checkpoints.

    Args:
        example_inputs: What the network takes.
        target: What may remain.
        network: Name of the attribute of the LightningModule that is pruned; ``""`` is the module itself.
        **how: The other arguments of :class:`cpd_fast.Pruner`, e.g. of ``cpd_fast.presets.preset("published")``.

    Raises:
        ImportError: If Lightning is not installed.

    Example:
        >>> import cpd_fast as cpd
        >>> from cpd_fast.integrations.lightning import CPDCallback  # doctest: +SKIP
        >>> callback = CPDCallback(torch.zeros(1, 3, 32, 32), cpd.Target(macs=0.5), network="net")  # doctest: +SKIP
        >>> pl.Trainer(callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
        >>> small = callback.compact()  # doctest: +SKIP
    """

    def __init__(self, example_inputs: Any, target: Target, network: str = "", **how: Any) -> None:
        super().__init__()
        self._arguments = (example_inputs, target)
        self._network, self._how = network, how
        self.pruner: Pruner | None = None
        self._state: dict[str, Any] | None = None
        self._batch: tuple[Any, ...] = ()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Comb the network, and go on from a checkpoint where there is one."""
        if self.pruner is None:
            network: nn.Module = pl_module.get_submodule(self._network)
            self.pruner = Pruner(network, *self._arguments, **self._how)
        if self._state is not None:
            self.pruner.load_state_dict(self._state)
            self._state = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch."""
        self._batch = batch, batch_idx

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget it."""
        self._batch = ()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Look at the gradients that the optimizer is about to use; Lightning has unscaled them."""
        assert self.pruner is not None
        self.pruner.step(lambda: _loss_again(pl_module, *self._batch))

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint; taken up when the fit starts."""
        self._state = state_dict or None

    def compact(self) -> nn.Module:
        """The physically smaller network; the one in the module stays masked.

        Raises:
            RuntimeError: Before the fit.
        """
        if self.pruner is None:
            raise RuntimeError("CPDCallback: nothing to compact before Trainer.fit has started")
        return self.pruner.compact()


def _loss_again(module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """What ``training_step`` returns for a batch; what it logs is dropped.

    Raises:
        ScoreError: If it returns no loss.
    """
    silent: dict[str, Any] = dict.fromkeys(("log", "log_dict"), lambda *_, **__: None)
    module.__dict__.update(silent)
    try:
        out = module.training_step(batch, batch_idx)
    finally:
        for name in silent:
            del module.__dict__[name]
    loss = out.get("loss") if isinstance(out, Mapping) else out
    if not isinstance(loss, Tensor):
        raise ScoreError(
            f"CPDCallback: the criterion needs the loss, and training_step returned {type(loss).__name__}; use Taylor()"
        )
    return loss

"""Unstructured pruning of single weights by magnitude, with masks that hold through training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from cpd_fast.errors import PlanError

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class WeightMasks:
    """Masks over the weights of all convolutions and linears of a model; no biases, no norms.

    What is masked is zero, bit for bit, from :meth:`attach` on: gradients of masked weights are cleared before any
    optimizer sees them, and after every step weights and optimizer state are cleared again, so that neither momentum
    nor weight decay brings a weight back.

    Args:
        model: The network; masked weights are set to zero in place.

    Raises:
        PlanError: If it has no convolution or linear.

    Source: the teacher of Prune, then Distill (Park and No, arXiv:2109.14960): global L1 magnitude, rounds of 20 %.

    Example:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0, -4.0], [3.0, -2.0]]))
        >>> masks = WeightMasks(net)
        >>> masks.prune(0.5)
        >>> net.weight.data.tolist(), masks.nonzeros()
        ([[0.0, -4.0], [3.0, 0.0]], {'weight': 2})
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights: dict[str, nn.Parameter] = {}
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            keys: tuple[str, ...] = ("weight",) if isinstance(module, _LAYERS) else ()
            if isinstance(module, nn.MultiheadAttention):
                keys = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            for key in keys:
                p = module._parameters.get(key)
                if p is not None and all(p is not known for known in self._weights.values()):  # tied ones once
                    self._weights[prefix + key] = p
        if not self._weights:
            raise PlanError("WeightMasks: the model has no convolution or linear whose weight is a parameter")
        self._masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self._weights.items()}
        self._handles: list[RemovableHandle] = []

    def prune(self, fraction: float = 0.2) -> None:
        """Mask the smallest of the weights that remain, over all layers together.

        Args:
            fraction: Of the remaining weights, in [0, 1); equal magnitudes: the earlier weight goes.

        Raises:
            PlanError: If the fraction is out of range or weights are not finite.
        """
        if not 0 <= fraction < 1:
            raise PlanError(
                f"fraction={fraction}: expected a number in [0, 1), the share of remaining weights that goes"
            )
        with torch.no_grad():
            left = torch.cat([p.detach().abs()[m].float().cpu() for p, m in self._pairs()])
            if not left.isfinite().all():
                raise PlanError(f"prune: {int((~left.isfinite()).sum())} weights are not finite; check the training")
            gone = torch.zeros(len(left), dtype=torch.bool)
            gone[left.argsort(stable=True)[: round(fraction * len(left))]] = True
            for part, (_, mask) in zip(
                gone.split([int(m.sum()) for _, m in self._pairs()]), self._pairs(), strict=True
            ):
                mask[mask.clone()] = ~part.to(mask.device)
        self._clear_weights()

    def attach(self, optimizer: Optimizer) -> None:
        """Keep masked weights at zero in a training with this optimizer; its state is cleared there, too."""
        self.remove()
        for p, mask in self._pairs():
            self._handles.append(p.register_post_accumulate_grad_hook(_clear_gradient(mask)))
        self._handles.append(optimizer.register_step_post_hook(lambda o, *_: self._clear(o)))
        self._clear(optimizer)

    def remove(self) -> None:
        """Let go of model and optimizer; masked weights stay zero until somebody trains them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def nonzeros(self) -> dict[str, int]:
        """Weights that remain, by parameter name."""
        return {name: int(m.sum()) for name, m in self._masks.items()}

    @property
    def density(self) -> float:
        """Share of the weights that remains, in (0, 1]."""
        return sum(self.nonzeros().values()) / sum(m.numel() for m in self._masks.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The masks, bool, by parameter name."""
        return dict(self._masks)

    def load_state_dict(self, masks: Mapping[str, Tensor]) -> None:
        """Take over masks and clear what they mask.

        Raises:
            PlanError: If they are of another model.
        """
        for name, own in self._masks.items():
            got = masks.get(name)
            if got is None or got.shape != own.shape:
                what = "no mask" if got is None else f"shape {tuple(got.shape)}"
                raise PlanError(f"masks of another model: {name}: expected shape {tuple(own.shape)}, got {what}")
            own.copy_(got)
        self._clear_weights()

    # ---------------------------------------------------------------------------------------------------------- parts
    def _pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [(p, self._masks[name]) for name, p in self._weights.items()]

    @torch.no_grad()
    def _clear_weights(self) -> None:
        for p, mask in self._pairs():
            p.masked_fill_(~mask, 0)

    @torch.no_grad()
    def _clear(self, optimizer: Optimizer) -> None:
        self._clear_weights()
        for p, mask in self._pairs():
            for value in optimizer.state.get(p, {}).values():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    value.masked_fill_(~mask, 0)


def _clear_gradient(mask: Tensor) -> Any:
    def clear(p: Tensor) -> None:
        if p.grad is not None:
            p.grad.masked_fill_(~mask, 0)

    return clear

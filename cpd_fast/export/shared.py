"""What the file formats share: inputs as arguments, eval mode for a while, the comparison with PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from cpd_fast.errors import BackendError, ShapeError

TOLERANCE = 1e-4  # of the largest output; fp32 in another order of summation stays below 1e-5


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple of arguments or a dict of keyword arguments as args and kwargs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def at_least_two(inputs: Any) -> Any:
    """Inputs with a batch of 2 where they had 1, which torch.export would take for a constant."""
    return tree_map(lambda t: torch.cat([t, t]) if _is_batch(t) and len(t) == 1 else t, inputs)


def twice(inputs: Any) -> Any:
    """Inputs with a batch of double size."""
    return tree_map(lambda t: torch.cat([t, t]) if _is_batch(t) else t, inputs)


def _is_batch(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dim() > 0


def dynamic_shapes(inputs: Any, dynamic_batch: bool) -> Any:
    """What torch.export is told of the inputs: dim 0 of every tensor is the batch, of any size."""
    if not dynamic_batch:
        return None
    args, kwargs = arguments(inputs)
    batch = torch.export.Dim("batch", min=1)
    shapes = tree_map(lambda t: {0: batch} if _is_batch(t) else None, (args, kwargs))
    return shapes[1] if kwargs else shapes[0]


def try_forward(model: nn.Module, inputs: Any) -> None:
    """Find wrong inputs here: the exporter would wrap them in pages of its own advice.

    Raises:
        ShapeError: If the forward fails.
    """
    args, kwargs = arguments(inputs)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as e:
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor))
        raise ShapeError(
            f"{type(model).__name__}: the forward fails on example inputs of shape {shapes}: {e}; "
            "give inputs that the model accepts"
        ) from e


def check_inputs(model: nn.Module, inputs: Any, dynamic_batch: bool) -> None:
    """Find out whether the model takes the example inputs, and the same with twice the batch.

    Raises:
        ShapeError: If it fails on the example inputs.
        BackendError: If it holds a batch size of its own, and the batch is to be dynamic.
    """
    try_forward(model, inputs)
    if dynamic_batch:
        try:
            try_forward(model, twice(inputs))
        except ShapeError as e:
            raise BackendError(
                f"{e} (twice the batch): the forward holds its batch size; pass dynamic_batch=False"
            ) from e


def difference(model: nn.Module, inputs: Any, run: Callable[[Any], Sequence[Tensor]]) -> float:
    """Largest difference between ``run`` and the model on noise of the inputs' shapes, over the largest output.

    Args:
        model: The model, in eval mode.
        inputs: Example inputs; floating point ones are replaced by noise.
        run: ``inputs -> output tensors``, in the order of the model's.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(t: Any) -> Any:
        is_real = isinstance(t, Tensor) and t.is_floating_point()
        return torch.randn(t.shape, generator=generator).to(t) if is_real else t

    inputs = tree_map(noise, inputs)
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        wanted = [t.double().cpu() for t in tree_flatten(model(*args, **kwargs))[0] if isinstance(t, Tensor)]
    worst = 0.0
    for w, g in zip(wanted, run(inputs), strict=True):
        if w.numel():
            worst = max(worst, float((w - g.double().cpu()).abs().max() / w.abs().max().clamp_min(1e-12)))
    return worst


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, every module is in eval mode; afterwards each is in the mode it was in."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for m, mode in modes:
            m.training = mode

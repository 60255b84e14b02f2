"""Repair the attributes that mirror sizes, and prove the result by a label-checked replay.

The replay runs the compacted model on meta tensors with the surviving channels written on its parameters, under the
same rules as comb; every union becomes the question whether the two channels are one. A size that stands in an
attribute shows as a shape error inside its module: the attributes there that hold an old size are tried with the
sizes it became, and an edit stays when the replay gets further.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from cpd_fast.compact.mend import mend
from cpd_fast.compact.replay import Replay, Replayer
from cpd_fast.compact.sizes import Sizes
from cpd_fast.compact.views import resize_calls
from cpd_fast.errors import CompactError
from cpd_fast.types import ChannelGraph, PrunePlan


def repair_known(model: nn.Module, graph: ChannelGraph, alive: np.ndarray) -> None:
    """Sizes of PyTorch's own layers (and their subclasses), from their tensors' new shapes."""
    lengths = norm_lengths(graph, alive)
    for name, m in model.named_modules():
        for attribute, value in known_sizes(name, m, lambda key, m=m: _shape(m, key), graph, alive, lengths).items():  # type: ignore[misc]
            setattr(m, attribute, value)


def norm_lengths(graph: ChannelGraph, alive: np.ndarray) -> dict[str, int]:
    """What is left of the channels that a module normalises over, by module, where they lie along one dim."""
    return {
        s.module: int(alive[s.channels].sum()) for s in graph.norm_sites if max(s.channels.shape) == s.channels.size
    }


_SIZED = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.PReLU,
    nn.Embedding,
)


def has_sizes(m: nn.Module) -> bool:
    """Whether :func:`known_sizes` knows attributes of such a layer."""
    return isinstance(m, _SIZED) or hasattr(m, "normalized_shape")


def known_sizes(
    name: str,
    m: nn.Module,
    shape: Callable[[str], tuple[int, ...] | None],
    graph: ChannelGraph,
    alive: np.ndarray,
    lengths: dict[str, int],
) -> dict[str, Any]:
    """The size attributes that one of PyTorch's own layers has when its tensors have their new shapes.

    Args:
        name: Qualified name of the layer.
        m: The layer; not changed.
        shape: New shape of a tensor of the layer by attribute, None where it has none.
        graph: Coupled channel groups.
        alive: Which channels survive.
        lengths: :func:`norm_lengths`, for norms without a weight.
    """
    weight = shape("weight")
    if isinstance(m, nn.modules.conv._ConvNd) and weight is not None:
        path = f"{name}.weight" if name else "weight"
        return _conv_sizes(m, weight, graph, alive, graph.aliases.get(path, path))
    if isinstance(m, nn.Linear) and weight is not None:
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(m, nn.modules.batchnorm._NormBase):
        whole = weight if weight is not None else shape("running_mean")
        return {} if whole is None else {"num_features": whole[0]}
    if isinstance(m, nn.GroupNorm):
        channels = weight[0] if weight is not None else lengths.get(name, m.num_channels)
        return {
            "num_groups": channels if m.num_groups == m.num_channels else m.num_groups,
            "num_channels": channels,
        }
    if isinstance(m, nn.PReLU) and weight is not None:
        return {"num_parameters": weight[0]}
    if isinstance(m, nn.Embedding) and weight is not None:
        return {"num_embeddings": weight[0], "embedding_dim": weight[1]}
    if hasattr(m, "normalized_shape") and not isinstance(m, (nn.Linear, nn.PReLU, nn.Embedding)):
        if weight is not None:
            return {"normalized_shape": weight}
        if name in lengths:
            return {"normalized_shape": (lengths[name],)}
    return {}


def _shape(m: nn.Module, key: str) -> tuple[int, ...] | None:
    tensor = getattr(m, key, None)
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else None


def _conv_sizes(
    m: nn.modules.conv._ConvNd, shape: tuple[int, ...], graph: ChannelGraph, alive: np.ndarray, weight: str
) -> dict[str, Any]:
    tensor = graph.tensors.get(weight)
    groups = m.groups
    if tensor is not None and groups > 1:  # conv groups that keep a row
        rows = np.ones(tensor.shape[0], bool)
        for ids in tensor.maps:
            if ids.shape[0] > 1:
                rows &= alive[ids].any(tuple(range(1, ids.ndim)))
        groups = int(rows.reshape(m.groups, -1).any(1).sum())
    first, second = shape[:2]
    outs, ins = (second * groups, first) if m.transposed else (first, second * groups)
    return {"groups": groups, "out_channels": outs, "in_channels": ins}


def repair(
    model: nn.Module, graph: ChannelGraph, plan: PrunePlan, replayer: Replayer
) -> list[tuple[str, np.ndarray, float]]:
    """Edit attributes of custom modules until the replay succeeds; then scale rows before scales that moved.

    Returns:
        Tensor name, rows of the original tensor and factor of every scaling.

    Raises:
        CompactError: When no edit gets the replay further; names the module, the failing call and what was tried.
    """
    sizes = Sizes(graph, plan)
    reached = -1
    while True:
        result, changed = mend(model, sizes, replayer)
        if not changed or (result.error is not None and result.done <= reached):
            break  # proven, or no edit gets it further
        reached = result.done
    if result.resizes:
        for name, fixes in result.resizes.items():
            resize_calls(model.get_submodule(name) if name else model, fixes)
        replayer.resizable = set()
        result = replayer.run()
    if result.error is not None:
        failure = _failure(result, model.get_submodule(result.module))
        raise failure from result.error
    _scale_rows(model, graph, plan, result.scales)
    return result.scales


def _failure(result: Replay, module: nn.Module) -> CompactError:
    return CompactError(
        f"{result.module or 'the model'} ({type(module).__name__}): the compacted forward fails: {result.error}. "
        "Its forward holds a size that cpd_fast could not repair; keep the module whole with comb(..., ignore=[...])",
        result.module,
    )


def _scale_rows(
    model: nn.Module, graph: ChannelGraph, plan: PrunePlan, scales: list[tuple[str, np.ndarray, float]]
) -> None:
    alive = graph.alive(plan)
    for name, rows, factor in scales:
        kept = np.ones(graph.tensors[name].shape[0], bool)
        for m in graph.tensors[name].maps:
            if m.size == m.shape[0]:
                kept &= alive[m.reshape(-1)]
        left = torch.from_numpy((np.cumsum(kept) - 1)[rows[kept[rows]]])
        with torch.no_grad():
            model.get_parameter(name)[left] *= factor

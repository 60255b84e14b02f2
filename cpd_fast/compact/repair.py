"""Repair the attributes that mirror sizes, and prove the result by a label-checked replay.

The replay runs the compacted model on meta tensors with the surviving channels written on its parameters, under the
same rules as comb; every union becomes the question whether the two channels are one. A size that stands in an
attribute shows as a shape error inside its module: the attributes there that hold an old size are tried with the
sizes it became, and an edit stays when the replay gets further.
"""

from __future__ import annotations

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
    norm_sizes = {
        s.module: int(alive[s.channels].sum()) for s in graph.norm_sites if max(s.channels.shape) == s.channels.size
    }
    for name, m in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(m, nn.modules.conv._ConvNd):
            _repair_conv(m, graph, alive, graph.aliases.get(f"{prefix}weight", f"{prefix}weight"))
        elif isinstance(m, nn.Linear):
            m.out_features, m.in_features = m.weight.shape
        elif isinstance(m, nn.modules.batchnorm._NormBase):
            t = m.weight if m.weight is not None else m.running_mean
            if t is not None:
                m.num_features = len(t)
        elif isinstance(m, nn.GroupNorm):
            channels = len(m.weight) if m.weight is not None else norm_sizes.get(name, m.num_channels)
            m.num_groups = channels if m.num_groups == m.num_channels else m.num_groups
            m.num_channels = channels
        elif isinstance(m, nn.PReLU):
            m.num_parameters = m.weight.numel()
        elif isinstance(m, nn.Embedding):
            m.num_embeddings, m.embedding_dim = m.weight.shape
        elif hasattr(m, "normalized_shape"):
            weight = getattr(m, "weight", None)
            if weight is not None:
                m.normalized_shape = tuple(weight.shape)
            elif name in norm_sizes:
                m.normalized_shape = (norm_sizes[name],)


def _repair_conv(m: nn.modules.conv._ConvNd, graph: ChannelGraph, alive: np.ndarray, weight: str) -> None:
    tensor = graph.tensors.get(weight)
    groups = m.groups
    if tensor is not None and groups > 1:  # conv groups that keep a row
        rows = np.ones(tensor.shape[0], bool)
        for ids in tensor.maps:
            if ids.shape[0] > 1:
                rows &= alive[ids].any(tuple(range(1, ids.ndim)))
        groups = int(rows.reshape(m.groups, -1).any(1).sum())
    first, second = m.weight.shape[:2]
    m.groups = groups
    if m.transposed:
        m.in_channels, m.out_channels = first, second * groups
    else:
        m.out_channels, m.in_channels = first, second * groups


def repair(model: nn.Module, graph: ChannelGraph, plan: PrunePlan, replayer: Replayer) -> None:
    """Edit attributes of custom modules until the replay succeeds; then scale rows before scales that moved.

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

"""Small nets with channel graphs written out by hand, so that rooms can be tested without comb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cpd_fast.types import ChannelGraph, CostTerm, CoupledGroup, ParamSlice, TensorMap


def hand_graph(
    groups: Sequence[CoupledGroup],
    tensors: Mapping[str, TensorMap],
    terms: Sequence[CostTerm] = (),
    untouched: int = 0,
    fingerprint: str = "hand",
) -> ChannelGraph:
    """A graph without norms, scales, ties or known inputs."""
    return ChannelGraph(
        groups=tuple(groups),
        tensors=tensors,
        terms=tuple(terms),
        steps=(),
        norm_sites=(),
        scale_sites=(),
        aliases={},
        fingerprint=fingerprint,
        inputs=((), {}),
        output_shapes=(),
        untouched=untouched,
    )


def build_graph(
    model: nn.Module | None,
    groups: Mapping[str, Mapping[str, Any]],
    axes: Mapping[str, Mapping[int, Any]],
    macs: Sequence[tuple[str, int, tuple[Any, ...]]] = (),
    bytes_: Sequence[tuple[str, int, tuple[Any, ...]]] = (),
    fingerprint: str = "hand",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> ChannelGraph:
    """A graph from ``axes[param][dim] = group`` (dim 0 produces, others consume).

    ``groups[name]`` holds ``n`` and optionally ``balance``, ``tie``, ``prunable``, ``reason``. ``macs`` and ``bytes_``
    hold ``(module, coefficient, box)``, each entry of a box a group's name, ``(name, k)`` or an int (a free dim).
    An axis keyed by a tuple of dims is given as the id array ``(n_channels, k)`` of flat positions.
    """
    offsets, total = {}, 0
    for name, spec in groups.items():
        offsets[name] = total
        total += spec["n"]

    def ids(axis: Any) -> np.ndarray:
        if isinstance(axis, int):
            return np.full(axis, -1, np.int64)
        name, k = axis if isinstance(axis, tuple) else (axis, 1)
        return np.repeat(np.arange(groups[name]["n"]) + offsets[name], k)

    sizes = dict(shapes or {})
    is_param = dict.fromkeys(sizes, True)
    if model is not None:
        sizes |= {k: tuple(p.shape) for k, p in model.named_parameters()} | {
            k: tuple(b.shape) for k, b in model.named_buffers()
        }
        is_param |= dict.fromkeys(dict(model.named_parameters()), True)
    tensors, slices = {}, {name: [] for name in groups}
    for param, dims in axes.items():
        shape = sizes[param]
        maps = []
        for dim, axis in dims.items():
            if isinstance(dim, tuple):
                name, index = axis
                flat = np.full(int(np.prod([shape[d] for d in dim])), -1, np.int64)
                flat[index] = (np.arange(len(index)) + offsets[name])[:, None]
                maps.append(flat.reshape([shape[d] if d in dim else 1 for d in range(len(shape))]))
                slices[name].append(ParamSlice(param, dim, np.asarray(index, np.int64), False))
                continue
            name = axis[0] if isinstance(axis, tuple) else axis
            line = ids(axis)
            maps.append(line.reshape([-1 if d == dim else 1 for d in range(len(shape))]))
            n = groups[name]["n"]
            slices[name].append(ParamSlice(param, (dim,), np.arange(len(line)).reshape(n, -1), dim == 0))
        tensors[param] = TensorMap(param, shape, tuple(maps), is_param.get(param, False))
    terms = []
    for kind, rows in (("macs", macs), ("activation_bytes", bytes_)):
        for module, coefficient, box in rows:
            lines = [ids(a) for a in box]
            maps = tuple(x.reshape([-1 if d == i else 1 for d in range(len(box))]) for i, x in enumerate(lines))
            terms.append(CostTerm(kind, module, coefficient, maps))
    made = tuple(
        CoupledGroup(
            name,
            name,
            spec["n"],
            offsets[name],
            tuple(slices[name]),
            None if spec.get("balance") is None else np.asarray(spec["balance"], np.int64),
            spec.get("tie"),
            spec.get("prunable", True),
            spec.get("reason"),
        )
        for name, spec in groups.items()
    )
    params = dict(model.named_parameters()) if model is not None else {}
    untouched = sum(p.numel() for k, p in params.items() if k not in tensors)
    return hand_graph(made, tensors, tuple(terms), untouched, fingerprint)


class TwoConv(nn.Module):
    """conv(3,8) - BN - act - conv(8,6) - act - mean - linear(6,4)."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = act()
        self.conv2 = nn.Conv2d(8, 6, 3, stride=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return self.fc(self.act(self.conv2(y)).mean((2, 3)))


def two_conv(seed: int = 0, act: type[nn.Module] = nn.ReLU) -> tuple[TwoConv, ChannelGraph]:
    """The net and its graph; example input (1, 3, 8, 8)."""
    torch.manual_seed(seed)
    model = TwoConv(act)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.bn1.running_mean.normal_(generator=g)
        model.bn1.running_var.uniform_(0.5, 2, generator=g)
    graph = build_graph(
        model,
        {"conv1": {"n": 8}, "conv2": {"n": 6}},
        {
            "conv1.weight": {0: "conv1"},
            "conv1.bias": {0: "conv1"},
            "bn1.weight": {0: "conv1"},
            "bn1.bias": {0: "conv1"},
            "bn1.running_mean": {0: "conv1"},
            "bn1.running_var": {0: "conv1"},
            "conv2.weight": {0: "conv2", 1: "conv1"},
            "conv2.bias": {0: "conv2"},
            "fc.weight": {1: "conv2"},
        },
        macs=[
            ("conv1", 64 * 9, ("conv1", 3)),
            ("conv2", 9 * 9, ("conv2", "conv1")),
            ("fc", 1, (4, "conv2")),
        ],
        bytes_=[("conv1", 256, ("conv1",)), ("bn1", 256, ("conv1",)), ("conv2", 36, ("conv2",)), ("fc", 16, ())],
    )
    return model, graph


def mlp(seed: int = 0, widths: Sequence[int] = (5, 7, 6, 3), act: type[nn.Module] = nn.Tanh):
    """Linear layers named ``0, 2, 4 ...`` in a Sequential with their hidden widths as groups, and the graph."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), act()]
    model = nn.Sequential(*layers[:-1])
    last = len(widths) - 2
    groups = {str(2 * i): {"n": widths[i + 1]} for i in range(last)}
    axes: dict[str, dict[int, Any]] = {}
    macs = []
    for i in range(last + 1):
        dims = {}
        if i < last:
            dims[0] = str(2 * i)
            axes[f"{2 * i}.bias"] = {0: str(2 * i)}
        if i > 0:
            dims[1] = str(2 * i - 2)
        axes[f"{2 * i}.weight"] = dims
        macs.append((str(2 * i), 1, (dims.get(0, widths[i + 1]), dims.get(1, widths[i]))))
    return model, build_graph(model, groups, axes, macs)


class Grouped(nn.Module):
    """conv(3,8) - relu - grouped conv(8,12, groups=4) - relu - mean - linear(12,4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def grouped(seed: int = 0) -> tuple[Grouped, ChannelGraph]:
    """The net and its graph; both groups are balanced over the four convolution groups."""
    torch.manual_seed(seed)
    model = Grouped()
    # input channel c of conv2 meets rows (c // 2) * 3 + {0, 1, 2} in column c % 2 of the (12, 2) weight
    pairs = np.array([[(c // 2 * 3 + r) * 2 + c % 2 for r in range(3)] for c in range(8)])
    graph = build_graph(
        model,
        {
            "conv1": {"n": 8, "balance": np.arange(8) // 2},
            "conv2": {"n": 12, "balance": np.arange(12) // 3},
        },
        {
            "conv1.weight": {0: "conv1"},
            "conv1.bias": {0: "conv1"},
            "conv2.weight": {0: "conv2", (0, 1): ("conv1", pairs)},
            "conv2.bias": {0: "conv2"},
            "fc.weight": {1: "conv2"},
        },
        macs=[("conv1", 64, ("conv1", 3)), ("fc", 1, (4, "conv2"))],
    )
    weight = graph.tensors["conv2.weight"]
    term = CostTerm("macs", "conv2", 64 * 9, tuple(m.reshape(m.shape[:2]) for m in weight.maps))
    return model, replace(graph, terms=(*graph.terms, term))

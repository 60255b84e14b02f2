"""Latency of a plan from measured layers: built once a machine, kept in the user's cache folder.

A network's latency is predicted as the time of its convolutions and linear layers at the plan's widths, interpolated
between widths that were measured one by one, plus what the dense network takes beyond the sum of its layers, in
proportion to the activation bytes that are left.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cpd_fast.compact import kept_shape
from cpd_fast.errors import BackendError
from cpd_fast.schedule import plan_cost
from cpd_fast.store import write_atomically
from cpd_fast.timing.layers import Layer, layer_of, layer_timer
from cpd_fast.timing.measure import latency
from cpd_fast.types import ChannelGraph, PrunePlan
from cpd_fast.wrappers import unwrap

FORMAT, VERSION = "cpd_fast.latency", 1
FRACTIONS = (1.0, 0.75, 0.5, 0.3, 0.15)  # of a layer's widths that are measured; in between: straight lines


def cache_folder() -> Path:
    """Where tables are kept: ``cpd_fast`` in the user's cache folder (``XDG_CACHE_HOME``, by default ``~/.cache``)."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cpd_fast"


def machine(backend: str, threads: int) -> dict[str, str]:
    """What a measured time belongs to."""
    from cpd_fast.machine import cpu_name

    package = "onnxruntime" if backend == "onnxruntime" else "torch"
    return {
        "processor": cpu_name(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": f"{backend} {metadata.version(package)}",
        "threads": str(threads),
    }


class LayerTimes:
    """Milliseconds of layers on one machine, in one backend, with one number of threads; in memory and on disk.

    Args:
        backend: ``"onnxruntime"`` or ``"eager"``.
        threads: CPU threads.
        folder: Folder of the tables; None keeps them in memory.
        measure: ``layer -> milliseconds``; default: the backend's.

    Raises:
        BackendError: If layers cannot be timed in this backend.
    """

    def __init__(
        self,
        backend: str,
        threads: int,
        folder: Path | None = None,
        measure: Callable[[Layer], float] | None = None,
    ) -> None:
        self.machine = machine(backend, threads)
        self._measure = measure if measure is not None else layer_timer(backend, threads)
        digest = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"latency-v{VERSION}-{digest}.json"
        self.times: dict[str, float] = self._read()
        self.measured = 0  # layers timed by this object

    def _read(self) -> dict[str, float]:
        """What the file knows; nothing where there is none, or one of another machine or version, or a broken one."""
        if self.path is None or not self.path.is_file():
            return {}
        try:
            doc = json.loads(self.path.read_text())
            fits = (doc["format"], doc["version"], doc["machine"]) == (FORMAT, VERSION, self.machine)
            times = {str(k): float(v) for k, v in doc["ms"].items()} if fits else {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
            return {}  # a cache: measured anew
        return times if all(0 < v < float("inf") for v in times.values()) else {}

    def __getitem__(self, layer: Layer) -> float:
        if layer.key not in self.times:
            self.times[layer.key] = float(self._measure(layer))
            self.measured += 1
        return self.times[layer.key]

    def write(self) -> None:
        """Keep what was measured.

        Raises:
            BackendError: If the cache folder cannot be written.
        """
        if self.path is None or not self.measured:
            return
        known = self._read() | self.times  # of a process that measured meanwhile
        doc = {"format": FORMAT, "version": VERSION, "machine": self.machine, "ms": known}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(doc, indent=1).encode())
        except OSError as e:
            raise BackendError(
                f"{self.path}: the latency table cannot be written ({e.strerror}); give cache=False"
            ) from e


@dataclass(frozen=True)
class _Grid:
    """Times of one layer over the widths of its input and output; non-decreasing in both."""

    weight: str  # qualified name of its weight
    layer: Layer
    ins: np.ndarray  # (a,), rising
    outs: np.ndarray  # (b,)
    ms: np.ndarray  # (a, b)

    def at(self, c_in: float, c_out: float) -> float:
        over_out = [float(np.interp(c_out, self.outs, row)) for row in self.ms]
        return float(np.interp(c_in, self.ins, over_out))


class LatencyTable:
    """Predicts the latency of every plan for one network: ``table(plan) -> milliseconds``.

    Give it to :func:`cpd_fast.plan` as ``latency=``. Predictions never grow when channels go.

    Args:
        model: The dense network.
        graph: Its channel graph, combed with ``example_inputs``.
        example_inputs: What latency is about; batch size is theirs.
        backend: ``"onnxruntime"`` or ``"eager"``.
        threads: CPU threads; default: what PyTorch uses.
        cache: Keep layer times in the user's cache folder: ``True``, ``False``, or a folder.
        measure: ``layer -> milliseconds`` in place of the backend's timer.
        dense_ms: Latency of the dense network, milliseconds; default: measured.

    Attributes:
        dense_ms: The dense network's latency, milliseconds.
        measured: How many layers had to be timed, not found in the cache.

    Raises:
        BackendError: If the backend is unknown or not installed, layers cannot be timed in it, or the cache folder
            cannot be written.

    Example:
        >>> import cpd_fast as cpd
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
        >>> x = torch.zeros(1, 3, 16, 16)
        >>> graph = cpd.comb(model, x)
        >>> table = LatencyTable(model, graph, x, backend="eager", threads=1, cache=False)
        >>> table(cpd.random_plan(graph, keep=0.25)) < table(cpd.random_plan(graph, keep=1.0))
        True
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        example_inputs: Any,
        backend: str = "onnxruntime",
        threads: int | None = None,
        cache: bool | str | os.PathLike[str] = True,
        measure: Callable[[Layer], float] | None = None,
        dense_ms: float | None = None,
    ) -> None:
        count = threads or torch.get_num_threads()
        folder = (cache_folder() if cache else None) if isinstance(cache, bool) else Path(cache)
        times = LayerTimes(backend, count, folder, measure)
        self._graph = graph
        model = unwrap(model)
        self._grids = [_grid(w, layer, graph, times) for w, layer in _layers(model, graph)]
        times.write()
        self.measured = times.measured
        self.dense_ms = dense_ms or latency(model, example_inputs, backend, 400, count, seconds=5).median_ms
        self._bytes = plan_cost(graph).activation_bytes
        layers = self._layers_ms(None)
        self._scale = min(1.0, self.dense_ms / layers) if layers else 1.0  # in a network, layers share fused operators
        self._rest = self.dense_ms - self._scale * layers

    def __call__(self, plan: PrunePlan | None) -> float:
        """Predicted milliseconds of one forward of what ``plan`` leaves."""
        left = plan_cost(self._graph, plan).activation_bytes / max(self._bytes, 1)
        return self._scale * self._layers_ms(plan) + self._rest * left

    def _layers_ms(self, plan: PrunePlan | None) -> float:
        alive = self._graph.alive(plan)
        shapes: dict[str, tuple[int, ...]] = {}
        total = 0.0
        for g in self._grids:
            if g.weight not in shapes:
                tensor = self._graph.tensors.get(g.weight)
                shapes[g.weight] = kept_shape(tensor, alive) if tensor is not None else ()
            total += g.at(*_widths(g.layer, shapes[g.weight]))
        return total


def _layers(model: nn.Module, graph: ChannelGraph) -> list[tuple[str, Layer]]:
    """Weight and layer of every call of a convolution or linear module, in order."""
    modules = dict(model.named_modules())
    found = []
    for number, step in enumerate(graph.steps):
        name = step.op.removeprefix("call ")
        layer = layer_of(modules[name], step.shape) if step.op.startswith("call ") and name in modules else None
        if layer is not None:
            made = (s.shape for s in graph.steps[number + 1 :] if (s.module, s.op) == (name, "aten.convolution"))
            layer = layer.giving(next(made, ()))
            found.append((graph.aliases.get(f"{name}.weight", f"{name}.weight"), layer))
    return found


def _widths(layer: Layer, weight: tuple[int, ...]) -> tuple[int, int]:
    """Input and output channels that a weight's shape means."""
    if not weight:
        return layer.c_in, layer.c_out
    first, second = weight[:2]
    if layer.is_depthwise:
        return first * layer.c_in // max(layer.c_out, 1), first
    if layer.kind == "conv_transpose":
        return first, second * layer.groups
    return second * layer.groups, first


def _grid(weight: str, layer: Layer, graph: ChannelGraph, times: LayerTimes) -> _Grid:
    """Time a layer at every pair of widths that a plan may leave."""
    prunable = np.zeros(graph.n_channels + 1, bool)
    for g in graph.prunable_groups:
        prunable[g.offset : g.offset + g.n_channels] = True
    least = graph.alive(None)
    least[prunable] = False
    tensor = graph.tensors.get(weight)
    varies = [False, False]
    if tensor is not None:
        for d in (0, 1):
            varies[d] = any(m.shape[d] > 1 and not least[m].all() for m in tensor.maps if m.ndim > d)
    in_varies, out_varies = varies if layer.kind == "conv_transpose" else varies[::-1]
    if layer.is_depthwise:
        ins, outs = _points(layer.c_in, varies[0], 1), np.array([layer.c_out])
    else:
        ins, outs = _points(layer.c_in, in_varies, layer.groups), _points(layer.c_out, out_varies, layer.groups)
    ms = np.array([[times[layer.at(int(a), int(b))] for b in outs] for a in ins])
    ms = np.maximum.accumulate(np.maximum.accumulate(ms, axis=0), axis=1)  # odd widths may be slower than the next
    return _Grid(weight, layer, ins, outs, ms)


def _points(width: int, varies: bool, step: int) -> np.ndarray:
    """Widths to measure, rising: multiples of ``step``, of 8 where there is room (kernels are slow on odd ones)."""
    if not varies:
        return np.array([width])
    unit = step if width < 32 or 8 % step else max(step, 8)
    return np.unique([max(step, min(width, round(width * f / unit) * unit or unit)) for f in FRACTIONS[1:]] + [width])

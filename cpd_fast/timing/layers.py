"""One convolution or linear layer on its own: what it is, and how long it takes in a backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from cpd_fast.errors import BackendError
from cpd_fast.export import CPU, OPSET
from cpd_fast.packages import require
from cpd_fast.timing.measure import Runner, median_ms

RUNS, SECONDS = 200, 0.05  # a layer: enough for a median, few enough for hundreds of layers
LAYER_BACKENDS = ("onnxruntime", "eager")


@dataclass(frozen=True)
class Layer:
    """A layer at one width and input size.

    Attributes:
        kind: ``"conv"``, ``"conv_transpose"`` or ``"linear"``.
        c_in: Input channels.
        c_out: Output channels.
        groups: Convolution groups; 1 for linears.
        batch: Everything in front of the channels: batch for convolutions, batch and tokens for linears.
        spatial: Input size behind the channels; empty for linears.
        kernel: Kernel size.
        stride: Stride.
        padding: Padding, in front of each dim.
        dilation: Dilation.
    """

    kind: str
    c_in: int
    c_out: int
    groups: int
    batch: tuple[int, ...]
    spatial: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def is_depthwise(self) -> bool:
        """Whether every group has one input channel, so that groups go with the channels."""
        return self.groups > 1 and self.groups == self.c_in

    @property
    def key(self) -> str:
        """Text that says everything, for tables on disk."""
        sizes = (self.batch, self.spatial, self.kernel, self.stride, self.padding, self.dilation)
        dims = " ".join("x".join(map(str, s)) or "-" for s in sizes)
        return f"{self.kind} {self.c_in}->{self.c_out}/{self.groups} {dims}"

    def at(self, c_in: int, c_out: int) -> Layer:
        """The same layer at another width; a depthwise one keeps its multiplier."""
        if self.is_depthwise:
            return replace(self, c_in=c_in, c_out=c_in * (self.c_out // self.c_in), groups=c_in)
        return replace(self, c_in=c_in, c_out=c_out)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Size of a convolution's output behind the channels."""
        return tuple(
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, p, d, k, t in zip(self.spatial, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )

    def giving(self, output_shape: tuple[int, ...]) -> Layer:
        """The same layer on inputs that are padded beforehand where a forward of its own pads: told by its output."""
        size = tuple(output_shape[2:])
        if self.kind != "conv" or len(size) != len(self.spatial) or size == self.output_size:
            return self
        padded = tuple(
            (o - 1) * t + d * (k - 1) + 1
            for o, d, k, t in zip(size, self.dilation, self.kernel, self.stride, strict=True)
        )
        return replace(self, spatial=padded, padding=(0,) * len(size))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of its input."""
        return (*self.batch, self.c_in, *self.spatial)

    def module(self) -> nn.Module:
        """The layer in PyTorch, random weights, eval mode."""
        if self.kind == "linear":
            return nn.Linear(self.c_in, self.c_out).eval()
        classes: dict[tuple[str, int], type[nn.Module]] = {
            ("conv", 1): nn.Conv1d,
            ("conv", 2): nn.Conv2d,
            ("conv", 3): nn.Conv3d,
            ("conv_transpose", 1): nn.ConvTranspose1d,
            ("conv_transpose", 2): nn.ConvTranspose2d,
            ("conv_transpose", 3): nn.ConvTranspose3d,
        }
        make: Any = classes[self.kind, len(self.spatial)]
        sizes = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return make(self.c_in, self.c_out, self.kernel, groups=self.groups, **sizes).eval()


def layer_of(module: nn.Module, input_shape: tuple[int, ...]) -> Layer | None:
    """A module as a layer, at the input it gets; None where it is no convolution or linear layer."""
    if isinstance(module, nn.Linear):
        return Layer("linear", module.in_features, module.out_features, 1, tuple(input_shape[:-1]), ())
    if not isinstance(module, nn.modules.conv._ConvNd) or len(input_shape) != len(module.kernel_size) + 2:
        return None
    spatial = tuple(input_shape[2:])
    padding = module.padding
    if isinstance(padding, str):  # "same" or "valid"
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = tuple(s // 2 for s in spans) if padding == "same" else (0,) * len(spans)
    return Layer(
        "conv_transpose" if module.transposed else "conv",
        module.in_channels,
        module.out_channels,
        module.groups,
        (input_shape[0],),
        spatial,
        tuple(module.kernel_size),
        tuple(module.stride),
        tuple(padding),
        tuple(module.dilation),
    )


def layer_timer(backend: str, threads: int) -> Callable[[Layer], float]:
    """``layer -> milliseconds``, the time of an empty call taken off.

    Raises:
        BackendError: If layers cannot be timed in this backend.
    """
    if backend not in LAYER_BACKENDS:
        raise BackendError(
            f"no latency table for backend {backend!r}: layers can be timed in {', '.join(LAYER_BACKENDS)}; "
            "plan with one of these, or for Target(macs=)"
        )
    make = _in_onnxruntime if backend == "onnxruntime" else _in_torch
    with contextlib.ExitStack() as stack:
        empty = median_ms(make(None, threads, stack), RUNS, SECONDS)

    def measure(layer: Layer) -> float:
        with contextlib.ExitStack() as stack:
            return max(median_ms(make(layer, threads, stack), RUNS, SECONDS) - empty, 1e-6)

    return measure


def _in_torch(layer: Layer | None, threads: int, stack: contextlib.ExitStack) -> Runner:
    module = nn.Identity() if layer is None else layer.module()
    x = torch.randn((1,) if layer is None else layer.input_shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    stack.callback(torch.set_num_threads, before)

    def run() -> None:
        with torch.inference_mode():
            module(x)

    return run


def _in_onnxruntime(layer: Layer | None, threads: int, stack: contextlib.ExitStack) -> Runner:
    require("onnx", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(onnx_layer(layer), options, providers=[CPU])
    shape = (1,) if layer is None else layer.input_shape
    feed = {"x": np.random.default_rng(0).standard_normal(shape, np.float32)}
    return lambda: session.run(None, feed)


def onnx_layer(layer: Layer | None) -> bytes:
    """An ONNX model of one layer (None: of an empty call), as the exporter writes such layers."""
    from onnx import TensorProto, helper, numpy_helper

    weights: dict[str, np.ndarray] = {}
    if layer is None:
        nodes = [helper.make_node("Identity", ["x"], ["y"])]
    else:
        module: Any = layer.module()
        weight, bias = (t.detach().numpy() for t in (module.weight, module.bias))
        if layer.kind == "linear":
            weights = {"w": np.ascontiguousarray(weight.T), "b": bias}
            if len(layer.input_shape) == 2:
                nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
            else:
                nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
        else:
            weights = {"w": weight, "b": bias}
            nodes = [
                helper.make_node(
                    "Conv" if layer.kind == "conv" else "ConvTranspose",
                    ["x", "w", "b"],
                    ["y"],
                    group=layer.groups,
                    kernel_shape=layer.kernel,
                    strides=layer.stride,
                    pads=[*layer.padding, *layer.padding],
                    dilations=layer.dilation,
                )
            ]
    shape = (1,) if layer is None else layer.input_shape
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return model.SerializeToString()


def macs_of(layer: Layer) -> int:
    """Multiply-accumulates of one call, for checks of a table against a graph."""
    if layer.kind == "linear":
        return prod(layer.batch) * layer.c_in * layer.c_out
    if layer.kind == "conv_transpose":
        return prod(layer.batch) * layer.c_in * layer.c_out // layer.groups * prod(layer.kernel) * prod(layer.spatial)
    taps = prod(layer.kernel) * prod(layer.output_size)
    return prod(layer.batch) * layer.c_in * layer.c_out // layer.groups * taps

"""Calls that a trace answers without running them: the operator and the output that PyTorch itself would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cpd_fast.comb.quick import function_shape, quick_call


class Seen(TorchDispatchMode):
    """Names of the operators that reach ATen."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(f"{func.namespace}.{func._schema.name.split('::')[1]}")
        return func(*args, **(kwargs or {}))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


IMAGE, WEIGHT = meta(2, 6, 9, 11), meta(8, 3, 3, 2)
CALLS = {
    "conv2d": (torch.conv2d, (IMAGE, WEIGHT, meta(8), 2, (1, 0), 1, 2), {}),
    "conv2d dilated": (F.conv2d, (IMAGE, meta(4, 6, 3, 3)), {"dilation": (2, 3), "stride": [1, 2]}),
    "conv1d": (torch.conv1d, (meta(2, 4, 16), meta(4, 1, 5)), {"groups": 4, "padding": 2}),
    "conv3d": (torch.conv3d, (meta(1, 2, 5, 6, 7), meta(3, 2, 1, 2, 3)), {}),
    "relu": (F.relu, (IMAGE,), {}),
    "relu in place": (F.relu, (meta(2, 3), True), {}),
    "silu in place": (F.silu, (meta(2, 3),), {"inplace": True}),
    "hardswish": (F.hardswish, (IMAGE,), {}),
    "hardsigmoid": (F.hardsigmoid, (IMAGE,), {}),
    "relu6": (F.relu6, (IMAGE,), {}),
    "hardtanh in place": (F.hardtanh, (meta(2, 3), 0.0, 6.0, True), {}),
    "gelu": (F.gelu, (IMAGE,), {"approximate": "tanh"}),
    "sigmoid": (torch.sigmoid, (IMAGE,), {}),
    "tanh": (Tensor.tanh, (IMAGE,), {}),
    "add": (Tensor.add, (IMAGE, meta(6, 1, 1)), {}),
    "add, the second larger": (torch.add, (meta(11), IMAGE), {}),
    "add in place": (Tensor.add_, (meta(2, 3), meta(3)), {}),
    "mul": (torch.mul, (IMAGE, meta(2, 6, 1, 1)), {}),
    "sub half": (torch.sub, (meta(2, 3, dtype=torch.half), meta(3, dtype=torch.half)), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_answers_are_those_of_pytorch(name: str) -> None:
    func, args, kwargs = CALLS[name]
    call = quick_call(func, args, kwargs)
    assert call is not None
    with Seen() as seen:
        out = func(*args, **kwargs)
    assert seen.names[-1] == call.op
    assert (call.out.shape, call.out.dtype, call.out.stride()) == (out.shape, out.dtype, out.stride())
    assert (call.out is args[0]) == (out is args[0])


LEFT = {
    "transposed operand": (torch.relu, (IMAGE.transpose(1, 2),), {}),
    "channels last": (torch.conv2d, (IMAGE.to(memory_format=torch.channels_last), meta(4, 6, 1, 1)), {}),
    "no batch": (torch.conv2d, (meta(6, 9, 9), meta(4, 6, 1, 1)), {}),
    "padding by name": (torch.conv2d, (IMAGE, meta(4, 6, 3, 3)), {"padding": "same"}),
    "wrong channels": (torch.conv2d, (IMAGE, meta(4, 5, 3, 3)), {}),
    "kernel too large": (torch.conv2d, (IMAGE, meta(4, 6, 30, 3)), {}),
    "a number": (torch.add, (IMAGE, 1.0), {}),
    "alpha": (torch.add, (IMAGE, IMAGE), {"alpha": 2}),
    "out": (torch.add, (IMAGE, IMAGE), {"out": meta(2, 6, 9, 11)}),
    "two types": (torch.mul, (IMAGE, IMAGE.half()), {}),
    "integers": (torch.add, (IMAGE.int(), IMAGE.int()), {}),
    "both broadcast": (torch.add, (meta(3, 1), meta(1, 4)), {}),
    "in place into the smaller": (Tensor.add_, (meta(3), meta(2, 3)), {}),
    "values": (torch.relu, (torch.zeros(3),), {}),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_plain_is_left_to_pytorch(name: str) -> None:
    func, args, kwargs = LEFT[name]
    assert quick_call(func, args, kwargs) is None


def test_attention_of_one_batch_shape() -> None:
    q, k, v = meta(2, 3, 5, 4), meta(2, 3, 7, 4), meta(2, 3, 7, 6)
    out = function_shape("scaled_dot_product_attention", (q, k, v), {"dropout_p": 0.0})
    assert out is not None and out.shape == F.scaled_dot_product_attention(q, k, v).shape
    assert function_shape("scaled_dot_product_attention", (q, k[:1], v), {}) is None
    assert function_shape("scaled_dot_product_attention", (q, k, v), {"enable_gqa": True}) is None

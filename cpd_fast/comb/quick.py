"""Outputs of common calls on the meta device without running them: many of its kernels are slow Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpd_fast.comb.leaves import leaves

# elementwise, result in the type of the (equal) types of their tensors
_ELEMENTWISE = {
    *(f"aten::{n}" for n in "add sub mul div gelu silu sigmoid relu tanh exp sqrt rsqrt neg abs erf mish".split()),
    *(f"aten::{n}" for n in "hardswish hardsigmoid hardtanh leaky_relu elu softplus clamp pow reciprocal".split()),
    *(f"aten::{n}" for n in "_softmax _safe_softmax".split()),
}


def quick_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The output of an elementwise ATen call on dense meta tensors of one type; None where that is not so plain."""
    name = func._schema.name
    if name not in _ELEMENTWISE or not args or kwargs.keys() - {"alpha", "approximate"}:
        return None
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not tensors or func._overloadname == "out" or (name.endswith("softmax") and args[2:] not in ((), (False,))):
        return None
    x = max(tensors, key=Tensor.numel)
    shape, strides, dtype = x.shape, x.stride(), x.dtype
    if not dtype.is_floating_point or not x.is_contiguous():
        return None
    for t in tensors:
        if t.dtype != dtype or t.dim() > len(shape) or t.device.type != "meta":
            return None
        if t.shape == shape:
            if t.stride() != strides:
                return None
        elif any(a not in (1, b) for a, b in zip(t.shape[::-1], shape[::-1], strict=False)):
            return None
    return torch.empty(shape, dtype=dtype, device="meta")


def function_shape(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a common call where its shape is plain: PyTorch's own meta kernels of these are slow."""
    if not args or not isinstance(args[0], Tensor) or args[0].device.type != "meta":
        return None
    if name == "lstm" and len(args) == 9 and isinstance(args[1], (tuple, list)):
        hidden, bidirectional = args[1], args[7]
        width = hidden[0].shape[-1] * (2 if bidirectional else 1)
        return (args[0].new_empty(*args[0].shape[:-1], width), *(torch.empty_like(h) for h in hidden))
    x, tensors = args[0], [t for t in leaves((args[1:], kwargs)) if isinstance(t, Tensor)]
    if any(t.dtype != x.dtype for t in tensors):
        return None
    if name == "batch_norm" and x.dim() > 1 and all(t.shape == x.shape[1:2] for t in tensors):
        return torch.empty_like(x)
    if name == "layer_norm" and all(t.shape == x.shape[x.dim() - t.dim() :] for t in tensors):
        shape = tuple(args[1] if len(args) > 1 else kwargs["normalized_shape"])
        return torch.empty_like(x) if shape == tuple(x.shape[x.dim() - len(shape) :]) else None
    if name == "linear" and tensors and x.dim() > 1 and x.shape[-1] == tensors[0].shape[1]:
        return torch.empty(*x.shape[:-1], tensors[0].shape[0], dtype=x.dtype, device="meta")
    return None

"""Outputs of common calls on the meta device without running them: many of its kernels are slow Python.

A call is answered here only where its output is plain: dense tensors of one floating type. Everything else runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cpd_fast.comb.calls import Call
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
    written = name.endswith("_")
    if name.removesuffix("_") not in _ELEMENTWISE or not args or kwargs.keys() - {"alpha", "approximate"}:
        return None
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not tensors or func._overloadname == "out" or (name.endswith("softmax") and args[2:] not in ((), (False,))):
        return None
    return _elementwise(tensors, written)


def _elementwise(tensors: list[Tensor], written: bool) -> Tensor | None:
    """The output of an elementwise call: as large as the largest of dense operands, or the first one itself."""
    x = max(tensors, key=Tensor.numel) if len(tensors) > 1 else tensors[0]
    shape, dtype = x.shape, x.dtype
    if not dtype.is_floating_point or not x.is_contiguous() or (written and tensors[0].shape != shape):
        return None
    for t in tensors:
        if t.dtype != dtype or t.dim() > len(shape) or not t.is_meta:
            return None
        if t.shape == shape:
            if not t.is_contiguous():
                return None
        elif any(a not in (1, b) for a, b in zip(t.shape[::-1], shape[::-1], strict=False)):
            return None
    return tensors[0] if written else dense(shape, dtype)


def dense(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor without values that no mode sees being made."""
    with torch._C._DisableTorchDispatch():
        return torch.empty(shape, dtype=dtype, device="meta")


def quick_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """A common call as ATen would show it, with its output; None where it must be run."""
    answer = _ANSWERS.get(func)
    try:
        return None if answer is None or not args else answer(*args, **kwargs)
    except TypeError:  # other arguments than the common ones
        return None


def _unary(name: str) -> Callable[..., Call | None]:
    def answer(input: Tensor, inplace: bool = False) -> Call | None:
        op = f"aten.{name}_" if inplace else f"aten.{name}"
        out = _elementwise([input], inplace) if isinstance(input, Tensor) else None
        return None if out is None else Call(op, (input,), {}, out)

    return answer


def _binary(name: str, written: bool) -> Callable[..., Call | None]:
    def answer(input: Tensor, other: Tensor) -> Call | None:
        if not isinstance(input, Tensor) or not isinstance(other, Tensor):
            return None
        out = _elementwise([input, other], written)
        return None if out is None else Call(f"aten.{name}_" if written else f"aten.{name}", (input, other), {}, out)

    return answer


def _gelu(input: Tensor, approximate: str = "none") -> Call | None:
    out = _elementwise([input], False)
    return None if out is None else Call("aten.gelu", (input,), {"approximate": approximate}, out)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Call | None:
    out = _elementwise([input], inplace)
    return None if out is None else Call(f"aten.hardtanh{'_' * inplace}", (input, min_val, max_val), {}, out)


def _relu6(input: Tensor, inplace: bool = False) -> Call | None:
    return _hardtanh(input, 0.0, 6.0, inplace)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Call | None:
    """conv1d, conv2d, conv3d of a batch."""
    dims = weight.dim() - 2
    given = [input, weight] if bias is None else [input, weight, bias]
    if isinstance(padding, str) or input.dim() != dims + 2 or any(not _plain(t, input.dtype) for t in given):
        return None
    stride, padding, dilation = ([v] * dims if isinstance(v, int) else list(v) * (dims // len(v))
                                 for v in (stride, padding, dilation))  # fmt: skip
    (n, channels, *size), (rows, columns, *kernel) = input.shape, weight.shape
    if columns * groups != channels or rows % groups or (bias is not None and bias.shape != (rows,)):
        return None
    out = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, p, d, k, step in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    if min(out) < 1:
        return None
    made = dense([n, rows, *out], input.dtype)
    return Call(
        "aten.convolution", (input, weight, bias, stride, padding, dilation, False, [0] * dims, groups), {}, made
    )


def _plain(t: Tensor, dtype: torch.dtype) -> bool:
    return t.is_meta and t.dtype == dtype and dtype.is_floating_point and t.is_contiguous()


_ANSWERS: dict[Any, Callable[..., Call | None]] = {
    **{f: _unary(f.__name__) for f in (F.relu, F.silu, F.hardswish, F.hardsigmoid)},
    **{getattr(o, n): _unary(n) for n in ("relu", "sigmoid", "tanh") for o in (torch, Tensor)},
    **{getattr(o, n): _binary(n, False) for n in ("add", "mul", "sub") for o in (torch, Tensor)},
    **{getattr(Tensor, f"{n}_"): _binary(n, True) for n in ("add", "mul", "sub")},
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    F.gelu: _gelu,
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
}


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
        return dense(x.shape, x.dtype) if x.is_contiguous() else torch.empty_like(x)
    if name == "layer_norm" and all(t.shape == x.shape[x.dim() - t.dim() :] for t in tensors):
        shape = tuple(args[1] if len(args) > 1 else kwargs["normalized_shape"])
        like = dense(x.shape, x.dtype) if x.is_contiguous() else torch.empty_like(x)
        return like if shape == tuple(x.shape[x.dim() - len(shape) :]) else None
    if name == "linear" and tensors and x.dim() > 1 and tensors[0].dim() == 2 and x.shape[-1] == tensors[0].shape[1]:
        return dense((*x.shape[:-1], tensors[0].shape[0]), x.dtype)
    if name == "scaled_dot_product_attention" and not kwargs.keys() - {"attn_mask", "dropout_p", "scale", "is_causal"}:
        return _attention(x, *args[1:3]) if len(args) > 2 else None
    return None


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """q (*batch, N, E), k (*batch, S, E), v (*batch, S, E_v) of one batch shape -> (*batch, N, E_v)."""
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2] or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return None
    return dense((*q.shape[:-1], v.shape[-1]), q.dtype)

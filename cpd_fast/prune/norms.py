"""Normalisation over kept channels only: what a masked call of each normalising function computes.

``keep`` is 1 for kept and 0 for removed channels and broadcasts to the input. Removed positions come out as 0, or as
the bias, which a masked model holds at 0 there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """fp32 or better."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _standardise(keep: Tensor, x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the kept positions of ``dims``; 0 at removed ones."""
    mask = keep.expand(x.shape)
    n = mask.sum(dims, keepdim=True).clamp_min(1)
    mean = (x * mask).sum(dims, keepdim=True) / n
    centred = (x - mean) * mask
    var = (centred * centred).sum(dims, keepdim=True) / n
    return centred * torch.rsqrt(var + eps)


def layer_norm(
    keep: Tensor,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Over the last ``len(normalized_shape)`` dims."""
    dims = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    return _affine(_standardise(keep, _wide(x), dims, eps), weight, bias).to(x.dtype)


def rms_norm(
    keep: Tensor, x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """x / root mean square over the last ``len(normalized_shape)`` dims."""
    dims = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    wide = _wide(x) * keep
    square = (wide * wide).sum(dims, keepdim=True) / keep.expand(x.shape).sum(dims, keepdim=True).clamp_min(1)
    tiny = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(wide * torch.rsqrt(square + tiny), weight, None).to(x.dtype)


def group_norm(
    keep: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Over the kept channels and all positions of each group, x of shape (N, C, ...)."""
    n, c = x.shape[:2]
    grouped = _wide(x).reshape(n, num_groups, c // num_groups, -1)
    mask = keep.reshape(1, num_groups, c // num_groups, 1)
    out = _standardise(mask, grouped, (2, 3), eps).reshape(x.shape)
    return _affine(out, *(_on_channels(p, x) for p in (weight, bias))).to(x.dtype)


def batch_norm(
    keep: Tensor,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Batch statistics over the kept positions (standardised weights, tokens as channels)."""
    if not training and running_mean is not None:
        return torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = (0, *range(2, x.dim()))
    mask = keep.expand(x.shape)
    out = _standardise(mask, _wide(x), dims, eps)
    return (_affine(out, *(_on_channels(p, x) for p in (weight, bias))) * mask).to(x.dtype)


def mean(keep: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    """Mean of the kept positions."""
    dims = _dims(dim, x)
    mask = keep.expand(x.shape)
    return (x * mask).sum(dims, keepdim, **kwargs) / mask.sum(dims, keepdim).clamp_min(1).to(x.dtype)


def sum_(keep: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    """Sum of the kept positions."""
    return (x * keep).sum(_dims(dim, x), keepdim, **kwargs)


def norm(keep: Tensor, x: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    """Vector norm of the kept positions."""
    return vector_norm(keep, x, 2 if p in ("fro", None) else p, dim, keepdim, **kwargs)


def vector_norm(keep: Tensor, x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    """Vector norm of the kept positions."""
    return torch.linalg.vector_norm(x * keep.to(x.dtype), ord, dim, keepdim, **kwargs)


def var(
    keep: Tensor, x: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, correction: Any = None
) -> Tensor:
    """Variance of the kept positions."""
    dims = _dims(dim, x)
    mask = keep.expand(x.shape)
    n = mask.sum(dims, keepdim=True).clamp_min(1)
    centred = (x - (x * mask).sum(dims, keepdim=True) / n) * mask
    less = float(unbiased) if correction is None else correction
    total = (centred * centred).sum(dims, keepdim)
    return total / (n.reshape(total.shape) - less if n.shape != total.shape else n - less)


def std(keep: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Standard deviation of the kept positions."""
    return var(keep, x, *args, **kwargs).sqrt()


def softmax(keep: Tensor, x: Tensor, dim: int, *rest: Any, **more: Any) -> Tensor:
    """Softmax over the kept positions; 0 at removed ones."""
    return torch.softmax(_without(keep, x, -torch.inf), dim, dtype=_dtype(rest, more))


def softmin(keep: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Softmax of -x over the kept positions; 0 at removed ones."""
    return softmax(keep, -x, *args, **kwargs)


def log_softmax(keep: Tensor, x: Tensor, dim: int, *rest: Any, **more: Any) -> Tensor:
    """Logarithm of the softmax over the kept positions; 0 at removed ones."""
    return _without(keep, torch.log_softmax(_without(keep, x, -torch.inf), dim, dtype=_dtype(rest, more)), 0.0)


def logsumexp(keep: Tensor, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """Logarithm of the sum of exponentials of the kept positions."""
    return torch.logsumexp(_without(keep, x, -torch.inf), dim, keepdim)


def normalize(keep: Tensor, x: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, **_: Any) -> Tensor:
    """x / its norm over the kept positions."""
    return torch.nn.functional.normalize(x * keep.to(x.dtype), p, dim, eps)


def cosine_similarity(keep: Tensor, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Cosine of the kept positions of two tensors."""
    mask = keep.to(x1.dtype)
    return torch.nn.functional.cosine_similarity(x1 * mask, x2 * mask, dim, eps)


def amax(keep: Tensor, x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """Largest of the kept positions."""
    return torch.amax(_without(keep, x, -torch.inf), dim, keepdim)


def amin(keep: Tensor, x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """Smallest of the kept positions."""
    return torch.amin(_without(keep, x, torch.inf), dim, keepdim)


def max_(keep: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Largest of the kept positions, with a dim its place too."""
    return torch.max(_without(keep, x, -torch.inf), *args, **kwargs)


def min_(keep: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Smallest of the kept positions, with a dim its place too."""
    return torch.min(_without(keep, x, torch.inf), *args, **kwargs)


def _dtype(rest: tuple[Any, ...], more: dict[str, Any]) -> torch.dtype | None:
    """Of F.softmax(x, dim, _stacklevel, dtype) and x.softmax(dim, dtype)."""
    return next((v for v in (*rest, more.get("dtype")) if isinstance(v, torch.dtype)), None)


def _without(keep: Tensor, x: Tensor, value: float) -> Tensor:
    """x with another value at removed positions."""
    return x.masked_fill(keep == 0, value)


def _dims(dim: Any, x: Tensor) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(x.dim()))
    return tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)


def _on_channels(p: Tensor | None, x: Tensor) -> Tensor | None:
    """(C,) -> (1, C, 1, ...)."""
    return None if p is None else p.reshape(1, -1, *[1] * (x.dim() - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def matmul(keep: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """x @ other, x cleared at removed positions."""
    return torch.matmul(x * keep.to(x.dtype), other)


def linear(keep: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, x cleared at removed positions."""
    return torch.nn.functional.linear(x * keep.to(x.dtype), weight, bias)


def attention(keep: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Scaled dot product attention, queries cleared at removed positions."""
    return torch.nn.functional.scaled_dot_product_attention(query * keep.to(query.dtype), *args, **kwargs)


# __name__ of the function as called (torch.mean and Tensor.mean alike) -> what runs instead
MASKED: dict[str, Callable[..., Any]] = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "mean": mean,
    "sum": sum_,
    "norm": norm,
    "var": var,
    "std": std,
    "linalg_vector_norm": vector_norm,
    "cosine_similarity": cosine_similarity,
    "softmax": softmax,
    "softmin": softmin,
    "log_softmax": log_softmax,
    "logsumexp": logsumexp,
    "normalize": normalize,
    "amax": amax,
    "amin": amin,
    "max": max_,
    "min": min_,
    "matmul": matmul,
    "__matmul__": matmul,
    "bmm": matmul,
    "linear": linear,
    "scaled_dot_product_attention": attention,
}

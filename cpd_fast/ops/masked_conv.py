"""Convolutions and linear layers of which only some channels are alive: a masked channel costs nothing.

Two bodies. The *reference* fills with zeros and calls the library's convolution at full width: its shapes do not depend
on the masks, so it is what compilers and ``torch.func`` see. *compact* calls the library on weights without the masked
rows and columns; convolution groups with different numbers of live channels are sorted into buckets of equal numbers,
each one grouped convolution, and groups without live channels are never touched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from cpd_fast.errors import BackendError, ShapeError
from cpd_fast.ops import _depthwise, _dispatch

Keep = Tensor | Sequence[int] | None
_Pair = tuple[int, int]


# -------------------------------------------------------------------------------------------------------------- checks

_lists: Any = WeakIdKeyDictionary()  # an index or mask tensor -> (its version, its indices): one wait for a GPU each


def _kept(op: str, name: str, keep: Keep, channels: int, device: torch.device) -> tuple[int, ...] | None:
    """The kept channels in order; None where all are kept.

    Raises:
        ShapeError: If a mask has another length, or indices are out of range or not increasing.
    """
    if keep is None:
        return None
    if not isinstance(keep, Tensor):
        found = tuple(int(i) for i in keep)
    else:
        _check_keep(op, name, keep, channels, device)
        version = None if keep.is_inference() else keep._version
        seen = _lists.get(keep)
        if version is not None and seen is not None and seen[0] == version:
            return _all_as_none(seen[1], channels)
        found = tuple((keep.nonzero().flatten() if keep.dtype == torch.bool else keep).tolist())
        if version is not None:
            _lists[keep] = (version, found)
    if found and (found[0] < 0 or found[-1] >= channels or any(a >= b for a, b in zip(found, found[1:], strict=False))):
        raise ShapeError(
            f"{op}: {name} must be increasing channel indices from 0 to {channels - 1}, got {_short(found)}; sort them "
            "and remove doubles, or pass a bool mask"
        )
    return _all_as_none(found, channels)


def _check_keep(op: str, name: str, keep: Tensor, channels: int, device: torch.device) -> None:
    if keep.dtype == torch.bool and keep.shape != (channels,):
        raise ShapeError(f"{op}: {name} as a mask must have shape ({channels},), got {tuple(keep.shape)}")
    if keep.dtype not in (torch.bool, torch.int64, torch.int32) or keep.dim() != 1:
        raise ShapeError(
            f"{op}: {name} must be a bool mask ({channels},) or increasing int64 indices, got {keep.dtype} of shape "
            f"{tuple(keep.shape)}"
        )
    if keep.device != device:
        raise ShapeError(f"{op}: {name} must be on the input's device {device}, got {keep.device}")


def _all_as_none(found: tuple[int, ...], channels: int) -> tuple[int, ...] | None:
    return None if len(found) == channels else found


def _short(found: tuple[int, ...]) -> str:
    return str(list(found)) if len(found) <= 8 else f"[{', '.join(map(str, found[:8]))}, ...]"


def _pair(op: str, name: str, value: int | Sequence[int], least: int) -> _Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ShapeError(f"{op}: {name} must be one or two numbers >= {least}, got {value}")
    return pair  # type: ignore[return-value]


def _check_input(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, channels: int, live: int | None) -> None:
    """Check what both ops share; ``live`` is the number of channels of a compact input.

    Raises:
        ShapeError: If the input, the bias or a device does not fit the weight.
    """
    expected = channels if live is None else live
    dim = 1 if op == "masked_conv2d" else -1
    if x.shape[dim] != expected:
        what = "channels" if live is None else "live channels (compact_input=True)"
        raise ShapeError(
            f"{op}: weight {tuple(weight.shape)} reads {expected} {what}, but the input has shape {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"{op}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ShapeError(f"{op}: {name} must be on the input's device {x.device}, got {tensor.device}")


# ------------------------------------------------------------------------------------------------- where channels are


class _Bucket(NamedTuple):
    """Groups with equal numbers of live channels, as one grouped convolution."""

    groups: int
    weight_rows: tuple[int, ...]  # of the full weight, group after group
    weight_columns: tuple[int, ...]  # for every row its columns, flattened; empty where all are read
    inputs: tuple[int, ...]  # channels of the full input
    outputs: tuple[int, ...]  # channels of the full output


@functools.lru_cache(maxsize=4096)
def _buckets(
    outputs: tuple[int, ...], inputs: tuple[int, ...], out_channels: int, in_channels: int, groups: int
) -> tuple[_Bucket, ...]:
    """The live part of every group, those of equal shape together; groups without live outputs are left out."""
    per_out, per_in = out_channels // groups, in_channels // groups
    rows: list[list[int]] = [[] for _ in range(groups)]
    columns: list[list[int]] = [[] for _ in range(groups)]
    for i in outputs:
        rows[i // per_out].append(i)
    for i in inputs:
        columns[i // per_in].append(i)
    shapes: dict[tuple[int, int], list[int]] = {}
    for g in range(groups):
        if rows[g]:
            shapes.setdefault((len(rows[g]), len(columns[g])), []).append(g)
    return tuple(
        _Bucket(
            len(members),
            tuple(i for g in members for i in rows[g]),
            () if n_in == per_in else tuple(i % per_in for g in members for _ in rows[g] for i in columns[g]),
            tuple(i for g in members for i in columns[g]),
            tuple(i for g in members for i in rows[g]),
        )
        for (_, n_in), members in shapes.items()
    )


@functools.lru_cache(maxsize=4096)
def _index(indices: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=device)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _select(x: Tensor, dim: int, wanted: tuple[int, ...], present: tuple[int, ...] | None, channels: int) -> Tensor:
    """Channels ``wanted`` of a tensor that holds ``present`` (None: all); in the memory format of ``x``."""
    held = tuple(range(channels)) if present is None else present
    if wanted == held:
        return x
    at = {c: i for i, c in enumerate(held)} if present is not None else None
    places = wanted if at is None else tuple(at[c] for c in wanted)
    index = _index(places, x.device)
    if dim == 1 and _is_channels_last(x):
        return _Take.apply(x.permute(0, 2, 3, 1), 3, index).permute(0, 3, 1, 2)
    return _Take.apply(x, dim, index)


def _spread(parts: list[tuple[tuple[int, ...], Tensor]], dim: int, held: tuple[int, ...]) -> Tensor:
    """One tensor with channels ``held`` from parts that have some of them; zero where no part has one."""
    if len(parts) == 1 and parts[0][0] == held:
        return parts[0][1]
    first = parts[0][1]
    shape = list(first.shape)
    shape[dim] = len(held)
    at = {c: i for i, c in enumerate(held)}
    last = dim == 1 and _is_channels_last(first)
    result = torch.zeros(shape, dtype=first.dtype, device=first.device)
    if last:
        result = result.contiguous(memory_format=torch.channels_last)
    for outputs, part in parts:
        index = _index(tuple(at[c] for c in outputs), part.device)
        if last:
            result = result.permute(0, 2, 3, 1).index_copy(3, index, part.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            result = result.index_copy(dim, index, part)
    return result


class _Take(torch.autograd.Function):
    """``index_select`` of different indices: its gradient is a copy into zeros, which costs half of adding to them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim, ctx.shape = dim, x.shape
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        zeros = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        return zeros.index_copy(ctx.dim, index, grad), None, None


class _TakeColumns(torch.autograd.Function):
    """For every row of a convolution's weight columns of its own, each at most once."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        ctx.shape = weight.shape
        rows = torch.arange(len(weight), device=weight.device)[:, None]
        return weight[rows, columns]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (columns,) = ctx.saved_tensors
        rows = torch.arange(ctx.shape[0], device=grad.device)[:, None]
        zeros = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        return zeros.index_put((rows.expand_as(columns), columns), grad), None


class _Zeros(torch.autograd.Function):
    """Zeros that depend on tensors in name: their gradients are zero, not None."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], x: Tensor, *others: Tensor | None) -> Tensor:
        ctx.inputs = [t if t is None else t.detach() for t in (x, *others)]
        return x.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[1:]
        return None, *(
            torch.zeros_like(t) if need and t is not None else None for t, need in zip(ctx.inputs, wanted, strict=True)
        )


# ---------------------------------------------------------------------------------------------------------- the bodies


def _alive(keep: Keep, channels: int, x: Tensor) -> Tensor | None:
    """``keep`` as a bool mask, without looking at its values: shapes stay the same whatever is masked."""
    if keep is None or (isinstance(keep, Tensor) and keep.dtype == torch.bool):
        return keep
    index = keep if isinstance(keep, Tensor) else torch.tensor(tuple(keep), dtype=torch.int64, device=x.device)
    return torch.zeros(channels, dtype=torch.bool, device=x.device).index_fill(0, index.long(), True)


def _zero_where_dead(x: Tensor, alive: Tensor | None, dim: int) -> Tensor:
    if alive is None:
        return x
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.where(alive.reshape(shape), x, 0.0)


def masked_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_keep: Keep,
    in_keep: Keep,
    geometry: tuple[_Pair, _Pair, _Pair, int],
) -> Tensor:
    """At full width: what is masked is zero before and after an ordinary convolution."""
    stride, padding, dilation, groups = geometry
    out_channels, per_in = weight.shape[:2]
    alive_out, alive_in = _alive(out_keep, out_channels, x), _alive(in_keep, per_in * groups, x)
    if alive_in is not None:
        columns = alive_in.reshape(groups, 1, per_in).expand(-1, out_channels // groups, -1)
        weight = torch.where(columns.reshape(out_channels, per_in, 1, 1), weight, 0.0)
    x, weight = _zero_where_dead(x, alive_in, 1), _zero_where_dead(weight, alive_out, 0)
    bias = None if bias is None else _zero_where_dead(bias, alive_out, 0)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _zero_where_dead(y, alive_out, 1)


def _compact_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_keep: tuple[int, ...] | None,
    in_keep: tuple[int, ...] | None,
    geometry: tuple[_Pair, _Pair, _Pair, int],
    compact_input: bool,
    compact_output: bool,
) -> Tensor:
    stride, padding, dilation, groups = geometry
    out_channels, in_channels = weight.shape[0], weight.shape[1] * groups
    outputs = tuple(range(out_channels)) if out_keep is None else out_keep
    inputs = tuple(range(in_channels)) if in_keep is None else in_keep
    held = outputs if compact_output else tuple(range(out_channels))
    shape = (x.shape[0], 0, *_out_size(x, weight, stride, padding, dilation))
    parts = []
    dtype: torch.dtype | None = None
    for bucket in _buckets(outputs, inputs, out_channels, in_channels, groups):
        b = None if bias is None else _select(bias, 0, bucket.weight_rows, None, out_channels)
        if not bucket.inputs:  # nothing to read: the bias alone
            part = x.new_zeros(shape[0], len(bucket.outputs), *shape[2:])
            parts.append((bucket.outputs, part if b is None else part + b.to(part.dtype).reshape(1, -1, 1, 1)))
            continue
        w = _select(weight, 0, bucket.weight_rows, None, out_channels)
        if bucket.weight_columns and groups == 1:
            w = _select(w, 1, bucket.inputs, None, in_channels)
        elif bucket.weight_columns:
            w = _TakeColumns.apply(w, _index(bucket.weight_columns, w.device).reshape(len(w), -1))
        if _is_channels_last(weight):
            w = w.contiguous(memory_format=torch.channels_last)
        seen = _select(x, 1, bucket.inputs, in_keep if compact_input else None, in_channels)
        parts.append((bucket.outputs, F.conv2d(seen, w, b, stride, padding, dilation, bucket.groups)))
        dtype = parts[-1][1].dtype
    if dtype is not None:  # under autocast the bias alone is of another dtype
        return _spread([(outputs, part.to(dtype)) for outputs, part in parts], 1, held)
    zeros = _Zeros.apply((shape[0], len(held), *shape[2:]), x, weight, bias)
    return zeros + _spread(parts, 1, held) if parts else zeros


def _native_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_keep: tuple[int, ...] | None,
    in_keep: tuple[int, ...] | None,
    geometry: tuple[_Pair, _Pair, _Pair, int],
    compact_input: bool,
    compact_output: bool,
) -> Tensor:
    """Planes that are alive on both sides are convolved where they are; those without an input give their bias."""
    stride, padding, dilation, channels = geometry
    everything = tuple(range(channels))
    outputs, inputs = out_keep if out_keep is not None else everything, in_keep if in_keep is not None else everything
    places, lonely, held = _planes(outputs, inputs, channels, compact_input, compact_output)
    if not places[0] or not len(x):  # nothing to convolve: no memory to point at
        return _compact_conv2d(x, weight, bias, out_keep, in_keep, geometry, compact_input, compact_output)
    size = _out_size(x, weight, stride, padding, dilation)
    y: Tensor = _depthwise.Depthwise.apply(x, weight, bias, places, size, held, (stride, padding, dilation))
    if lonely[0] and bias is not None:
        part = bias[_index(lonely[1], x.device)].reshape(1, -1, 1, 1).expand(len(x), -1, *size)
        y = y.index_copy(1, _index(lonely[0], x.device), part)
    return y


@functools.lru_cache(maxsize=4096)
def _planes(
    outputs: tuple[int, ...], inputs: tuple[int, ...], channels: int, compact_input: bool, compact_output: bool
) -> tuple[tuple[list[int], list[int], list[int]], tuple[tuple[int, ...], tuple[int, ...]], int]:
    """Where live channels are in x, the result and the weight; outputs without an input; channels of the result."""
    read = {c: i for i, c in enumerate(inputs)} if compact_input else {c: c for c in inputs}
    written = {c: i for i, c in enumerate(outputs)} if compact_output else {c: c for c in outputs}
    live = [c for c in outputs if c in read]
    lonely = tuple(c for c in outputs if c not in read)
    places = ([read[c] for c in live], [written[c] for c in live], live)
    return places, (tuple(written[c] for c in lonely), lonely), len(outputs) if compact_output else channels


def _out_size(x: Tensor, weight: Tensor, stride: _Pair, padding: _Pair, dilation: _Pair) -> list[int]:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]


# -------------------------------------------------------------------------------------------------------- the functions


def _why_not_compact(*tensors: Tensor) -> str | None:
    if _dispatch.is_watched(*tensors):
        return "has shapes that depend on the masks: compilers and tensor subclasses get full width"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "does not run inside torch.func transforms (vmap, grad, jvp)"
    return None


def _check_lists(op: str, keeps: dict[str, tuple[Keep, int]], x: Tensor, *tensors: Tensor) -> None:
    """Check the lists for the reference: their values only where nobody traces."""
    for name, (keep, channels) in keeps.items():
        if _why_not_compact(x, *tensors) is None:
            _kept(op, name, keep, channels, x.device)
        elif isinstance(keep, Tensor):
            _check_keep(op, name, keep, channels, x.device)


def _choose(op: str, backend: str | None, why_not_cpu: str | None, *tensors: Tensor) -> str:
    """Name the body that runs: cpu, compact or reference.

    Raises:
        BackendError: If the one asked for does not exist or cannot run this call.
    """
    compact = _why_not_compact(*tensors)
    reasons = {"cpu": compact or why_not_cpu, "compact": compact, "reference": None}
    if backend is None:
        return next(name for name, reason in reasons.items() if reason is None)
    if backend not in reasons:
        raise BackendError(f"{op}: unknown backend {backend!r}; choose one of {', '.join(reasons)}")
    if reasons[backend]:
        raise BackendError(f"{op}: backend {backend!r} {reasons[backend]}")
    return backend


def _explain(op: str, *args: Any) -> str:
    tensors = [a for a in args if isinstance(a, Tensor)]
    compact = "compact (the library's kernels on weights without masked channels)"
    if reason := _why_not_compact(*tensors):
        return f"{op}: reference\n  not cpu: {reason}\n  not compact: {reason}"
    numbers = [a for a in args if isinstance(a, int)]
    if op == "masked_linear" or len(tensors) < 2:
        return f"{op}: {compact}\n  not cpu: is for depthwise layers\n  not reference: comes later in the order"
    x, weight = tensors[:2]
    groups = numbers[-1] if len(args) > 6 else 1
    if reason := _depthwise.why_not(x, weight, None, groups):
        return f"{op}: {compact}\n  not cpu: {reason}\n  not reference: comes later in the order"
    return f"{op}: cpu ({_dispatch._native().current_isa()})\n  not compact, reference: come later in the order"  # type: ignore[union-attr]


for _name in ("masked_conv2d", "masked_linear"):
    _dispatch.EXPLAINERS[_name] = _explain


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    out_keep: Keep = None,
    in_keep: Keep = None,
    compact_input: bool = False,
    compact_output: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""A convolution of which only some channels are alive: as if the others were removed, at the cost of the rest.

    y = conv2d(x * in_mask, weight, bias) * out_mask, but masked channels are neither read nor computed, whatever they
    hold (NaN as well), and all gradients of theirs are exactly zero. Any set may be kept: groups may have different
    numbers of live channels, none at all (a group without live inputs gives its bias), or all.

    Args:
        x: Input, shape ``(N, C_in, H, W)``, contiguous or channels-last; the result has the same memory format.
        weight: Weight at full width, shape ``(C_out, C_in / groups, kH, kW)``.
        bias: Bias at full width, shape ``(C_out,)``.
        stride: As in ``torch.nn.functional.conv2d``.
        padding: As there; ``"same"`` pads one more at the end where kernels are even.
        dilation: As there.
        groups: As there; divides C_in and C_out.
        out_keep: Live output channels: a bool mask ``(C_out,)`` or increasing indices; ``None``: all. Indices are read
            once for each version of a tensor.
        in_keep: Live input channels, likewise.
        compact_input: ``x`` holds the live channels only, in order: shape ``(N, len(in_keep), H, W)``. Between coupled
            layers this saves the copy that taking them out costs.
        compact_output: So shall the result.
        backend: ``None`` (the first that can run), ``"cpu"`` (depthwise layers), ``"compact"`` or ``"reference"``; see
            :func:`explain_backend`.

    Returns:
        Shape ``(N, C_out, H_out, W_out)``, masked channels exactly 0; with ``compact_output`` the live ones only.

    Raises:
        ShapeError: If shapes, devices or channel lists do not fit.

    Example:
        >>> import torch
        >>> x, weight = torch.ones(1, 3, 1, 1), torch.ones(2, 3, 1, 1)
        >>> masked_conv2d(x, weight, in_keep=[0, 2], out_keep=[1]).flatten().tolist()
        [0.0, 2.0]
    """
    op = "masked_conv2d"
    if x.dim() != 4 or weight.dim() != 4:
        raise ShapeError(f"{op}: expected input (N, C, H, W) and weight of 4 dims, got {x.dim()} and {weight.dim()}")
    if groups < 1 or weight.shape[0] % groups:
        raise ShapeError(f"{op}: groups={groups} does not divide {weight.shape[0]} output channels")
    in_channels = weight.shape[1] * groups
    x, padding = _explicit_padding(op, x, weight, stride, padding, dilation)
    geometry = (_pair(op, "stride", stride, 1), padding, _pair(op, "dilation", dilation, 1), groups)
    if min(_out_size(x, weight, *geometry[:3])) < 1:
        raise ShapeError(
            f"{op}: a kernel of {tuple(weight.shape[2:])} with dilation {geometry[2]} does not fit an input of shape "
            f"{tuple(x.shape)} with padding {geometry[1]}"
        )
    tensors = [t for t in (x, weight, bias) if t is not None]
    chosen = _choose(op, backend, _depthwise.why_not(x, weight, bias, groups), *tensors)
    if chosen != "reference":
        outputs = _kept(op, "out_keep", out_keep, weight.shape[0], x.device)
        inputs = _kept(op, "in_keep", in_keep, in_channels, x.device)
        live = None if not compact_input or inputs is None else len(inputs)
        _check_input(op, x, weight, bias, in_channels, live)
        if outputs is None and inputs is None and backend is None:
            return F.conv2d(x, weight, bias, *geometry)
        body = _native_depthwise if chosen == "cpu" else _compact_conv2d
        return body(x, weight, bias, outputs, inputs, geometry, compact_input, compact_output)
    _check_lists(op, {"out_keep": (out_keep, weight.shape[0]), "in_keep": (in_keep, in_channels)}, *tensors)
    x = _widen(x, 1, in_keep, in_channels) if compact_input else x
    _check_input(op, x, weight, bias, in_channels, None)
    y = masked_conv2d_reference(x, weight, bias, out_keep, in_keep, geometry)
    return _narrow(y, 1, out_keep) if compact_output else y


def _explicit_padding(
    op: str, x: Tensor, weight: Tensor, stride: Any, padding: int | Sequence[int] | str, dilation: Any
) -> tuple[Tensor, _Pair]:
    """Padding as two numbers; what is not the same on both sides is done here.

    Raises:
        ShapeError: If the padding is neither numbers nor a known word.
    """
    if not isinstance(padding, str):
        return x, _pair(op, "padding", padding, 0)
    if padding == "valid":
        return x, (0, 0)
    if padding != "same" or _pair(op, "stride", stride, 1) != (1, 1):
        raise ShapeError(f"{op}: padding must be numbers, 'valid', or 'same' with stride 1, got {padding!r}")
    dilated = _pair(op, "dilation", dilation, 1)
    total = [d * (k - 1) for d, k in zip(dilated, weight.shape[2:], strict=True)]
    if all(t % 2 == 0 for t in total):
        return x, (total[0] // 2, total[1] // 2)
    top, left = (t // 2 for t in total)
    return F.pad(x, (left, total[1] - left, top, total[0] - top)), (0, 0)


def _widen(x: Tensor, dim: int, keep: Keep, channels: int) -> Tensor:
    """A compact input at full width."""
    if keep is None:
        return x
    index = _narrow_index(keep, x)
    if x.shape[dim] != len(index):
        return x  # the check that follows says so
    shape = list(x.shape)
    shape[dim] = channels
    return torch.zeros(shape, dtype=x.dtype, device=x.device).index_copy(dim, index, x)


def _narrow(y: Tensor, dim: int, keep: Keep) -> Tensor:
    return y if keep is None else y.index_select(dim, _narrow_index(keep, y))


def _narrow_index(keep: Tensor | Sequence[int], x: Tensor) -> Tensor:
    if not isinstance(keep, Tensor):
        return torch.tensor(tuple(keep), dtype=torch.int64, device=x.device)
    return keep.nonzero().flatten() if keep.dtype == torch.bool else keep.long()


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_keep: Keep = None,
    in_keep: Keep = None,
    compact_input: bool = False,
    compact_output: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A linear layer of which only some features are alive; the meaning is that of :func:`masked_conv2d`.

    Args:
        x: Input, shape ``(..., in_features)``.
        weight: Weight at full width, shape ``(out_features, in_features)``.
        bias: Bias at full width, shape ``(out_features,)``.
        out_keep: Live outputs: a bool mask or increasing indices; ``None``: all.
        in_keep: Live inputs, likewise.
        compact_input: ``x`` holds the live features only.
        compact_output: So shall the result.
        backend: ``None``, ``"compact"`` or ``"reference"``.

    Returns:
        Shape ``(..., out_features)``, masked features exactly 0; with ``compact_output`` the live ones only.

    Raises:
        ShapeError: If shapes, devices or lists do not fit.

    Example:
        >>> import torch
        >>> masked_linear(torch.ones(1, 3), torch.ones(2, 3), in_keep=[0, 2], out_keep=[1]).tolist()
        [[0.0, 2.0]]
    """
    op = "masked_linear"
    if weight.dim() != 2 or x.dim() < 1:
        raise ShapeError(f"{op}: expected input (..., F) and weight of 2 dims, got {x.dim()} and {weight.dim()} dims")
    out_features, in_features = weight.shape
    tensors = [t for t in (x, weight, bias) if t is not None]
    if _choose(op, backend, "is for depthwise convolutions", *tensors) == "reference":
        _check_lists(op, {"out_keep": (out_keep, out_features), "in_keep": (in_keep, in_features)}, *tensors)
        x = _widen(x, -1, in_keep, in_features) if compact_input else x
        _check_input(op, x, weight, bias, in_features, None)
        alive_out, alive_in = _alive(out_keep, out_features, x), _alive(in_keep, in_features, x)
        w = _zero_where_dead(_zero_where_dead(weight, alive_in, 1), alive_out, 0)
        b = None if bias is None else _zero_where_dead(bias, alive_out, 0)
        y = _zero_where_dead(F.linear(_zero_where_dead(x, alive_in, -1), w, b), alive_out, -1)
        return _narrow(y, -1, out_keep) if compact_output else y
    outputs = _kept(op, "out_keep", out_keep, out_features, x.device)
    inputs = _kept(op, "in_keep", in_keep, in_features, x.device)
    _check_input(op, x, weight, bias, in_features, None if not compact_input or inputs is None else len(inputs))
    if outputs is None and inputs is None:
        return F.linear(x, weight, bias)
    rows = tuple(range(out_features)) if outputs is None else outputs
    columns = tuple(range(in_features)) if inputs is None else inputs
    held = rows if compact_output else tuple(range(out_features))
    if not rows:
        return _Zeros.apply((*x.shape[:-1], len(held)), x, weight, bias)
    w = _select(_select(weight, 0, rows, None, out_features), 1, columns, None, in_features)
    b = None if bias is None else _select(bias, 0, rows, None, out_features)
    seen = _select(x, -1, columns, inputs if compact_input else None, in_features)
    return _spread([(rows, F.linear(seen, w, b))], -1, held)

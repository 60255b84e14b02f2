"""Which channels of a masked layer are alive, and where they are held: checks, and what every body reads off them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from cpd_fast.errors import ShapeError
from cpd_fast.ops import _dispatch

Keep = Tensor | Sequence[int] | None
Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Where a kernel goes."""

    stride: Pair
    padding: Pair
    dilation: Pair

    def out_size(self, x: Tensor, weight: Tensor) -> list[int]:
        """Height and width of the result."""
        sizes = zip(x.shape[2:], weight.shape[2:], *self, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]


class Bucket(NamedTuple):
    """Groups with equal numbers of live channels, as one grouped convolution."""

    groups: int
    weight_rows: tuple[int, ...]  # of the full weight, group after group
    weight_columns: tuple[int, ...]  # for every row its columns, flattened; empty where all are read
    inputs: tuple[int, ...]  # channels of the full input
    read: tuple[int, ...]  # where the input holds them
    outputs: tuple[int, ...]  # channels of the full output
    written: tuple[int, ...]  # where the result holds them


class Planes(NamedTuple):
    """Planes of a depthwise layer."""

    places: tuple[list[int], list[int], list[int]]  # of those that are convolved: in the input, the result, the weight
    lonely: tuple[int, ...]  # outputs without a live input, of the full output
    written: tuple[int, ...]  # where the result holds those


@dataclass(frozen=True, eq=False)
class Channels:
    """The live channels of a layer; those a compact tensor holds are its live ones in order.

    Attributes:
        outputs: Live output channels, increasing.
        inputs: Live input channels, increasing.
        out_channels: Output channels at full width.
        in_channels: Input channels at full width.
        groups: Convolution groups.
        compact_input: The input holds the live channels only.
        compact_output: So shall the result.
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    out_channels: int
    in_channels: int
    groups: int = 1
    compact_input: bool = False
    compact_output: bool = False

    @functools.cached_property
    def present(self) -> tuple[int, ...]:
        """The channels that the input holds."""
        return self.inputs if self.compact_input else tuple(range(self.in_channels))

    @functools.cached_property
    def held(self) -> tuple[int, ...]:
        """The channels that the result holds."""
        return self.outputs if self.compact_output else tuple(range(self.out_channels))

    @functools.cached_property
    def members(self) -> list[tuple[list[int], list[int]]]:
        """Live outputs and live inputs of every group."""
        per_out, per_in = self.out_channels // self.groups, self.in_channels // self.groups
        found: list[tuple[list[int], list[int]]] = [([], []) for _ in range(self.groups)]
        for i in self.outputs:
            found[i // per_out][0].append(i)
        for i in self.inputs:
            found[i // per_in][1].append(i)
        return found

    @functools.cached_property
    def _at(self) -> tuple[dict[int, int], dict[int, int]]:
        """Where the input and the result hold their channels."""
        read, written = ({c: i for i, c in enumerate(channels)} for channels in (self.present, self.held))
        return read, written

    @functools.cached_property
    def planes(self) -> Planes:
        """Of a layer with a group for each channel: the planes that are convolved, and those that are not."""
        read, written = self._at
        alive = set(self.inputs)
        live = [c for c in self.outputs if c in alive]
        lonely = [c for c in self.outputs if c not in alive]
        return Planes(
            ([read[c] for c in live], [written[c] for c in live], live),
            tuple(lonely),
            tuple(written[c] for c in lonely),
        )

    @functools.cached_property
    def buckets(self) -> list[Bucket]:
        """The live part of every group, those of equal shape together; groups without live outputs are left out."""
        per_in = self.in_channels // self.groups
        read, written = self._at
        shapes: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {}
        for rows, columns in self.members:
            if rows:
                shapes.setdefault((len(rows), len(columns)), []).append((rows, columns))
        return [
            Bucket(
                len(groups),
                tuple(i for rows, _ in groups for i in rows),
                () if n_in == per_in else tuple(i % per_in for rows, found in groups for _ in rows for i in found),
                tuple(i for _, found in groups for i in found),
                tuple(read[i] for _, found in groups for i in found),
                tuple(i for rows, _ in groups for i in rows),
                tuple(written[i] for rows, _ in groups for i in rows),
            )
            for (_, n_in), groups in shapes.items()
        ]


@functools.lru_cache(maxsize=1024)
def channels_of(
    outputs: tuple[int, ...] | None,
    inputs: tuple[int, ...] | None,
    out_channels: int,
    in_channels: int,
    groups: int,
    compact_input: bool,
    compact_output: bool,
) -> Channels:
    """The same object for the same channels, so that what is read off them is made once; None is all."""
    everything = [range(n) if found is None else found for found, n in ((outputs, out_channels), (inputs, in_channels))]
    return Channels(
        tuple(everything[0]), tuple(everything[1]), out_channels, in_channels, groups, compact_input, compact_output
    )


@functools.lru_cache(maxsize=4096)
def index_of(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Channel indices as a tensor."""
    return torch.tensor(indices, dtype=torch.int64, device=device)


# -------------------------------------------------------------------------------------------------------------- checks

_lists: Any = WeakIdKeyDictionary()  # an index or mask tensor -> (its version, its indices): one wait for a GPU each


def kept(op: str, name: str, keep: Keep, channels: int, device: torch.device) -> tuple[int, ...] | None:
    """The kept channels in order; None where all are kept.

    Raises:
        ShapeError: If a mask has another length, or indices are out of range or not increasing.
    """
    if keep is None:
        return None
    if not isinstance(keep, Tensor):
        found = tuple(int(i) for i in keep)
    else:
        check_keep(op, name, keep, channels, device)
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


def why_not_compact(*tensors: Tensor) -> str | None:
    """Why bodies whose shapes depend on the masks cannot run."""
    if _dispatch.is_watched(*tensors):
        return "has shapes that depend on the masks: compilers and tensor subclasses get full width"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "does not run inside torch.func transforms (vmap, grad, jvp)"
    return None


def check_groups(op: str, weight: Tensor, groups: int) -> None:
    """Check that the output channels divide among the groups.

    Raises:
        ShapeError: If they do not.
    """
    if groups < 1 or weight.shape[0] % groups:
        raise ShapeError(f"{op}: groups={groups} does not divide {weight.shape[0]} output channels")


def check_lists(op: str, keeps: dict[str, tuple[Keep, int]], x: Tensor, *tensors: Tensor) -> None:
    """Check lists and their channels for the reference: values only where nobody traces."""
    for name, (keep, channels) in keeps.items():
        if why_not_compact(x, *tensors) is None:
            kept(op, name, keep, channels, x.device)
        elif isinstance(keep, Tensor):
            check_keep(op, name, keep, channels, x.device)


def check_keep(op: str, name: str, keep: Tensor, channels: int, device: torch.device) -> None:
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


def pair_of(op: str, name: str, value: int | Sequence[int], least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ShapeError(f"{op}: {name} must be one or two numbers >= {least}, got {value}")
    return pair  # type: ignore[return-value]


def check_input(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, channels: int, live: int | None) -> None:
    """Check what both ops share; ``live`` is the number of channels of a compact input.

    Raises:
        ShapeError: If the input, the bias or a device does not fit the weight.
    """
    expected = channels if live is None else live
    dim = -1 if op == "masked_linear" else 1
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

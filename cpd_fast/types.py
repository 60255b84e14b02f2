"""Frozen data that crosses rooms: graph, scores, plan, cost.

A *channel* is the smallest set of tensor indices that go together; a *coupled group* is a
set of interchangeable channels, i.e. channels that own slices of the same tensors; a *plan* lists the kept channels
of each group. Inside a :class:`ChannelGraph` every channel has one global id, ``group.offset + index``, and every
tensor that depends on channels is described by *channel maps*: integer arrays that broadcast to the tensor's shape
and hold the global id of the channel an element belongs to, ``-1`` where it belongs to none. An element survives a
plan when every one of its maps says so. Masks, compaction, scores and costs all read these maps and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cpd_fast import describe
from cpd_fast.errors import FileFormatError, PlanError, ScoreError

# functions whose result depends on how many channels there are, and which masked execution can run over kept ones
NORMALISING = frozenset(
    "layer_norm rms_norm group_norm batch_norm mean sum norm var std softmax log_softmax logsumexp normalize "
    "amax amin max min linalg_vector_norm cosine_similarity softmin".split()
)
# products whose first argument a masked execution can clear where channels are removed
PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "linear", "scaled_dot_product_attention"})

PLAN_FORMAT = "cpd_fast.plan"
PLAN_VERSION = 1


@dataclass(frozen=True, eq=False)
class ParamSlice:
    """The part of one tensor that each channel of a group owns.

    Attributes:
        param: Qualified name of a parameter or buffer (tied tensors appear once, under their first name).
        dims: Dims of the tensor that ``index`` runs over; one dim for all but grouped convolutions, whose input
            channels own (row, column) pairs: there ``dims == (0, 1)``.
        index: Positions in the row-major flattening of ``dims``, int64, shape ``(n_channels, k)``.
        produces: True where the tensor produces the channel (rows out: weights' output dim, bias, norm scale and
            shift), False where it consumes it (columns in).
    """

    param: str
    dims: tuple[int, ...]
    index: np.ndarray
    produces: bool

    @property
    def dim(self) -> int:
        """The only dim, for slices that have one; the last (the column) dim otherwise."""
        return self.dims[-1]


@dataclass(frozen=True, eq=False)
class CoupledGroup:
    """Interchangeable channels: each owns equally many indices of the same tensors.

    Attributes:
        name: Unique; the root's name, with ``#2``, ``#3`` where one layer roots several groups.
        root: Qualified name of the module (or parameter) that first produces the channels.
        n_channels: How many channels.
        offset: Global id of channel 0.
        slices: What each channel owns, one entry a tensor and dim.
        balance: ``None``, or block number of every channel, int64 ``(n_channels,)``: all blocks must keep equally
            many channels (conv groups, heads, GroupNorm groups). Blocks have equal sizes.
        tie: ``None``, or a key shared by groups whose blocks must all keep the same number (the q/k dims and the v
            dims of one attention).
        prunable: Whether channels may be removed at all.
        reason: Why not, when ``prunable`` is False.
    """

    name: str
    root: str
    n_channels: int
    offset: int
    slices: tuple[ParamSlice, ...]
    balance: np.ndarray | None = None
    tie: str | None = None
    prunable: bool = True
    reason: str | None = None

    @property
    def blocks(self) -> tuple[np.ndarray, ...]:
        """The channels of every balance block; one block with all channels where there is no balance."""
        if self.balance is None:
            return (np.arange(self.n_channels),)
        return tuple(np.flatnonzero(self.balance == b) for b in range(int(self.balance.max()) + 1))


@dataclass(frozen=True, eq=False)
class TensorMap:
    """How one parameter or buffer depends on channels: see the module's text on channel maps.

    ``masked`` is False where another factor of the same product carries the mask (the direction of a weight_norm).
    """

    name: str
    shape: tuple[int, ...]
    maps: tuple[np.ndarray, ...]
    is_parameter: bool = True
    masked: bool = True


@dataclass(frozen=True, eq=False)
class CostTerm:
    """``coefficient * (number of surviving positions of the joint box of maps)`` MACs or bytes."""

    kind: str  # "macs" or "activation_bytes"
    module: str
    coefficient: int
    maps: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class TraceStep:
    """One computing call of the traced forward; compaction must repeat it, with the shape that the plan leaves.

    Attributes:
        op: Name of the operator, or ``call M`` for the first input of module M.
        module: Qualified name of the module whose forward runs.
        shape: Shape of its first output.
        maps: Channel maps that broadcast to ``shape``.
        constants: Its numbers (scales, epsilons, group counts), which must stay.
        rows: ``(tensor name, rows)`` whose scaling makes up for a first constant that follows a size.
        loose: Dims along which elements repeat: how long they are shows where they meet others.
    """

    op: str
    module: str
    shape: tuple[int, ...]
    maps: tuple[np.ndarray, ...]
    constants: tuple[float, ...]
    rows: tuple[tuple[str, np.ndarray], ...]
    loose: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class NormSite:
    """A call whose result depends on how many channels there are (one of ``NORMALISING`` or ``PRODUCTS``).

    ``op`` is the ``__name__`` of the function, ``call`` counts its calls with ``module`` innermost during one forward
    of the model; ``channels`` is a channel map that broadcasts to its input.
    """

    module: str
    op: str
    call: int
    channels: np.ndarray


@dataclass(frozen=True, eq=False)
class ScaleSite:
    """An attention whose scale is 1/sqrt(head_dim): removing head dims must not change it.

    Attributes:
        module: Module whose forward calls attention.
        call: Which of the attention calls of that forward it is.
        channels: Channel map of q's last dim by head, shape ``(heads, head_dim)``.
        identity: Qualified name of an ``nn.Identity`` that q passes through (it becomes the scale), or None.
        rows: ``(tensor name, rows)`` whose scaling scales q, where there is no identity. Where there are none
            either, the scale is put into the call.
    """

    module: str
    call: int
    channels: np.ndarray
    identity: str | None
    rows: tuple[tuple[str, np.ndarray], ...]


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The coupled channel groups of one model; what :func:`cpd_fast.comb` returns.

    Plain data without live modules: it can be kept while the model trains, and used for any model of the same
    structure (``fingerprint``).
    """

    groups: tuple[CoupledGroup, ...]
    tensors: Mapping[str, TensorMap]
    terms: tuple[CostTerm, ...]
    steps: tuple[TraceStep, ...]
    norm_sites: tuple[NormSite, ...]
    scale_sites: tuple[ScaleSite, ...]
    aliases: Mapping[str, str]  # every name of a tied tensor -> the first one
    fingerprint: str
    inputs: tuple[tuple[Any, ...], dict[str, Any]]  # example args and kwargs, tensors on the meta device
    output_shapes: tuple[tuple[int, ...], ...]
    untouched: int  # parameters that no channel map describes
    needs_hooks: bool = False  # whether the forward relies on hooks of its own
    heads: bool = False  # whether channels of attention are whole heads
    hopes: frozenset[str] = frozenset()  # modules in which slices were taken to follow the channels
    unused: tuple[str, ...] = ()  # parameters that the forward never reads: they keep their shapes
    options: Mapping[str, Any] = field(default_factory=dict)  # what comb must be told to find the same groups again
    _by_name: dict[str, CoupledGroup] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._by_name.update({g.name: g for g in self.groups})

    @property
    def n_channels(self) -> int:
        """Channels of all groups together: global ids run from 0 to here."""
        return sum(g.n_channels for g in self.groups)

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the example input tensors."""
        return tuple(tuple(t.shape) for t in tree_leaves(self.inputs) if isinstance(t, Tensor))

    @property
    def prunable_groups(self) -> tuple[CoupledGroup, ...]:
        """The groups a plan may shrink."""
        return tuple(g for g in self.groups if g.prunable)

    def __getitem__(self, name: str) -> CoupledGroup:
        try:
            return self._by_name[name]
        except KeyError:
            import difflib

            near = difflib.get_close_matches(name, self._by_name, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise PlanError(f"no coupled group is named {name!r}{hint} (print(graph) lists them)") from None

    def alive(self, plan: PrunePlan | None) -> np.ndarray:
        """Which channels a plan keeps: bool, ``(n_channels + 1,)``; the last entry answers for id -1 and is True."""
        alive = np.ones(self.n_channels + 1, bool)
        for name, kept in (plan or {}).items():
            group = self._by_name[name]
            alive[group.offset : group.offset + group.n_channels] = False
            alive[group.offset + np.asarray(kept, np.int64)] = True
        return alive

    def explain(self, param: str) -> str:
        """Say, for one parameter, buffer or module: its groups, what goes with it, what limits it, why it is frozen.

        Example:
            >>> import torch, cpd_fast as cpd
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
            >>> print(cpd.comb(net, torch.zeros(1, 3, 8, 8)).explain("0.weight"))
            0.weight (8x3x3x3):
              dim 0: produces 8 channels of 0 (prunable)
                is read by 2
              dim 1: consumes 3 channels of 0#2 (frozen: reads a model input or another axis without channels)
        """
        return describe.explain(self, param)

    def freeze(self, *items: str | nn.Module, model: nn.Module | None = None) -> ChannelGraph:
        """A graph with more groups frozen; plans of either graph fit the same model.

        Args:
            items: Names or ``fnmatch`` patterns of groups, else of modules or parameters, which keep their shapes; or
                modules of ``model``.
            model: The model, where an item is a module.

        Raises:
            PlanError: If an item matches nothing.
        """
        return describe.freeze(self, items, model, "frozen on request")

    def protect(self, *ends: str) -> ChannelGraph:
        """A graph in which the first or last layers are whole.

        Args:
            ends: ``"first"``: what the first weight of the forward produces stays; ``"last"``: what the layers read
                that make the outputs stays. In a network with residual sums that is the whole stream.

        Raises:
            PlanError: If an end is neither.
        """
        return describe.protect(self, ends)

    def as_dict(self) -> dict[str, Any]:
        """Groups, what they own and why they are frozen, as plain values for JSON."""
        return describe.as_dict(self)

    def __str__(self) -> str:
        return describe.table(self)


class Scores(Mapping[str, Tensor]):
    """Importance of every channel by group name: fp32 ``(n_channels,)`` on the CPU, larger = keep.

    ``stderr`` holds a standard error of the same shape for criteria that estimate one.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        criterion: str,
        fingerprint: str,
        stderr: Mapping[str, Tensor] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self._values = {k: v.detach().to("cpu", torch.float32) for k, v in values.items()}
        for name, v in self._values.items():
            bad = ~torch.isfinite(v)
            if bad.any():
                where = bad.nonzero()[:3].flatten().tolist()
                grown = bool(torch.isfinite(values[name]).all())
                advice = (
                    "they have grown beyond what fp32 holds: training diverges, or gradients are still scaled by a "
                    "GradScaler (call scaler.unscale_(optimizer) first)"
                    if grown
                    else "check the loss and the batches for NaN"
                )
                raise ScoreError(
                    f"{criterion}: {int(bad.sum())} of {v.numel()} scores of group {name} are not finite "
                    f"(channels {where} ...); {advice}"
                )
        self.criterion = criterion
        self.fingerprint = fingerprint
        self.stderr = dict(stderr or {})
        self.info = dict(info or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        engine = f" by {self.info['engine']} ({self.info.get('engine_reason')})" if "engine" in self.info else ""
        channels = sum(v.numel() for v in self._values.values())
        return f"Scores({self.criterion}{engine}, {len(self)} groups, {channels} channels)"


class PrunePlan(Mapping[str, tuple[int, ...]]):
    """The kept channels of each group: group name -> sorted indices. A group that is absent keeps everything.

    Pure data: comparable, hashable, saved as JSON, replayed on a fresh model of the same structure.
    """

    def __init__(self, kept: Mapping[str, Any], fingerprint: str) -> None:
        clean: dict[str, tuple[int, ...]] = {}
        for name, indices in kept.items():
            try:
                idx = [int(i) for i in indices]
            except (TypeError, ValueError) as e:
                raise PlanError(f"plan: group {name!r}: expected a list of channel indices, got {indices!r}") from e
            if idx != sorted(set(idx)) or (idx and idx[0] < 0):
                raise PlanError(f"plan: group {name!r}: kept channels must be sorted, unique and >= 0")
            clean[str(name)] = tuple(idx)
        self._kept = clean
        self.fingerprint = str(fingerprint)

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrunePlan) and (self._kept, self.fingerprint) == (other._kept, other.fingerprint)

    def __hash__(self) -> int:
        return hash((self.fingerprint, tuple(sorted(self._kept.items()))))

    def __repr__(self) -> str:
        return f"PrunePlan({len(self)} groups, {sum(map(len, self._kept.values()))} channels kept)"

    def check(self, graph: ChannelGraph) -> None:
        """Find out whether this plan can be applied to ``graph``.

        Raises:
            PlanError: If it cannot; says which group and what to keep.
        """
        if self.fingerprint != graph.fingerprint:
            raise PlanError(
                f"plan of another model: plan has fingerprint {self.fingerprint}, model has {graph.fingerprint}; "
                "make the plan from this model's graph"
            )
        tied: dict[str, tuple[str, int]] = {}
        for name, kept in self.items():
            group = graph[name]
            if not kept:
                raise PlanError(f"{name}: the plan keeps no channel; keep at least one of {group.n_channels}")
            if kept[-1] >= group.n_channels:
                raise PlanError(f"{name}: channel {kept[-1]} is out of range, the group has {group.n_channels}")
            if len(kept) < group.n_channels and not group.prunable:
                raise PlanError(f"{name}: {group.n_channels - len(kept)} channels removed but frozen: {group.reason}")
        for group in graph.groups:
            if group.balance is None and group.tie is None:
                continue
            kept = self.get(group.name, tuple(range(group.n_channels)))
            balance = np.zeros(group.n_channels, np.int64) if group.balance is None else group.balance
            counts = np.bincount(balance[list(kept)], minlength=int(balance.max()) + 1)
            if counts.min() != counts.max():
                raise PlanError(
                    f"{group.name}: its {len(counts)} blocks (conv groups, heads) must keep equally many channels, "
                    f"got {counts.tolist()[:16]}; remove the same number from each"
                )
            if group.tie is not None:
                other, count = tied.setdefault(group.tie, (group.name, int(counts[0])))
                if count != counts[0]:
                    raise PlanError(
                        f"{group.name}: must keep as many channels a block as {other}, got {counts[0]} and {count}"
                    )

    def to_json(self) -> str:
        """The plan as a JSON document."""
        return json.dumps(
            {"format": PLAN_FORMAT, "version": PLAN_VERSION, "fingerprint": self.fingerprint, "kept": self._kept},
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> PrunePlan:
        """Parse what :meth:`to_json` wrote.

        Raises:
            FileFormatError: On anything else.
        """
        try:
            doc = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise FileFormatError(f"{where}: not a JSON document ({e})") from e
        if not isinstance(doc, dict) or doc.get("format") != PLAN_FORMAT:
            raise FileFormatError(f"{where}: not a cpd_fast plan (no format {PLAN_FORMAT!r})")
        if doc.get("version") != PLAN_VERSION:
            raise FileFormatError(
                f"{where}: plan version {doc.get('version')!r}, this cpd_fast reads {PLAN_VERSION}; upgrade cpd_fast"
            )
        kept = doc.get("kept")
        if not isinstance(kept, dict) or not all(
            isinstance(v, list) and all(type(i) is int for i in v) for v in kept.values()
        ):
            raise FileFormatError(f"{where}: 'kept' must map group names to lists of channels (whole numbers)")
        try:
            return cls(kept, str(doc.get("fingerprint")))
        except PlanError as e:
            raise FileFormatError(f"{where}: {e}") from e

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(self.to_json())
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrunePlan:
        """Read a plan.

        Raises:
            FileFormatError: When the file is not one.
        """
        try:
            text = Path(path).read_text()
        except UnicodeDecodeError as e:
            raise FileFormatError(f"{path}: not a JSON document ({e})") from e
        return cls.from_json(text, str(path))


@dataclass(frozen=True)
class Target:
    """What may REMAIN after pruning: a fraction in (0, 1] of the dense model, or an absolute number above 1.

    Attributes:
        params: Parameters.
        macs: Multiply-accumulates of one forward at the example input.
        memory: Activation bytes of one forward at the example input.
        latency_ms: Milliseconds of one forward (needs a latency table).
    """

    params: float | None = None
    macs: float | None = None
    memory: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        given = self.given
        if not given:
            raise PlanError("Target: give at least one of params, macs, memory, latency_ms; e.g. Target(macs=0.5)")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise PlanError(
                    f"Target({name}={value!r}): expected a fraction in (0, 1] that remains, "
                    "or an absolute number above 1"
                )

    @property
    def given(self) -> dict[str, float]:
        """The limits that were set."""
        names = ("params", "macs", "memory", "latency_ms")
        return {n: v for n in names if (v := getattr(self, n)) is not None}


@dataclass(frozen=True)
class Cost:
    """What one forward of a model costs at a stated input.

    Attributes:
        params: Number of parameters (tied ones once).
        macs: Multiply-accumulates of convolutions, linears and matmuls, whole batch of the example input.
        activation_bytes: Bytes of the results of all computing (non-view) ops.
    """

    params: int
    macs: int
    activation_bytes: int

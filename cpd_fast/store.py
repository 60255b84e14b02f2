"""Save a compacted network and rebuild it on a freshly constructed original: safetensors and JSON, never pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from cpd_fast.compact import Scale, compact, kept_shape
from cpd_fast.errors import CpdError, FileFormatError, PlanError, TraceError
from cpd_fast.pipeline import comb
from cpd_fast.types import ChannelGraph, PrunePlan

FORMAT = "cpd_fast.network"
VERSION = 1
META = "cpd_fast"  # key of the safetensors metadata that holds ours
MAX_INPUT_ELEMENTS = 1 << 28  # a file may not ask for more example input than this, in each tensor ...
MAX_INPUT_DIMS = 16
MAX_INPUTS = 256  # ... nor for more of them
DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


def save(
    path: str | os.PathLike[str], small: nn.Module, graph: ChannelGraph, plan: PrunePlan, example_inputs: Any = None
) -> None:
    """Write a compacted network to one safetensors file that holds weights, plan, fingerprint and format version.

    Args:
        path: The file, by custom ``*.safetensors``. Written atomically.
        small: What :func:`cpd_fast.compact` returned, trained further or not.
        graph: The graph of the original.
        plan: The plan that made ``small`` from the original.
        example_inputs: The inputs that ``graph`` was combed with (tensor, tuple, list or dict). Only their shapes and
            dtypes are stored, for :func:`load`. Default: fp32 tensors of the shapes in ``graph``.

    Raises:
        PlanError: If ``plan`` does not fit ``graph``, or ``small`` is not what it leaves.
        FileFormatError: If the file cannot be written.

    Example:
        >>> import tempfile, cpd_fast as cpd
        >>> net = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
        >>> x = torch.zeros(1, 3, 6, 6)
        >>> model = net()
        >>> graph = cpd.comb(model, x)
        >>> plan = cpd.random_plan(graph, keep=0.5)
        >>> path = tempfile.mkdtemp() + "/small.safetensors"
        >>> small = cpd.compact(model, graph, plan)
        >>> save(path, small, graph, plan)
        >>> torch.equal(load(path, net())(x), small(x))
        True
    """
    plan.check(graph)
    _check_shapes(small, graph, plan)
    names = {name: t for name, t in small.state_dict().items() if graph.aliases.get(name, name) == name}
    inputs = _spec_of_shapes(graph.input_shapes) if example_inputs is None else _spec(example_inputs)
    head = {"fingerprint": graph.fingerprint, "plan": plan.to_json(), "inputs": inputs, "scales": _scales(small)}
    head |= {"comb": dict(graph.options)} if graph.options else {}
    data = pack_tensors(names, head, FORMAT, VERSION)
    try:
        write_atomically(Path(path), data)
    except OSError as e:
        raise FileFormatError(f"{path}: cannot be written ({e.strerror or e})") from e


def _check_shapes(small: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> None:
    """Find out now, and not when the file is loaded, that a network has other shapes than its plan says.

    Raises:
        PlanError: If it has.
    """
    alive = graph.alive(plan)
    own = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    for name, t in graph.tensors.items():
        wanted = kept_shape(t, alive)
        got = tuple(own[name].shape) if name in own else None
        if got != wanted:
            has = "does not have it" if got is None else f"has {got}"
            raise PlanError(
                f"{name}: the plan leaves shape {wanted}, {type(small).__name__} {has}; save what compact returned "
                "for this plan (compose_plans makes one plan of two)"
            )


def _scales(model: nn.Module) -> dict[str, float]:
    """The constants that compaction put in to keep attention scales: they are in no state dict."""
    return {name: m.factor for name, m in model.named_modules() if isinstance(m, Scale)}


def load(
    path: str | os.PathLike[str],
    fresh_model: nn.Module,
    example_inputs: Any = None,
    graph: ChannelGraph | None = None,
) -> nn.Module:
    """Rebuild a compacted network: comb a freshly built original, compact it by the stored plan, load the weights.

    Runs no code from the file. ``fresh_model`` is left as it is; its weights do not matter.

    Args:
        path: What :func:`save` wrote.
        fresh_model: The original architecture, at its original widths.
        example_inputs: Inputs to comb with; default: tensors of the stored shapes and dtypes, without memory.
        graph: Graph of ``fresh_model``, if at hand: saves the trace. Options that comb was given (``ignore``,
            ``on_unknown``, ``granularity``, ``conv_groups``) are in the file.

    Returns:
        The compacted network in ``fresh_model``'s mode, on its device.

    Raises:
        FileFormatError: If the file is missing, corrupt, truncated, from a future version, or of another model.
        UnsupportedOpError: If the model holds an operator without a rule; pass the ``graph`` then.
    """
    where = str(path)
    tensors, head = read_tensors(Path(path), FORMAT, VERSION)
    plan = PrunePlan.from_json(str(head.get("plan")), f"{where}: plan")
    if graph is None:
        graph = _comb_again(fresh_model, example_inputs, head, where)
    if graph.fingerprint != head.get("fingerprint"):
        raise FileFormatError(
            f"{where}: belongs to another model: the file has fingerprint {head.get('fingerprint')}, "
            f"{type(fresh_model).__name__} has {graph.fingerprint}; build the model as it was before pruning"
        )
    try:
        small = compact(fresh_model, graph, plan)
    except CpdError as e:
        raise FileFormatError(f"{where}: its plan does not fit {type(fresh_model).__name__}: {e}") from e
    _load_strictly(small, tensors, graph.aliases, where)
    _check_scales(small, head.get("scales", {}), where)
    return small


def _comb_again(model: nn.Module, example_inputs: Any, head: Mapping[str, Any], where: str) -> ChannelGraph:
    options = head.get("comb", {})
    if not isinstance(options, dict) or not options.keys() <= {"ignore", "on_unknown", "granularity", "conv_groups"}:
        raise FileFormatError(f"{where}: the options of its comb cannot be read; pass graph")
    ignore = options.pop("ignore", [])
    if not isinstance(ignore, list) or not all(isinstance(v, str) for v in [*ignore, *options.values()]):
        raise FileFormatError(f"{where}: the options of its comb cannot be read; pass graph")
    inputs = _without_memory(head.get("inputs"), where) if example_inputs is None else example_inputs
    try:
        return comb(model, inputs, ignore, **options)
    except (PlanError, ValueError) as e:
        raise FileFormatError(f"{where}: {type(model).__name__} cannot be combed as it was: {e}; pass graph") from e
    except TraceError as e:
        if example_inputs is not None:
            raise
        raise FileFormatError(
            f"{where}: {type(model).__name__} does not run on the example inputs of the file ({e}); "
            "build the model as it was before pruning, or pass example_inputs"
        ) from e


def _check_scales(small: nn.Module, stored: Any, where: str) -> None:
    """Attention scales that the file was saved with must be those that its plan gives; old files have none stored.

    Raises:
        FileFormatError: If one is not.
    """
    made = _scales(small)
    if not isinstance(stored, dict) or not all(isinstance(v, float) for v in stored.values()):
        raise FileFormatError(f"{where}: its attention scales cannot be read")
    for name in {**made, **stored} if stored else ():
        if abs(made.get(name, 1.0) - stored.get(name, 1.0)) > 1e-6 * made.get(name, 1.0):
            raise FileFormatError(
                f"{where}: {name}: its attention scale is {stored.get(name, 1.0):g}, the plan gives "
                f"{made.get(name, 1.0):g}; save with the plan of the original (compose_plans makes one of two)"
            )


def _load_strictly(small: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], where: str) -> None:
    """Copy ``tensors`` into ``small``; every name, shape and dtype must agree.

    Raises:
        FileFormatError: If one does not.
    """
    wanted = small.state_dict()
    state = {}
    faults = [f"{name}: not a tensor of the model" for name in tensors if name not in wanted]
    for name, want in wanted.items():
        got = tensors.get(aliases.get(name, name), tensors.get(name))
        if got is None:
            faults.append(f"{name}: missing")
        elif got.shape != want.shape or got.dtype != want.dtype:
            faults.append(f"{name}: expected {tuple(want.shape)} {want.dtype}, got {tuple(got.shape)} {got.dtype}")
        else:
            state[name] = got
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise FileFormatError(f"{where}: does not fit the model: {'; '.join(faults[:5])}{more}")
    small.load_state_dict(state, strict=True)


# ----------------------------------------------------------------------------------------- example inputs as JSON
def _spec(inputs: Any) -> dict[str, Any]:
    """Shapes and dtypes of example inputs.

    Raises:
        FileFormatError: If they are no tensors.
    """
    if isinstance(inputs, Tensor):
        return {"kind": "tensor", "shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if isinstance(inputs, (tuple, list)):
        return {"kind": "tuple", "items": [_spec(i) for i in inputs]}
    if isinstance(inputs, Mapping):
        return {"kind": "dict", "items": {str(k): _spec(v) for k, v in inputs.items()}}
    raise FileFormatError(f"example_inputs: expected tensors, tuples or dicts of them, got {type(inputs).__name__}")


def _spec_of_shapes(shapes: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    items = [{"kind": "tensor", "shape": list(s), "dtype": "float32"} for s in shapes]
    return items[0] if len(items) == 1 else {"kind": "tuple", "items": items}


def _without_memory(spec: Any, where: str) -> Any:
    """Example inputs of a stored spec, which is data of unknown origin, on the meta device.

    Raises:
        FileFormatError: If it is no spec, or asks for too much.
    """
    left = MAX_INPUTS

    def build(spec: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise FileFormatError(f"{where}: asks for more than {MAX_INPUTS} example inputs; pass example_inputs")
        if spec["kind"] == "tuple":
            return tuple(build(s) for s in spec["items"])
        if spec["kind"] == "dict":
            return {str(k): build(s) for k, s in spec["items"].items()}
        shape, dtype = list(spec["shape"]), DTYPES.get(spec["dtype"])
        fits = len(shape) <= MAX_INPUT_DIMS and all(type(s) is int and 0 <= s <= MAX_INPUT_ELEMENTS for s in shape)
        if dtype is None or not fits or math.prod(shape) > MAX_INPUT_ELEMENTS:
            raise FileFormatError(
                f"{where}: cannot use example inputs of shape {reprlib.repr(shape)}, "
                f"dtype {reprlib.repr(spec['dtype'])}; pass example_inputs"
            )
        return torch.empty(shape, dtype=dtype, device="meta")

    try:
        return build(spec)
    except FileFormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, OverflowError) as e:
        raise FileFormatError(f"{where}: its example inputs cannot be read ({e}); pass example_inputs") from e


# --------------------------------------------------------------------------------------- tensors and JSON in one file
def pack_tensors(tensors: Mapping[str, Tensor], head: Mapping[str, Any], kind: str, version: int) -> bytes:
    """Tensors and a JSON head as one safetensors document, with a SHA-256 over both.

    Args:
        tensors: Any dtypes and devices; each is stored in full.
        head: JSON-able.
        kind: Name of the format, checked by :func:`read_tensors`.
        version: Its version.
    """
    flat = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    text = json.dumps(dict(head), sort_keys=True)
    meta = {"format": kind, "version": version, "head": text, "sha256": _digest(flat, text)}
    return safetensors_bytes(flat, metadata={META: json.dumps(meta)})  # one key: several come out in random order


def read_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`pack_tensors` made: CPU tensors by name, and the head.

    Raises:
        FileFormatError: If the file is missing, truncated, corrupt, of another kind or from a future version.
    """
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as f:
            meta = json.loads((f.metadata() or {}).get(META, "{}"))
            found = (meta.get("format"), meta.get("version"))
            # Copies: tensors mapped from a file change with it, after they were checked or while they are used.
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()} if found == (kind, version) else {}
    except Exception as e:  # whatever the parser says of bytes that are no safetensors document, it is the file's fault
        raise FileFormatError(f"{path}: corrupt or truncated, not a safetensors file ({e})") from e
    if found[0] != kind:
        raise FileFormatError(f"{path}: expected a {kind} file, got {found[0] or 'plain safetensors'}")
    if found[1] != version:
        raise FileFormatError(f"{path}: {kind} version {found[1]}, this cpd_fast reads {version}; upgrade cpd_fast")
    text = str(meta.get("head"))
    if meta.get("sha256") != _digest(tensors, text):
        raise FileFormatError(f"{path}: corrupt: its contents do not have the SHA-256 that they were written with")
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise FileFormatError(f"{path}: its JSON head cannot be read ({e})") from e
    if not isinstance(head, dict):
        raise FileFormatError(f"{path}: its JSON head is no object")
    return tensors, head


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        sha.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        sha.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there in full or as it was before, whatever happens in between.

    Raises:
        OSError: If the folder cannot be written or is full; an old file is untouched then.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise

"""Files of unknown origin: whatever is done to one, loading it gives the network or one of our own errors, soon.

Two kinds of damage: bytes (what disks and networks do; the checksum sees it), and contents under a right checksum
(what a person does who wants a file to be believed). ``CPD_FUZZ=20`` makes twenty times as many files.
"""

import json
import os
import resource
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import CpdError, FileFormatError
from cpd_fast.store import FORMAT, VERSION, load, pack_tensors, read_tensors, save
from cpd_fast.types import PrunePlan

TIMES = int(os.environ.get("CPD_FUZZ", "1"))
X = torch.ones(1, 3, 6, 6)
SECONDS = 2.0  # that loading a file may take
MIB = 64 + 16 * TIMES  # that the process may grow by, hypothesis's own records included


def files(count):
    """So many made-up files."""
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=TIMES == 1,
    )


def fresh():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Path of a sound file, its bytes, tensors and head, and what its network computes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fuzz") / "small"
    model = fresh()
    graph = cpd.comb(model, X)
    plan = cpd.random_plan(graph, keep=0.5)
    small = cpd.compact(model, graph, plan)
    save(path, small, graph, plan)
    return path, path.read_bytes(), *read_tensors(path, FORMAT, VERSION), small(X).detach(), graph


@pytest.fixture(scope="module")
def bounded(good):
    """Memory: the high-water mark of the process may hardly rise, whatever the files ask for.

    The first input that an operator refuses makes PyTorch import its compiler, 140 MiB; that is not the file's doing.
    """
    path, _, tensors, head, *_ = good
    too_small = {"kind": "tensor", "shape": [1, 3, 1, 6], "dtype": "float32"}
    path.write_bytes(pack_tensors(tensors, {**head, "inputs": too_small}, FORMAT, VERSION))
    with pytest.raises(CpdError):
        load(path, fresh())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MIB * 1024  # KiB


def outcome(path, data, graph=None):
    """``None`` for one of our errors, or the loaded network's output; anything else escapes and fails the test."""
    path.write_bytes(data)
    began = time.process_time()
    try:
        with torch.no_grad():
            result = load(path, fresh(), graph=graph)(X)
    except CpdError:
        result = None
    assert time.process_time() - began < SECONDS
    return result


@st.composite
def damage(draw, data):
    """A few bytes replaced, removed, inserted or repeated; or the end cut off; or the header's length changed."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(out)))
        piece = draw(st.binary(min_size=1, max_size=12))
        match draw(st.integers(0, 4)):
            case 0:
                out[at : at + len(piece)] = piece
            case 1:
                del out[at : at + draw(st.integers(1, 200))]
            case 2:
                out[at:at] = piece
            case 3:
                out[at:at] = out[at : at + draw(st.integers(1, 200))]
            case 4:
                out[:8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    return bytes(out)


@files(1000)
@given(st.data())
def test_damaged_bytes(good, bounded, draw):
    path, data, _, _, expected, _ = good
    changed = draw.draw(damage(data))
    result = outcome(path, changed)
    assert result is None or result.equal(expected), "a damaged file loaded as another network"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.integers()
    | st.sampled_from([1 << 28, 1 << 40, 1 << 63, -1, 0])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([
        "tensor",
        "tuple",
        "dict",
        "float32",
        "int64",
        "complex128",
        "load",
        "__class__",
        "0",
        "3",
        "../a",
    ]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def nodes(value, at=()):
    """Every place in a JSON value."""
    yield at
    if isinstance(value, dict):
        for k in value:
            yield from nodes(value[k], (*at, k))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from nodes(value[i], (*at, i))


def replaced(value, at, new):
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = replaced(value[at[0]], at[1:], new)
    return copy


@st.composite
def forged_head(draw, head):
    """The head with one or two places replaced by anything; the plan is opened up, it is JSON inside of JSON."""
    opened = {**head, "plan": json.loads(head["plan"])}
    for _ in range(draw(st.integers(1, 2))):
        places = list(nodes(opened))
        opened = replaced(opened, draw(st.sampled_from(places)), draw(JSON))
        if not isinstance(opened, dict):
            return {"plan": json.dumps(opened)}
    closed = draw(st.booleans()) and isinstance(opened.get("plan"), str)
    return opened if closed else {**opened, "plan": json.dumps(opened.get("plan"))}


@files(300)
@given(st.data())
def test_forged_heads(good, bounded, draw):
    """A head that means something else must not load; one that means the same gives the same network."""
    path, _, tensors, head, expected, _ = good
    forged = draw.draw(forged_head(head))
    result = outcome(path, pack_tensors(tensors, forged, FORMAT, VERSION))
    if result is not None:
        assert forged["fingerprint"] == head["fingerprint"]
        assert PrunePlan.from_json(forged["plan"]) == PrunePlan.from_json(head["plan"])
        assert result.equal(expected)


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@st.composite
def forged_tensors(draw, tensors):
    """Tensors renamed, left out, added, or with another shape or dtype."""
    out = dict(tensors)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(out)))
        t = out.pop(name)
        match draw(st.integers(0, 3)):
            case 0:
                continue
            case 1:
                out[draw(st.sampled_from([*tensors, "../evil", "", "0.weight.x"]) | st.text(max_size=6))] = t
            case 2:
                out[name] = torch.zeros(draw(st.lists(st.integers(0, 5), max_size=5)))
            case 3:
                out[name] = t.to(draw(st.sampled_from(DTYPES)))
        if not out:
            break
    return out


@files(120)
@given(st.data())
def test_forged_tensors(good, bounded, draw):
    path, _, tensors, head, _, graph = good
    forged = draw.draw(forged_tensors(tensors))
    result = outcome(path, pack_tensors(forged, head, FORMAT, VERSION), graph)
    same = {k: (t.shape, t.dtype) for k, t in forged.items()} == {k: (t.shape, t.dtype) for k, t in tensors.items()}
    assert (result is not None) == same


@files(300)
@given(st.data())
def test_forged_plans(good, bounded, draw):
    """Plan files alone."""
    head = good[3]
    plan = json.loads(head["plan"])
    forged = replaced(plan, draw.draw(st.sampled_from(list(nodes(plan)))), draw.draw(JSON))
    try:
        again = PrunePlan.from_json(json.dumps(forged))
    except CpdError:
        return
    assert all(type(i) is int for kept in again.values() for i in kept)


HUGE = {
    "digits": {"kind": "tensor", "shape": [10**4000], "dtype": "float32"},
    "many dims": {"kind": "tensor", "shape": [2] * 100_000, "dtype": "float32"},
    "many inputs": {"kind": "tuple", "items": [{"kind": "tensor", "shape": [1], "dtype": "float32"}] * 10_000},
    "large": {"kind": "tensor", "shape": [1, 3, 9000, 9000], "dtype": "complex128"},
    "empty and large": {"kind": "tensor", "shape": [0, 1 << 62], "dtype": "float32"},
}


@pytest.mark.parametrize("inputs", HUGE.values(), ids=HUGE)
def test_files_that_ask_for_much(good, bounded, inputs):
    path, _, tensors, head, *_ = good
    assert outcome(path, pack_tensors(tensors, {**head, "inputs": inputs}, FORMAT, VERSION)) is None or (
        inputs["shape"][-1] == 9000  # a fully convolutional network may be combed at any size: it costs no memory
    )


def test_deep_json_is_our_error(good):
    path, _, tensors, head, *_ = good
    deep = "[" * 100_000 + "]" * 100_000
    path.write_bytes(pack_tensors(tensors, {**head, "plan": deep}, FORMAT, VERSION))
    with pytest.raises(FileFormatError, match="plan: not a JSON document"):
        load(path, fresh())

"""Save and load: the same network comes back, and nothing else is accepted."""

import json
import random

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import FileFormatError, PlanError
from cpd_fast.store import FORMAT, VERSION, load, pack_tensors, read_tensors, save, write_atomically

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def fresh(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 6, 3, bias=False),
        nn.Flatten(),
        nn.Linear(96, 2),
    ).eval()


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = fresh()
    model[1].running_mean.uniform_(-1, 1)
    graph = cpd.comb(model, X)
    plan = cpd.random_plan(graph, keep=0.5)
    small = cpd.compact(model, graph, plan)
    save(tmp_path / "small.safetensors", small, graph, plan)
    return tmp_path / "small.safetensors", small


def test_round_trip_is_exact(saved):
    path, small = saved
    model = fresh()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    again = load(path, model)
    assert again(X).equal(small(X))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_state_dict_round_trip(saved):
    """The plan rebuilds the structure, the state dict the rest: what torch.save users have."""
    model = fresh()
    graph = cpd.comb(model, X)
    other = cpd.compact(model, graph, cpd.random_plan(graph, keep=0.5))
    assert not other(X).equal(saved[1](X))
    other.load_state_dict(saved[1].state_dict())
    assert other(X).equal(saved[1](X))


def test_network_that_is_not_what_the_plan_leaves(tmp_path):
    model = fresh()
    graph = cpd.comb(model, X)
    small = cpd.compact(model, graph, cpd.random_plan(graph, keep=0.5))
    with pytest.raises(
        PlanError, match=r"0\.weight: the plan leaves shape \(2, 3, 3, 3\), Sequential has \(4, 3, 3, 3\)"
    ):
        save(tmp_path / "small", small, graph, cpd.random_plan(graph, keep=0.25))
    assert not (tmp_path / "small").exists()


def test_inputs_of_several_tensors_are_remembered(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x, ids):
            return self.b(torch.relu(self.a(x) + self.embed(ids)))

    inputs = {"x": torch.randn(2, 8), "ids": torch.zeros(2, dtype=torch.int64)}
    model = Two()
    graph = cpd.comb(model, inputs)
    plan = cpd.random_plan(graph, keep=0.5)
    small = cpd.compact(model, graph, plan)
    save(tmp_path / "two", small, graph, plan, inputs)
    assert load(tmp_path / "two", Two())(**inputs).equal(small(**inputs))


def test_another_architecture_is_refused(saved):
    with pytest.raises(FileFormatError, match="belongs to another model.*fingerprint.*as it was before pruning"):
        load(saved[0], fresh(width=12))


def test_missing_file(tmp_path):
    with pytest.raises(FileFormatError, match="no such file"):
        load(tmp_path / "nothing", fresh())


@pytest.mark.parametrize("size", [0, 4, 8, 100, 1000, -1])
def test_truncated_file(saved, size):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FileFormatError, match="corrupt or truncated"):
        load(path, fresh())


def test_flipped_bit_in_the_weights(saved):
    path, _ = saved
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="corrupt: its contents do not have the SHA-256"):
        load(path, fresh())


def test_future_version(saved):
    path, small = saved
    path.write_bytes(pack_tensors(small.state_dict(), {}, FORMAT, VERSION + 1))
    with pytest.raises(FileFormatError, match=f"version {VERSION + 1}, this cpd_fast reads {VERSION}; upgrade"):
        load(path, fresh())


def test_other_safetensors_file(tmp_path):
    (tmp_path / "plain").write_bytes(safetensors_bytes({"a": torch.zeros(2)}))
    with pytest.raises(FileFormatError, match="expected a cpd_fast.network file, got plain safetensors"):
        load(tmp_path / "plain", fresh())


def forge(path, change_tensors=lambda t: t, **head_changes):
    """A file with a right checksum and wrong contents."""
    tensors, head = read_tensors(path, FORMAT, VERSION)
    path.write_bytes(pack_tensors(change_tensors(tensors), {**head, **head_changes}, FORMAT, VERSION))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "0.bias": torch.zeros(3)}, r"0\.bias: expected \(4,\) torch\.float32, got \(3,\)"),
        (lambda t: {**t, "0.bias": t["0.bias"].double()}, r"0\.bias: expected .*float32, got .*float64"),
        (lambda t: {k: v for k, v in t.items() if k != "0.bias"}, r"0\.bias: missing"),
        (lambda t: {**t, "../evil": torch.zeros(1)}, r"\.\./evil: not a tensor of the model"),
    ],
    ids=["shape", "dtype", "missing", "extra"],
)
def test_tensors_must_fit(saved, change, message):
    forge(saved[0], change)
    with pytest.raises(FileFormatError, match=message):
        load(saved[0], fresh())


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"plan": "{}"}, "not a cpd_fast plan"),
        ({"plan": None}, "not a (JSON document|cpd_fast plan)"),
        ({"inputs": {"kind": "tensor", "shape": [1 << 40], "dtype": "float32"}}, "cannot use example inputs of shape"),
        (
            {"inputs": {"kind": "tensor", "shape": [1, 5, 6, 6], "dtype": "float32"}},
            "does not run on the example inputs",
        ),
        ({"scales": {"0": "1"}}, "attention scales cannot be read"),
        ({"inputs": {"kind": "tensor", "shape": [1], "dtype": "load"}}, "cannot use example inputs"),
        ({"inputs": 3}, "example inputs cannot be read"),
        ({"fingerprint": "x"}, "belongs to another model"),
    ],
    ids=["plan", "no-plan", "huge", "misfit", "scales", "dtype", "inputs", "fingerprint"],
)
def test_head_must_make_sense(saved, head, message):
    forge(saved[0], **head)
    with pytest.raises(FileFormatError, match=message):
        load(saved[0], fresh())


def test_plan_that_keeps_nothing_of_a_group(saved):
    _, head = read_tensors(saved[0], FORMAT, VERSION)
    plan = json.loads(head["plan"])
    plan["kept"][next(iter(plan["kept"]))] = [99]
    forge(saved[0], plan=json.dumps(plan))
    with pytest.raises(FileFormatError, match="plan does not fit Sequential.*channel 99 is out of range"):
        load(saved[0], fresh())


def test_random_damage_raises_only_our_errors(saved):
    path, small = saved
    data = path.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged if rng.random() < 0.7 else damaged[: rng.randrange(len(damaged))])
        try:
            assert load(path, fresh())(X).equal(small(X))  # a byte that was replaced by itself
        except FileFormatError:
            pass


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]

"""rademacher, fill_rademacher_ and perturb_: published vectors, the frozen layout, the same bits on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cpd_fast.errors import BackendError, ShapeError
from cpd_fast.ops import _philox, fill_rademacher_, perturb_, rademacher

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BACKENDS = ["reference", "cpu", "triton"]

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output.
PUBLISHED = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def independent_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 from the paper, with Python's integers."""
    c, k = list(counter), list(key)
    for r in range(10):
        if r:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return c


def independent_signs(n: int, seed: int, probe: int, tensor: int) -> np.ndarray:
    """The frozen layout, an element at a time."""
    key, out = [seed % 2**32, seed // 2**32], np.empty(n)
    for i in range(n):
        word = independent_philox([i // 128, tensor, probe, 0], key)[i % 128 // 32]
        out[i] = -1 if word >> i % 32 & 1 else 1
    return out


@pytest.mark.parametrize(("counter", "key", "output"), PUBLISHED)
def test_published_vectors(counter, key, output):
    assert independent_philox(counter, key) == output
    assert list(_philox.philox(tuple(counter), tuple(key))) == output
    as_tensors = _philox.philox(tuple(torch.tensor([x]) for x in counter), tuple(key))
    assert [int(x) for x in as_tensors] == output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("seed", "probe", "tensor"), [(0, 0, 0), (2**63 - 1, 2**32 - 1, 2**32 - 1), (123456789012345, 7, 160)]
)
def test_the_frozen_layout(backend, seed, probe, tensor):
    got = rademacher(torch.empty(300), seed, probe, tensor, backend=backend)
    assert np.array_equal(got.numpy(), independent_signs(300, seed, probe, tensor))


def test_golden_values():
    """Scores saved with one version must be made again by the next: these words never change."""
    got = rademacher(torch.empty(256), seed=2021, probe=3, tensor=5) < 0
    words = (got.view(8, 32) * 2 ** torch.arange(32)).sum(1)
    assert [hex(w) for w in words.tolist()] == GOLDEN


GOLDEN = [
    "0xd3042509",
    "0x59995325",
    "0xa774e661",
    "0xb80f56ac",
    "0xe153eb49",
    "0x1649c954",
    "0xbe1da591",
    "0xae220b91",
]


def shaped(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor in one of the memory layouts that parameters come in."""
    x = torch.randn(shape).to(dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x


CASES = [
    ((1,), "contiguous"),
    ((127,), "contiguous"),
    ((3, 5000), "contiguous"),
    ((), "contiguous"),
    ((0, 3), "contiguous"),
    ((5, 7, 3, 3), "channels_last"),
    ((2, 130, 3, 3), "channels_last"),
    ((4, 1, 3, 3), "channels_last"),
    ((2, 5, 2, 3, 2), "channels_last"),
    ((17, 9), "transposed"),
    ((4, 6), "strided"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_signs_belong_to_logical_elements(shape, layout, dtype, backend):
    like = shaped(shape, layout, dtype)
    expected = _philox.signs(like.numel(), 9, 1, 2, like.device).view(shape)
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton bodies have no fp64")
    got = rademacher(like, 9, 1, 2, backend=backend)
    assert got.dtype == dtype and got.stride() == torch.empty_like(like).stride() and not got.requires_grad
    assert torch.equal(got, expected.to(dtype))
    x = like.clone()  # memory format kept
    fill_rademacher_([torch.ones(3, dtype=dtype), x], 9, 1, ids=[0, 2], backend=backend)
    assert torch.equal(x, expected.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_perturb_adds_a_probe_with_one_rounding(shape, layout, dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton bodies have no fp64")
    x = shaped(shape, layout, dtype).requires_grad_()
    alpha, version = 0.37, x._version
    expected = (x.detach().double() + alpha * rademacher(x, 5, 4, 3).double()).to(dtype)
    kept = x.detach().clone()
    perturb_([x], alpha, 5, 4, ids=[3], backend=backend)
    if dtype == torch.float64:
        assert torch.equal(x.detach(), expected)
    else:  # fp32 adds before it rounds: at most one step of the dtype away from exact
        torch.testing.assert_close(x.detach(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert x._version == version
    perturb_([x], -2 * alpha, 5, 4, ids=[3], backend=backend)
    mirrored = (2 * kept.double() - expected.double()).to(dtype)
    torch.testing.assert_close(x.detach(), mirrored, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_signs_are_fair_and_probes_differ():
    n = 1 << 20
    probes = [rademacher(torch.empty(n), 1, p, t) for p, t in ((0, 0), (1, 0), (0, 1))]
    probes.append(rademacher(torch.empty(n), 2, 0, 0))
    for i, a in enumerate(probes):
        assert a.abs().eq(1).all() and a.mean().abs() < 5 / n**0.5
        for b in probes[:i]:
            assert (a * b).mean().abs() < 5 / n**0.5


def test_strides_of_a_view_that_is_not_dense():
    like = torch.empty(1).expand(4, 3)
    assert torch.equal(rademacher(like, 0, 0, 0), rademacher(torch.empty(4, 3), 0, 0, 0))


def test_refusals():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"rademacher: seed must be in \[0, 2\^63\), got -1"):
        rademacher(x, -1, 0, 0)
    with pytest.raises(ValueError, match=r"probe must be in \[0, 2\^32\), got 4294967296"):
        rademacher(x, 0, 2**32, 0)
    with pytest.raises(ValueError, match=r"tensor must be in \[0, 2\^32\), got -1"):
        perturb_([x], 1.0, 0, 0, ids=[-1])
    with pytest.raises(ShapeError, match=r"expected floating-point tensors, got torch.int64 \(tensor 0\)"):
        rademacher(torch.zeros(3, dtype=torch.int64), 0, 0, 0)
    with pytest.raises(ShapeError, match="got cpu and meta"):
        fill_rademacher_([x, torch.empty(3, device="meta")], 0, 0)
    with pytest.raises(ShapeError, match="expected one id a tensor, got 2 ids for 1 tensors"):
        fill_rademacher_([x], 0, 0, ids=[0, 1])
    with pytest.raises(BackendError, match="backend 'cuda' "):
        rademacher(x, 0, 0, 0, backend="cuda")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_registered_op(layout):
    like = shaped((3, 4, 2, 2), layout)
    torch.library.opcheck(torch.ops.cpd_fast.rademacher, (like, 1, 2, 3))
    compiled = torch.compile(lambda x: rademacher(x, 1, 2, 3) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(like), rademacher(like, 1, 2, 3) * 2)

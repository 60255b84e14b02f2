"""The CUDA bodies of rademacher, hutchinson_reduce and channel_sums, run by the host model against the references."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import Tensor

from cpd_fast.ops import ReduceTable, _dispatch, channel_sums, hutchinson_reduce, rademacher, squared_norms
from cpd_fast.ops._probe_kernels import memory_of
from cpd_fast.ops.hutchinson import EntryTable
from tests.host_model.build import ORDERS, Builder, run_program
from tests.ops.test_hutchinson_reduce import channels, close, expected_sums, problem
from tests.ops.test_rademacher import CASES, DTYPES, shaped


@pytest.fixture(scope="module")
def model(host_model: Builder) -> ctypes.CDLL:
    library = host_model.library("hutchinson_host")
    for name in ("rademacher", "hutchinson_reduce", "channel_sums"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def integers(numbers) -> ctypes.Array:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def fill(model, tensors: list[Tensor], seed: int, probe: int, alpha: float | None = None) -> None:
    numbers = []
    for i, t in enumerate(tensors):
        numbers += [_dispatch.DTYPE_CODES[t.dtype], t.data_ptr(), t.numel(), *memory_of(t), i]
    arguments = (ctypes.c_uint64(seed), probe, alpha is not None, ctypes.c_double(alpha or 0.0))
    message = model.rademacher(integers(numbers), ctypes.c_int64(len(tensors)), *arguments)
    assert message is None, message


def reduce(
    model, table: EntryTable, n_out: int, values: dict[int, Tensor], counter, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The sums and the marks of tensors that were not finite; twice, the second time into the first's result."""
    dtype = torch.float64 if any(e.dtype == torch.float64 for e in table.expected.values()) else torch.float32
    out, bad = torch.zeros(n_out, dtype=dtype), torch.zeros(table.n_tensors, dtype=torch.int32)
    kept = {i: v.contiguous(memory_format=table.expected[i].memory_format) for i, v in values.items()}
    addresses = integers([kept[i].data_ptr() if i in kept else 0 for i in range(table.n_tensors)])
    seed, probe = counter or (0, 0)
    numbers = table.on_gpu(*table.range_of(values))
    message = model.hutchinson_reduce(
        integers(numbers),
        ctypes.cast(addresses, ctypes.c_void_p),
        *(ctypes.c_int64(table.n_tensors), counter is not None, ctypes.c_uint64(seed), probe, ctypes.c_double(alpha)),
        *(pointer(out), dtype == torch.float64, pointer(bad)),
    )
    assert message is None, message
    return out, bad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probes_are_the_same_bits(model, dtype):
    model.set_order(ORDERS["random"], 3)
    tensors = [shaped(shape, layout, dtype) for shape, layout in CASES if layout not in ("strided", "transposed")]
    tensors.append(torch.randn(70).to(dtype)[1:])  # misaligned
    if dtype == torch.float32:
        tensors.append(torch.randn(33000))  # two blocks
    before = [t.clone() for t in tensors]
    fill(model, tensors, 2**62 + 12345, 2**31 + 7)
    for i, t in enumerate(tensors):
        assert torch.equal(t, rademacher(t, 2**62 + 12345, 2**31 + 7, i, backend="reference")), i
    moved = [t.clone() for t in before]
    fill(model, moved, 5, 6, 0.37)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for i, (t, old) in enumerate(zip(moved, before, strict=True)):
        v = rademacher(old, 5, 6, i, backend="reference")
        torch.testing.assert_close(t, (old.to(wide) + 0.37 * v.to(wide)).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_match_float64(model, dtype):
    model.set_order(ORDERS["reverse"], 0)
    tensors, pieces = problem(dtype)
    table = ReduceTable(tensors, [p for p in pieces if p[0] != 13])  # 13: pieces that no kernel makes, and others
    pieces = [p for p in pieces if p[0] != 13]
    values = {i: torch.randn_like(t) for i, t in enumerate(tensors) if i != 4}
    products: list[Tensor | None] = [None] * len(tensors)
    for i, v in values.items():
        products[i] = v.double() * rademacher(tensors[i], 11, 2, i).double()
    got, bad = reduce(model, table.kernel, table.n_out, values, (11, 2), alpha=0.5)
    close(got, 0.5 * expected_sums(products, pieces, tensors), dtype)
    assert not bad.any()
    squares = [values[i].double() ** 2 if i in values else None for i in range(len(tensors))]
    got, _ = reduce(model, table.kernel, table.n_out, values, None)
    close(got, expected_sums(squares, pieces, tensors), dtype)


def shapes_of_every_body() -> list[Tensor]:
    """Rows of a thread, of a warp, of a block; columns of one block of rows, and of several that add up in order."""
    return [torch.randn(s) for s in ((4000, 9), (300, 40), (600, 70), (520, 6, 3), (2, 3000), (1, 40000), (40, 1100))]


def test_the_same_bits_in_every_thread_order(model):
    tensors = shapes_of_every_body()
    pieces = [(i, (0,)) for i in (0, 1, 4, 5)] + [(i, dims) for i in (2, 3, 6) for dims in ((0,), (1,))]
    table = ReduceTable(tensors, pieces)
    values = dict(enumerate(tensors))
    results = []
    for number in ORDERS.values():
        model.set_order(number, 9)
        results.append(reduce(model, table.kernel, table.n_out, values, (1, 2))[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    close(results[0], hutchinson_reduce(table, tensors, 1, 2, backend="reference").double(), torch.float32)
    close(
        reduce(model, table.kernel, table.n_out, values, None)[0],
        squared_norms(table, tensors, backend="reference").double(),
        torch.float32,
    )


def test_one_tensor_and_values_that_are_not_finite(model):
    model.set_order(ORDERS["forward"], 0)
    tensors = [torch.zeros(3, 4), torch.zeros(5), torch.zeros(600, 40)]
    table = ReduceTable(tensors, [(0, (0,)), (0, (1,)), (1, (0,)), (2, (1,))])
    values = [torch.randn_like(t) for t in tensors]
    values[2][500, 3] = float("nan")
    got, bad = reduce(model, table.kernel, table.n_out, dict(enumerate(values)), (0, 0))
    assert bad.tolist() == [0, 0, 1] and got.isnan().sum() == 1
    for i in range(2):
        got, bad = reduce(model, table.kernel, table.n_out, {i: values[i]}, (0, 0))
        expected = hutchinson_reduce(table, {i: values[i]}, 0, 0, backend="reference")
        torch.testing.assert_close(got, expected)
        assert not bad.any()


def test_more_tensors_than_one_launch_holds(model):
    model.set_order(ORDERS["forward"], 0)
    tensors = [torch.randn(2, 3) for _ in range(900)]
    table = ReduceTable(tensors, [(i, (1,)) for i in range(900)])
    values = {i: t for i, t in enumerate(tensors) if i % 7}
    got, _ = reduce(model, table.kernel, table.n_out, values, (3, 4))
    torch.testing.assert_close(got, hutchinson_reduce(table, values, 3, 4, backend="reference"))
    filled = [t.clone() for t in tensors[:200]]
    fill(model, filled, 3, 4)
    assert all(torch.equal(t, rademacher(t, 3, 4, i)) for i, t in enumerate(filled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_channel_sums(model, dtype):
    model.set_order(ORDERS["reverse"], 0)
    table, _ = channels()
    vector, scale = torch.randn(100, dtype=dtype), torch.randn(table.n_cells, dtype=dtype)
    for factors in (None, scale):
        out = torch.full((50,), np.nan, dtype=dtype)
        arguments = (ctypes.c_int64(50), pointer(vector), pointer(factors), pointer(out), dtype == torch.float64)
        assert model.channel_sums(*(pointer(x) for x in table.csr), *arguments) is None
        torch.testing.assert_close(out, channel_sums(table, vector, factors, backend="reference"))


def test_a_result_that_is_too_short_is_seen(host_model):
    done = run_program(host_model.program("asan", "hutchinson_host"), "0", "short_result")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]

"""hutchinson_reduce, squared_norms and channel_sums: all bodies against fp64 sums of explicit products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cpd_fast.errors import BackendError, ShapeError
from cpd_fast.ops import ChannelTable, ReduceTable, channel_sums, hutchinson_reduce, rademacher, squared_norms

BACKENDS = ["reference", "cpu", "triton"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# shape, memory, dims of the pieces wanted
PARAMETERS: list[tuple[tuple[int, ...], str, list[tuple[int, ...]]]] = [
    ((7,), "contiguous", [(0,)]),  # a bias
    ((1,), "contiguous", [(0,)]),
    ((5, 3), "contiguous", [(0,), (1,)]),
    ((130, 37), "contiguous", [(1,), (0,)]),
    ((3, 1030), "contiguous", [(0,), (1,)]),
    ((2, 9000), "contiguous", [(1,)]),
    ((8, 6, 3, 3), "contiguous", [(0,), (1,)]),
    ((8, 6, 3, 3), "channels_last", [(0,), (1,)]),
    ((4, 130, 3, 3), "channels_last", [(0,), (1,)]),
    ((12, 4, 3, 3), "contiguous", [(0,), (0, 1)]),  # a grouped convolution
    ((12, 4, 3, 3), "channels_last", [(0, 1), (0,)]),
    ((33, 1, 3, 3), "channels_last", [(0,), (0, 1)]),  # depthwise
    ((1, 9, 20), "contiguous", [(2,)]),  # a position embedding
    ((2, 3, 4), "contiguous", [(1,), (2,), (0, 2), (1, 0), ()]),
    ((6, 5), "transposed", [(0,), (1,)]),
    ((3, 4, 2, 2, 2), "channels_last", [(0,), (1,)]),
    ((0, 4), "contiguous", [(1,)]),
]


def parameter(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape).to(dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    if layout == "transposed":
        return x.T.contiguous().T
    return x


def problem(dtype: torch.dtype) -> tuple[list[Tensor], list[tuple[int, tuple[int, ...]]]]:
    tensors = [parameter(shape, layout, dtype) for shape, layout, _ in PARAMETERS]
    return tensors, [(i, dims) for i, (_, _, wanted) in enumerate(PARAMETERS) for dims in wanted]


def expected_sums(products: list[Tensor | None], pieces: list[tuple[int, tuple[int, ...]]], tensors) -> Tensor:
    """fp64 sums, a piece and an entry at a time."""
    parts = [torch.zeros(0, dtype=torch.float64)]
    for i, dims in pieces:
        product = products[i]
        if product is None:
            product = torch.zeros(tensors[i].shape, dtype=torch.float64)
        moved = product.permute(*dims, *(d for d in range(product.dim()) if d not in dims))
        size = int(np.prod([product.shape[d] for d in dims], dtype=int))
        rest = product.numel() // size if size else 0
        parts.append(moved.reshape(size, rest).sum(1))
    return torch.cat(parts)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    # Products of a sign are exact: what is left is fp32 summation.
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(got.double(), expected, rtol=1e-5 if tolerance > 1e-6 else 1e-12, atol=tolerance)


def skip_if_without(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton bodies have no fp64")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_every_layout(dtype, backend):
    skip_if_without(backend, dtype)
    if backend == "triton" and dtype != torch.float32:
        pytest.skip("slow in the interpreter; test_mixed_dtypes_and_own_ids has the others")
    tensors, pieces = problem(dtype)
    table = ReduceTable(tensors, pieces)
    values: list[Tensor | None] = [torch.randn_like(t) for t in tensors]
    values[3] = None  # unused in this batch
    values[6] = values[6].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)  # Hv in strides of its own
    values[7] = values[7].contiguous()
    products = [
        None if v is None else v.double() * rademacher(t, 11, 2, i).double()
        for i, (v, t) in enumerate(zip(values, tensors, strict=True))
    ]
    got = hutchinson_reduce(table, values, 11, 2, backend=backend)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(got, expected_sums(products, pieces, tensors), dtype)
    squares = [None if v is None else v.double() ** 2 for v in values]
    close(squared_norms(table, values, backend=backend), expected_sums(squares, pieces, tensors), dtype)
    assert not table.bad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_at_a_time_adds_up_to_all(backend):
    """What gradient hooks do: a mapping with one value, a share of a batch, into the same result."""
    tensors, pieces = problem(torch.float32)
    if backend == "triton":  # interpreted: a few
        tensors, pieces = tensors[:3], [(i, dims) for i, dims in pieces if i < 3]
    table = ReduceTable(tensors, pieces)
    values = [torch.randn_like(t) for t in tensors]
    out = torch.zeros(table.n_out)
    for share in (0.25, 0.75):
        for i, v in enumerate(values):
            same = hutchinson_reduce(table, {i: v}, 3, 4, out=out, alpha=share, backend=backend)
            assert same is out
    torch.testing.assert_close(out, hutchinson_reduce(table, values, 3, 4, backend=backend), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_own_ids(backend):
    tensors = [torch.randn(4, 5).half(), torch.randn(6), torch.randn(3, 2).bfloat16()]
    ids, pieces = [7, 0, 300], [(0, (1,)), (1, (0,)), (2, (0,))]
    table = ReduceTable(tensors, pieces, ids=ids)
    products = [t.double() * rademacher(t, 1, 1, i).double() for t, i in zip(tensors, ids, strict=True)]
    got = hutchinson_reduce(table, tensors, 1, 1, backend=backend)
    close(got, expected_sums(products, pieces, tensors), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_not_finite_are_remembered_by_tensor(backend):
    tensors = [torch.zeros(3, 4), torch.zeros(5), torch.zeros(2, 2, 3, 3), torch.zeros(2, 3, 2)]
    table = ReduceTable(tensors, [(0, (1,)), (1, (0,)), (2, (0,)), (2, (0, 1)), (3, (1, 0))])
    values = [torch.randn_like(t) for t in tensors]
    values[2][1, 1, 2, 2] = float("inf")
    values[3][0, 0, 1] = float("nan")
    hutchinson_reduce(table, values, 0, 0, backend=backend)
    assert table.bad.tolist() == [0, 0, 1, 1]
    hutchinson_reduce(table, {1: values[1]}, 0, 1, backend=backend)
    assert table.bad.tolist() == [0, 0, 1, 1]  # until it is set to zero
    table.bad.zero_()
    values[0][2, 3] = float("nan")
    hutchinson_reduce(table, {0: values[0], 1: values[1]}, 0, 2, backend=backend)
    assert table.bad.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_sum(backend):
    table = ReduceTable([torch.zeros(3)], [(0, (0,))])
    assert hutchinson_reduce(table, [None], 0, 0, backend=backend).tolist() == [0, 0, 0]
    assert hutchinson_reduce(ReduceTable([], []), [], 0, 0, backend=backend).shape == (0,)


def test_refusals():
    w = torch.zeros(3, 4)
    table = ReduceTable([w, torch.zeros(2)], [(0, (0,))])
    with pytest.raises(ShapeError, match=r"expected 2 tensors \(None where absent\), got 1"):
        hutchinson_reduce(table, [w], 0, 0)
    with pytest.raises(ShapeError, match=r"tensor 0 must be \(3, 4\) torch.float32 on cpu, got \(4, 3\)"):
        hutchinson_reduce(table, {0: w.T}, 0, 0)
    with pytest.raises(ShapeError, match=r"got \(3, 4\) torch.float64 on cpu; make the table from the tensors"):
        squared_norms(table, {0: w.double()})
    with pytest.raises(ShapeError, match="got a value for number 2"):
        hutchinson_reduce(table, {2: w}, 0, 0)
    with pytest.raises(ShapeError, match=r"out must be \(3,\) torch.float32 on cpu, got \(4,\)"):
        hutchinson_reduce(table, {0: w}, 0, 0, out=torch.zeros(4))
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^63\), got -5"):
        hutchinson_reduce(table, {0: w}, -5, 0)
    with pytest.raises(ShapeError, match=r"piece \(0, \(2,\)\) does not fit shape \(3, 4\)"):
        ReduceTable([w], [(0, (2,))])
    with pytest.raises(ShapeError, match=r"names a dim twice"):
        ReduceTable([w], [(0, (1, 1))])
    with pytest.raises(ShapeError, match="expected floating-point tensors, got torch.int32"):
        ReduceTable([w.int()], [])
    with pytest.raises(ShapeError, match="on one device, got cpu and meta"):
        ReduceTable([w, w.to("meta")], [])
    with pytest.raises(BackendError, match="backend 'cuda' "):
        hutchinson_reduce(table, {0: w}, 0, 0, backend="cuda")


def test_registered_op_and_compile():
    tensors, pieces = problem(torch.float32)
    table = ReduceTable(tensors, pieces)
    numbers = [n for e in table.entries for n in e]
    values = [None if i == 3 else t for i, t in enumerate(tensors)]
    arguments = (values, numbers, table.n_out, table.dtype, table.device, 5, 6)
    torch.library.opcheck(torch.ops.cpd_fast.hutchinson_reduce, arguments)
    compiled = torch.compile(lambda v: hutchinson_reduce(table, v, 5, 6), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(values), hutchinson_reduce(table, values, 5, 6), rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- channels


def channels() -> tuple[ChannelTable, list[tuple[int, np.ndarray]]]:
    rng = np.random.default_rng(0)
    runs = [(0, 5, 1), (0, 5, 3), (5, 1, 7), (6, 40, 2), (5, 1, 1), (0, 5, 1)]
    made = [(first, rng.integers(0, 100, (n, k))) for first, n, k in runs]
    return ChannelTable(50, 100, made), made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_channel_sums(dtype, scaled, backend):
    skip_if_without(backend, dtype)
    table, runs = channels()
    vector, scale = torch.randn(100, dtype=dtype), torch.randn(table.n_cells, dtype=dtype)
    expected, cell = torch.zeros(50, dtype=torch.float64), 0
    for first, index in runs:
        for i, row in enumerate(index):
            expected[first + i] += vector.double()[torch.from_numpy(row)].sum() * (scale[cell] if scaled else 1)
            cell += 1
    got = channel_sums(table, vector, scale if scaled else None, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert got.dtype == dtype and got[46:].tolist() == [0] * 4  # channels that own nothing


def test_channel_refusals():
    table, _ = channels()
    with pytest.raises(ShapeError, match=r"vector must be \(100,\) in fp32 or fp64"):
        channel_sums(table, torch.zeros(99))
    with pytest.raises(ShapeError, match="scale must be"):
        channel_sums(table, torch.zeros(100), torch.zeros(table.n_cells).double())
    with pytest.raises(ShapeError, match="run 0 has positions 0 to 9, expected 0 to 8"):
        ChannelTable(2, 9, [(0, np.array([[0], [9]]))])
    with pytest.raises(ShapeError, match="run 0 has channels 1 to 2, expected 0 to 1"):
        ChannelTable(2, 9, [(1, np.array([[0], [1]]))])
    with pytest.raises(ShapeError, match=r"must be \(channels, k\), got shape \(2,\)"):
        ChannelTable(2, 9, [(0, np.array([0, 1]))])

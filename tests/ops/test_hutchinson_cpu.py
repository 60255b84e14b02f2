"""The CPU body of a probe's sums: the same bits on every instruction set and for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cpd_fast.ops import (
    ChannelTable,
    ReduceTable,
    _dispatch,
    channel_sums,
    fill_rademacher_,
    hutchinson_reduce,
    perturb_,
    squared_norms,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Rows of all lengths around what is summed sixteen at a time, chunks of 2048, items of 2^14 elements and 512 rows.
SHAPES: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = [
    *(((70, n), [(0,)]) for n in (1, 2, 7, 15, 16, 17, 31, 32, 33, 127, 128, 129, 300)),
    *(((600, n), [(0,), (1,)]) for n in (3, 16, 40, 129)),
    ((5000,), [(0,)]),
    ((96, 4, 3, 3), [(0,), (0, 1)]),
    ((20, 230, 3, 3), [(0,), (1,)]),
    ((3, 2100, 3, 3), [(0,), (1,)]),  # two items share its rows, and cut a channel
    ((3, 17000), [(0,)]),
    ((1, 197, 24), [(2,), (1,)]),
]


@pytest.fixture
def native() -> Iterator[Any]:
    """The compiled library; instruction set and number of threads are as before afterwards."""
    library = _dispatch._native()
    if isinstance(library, str):
        pytest.skip(library)
    isa, threads = library.current_isa(), torch.get_num_threads()
    yield library
    library.set_isa(isa)
    torch.set_num_threads(threads)


def everything(dtype: torch.dtype) -> dict[str, Tensor]:
    """What all kernels of the CPU body make of fixed tensors."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape, _ in SHAPES]
    last = tensors[-4].to(memory_format=torch.channels_last)
    tensors.append(last)
    pieces = [(i, dims) for i, (_, wanted) in enumerate(SHAPES) for dims in wanted] + [(len(SHAPES), (1,))]
    table = ReduceTable(tensors, pieces)
    sums = hutchinson_reduce(table, tensors, 7, 3, alpha=0.3, backend="cpu")
    norms = squared_norms(table, tensors, alpha=0.3, backend="cpu")
    index = torch.randint(table.n_out, (500, 3), generator=g).numpy()
    scale = torch.rand(500, dtype=sums.dtype, generator=g)
    channels = channel_sums(ChannelTable(500, table.n_out, [(0, index)]), sums, scale, backend="cpu")
    signs, moved = [torch.empty_like(t) for t in tensors], [t.clone() for t in tensors]
    fill_rademacher_(signs, 7, 3, backend="cpu")
    perturb_(moved, 0.01, 7, 3, backend="cpu")
    flat = {"signs": signs, "moved": moved}
    return {"sums": sums, "norms": norms, "channels": channels} | {
        name: torch.cat([t.reshape(-1) for t in ts]) for name, ts in flat.items()
    }


def to_pieces(x: Tensor, wanted: list[tuple[int, ...]]) -> Tensor:
    others = [[d for d in range(x.dim()) if d not in dims] for dims in wanted]
    return torch.cat([(x.sum(o) if o else x).reshape(-1) for o in others])


def same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(native, dtype):
    native.set_isa("portable")
    expected = everything(dtype)
    others = [isa for isa in ("avx2", "avx512") if isa in native.supported_isas()]
    if not others:
        pytest.skip("this CPU has neither AVX2 nor AVX-512")
    for isa in others:
        native.set_isa(isa)
        same_bits(everything(dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_number_of_threads_gives_the_same_bits(native, dtype):
    torch.set_num_threads(1)
    expected = everything(dtype)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        same_bits(everything(dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns_of_all_lengths(native, dtype):
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape, _ in SHAPES]
    for i, (shape, wanted) in enumerate(SHAPES):
        table = ReduceTable(tensors[i : i + 1], [(0, dims) for dims in wanted])
        sums = hutchinson_reduce(table, tensors[i : i + 1], 7, 3, backend="cpu").double()
        norms = squared_norms(table, tensors[i : i + 1], backend="cpu").double()
        x = tensors[i].double()
        signs = torch.empty_like(x)
        fill_rademacher_([signs], 7, 3, backend="reference")
        for made, product in ((sums, signs * x), (norms, x * x)):
            expected, size = to_pieces(product, wanted), to_pieces(product.abs(), wanted)
            # 512 rows of a column are added in fp32, one after the other
            error = 1e-14 if dtype == torch.float64 else 4e-6
            assert ((made - expected).abs() <= error * size).all(), (shape, wanted)

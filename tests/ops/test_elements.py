"""Elements named by index lists: taken out, put among zeros, written back; native and plain."""

import itertools

import pytest
import torch

from cpd_fast.ops import _dispatch
from cpd_fast.ops.elements import Elements

NATIVE = _dispatch._native()
needs_native = pytest.mark.skipif(isinstance(NATIVE, str), reason=str(NATIVE))
SHAPES = [(1,), (40,), (7, 5), (9, 33), (6, 40, 3, 3), (5, 17, 1, 1), (4, 6, 2, 5), (3, 4, 2, 3, 2)]
LISTS = {
    "rows": lambda s: {0: [i for i in range(s[0]) if i % 3 != 1]},
    "columns": lambda s: {1: [i for i in range(s[1]) if i % 5 > 1]},
    "both": lambda s: {0: [s[0] - 1], 1: list(range(0, s[1], 2))},
    "few": lambda s: {0: [0], 1: [s[1] // 2]},
    "none": lambda s: {0: []},
    "three": lambda s: {0: [0], 1: [1], 2: [0]},
}
CASES = [
    (s, k) for s, k in itertools.product(SHAPES, LISTS) if k in ("rows", "none") or len(s) > (2 if k == "three" else 1)
]


@pytest.fixture(params=["plain", "portable", "avx2", "avx512"])
def body(request, monkeypatch):
    """The chain of index_select, or the native pass on each instruction set."""
    if request.param == "plain":
        monkeypatch.setattr(_dispatch, "_native", lambda: "switched off")
        yield
        return
    if isinstance(NATIVE, str) or request.param not in NATIVE.supported_isas():
        pytest.skip(f"no {request.param} here")
    before = NATIVE.current_isa()
    NATIVE.set_isa(request.param)
    yield
    NATIVE.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex128])
def test_moves_are_those_of_indexing(body, dtype):
    for shape, kind in CASES:
        lists = {d: torch.tensor(i, dtype=torch.int64) for d, i in LISTS[kind](shape).items()}
        at = tuple(lists.get(d, torch.arange(n)) for d, n in enumerate(shape))
        grid = torch.meshgrid(*at, indexing="ij")
        for last in (False, True) if len(shape) == 4 else (False,):
            layout = torch.channels_last if last else torch.contiguous_format
            x = (torch.rand(shape) * 100).to(dtype).contiguous(memory_format=layout)
            some = Elements(shape, lists)
            part = some.take(x)
            assert torch.equal(part, x[grid]) and part.shape == some.shape and part.is_contiguous(memory_format=layout)
            wanted = torch.zeros(shape, dtype=dtype)
            wanted[grid] = part
            spread = some.put(part, last)
            assert torch.equal(spread, wanted) and spread.is_contiguous(memory_format=layout)
            wanted, version = x.clone(), x._version
            wanted[grid] = part.logical_not().to(dtype)
            some.write(x, part.logical_not())
            assert torch.equal(x, wanted) and x._version > version


def test_what_is_not_dense_in_a_known_order_is_moved_too():
    x = torch.rand(6, 8).t()
    some = Elements((8, 6), {0: torch.tensor([1, 5]), 1: torch.tensor([0])})
    assert torch.equal(some.take(x), x[[1, 5]][:, :1])
    some.write(x, torch.ones(2, 1))
    assert x[1, 0] == x[5, 0] == 1 and (x == 1).sum() == 2
    assert torch.equal(torch.func.vmap(Elements((3,), {0: torch.tensor([2])}).take)(torch.arange(6).reshape(2, 3)),
                       torch.tensor([[2], [5]]))  # fmt: skip


def test_gradients_of_gradients():
    some = Elements((4, 5), {0: torch.tensor([0, 3]), 1: torch.tensor([1, 2])})
    x, y = torch.randn(4, 5, dtype=torch.double), torch.randn(2, 2, dtype=torch.double)
    x.requires_grad_(), y.requires_grad_()
    for call in (lambda x, y: some.take(x) * y, lambda x, y: some.put(y) * x):
        assert torch.autograd.gradcheck(call, (x, y)) and torch.autograd.gradgradcheck(call, (x, y))


def test_a_traced_graph_has_operators_not_addresses():
    some = Elements((4, 5), {0: torch.tensor([0, 3])})
    traced = torch.jit.trace(some.take, torch.zeros(4, 5))
    x = torch.randn(4, 5)
    assert torch.equal(traced(x), x[[0, 3]])


@needs_native
@pytest.mark.parametrize(("move", "pointers", "sizes", "what"), [
    (3, 0, (1, 1, 1, 1, 1, 1, 4), "move"), (0, 0, (1, 1, 1, 1, 1, 1, 3), "1, 2, 4, 8 or 16"),
    (0, 0, (1, 1, 1, 1, 1, 1, 4), "null"), (0, 1, (2, 1, 3, 1, 1, 1, 4), "increase"),
    (0, 1, (1, 1, 1, -1, 1, 1, 4), ">= 0"), (0, 0, (2, 1, 3, 1, 1, 1, 4), "increase"),
])  # fmt: skip
def test_the_native_pass_refuses_wild_memory(move, pointers, sizes, what):
    rows = torch.tensor([1, 1])
    with pytest.raises(ValueError, match=what):
        NATIVE.elements(move, (0, 0, rows.data_ptr() if pointers else 0, 0), sizes, 1)

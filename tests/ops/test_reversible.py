"""ReversibleStep: there as perturb_ goes, and back to the same bits, whatever the values and whatever interrupts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cpd_fast.errors import ShapeError
from cpd_fast.ops import ReversibleStep, _dispatch, perturb_

ISAS = ["portable", "avx2", "avx512"]
STEP = 3e-5


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int64 if t.dtype == torch.float64 else torch.int16 if t.element_size() == 2 else torch.int32)


def awkward() -> Tensor:
    """Every exponent, both signs, both zeros, infinities and NaN with payloads, among enough ordinary values."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(70_001, generator=g) * 0.02
    patterns = torch.randint(-(2**31), 2**31, (3000,), generator=g, dtype=torch.int64).to(torch.int32)
    x[5:3005] = patterns.view(torch.float32)
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-38, 3.4e38, STEP, -STEP]
    special += [STEP / 16, -STEP / 16, STEP * (1 - 2**-24) / 16, 1 / 3]
    x[-20 : -20 + len(special)] = torch.tensor(special)
    x[40_000:50_000] = 0.0
    x[50_000:60_000] = STEP * torch.exp(torch.empty(10_000).uniform_(-2.7, 5, generator=g))  # near the step
    return x


def tensors() -> list[Tensor]:
    x = awkward()
    conv = x[30_000 : 30_000 + 64 * 9 * 20].clone().view(64, 20, 3, 3)
    return [
        x,
        conv.to(memory_format=torch.channels_last),
        awkward()[3000:40_000:3],  # not dense
        torch
        .randint(-(2**31), 2**31, (500,), generator=torch.Generator().manual_seed(1))
        .to(torch.int32)
        .view(torch.float32),
        x[-1].clone(),
        torch.empty(0, 3),
        x.double(),
        conv.bfloat16(),
    ]


@pytest.fixture(params=[*ISAS, "reference"])
def backend(request):
    """Of the CPU's body every instruction set."""
    if request.param == "reference":
        yield "reference"
        return
    native = _dispatch._native()
    if isinstance(native, str) or request.param not in native.supported_isas():
        pytest.skip(f"no {request.param} here")
    before = native.current_isa()
    native.set_isa(request.param)
    yield "cpu"
    native.set_isa(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_there_and_back_bit_for_bit(backend, threads):
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        moved, expected = tensors(), tensors()
        start = [bits(t.clone()) for t in moved]
        step = ReversibleStep(moved, STEP, seed=5, ids=range(2, 10), backend=backend)
        for probe in (0, 7):
            step.away(probe)
            there = [t.clone() for t in expected]
            perturb_(there, STEP, 5, probe, ids=range(2, 10), backend=backend)
            for got, want in zip(moved, there, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            assert not torch.equal(bits(moved[0]), start[0])
            step.back()
            assert all(torch.equal(bits(t.clone()), s) for t, s in zip(moved, start, strict=True))
    finally:
        torch.set_num_threads(before_threads)


def test_one_byte_an_element_is_enough(backend):
    """Of the ordinary tensors no copy is kept, and no byte is near its end."""
    if backend == "reference":
        pytest.skip("keeps copies")
    moved = tensors()
    step = ReversibleStep(moved, STEP, seed=5, backend=backend)
    assert [t.dtype for t in step._copies] == [torch.float32] * 3 + [torch.float64, torch.bfloat16]
    assert [t.numel() for t in step._copies[:3]] == [len(moved[2]), 500, 0]
    assert sum(len(values) for _, _, values in step._small) < 0.05 * len(step._lost)
    step.away(3)
    safe = torch.ones(len(step._lost), dtype=torch.bool)
    safe[step._small[0][1]] = False
    assert 4 <= int(step._lost[: len(moved[0])][safe[: len(moved[0])]].abs().max()) <= 35
    step.back()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("which", ["away", "back"])
def test_back_finishes_what_an_interrupt_left(monkeypatch, backend, which, when):
    if backend == "reference":
        pytest.skip("keeps copies, which are copied again")
    moved = tensors()
    start = [bits(t.clone()) for t in moved]
    step = ReversibleStep(moved, STEP, seed=5, backend=backend)
    native, interrupts = _dispatch._native(), [KeyboardInterrupt]

    class Interrupted:
        def reversible_step(self, *args):
            hit = interrupts and ("back" if args[4] else "away") == which
            if hit and when == "before":
                raise interrupts.pop()
            native.reversible_step(*args)
            if hit:
                raise interrupts.pop()

    # by its globals: doctest may have loaded the module again
    monkeypatch.setitem(ReversibleStep.back.__globals__, "_native", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        step.away(1)
        step.back()
    step.back()
    step.back()
    assert not interrupts
    assert all(torch.equal(bits(t.clone()), s) for t, s in zip(moved, start, strict=True))


def test_refusals():
    with pytest.raises(ShapeError, match="expected floating-point tensors, got torch.int64"):
        ReversibleStep([torch.arange(3)], 0.1, 0).away(0)
    with pytest.raises(ValueError, match="seed"):
        ReversibleStep([torch.ones(3)], 0.1, -1)

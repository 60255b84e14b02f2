"""The host model of CUDA: it runs right kernels, and planted faults are seen by it or by the sanitizers.

Every ``*_host.cpp`` beside this file is run under both sanitizers.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from tests.host_model.build import BODIES, ORDERS, Builder, run_program

BARRIER, DIVERGENT, RETURNED, LANE, MASK, UNSET, ABSENT, TWICE = range(8)
REPORTS = {
    "asan": {
        "past_shared": "heap-buffer-overflow",
        "past_dynamic": "heap-buffer-overflow",
        "past_global": "heap-buffer-overflow",
        "misaligned": "misaligned address",
        "overflow": "signed integer overflow",
    },
    "tsan": dict.fromkeys(
        [
            "missing_barrier",
            "second_reduction",
            "missing_syncwarp",
            "all_write_the_same",
            "count_without_atomics",
            "blocks_share_a_sum",
        ],
        "data race",
    ),
}


@pytest.fixture(scope="module")
def planted(host_model: Builder) -> ctypes.CDLL:
    library = host_model.library("planted")
    library.planted.restype = ctypes.c_char_p
    return library


def outcome(library: ctypes.CDLL, fault: int, order: str = "forward") -> tuple[bytes | None, torch.Tensor]:
    library.set_order(ORDERS[order], 0)
    out = torch.zeros(64)
    return library.planted(fault, ctypes.c_void_p(out.data_ptr())), out


def test_faults_that_the_model_names(planted):
    for fault, message in {
        DIVERGENT: rb"divergent __syncthreads: thread 32 is at planted.cpp:\d+, others wait at planted.cpp:\d+",
        RETURNED: rb"thread 7 returned while others wait at planted.cpp:\d+",
        LANE: rb"deadlock: a warp collective lacks lanes of its mask at planted.cpp:\d+, thread 0",
        MASK: rb"thread 16 is not of the mask of its own collective",
    }.items():
        assert re.match(message, outcome(planted, fault)[0] or b"none"), (fault, outcome(planted, fault)[0])
    assert outcome(planted, UNSET)[1].isnan().all()
    absent = outcome(planted, ABSENT)[1].view(2, 2, 16)
    assert absent[:, 0].eq(1).all() and absent[:, 1].isnan().all()


@pytest.mark.parametrize("fault", [BARRIER, TWICE], ids=["missing_barrier", "second_reduction"])
def test_faults_that_orders_show(planted, fault):
    results = [outcome(planted, fault, order)[1].nan_to_num(-1.0) for order in ("forward", "reverse")]
    assert not torch.equal(*results)


@pytest.mark.parametrize("sanitizer", REPORTS)
def test_sanitizers_see_planted_faults_and_let_right_kernels_pass(host_model, sanitizer):
    program = host_model.program(sanitizer, "planted")
    done = run_program(program)
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), done.stderr[-3000:]
    for name, report in REPORTS[sanitizer].items():
        done = run_program(program, "0", name)
        assert done.returncode != 0 and report in done.stderr and name in done.stderr, (name, done.stderr[-2000:])


@pytest.mark.parametrize("sanitizer", REPORTS)
@pytest.mark.parametrize("body", BODIES)
def test_bodies_are_clean_under_sanitizers(host_model, body, sanitizer):
    done = run_program(host_model.program(sanitizer, f"{body}_host"))
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), done.stderr[-3000:]


def test_a_body_that_writes_past_its_output_is_seen(host_model):
    done = run_program(host_model.program("asan", "channel_kl_host"), "0", "short_gradient")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]

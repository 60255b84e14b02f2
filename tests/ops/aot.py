"""Compile the Triton kernels ahead of time, without a GPU: ``python -m tests.ops.aot channel_kl_kernel``.

A process of its own: elsewhere in the tests Triton is its interpreter. For every architecture, dtype and configuration:
loads and stores are 16 bytes wide where memory allows, and no register spills (the cubin reserves no stack).
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ARCHITECTURES = (75, 80, 90)
# What every call passes; pointers are told apart by name.
INTEGERS = (
    "reduce inner column_blocks chunks blocks c h w student_h student_w teacher_h teacher_w most_rows most_columns"
)
FLOATS = "log2e_over_t loss_scale grad_scale"
INPUTS = ("student_ptr", "teacher_ptr", "dstudent_ptr")  # of the tensors' dtype; other pointers are fp32
ALIGNED = ("reduce", "inner", "w", "student_w", "teacher_w", "numel")  # multiples of 16


def cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def stack_bytes(binary: Path) -> list[int]:
    """What every kernel of a cubin or library reserves of local memory: more than 0 if registers spill."""
    done = subprocess.run([cuobjdump(), "-res-usage", binary], capture_output=True, text=True, check=True)
    return [int(a) + int(b) for a, b in re.findall(r"STACK:(\d+) .*?LOCAL:(\d+)", done.stdout)]


def compile_kernel(
    kernel: Any,
    kind: str,
    constants: dict[str, Any],
    options: dict[str, Any],
    wide: str = "ld st",
    types: dict[str, str] | None = None,
) -> None:
    """Compile for every architecture; ``wide`` names what must be vectorised, ``types`` those of other arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given, types = types, dict.fromkeys(INTEGERS.split(), "i32") | dict.fromkeys(FLOATS.split(), "fp32")
    types |= {n: f"*{kind if n in INPUTS else 'fp32'}" for n in kernel.arg_names if n.endswith("_ptr")}
    types |= (given or {}) | dict.fromkeys(constants, "constexpr")
    signature = {n: types[n] for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if n.endswith("_ptr") or n in ALIGNED}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    for arch in ARCHITECTURES:
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})
        ptx, where = compiled.asm["ptx"], (kernel.__name__, kind, arch, constants)
        assert f".target sm_{arch}" in ptx, where
        for access in wide.split():
            assert f"{access}.global.v4" in ptx or (kind != "fp32" and f"{access}.global.v2" in ptx), (access, where)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            assert stack_bytes(Path(file.name)) == [0], ("spills", where)


def channel_kl_kernel(kind: str) -> None:
    from cpd_fast.kernels.channel_kl import channel_kl_kernel, launch_config

    for reduce, inner in ((4096, 1), (16384, 1), (150, 16384), (16384, 150)):
        config = launch_config(reduce, inner)
        options = {"num_warps": config.pop("num_warps")}
        wanted = {"HAS_GRAD": True, "WANT_LOSS": True, "WANT_DSTUDENT": True, "ONE_BLOCK": reduce <= config["BLOCK_R"]}
        compile_kernel(channel_kl_kernel, kind, wanted | config, options)


def channel_kl_chunk_kernel(kind: str) -> None:
    from cpd_fast.kernels.channel_kl import channel_kl_chunk_kernel

    compile_kernel(channel_kl_chunk_kernel, kind, {"CHUNK": 16384, "BLOCK_R": 2048}, {"num_warps": 8}, wide="ld")


def channel_kl_finish_kernel(kind: str) -> None:
    from cpd_fast.kernels.channel_kl import channel_kl_finish_kernel

    wanted = {"HAS_GRAD": True, "WANT_LOSS": True, "WANT_DSTUDENT": True}
    block = {"CHUNK": 16384, "BLOCK_R": 2048, "CHUNKS": 16}
    compile_kernel(channel_kl_finish_kernel, kind, wanted | block, {"num_warps": 8})


def same_sizes() -> Iterator[dict[str, bool]]:
    """Student smaller, teacher smaller, both of one size; the setting of corners goes along."""
    yield {"STUDENT_SAME": False, "TEACHER_SAME": True, "CORNERS": False}
    yield {"STUDENT_SAME": True, "TEACHER_SAME": False, "CORNERS": True}
    yield {"STUDENT_SAME": True, "TEACHER_SAME": True, "CORNERS": False}


def resized_kl_chunk_kernel(kind: str) -> None:
    from cpd_fast.kernels.resized_kl import BLOCK, CHUNK, OPTIONS, resized_kl_chunk_kernel

    for same in same_sizes():
        constants = {"HAS_WEIGHT": True, "BLOCK": BLOCK, "CHUNK": CHUNK} | same
        compile_kernel(resized_kl_chunk_kernel, kind, constants, OPTIONS, wide="ld")


def resized_kl_map_kernel(kind: str) -> None:
    from cpd_fast.kernels.resized_kl import resized_kl_map_kernel

    compile_kernel(
        resized_kl_map_kernel, kind, {"HAS_GRAD": True, "WANT_LOSS": True, "CHUNKS": 512}, {"num_warps": 4}, wide=""
    )


def resized_kl_pixel_kernel(kind: str) -> None:
    from cpd_fast.kernels.resized_kl import BLOCK, OPTIONS, resized_kl_pixel_kernel

    for same in same_sizes():
        constants = {"HAS_WEIGHT": True, "HAS_GRAD": True, "WANT_LOSS": True, "BLOCK": BLOCK} | same
        compile_kernel(resized_kl_pixel_kernel, kind, constants, OPTIONS)


def resized_kl_gather_kernel(kind: str) -> None:
    from cpd_fast.kernels.resized_kl import BLOCK, OPTIONS, resized_kl_gather_kernel

    for same, over_classes in itertools.product(same_sizes(), (False, True)):
        constants = {"HAS_WEIGHT": True, "OVER_CLASSES": over_classes, "BLOCK": BLOCK} | same
        # A smaller student's values visit pixels here and there.
        compile_kernel(
            resized_kl_gather_kernel, kind, constants, OPTIONS, wide="ld st" if same["STUDENT_SAME"] else "st"
        )


HUTCHINSON_TYPES = {
    "addresses_ptr": "*i64",
    "entries_ptr": "*i64",
    "items_ptr": "*i64",
    "partials_ptr": "*fp32",
    "seed": "i64",
    "probe": "i32",
    "tensor": "i32",
    "alpha": "fp32",
    "numel": "i64",
    "channels": "i32",
    "inner": "i32",
    "starts_ptr": "*i64",
    "index_ptr": "*i64",
    "cells_ptr": "*i64",
    "x_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "owners_ptr": "*i64",
    "bad_ptr": "*i32",
    "n_out": "i32",
}


def rademacher_kernel(kind: str) -> None:
    from cpd_fast.kernels.hutchinson import FILL_BLOCK, rademacher_kernel

    types = HUTCHINSON_TYPES | {"out_ptr": f"*{kind}"}
    for add, is_last in ((False, False), (True, False), (True, True)):
        constants = {"ADD": add, "IS_LAST": is_last, "BLOCK": FILL_BLOCK}
        compile_kernel(rademacher_kernel, kind, constants, {"num_warps": 8}, wide="" if is_last else "st", types=types)


def reduce_kernel(kind: str) -> None:
    from cpd_fast.kernels.hutchinson import TRITON_TYPES, reduce_config, reduce_kernel

    for width, has_signs, has_columns, is_last in ((32, True, False, False), (1024, True, True, False)) + (
        (128, False, True, True),
    ):
        config = reduce_config(width)
        options = {"num_warps": config.pop("num_warps")}
        constants = {"HAS_SIGNS": has_signs, "HAS_COLUMNS": has_columns, "IS_LAST": is_last}
        constants["DTYPE"] = TRITON_TYPES[0 if kind == "fp32" else 2]
        compile_kernel(reduce_kernel, kind, constants | config, options, wide="", types=HUTCHINSON_TYPES)


def segment_sums_kernel(kind: str) -> None:
    from cpd_fast.kernels.hutchinson import SEGMENT_BLOCK, segment_sums_kernel

    if kind != "fp32":
        return  # sums are fp32, whatever the tensors
    types = HUTCHINSON_TYPES | {"out_ptr": "*fp32"}
    for has_scale in (False, True):
        constants = {"HAS_SCALE": has_scale, "ADD": not has_scale, "BLOCK": SEGMENT_BLOCK}
        compile_kernel(segment_sums_kernel, kind, constants, {"num_warps": 4}, wide="", types=types)


def masked_groups_types(kernel: Any, kind: str) -> dict[str, str]:
    types = {n: f"*{kind}" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
    return types | {"table_ptr": "*i64"} | ({"partials_ptr": "*fp32"} if "partials_ptr" in types else {})


def masked_groups_values_kernel(kind: str) -> None:
    from cpd_fast.kernels.masked_groups import BLOCK, OPTIONS, PLACES
    from cpd_fast.kernels.masked_groups import masked_groups_values_kernel as kernel

    for backward, last in itertools.product((False, True), (False, True)):
        constants = {"BACKWARD": backward, "HAS_BIAS": not backward, "LAST": last, "PLACES": PLACES, "BLOCK": BLOCK}
        compile_kernel(kernel, kind, constants, OPTIONS, wide="", types=masked_groups_types(kernel, kind))


def masked_groups_partial_kernel(kind: str) -> None:
    from cpd_fast.kernels.masked_groups import OPTIONS, TAPS, WEIGHT_BLOCK
    from cpd_fast.kernels.masked_groups import masked_groups_partial_kernel as kernel

    for last in (False, True):
        constants = {"LAST": last, "TAPS": TAPS, "BLOCK": WEIGHT_BLOCK}
        compile_kernel(kernel, kind, constants, OPTIONS, wide="", types=masked_groups_types(kernel, kind))


def masked_groups_finish_kernel(kind: str) -> None:
    from cpd_fast.kernels.masked_groups import FINISH_BLOCK, OPTIONS, TAPS
    from cpd_fast.kernels.masked_groups import masked_groups_finish_kernel as kernel

    constants = {"HAS_BIAS": True, "TAPS": TAPS, "BLOCK": FINISH_BLOCK}
    compile_kernel(kernel, kind, constants, OPTIONS, wide="", types=masked_groups_types(kernel, kind))


KERNELS: dict[str, Callable[[str], None]] = {
    f.__name__: f
    for f in (
        channel_kl_kernel,
        channel_kl_chunk_kernel,
        channel_kl_finish_kernel,
        resized_kl_chunk_kernel,
        resized_kl_map_kernel,
        resized_kl_pixel_kernel,
        resized_kl_gather_kernel,
        rademacher_kernel,
        reduce_kernel,
        segment_sums_kernel,
        masked_groups_values_kernel,
        masked_groups_partial_kernel,
        masked_groups_finish_kernel,
    )
}

if __name__ == "__main__":
    for kernel_name in sys.argv[1:]:
        for dtype in ("fp32", "fp16"):
            KERNELS[kernel_name](dtype)
    print("compiled")

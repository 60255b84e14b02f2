"""What the compilers make of the GPU kernels, without a GPU: every architecture, wide loads and stores, no spills."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cpd_fast.ops import _dispatch
from tests.ops.aot import KERNELS, cuobjdump, stack_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHITECTURES = ["75", "80", "86", "89", "90"]


def test_every_triton_kernel_has_a_case():
    found = []
    for name in ("channel_kl", "resized_kl", "hutchinson", "masked_groups"):
        tree = ast.parse((ROOT / "kernels" / f"{name}.py").read_text())
        found += [f.name for f in tree.body if isinstance(f, ast.FunctionDef) and f.name.endswith("_kernel")]
    assert sorted(found) == sorted(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_triton_kernels_compile_ahead_of_time(kernel, tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.ops.aot", kernel]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


def test_the_stub_names_every_binding():
    bound = set()
    for source in (ROOT / "csrc").glob("bindings*.cpp"):
        bound |= set(re.findall(r'm\.(?:def|attr)\(\s*"(\w+)"', source.read_text()))
    stub = ast.parse((ROOT / "cpd_fast" / "_native.pyi").read_text())
    named = {n.name for n in stub.body if isinstance(n, ast.FunctionDef)}
    named |= {n.target.id for n in stub.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert named == bound


def test_cuda_is_built_for_every_architecture():
    text = (ROOT / "CMakeLists.txt").read_text()
    built = re.search(r'set\(CPD_CUDA_ARCHS "([^"]+)"', text)
    assert built and [a.split("-")[0] for a in built[1].split(";")] == ARCHITECTURES


def test_no_cuda_kernel_spills():
    """Reads the library as it was built: nothing is compiled here."""
    native = _dispatch._native()
    if isinstance(native, str) or not native.has_cuda:
        pytest.skip("needs a library with CUDA code (nvcc at build time)")
    pytest.importorskip("triton", reason="brings cuobjdump")
    library = Path(native.__file__)
    listed = subprocess.run([cuobjdump(), "-lelf", library], capture_output=True, text=True, check=True).stdout
    built = sorted(set(re.findall(r"sm_(\d+)", listed)))
    if "CPD_CUDA_ARCHS" not in os.environ and built != ARCHITECTURES:
        pytest.skip(f"the library was built for sm_{', '.join(built)} only; build it without CPD_CUDA_ARCHS")
    stacks = stack_bytes(library)
    assert len(stacks) >= len(built) * len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert not any(stacks), stacks

"""Compile the CUDA kernel bodies for the host model: a library for ctypes, or a program of cases under a sanitizer.

A new kernel file needs only ``tests/host_model/<name>_host.cpp``: it includes the ``.cu``, gives the launchers a C
interface (``guarded.h``) and names small problems with ``CASE`` (``cases.h``).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
INCLUDE = ["-I", str(HERE.parent.parent / "csrc"), "-I", str(HERE)]
BASE = ["-std=c++17", "-O1", "-g", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas"]
SANITIZERS = {
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "tsan": ["-fsanitize=thread"],
}
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
BODIES = sorted(path.stem.removesuffix("_host") for path in HERE.glob("*_host.cpp"))


class Builder:
    """Compiles each source once a session and kind of build."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def library(self, *sources: str) -> ctypes.CDLL:
        """The sources (``"channel_kl_host"``) and the model as a shared library."""
        target = self._link("plain", ["-shared"], ["host_model", *sources], "-".join(sources) + ".so")
        return ctypes.CDLL(str(target))

    def program(self, sanitizer: str, *sources: str) -> Path:
        """The sources, the model and the runner of cases, under ``"asan"`` (with undefined behaviour) or ``"tsan"``."""
        link = SANITIZERS[sanitizer]
        return self._link(sanitizer, link, ["host_model", "cases_main", *sources], "-".join(sources))

    def _link(self, kind: str, flags: list[str], sources: list[str], name: str) -> Path:
        objects = [self._object(kind, source) for source in sources]
        target = self.folder / kind / name
        if not target.exists():
            self._run([*flags, "-o", str(target), *map(str, objects)])
        return target

    def _object(self, kind: str, source: str) -> Path:
        target = self.folder / kind / f"{source}.o"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            flags = SANITIZERS.get(kind, [])
            if source == "host_model":  # is told of the sanitizer, and not watched by it where that looks at threads
                flags = [f"-DHM_{kind.upper()}", *(flags if kind == "asan" else [])]
            self._run([*BASE, *flags, *INCLUDE, "-c", "-o", str(target), str(HERE / f"{source}.cpp")])
        return target

    def _run(self, arguments: list[str]) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("needs g++")
        done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
        if "cannot find" in done.stderr and "san" in done.stderr:
            pytest.skip("needs the sanitizers' libraries")
        assert done.returncode == 0, done.stderr[-3000:]


def run_program(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of cases: all right ones, or ``order, name``."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",  # looking for leaks needs ptrace
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [str(program), *arguments]
    if setarch := shutil.which("setarch"):  # ThreadSanitizer needs its addresses where it expects them
        command = [setarch, "-R", *command]
    return subprocess.run(command, env=os.environ | options, capture_output=True, text=True, check=False, timeout=250)

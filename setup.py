"""Build ``cpd_fast._native`` with CMake; everything else about the package is in pyproject.toml.

``CPD_CUDA``: AUTO (default: CUDA code when nvcc is found), ON (an error when it is not) or OFF.
``CPD_CUDA_ARCHS``: CMake's list of architectures. ``MAX_JOBS``: compilers at a time.
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure and build the CMake project; the library lands beside the package."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / "cmake"
        work.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CPD_CUDA": os.environ.get("CPD_CUDA", "AUTO"),
        }
        if archs := os.environ.get("CPD_CUDA_ARCHS"):
            options["CPD_CUDA_ARCHS"] = archs
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(work),
            "-G",
            "Ninja",
            *(f"-D{k}={v}" for k, v in options.items()),
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(work), "-j", jobs], check=True)
        if not target.exists():
            raise RuntimeError(f"the build finished without {target}")


packages = sorted({"cpd_fast", *find_packages(include=["cpd_fast.*"])} | {"cpd_fast.kernels"})
readme = ROOT / "README.md"
setup(
    long_description=readme.read_text() if readme.exists() else "",
    long_description_content_type="text/markdown",
    packages=packages,
    package_dir={"cpd_fast.kernels": "kernels"},
    package_data={"": ["py.typed", "*.pyi", "*.html", "*.j2", "*.css", "*.js", "*.svg", "*.json", "*.yaml"]},
    ext_modules=[Extension("cpd_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

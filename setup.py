"""Builds the extensions by driving CMake once for all of them; torch is never imported here.

``pymerge._cuda`` is optional: CMake builds it where it finds a CUDA compiler.

Environment: ``PYMERGE_CMAKE_ARGS`` is appended to the configure command (``make asan`` uses it).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FIRST = "pymerge._C"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name != FIRST:
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        build_dir = ROOT / "build" / f"cmake-{tag}"
        import pybind11

        configure = [
            self._cmake(),
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYMERGE_OUTPUT_DIR={target.parent}",
            *shlex.split(os.environ.get("PYMERGE_CMAKE_ARGS", "")),
        ]
        ninja = shutil.which("ninja")
        if ninja:  # named each time: the one of an isolated build is gone at the next
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.check_call(configure)
        subprocess.check_call([self._cmake(), "--build", str(build_dir), "--parallel"])

    @staticmethod
    def _cmake() -> str:
        """The cmake of this environment if it has one, else the one on PATH."""
        beside = Path(sys.executable).parent / "cmake"
        return str(beside) if beside.exists() else "cmake"


setup(
    ext_modules=[
        Extension(FIRST, sources=[]),
        Extension("pymerge._cuda_emulated", sources=[]),
        Extension("pymerge._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)

"""The CUDA extension without a GPU: it is built where nvcc is, imports without a driver, says why
it cannot run, and its hot kernels are what they are meant to be."""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pymerge import doctor
from pymerge.errors import BackendError
from pymerge.ops import cuda, device

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
without_gpu = pytest.mark.skipif(device.may_have_gpu(), reason="this machine may have a GPU")


def asked(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYMERGE_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_nvcc
def test_the_extension_is_built_and_imports_without_a_driver() -> None:
    extension = importlib.import_module("pymerge._cuda")
    assert not extension.is_emulated()


@needs_nvcc
@without_gpu
def test_the_extension_itself_says_why_it_cannot_run() -> None:
    extension = importlib.import_module("pymerge._cuda")
    assert re.search(r"driver|no CUDA", extension.why_not())
    with pytest.raises(BackendError, match=r"cudaGetDeviceCount: .*driver"):
        extension.num_devices()
    with pytest.raises(BackendError, match="cuda"):
        extension.axpy_n((4096, 1, 4), None, [(8192, 1, 4)], [1.0], 1.0, 1.0, True)


@without_gpu
def test_why_not_and_doctor_say_that_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMERGE_CUDA_EMULATE", raising=False)
    problem = cuda.why_not("axpy_n")
    assert problem is not None
    assert "no NVIDIA driver" in problem
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        device.devices_for("cuda")
    found = {f.name: f for s in doctor.examine().sections for f in s.findings}
    assert (found["cuda"].value, found["cuda"].note) == ("not available", problem)
    assert found["triton"].value == "not available"
    assert found["triton"].note


def test_a_missing_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMERGE_CUDA_EMULATE", raising=False)
    monkeypatch.setattr(cuda, "may_have_gpu", lambda: True)
    monkeypatch.setattr(cuda, "_modules", {})
    monkeypatch.setitem(sys.modules, "pymerge._cuda", None)
    assert "pymerge._cuda cannot be imported" in (cuda.why_not() or "")


def test_neither_torch_nor_triton_is_loaded_to_say_no() -> None:
    code = "import sys\nfrom pymerge.ops import cuda, device\ncuda.why_not()\n"
    assert asked(f"{code}print(sorted({{'torch', 'triton'}} & set(sys.modules)))") == "[]"


@functools.cache
def ptxas(source: str, architecture: str) -> str:
    """What ptxas says of the kernels of a file."""
    done = subprocess.run(
        [
            *("nvcc", "-std=c++17", "-O3", "--fmad=false", "-cubin", "-Xptxas", "-v"),
            *(f"-arch={architecture}", f"-I{ROOT / 'csrc' / 'include'}", "-o", os.devnull),
            str(SOURCES / source),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@functools.cache
def ptx(source: str) -> str:
    done = subprocess.run(
        [
            *("nvcc", "-std=c++17", "-O3", "--fmad=false", "-ptx", "-arch=compute_80"),
            *(f"-I{ROOT / 'csrc' / 'include'}", "-o", "/dev/stdout", str(SOURCES / source)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


#: File, and what the mangled names of its hot kernels contain.
HOT = (
    ("maps.cu", "staged_map_kernelINS0_", "axpy_n_map"),
    ("disjoint.cu", "staged_map_kernelINS0_", "disjoint_merge_map"),
    ("histogram.cu", "", "magnitude_histogram_kernel"),
    ("selection.cu", "", "bracket_count_kernel"),
)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("source", "driver", "kernel"), HOT)
def test_hot_kernels_spill_nothing(
    source: str, driver: str, kernel: str, architecture: str
) -> None:
    said = ptxas(source, architecture)
    found = re.findall(
        r"Compiling entry function '(\S+)' for '\w+'\n(?:.*\n)*?.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads",
        said,
    )
    hot = [entry for entry in found if kernel in entry[0] and driver.split("I")[0] in entry[0]]
    assert hot, said
    assert {(stores, loads) for _, stores, loads in hot} == {("0", "0")}


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("source", "kernel"), [(s, k) for s, d, k in HOT if d])
def test_hot_maps_move_16_bytes_at_a_time(source: str, kernel: str) -> None:
    """16-bit elements come 16 bytes at a time, into shared memory or registers, and leave so."""
    text = ptx(source)
    bodies = {body.split("(")[0]: body for body in text.split("\n.entry ")[1:] if kernel in body}
    assert bodies
    for name, body in bodies.items():
        if "staged_map_kernel" in name:
            assert re.search(r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16;", body)
        else:
            assert re.search(r"ld\.global(\.nc)?\.v4\.u32", body)
        assert re.search(r"st\.global(\.cs)?\.v4\.u32", body)
        assert "fma.rn" not in body

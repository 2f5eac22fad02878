"""Every method on every backend that this machine can run: the bytes are the CPU's.

Backends that need a switch in the environment before anything is loaded run in a process of their
own. A cell that cannot run is skipped with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pymerge import ops
from pymerge.methods import METHODS
from pymerge.ops import dispatch
from pymerge.ops.table import OPS

SCRIPT = Path(__file__).with_name("cells.py")
cells = importlib.import_module("cells") if str(SCRIPT.parent) in sys.path else None
if cells is None:
    sys.path.insert(0, str(SCRIPT.parent))
    cells = importlib.import_module("cells")
    sys.path.remove(str(SCRIPT.parent))

#: Backend as shown → its name and the environment that it needs.
ELSEWHERE = {
    "triton-interpreter": ("triton", {"TRITON_INTERPRET": "1"}),
    "cuda-emulated": ("cuda", {"PYMERGE_CUDA_EMULATE": "1"}),
    "triton": ("triton", {}),
    "cuda": ("cuda", {}),
}


@functools.cache
def truth(name: str) -> str:
    """The digest by the reference."""
    found: str = cells.digest(name, "reference")
    return found


@functools.cache
def run_elsewhere(shown: str) -> dict[str, Any]:
    """Name → digest of every cell, and the values of some, by a process of its own."""
    backend, environment = ELSEWHERE[shown]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYMERGE_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), backend],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(params=ops.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = ops.isa()
    ops.use_isa(request.param)
    yield request.param
    ops.use_isa(before)


def test_every_method_has_a_cell() -> None:
    assert {cell.method for cell in cells.CELLS.values()} == set(METHODS)


@pytest.mark.parametrize("name", cells.CELLS)
def test_cpu(name: str, isa: str) -> None:
    assert cells.digest(name, "cpu") == truth(name)


@pytest.mark.parametrize("shown", ELSEWHERE)
@pytest.mark.parametrize("name", cells.CELLS)
def test_elsewhere(name: str, shown: str) -> None:
    backend, environment = ELSEWHERE[shown]
    missing = [
        op for op in METHODS[cells.CELLS[name].method].ops if backend not in OPS[op].backends
    ]
    if missing:
        pytest.skip(f"backend {backend} has no {', '.join(missing)}")
    if not environment:
        reason = dispatch.why_not(backend, "axpy_n")
        if reason is not None:
            pytest.skip(reason)
    if shown == "triton-interpreter" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if not environment and METHODS[cells.CELLS[name].method].cost is not None:
        # A device has a BLAS of its own: near, not equal.
        found, expected = run_elsewhere(shown)[f"{name}/values"], cells.values(name, "reference")
        assert isinstance(found, list), found
        error, size = (math.dist(found, other) for other in (expected, [0.0] * len(expected)))
        assert error <= 1e-4 * size
        return
    assert run_elsewhere(shown)[name] == truth(name)

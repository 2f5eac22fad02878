"""The Triton kernels in Triton's interpreter; the checks are those of interpreted.py."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("interpreted.py")


def names() -> list[str]:
    """The checks of the program, which this process cannot import: see there."""
    functions = [n for n in ast.parse(PROGRAM.read_text()).body if isinstance(n, ast.FunctionDef)]
    return [f.name for f in functions if any(ast.unparse(d) == "check" for d in f.decorator_list)]


@functools.cache
def reports() -> tuple[dict[str, dict[str, Any]], str]:
    """What one process for all checks says of each, and how it ended."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(("PYMERGE_", "TRITON_"))},
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {report["check"]: report for report in found}, done.stderr[-2000:]


@pytest.mark.parametrize("name", names())
def test_interpreted_kernels_give_the_bytes_of_the_reference(name: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    found, end = reports()
    assert name in found, end
    assert found[name]["problem"] is None, found[name]["problem"]


def test_there_are_checks() -> None:
    assert len(names()) >= 10

"""The ops on the CPU: arguments are checked here, the work is done by ``pymerge._C``.

The extension is loaded at the first use, so that this module imports on a machine where it is
missing; the error then carries the reason. The ops are documented in
pymerge/ops/table.py.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.errors import BackendError
from pymerge.ops import checks
from pymerge.ops.view import View

_extension: Any = None
_reason: ImportError | None = None


def _load() -> Any:
    """The extension module, or None with the reason kept."""
    global _extension, _reason
    if _extension is None and _reason is None:
        try:
            _extension = importlib.import_module("pymerge._C")
        except ImportError as error:
            _reason = error
    return _extension


def _kernels() -> Any:
    problem = why_not()
    if problem is not None:
        raise BackendError(problem) from _reason
    return _extension


def why_not(op: str | None = None) -> str | None:
    """Why this backend cannot run ``op`` here, or None. It offers every op of the table.

    Raises BackendError where PYMERGE_ISA names an instruction set that is missing: what is asked
    for by name is never replaced in silence.
    """
    extension = _load()
    if extension is None:
        return (
            f"the extension pymerge._C cannot be imported: {_reason}; "
            "build it with `make native`, or install pymerge again"
        )
    if not extension.isa():
        raise BackendError(
            f"PYMERGE_ISA asks for {os.environ.get('PYMERGE_ISA', '')!r}; "
            f"this machine and build have {', '.join(extension.available_isas())}"
        )
    return None


def isa() -> str:
    """The instruction set in use: "scalar", "avx2" or "avx512"."""
    name: str = _kernels().isa()
    return name


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this processor, operating system and build have, worst first."""
    extension = _load()
    if extension is None:
        _kernels()
    return tuple(extension.available_isas())


def use_isa(name: str) -> None:
    """Makes all following calls, in every thread, use an instruction set.

    Raises BackendError, which names those there are, if it is missing.
    """
    names = available_isas()
    if not _extension.use_isa(name):
        raise BackendError(
            f"instruction set {name!r} cannot be used; "
            f"this machine and build have {', '.join(names)}"
        )


def axpy_n(
    out: View,
    inputs: Sequence[View],
    weights: Sequence[float],
    *,
    base: View | None = None,
    divisor: float = 1.0,
    scale: float = 1.0,
) -> int:
    op = "axpy_n"
    checks.check_views(op, base, inputs, out)
    checks.check_writable(op, out)
    rounded = checks.floats(op, "weights", weights, len(inputs))
    divisor, scale = checks.floats(op, "factors", [divisor, scale], 2)
    count: int = _kernels().axpy_n(out, base, inputs, rounded, divisor, scale)
    return count


def magnitude_sample(
    base: View | None, models: Sequence[View], start: int, *, group: int, stride: int
) -> NDArray[np.int32]:
    op = "magnitude_sample"
    num = checks.check_views(op, base, models)
    num_sampled = checks.check_sampling(op, num, start, group, stride)
    keys = np.empty((len(models), num_sampled), np.int32)
    _kernels().magnitude_sample(
        base, models, num, start, group, stride, keys.ctypes.data, num_sampled
    )
    return keys


def bracket_count(
    base: View | None, models: Sequence[View], low: ArrayLike, high: ArrayLike, capacity: int
) -> tuple[NDArray[np.int64], list[NDArray[np.int32]]]:
    op = "bracket_count"
    num = checks.check_views(op, base, models)
    lows, highs = checks.brackets(op, low, high, len(models))
    checks.check_range(op, "capacity", capacity, 0, 2**62)
    capacity = min(capacity, num)
    counts = np.zeros((len(models), 4), np.int64)
    candidates = np.empty((len(models), capacity), np.int32)
    _kernels().bracket_count(
        base, models, num, lows, highs, counts.ctypes.data, candidates.ctypes.data, capacity
    )
    return counts, [row[: count[3]] for row, count in zip(candidates, counts, strict=True)]


def magnitude_histogram(
    base: View | None,
    models: Sequence[View],
    counts: NDArray[np.uint64],
    *,
    shift: int,
    prefix: ArrayLike | None = None,
    prefix_shift: int | None = None,
) -> None:
    num = checks.check_views("magnitude_histogram", base, models)
    prefixes, top = checks.check_histogram(len(models), counts, shift, prefix, prefix_shift)
    _kernels().magnitude_histogram(
        base, models, num, shift, prefixes, top, counts.ctypes.data, counts.shape[1]
    )


def locate_equal(base: View | None, model: View, key: int, nth: int) -> tuple[int, int]:
    op = "locate_equal"
    checks.check_views(op, base, [model])
    checks.check_range(op, "key", key, 0, checks.INT32_MAX)
    checks.check_range(op, "nth", nth, 0, 2**62)
    index, count = _kernels().locate_equal(base, model, key, nth)
    return index, count


def disjoint_merge(
    out: View,
    base: View,
    models: Sequence[View],
    weights: Sequence[float],
    thresholds: ArrayLike,
    cutoffs: ArrayLike,
    start: int,
    *,
    normalize: bool,
    scale: float = 1.0,
) -> int:
    op = "disjoint_merge"
    checks.check_views(op, base, models, out)
    checks.check_writable(op, out)
    rounded = checks.floats(op, "weights", weights, len(models))
    limits, ends = checks.selection(op, thresholds, cutoffs, start, len(models))
    (scale,) = checks.floats(op, "factors", [scale], 1)
    count: int = _kernels().disjoint_merge(
        out, base, models, rounded, limits, ends, start, bool(normalize), scale
    )
    return count


def convert(out: View, input: View) -> int:
    checks.check_views("convert", None, [input], out)
    if out.code != input.code:
        checks.check_writable("convert", out)
    count: int = _kernels().convert(out, input)
    return count


def count_nonfinite(input: View) -> int:
    checks.check_views("count_nonfinite", None, [input])
    count: int = _kernels().count_nonfinite(input)
    return count

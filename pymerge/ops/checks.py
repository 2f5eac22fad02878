"""Checks of op arguments, shared by the backends: what is wrong is said before a kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pymerge.errors import PymergeError
from pymerge.formats import BY_CODE
from pymerge.ops.view import View

INT32_MAX = 2**31 - 1


def check_views(op: str, base: View | None, models: Sequence[View], out: View | None = None) -> int:
    """Checks formats, element counts and overlap; returns the number of elements."""
    if not models:
        raise PymergeError(f"{op}: expected at least one input, found none")
    named = [(f"input {i}", v) for i, v in enumerate(models)]
    if base is not None:
        named.insert(0, ("the base", base))
    num = named[0][1].num if out is None else out.num
    first = named[0][0] if out is None else "the output"
    for name, v in named if out is None else [*named, ("the output", out)]:
        if v.code not in BY_CODE:
            raise PymergeError(
                f"{op}: {name} has format code {v.code}, known are {sorted(BY_CODE)}"
            )
        if v.num != num or num < 0:
            raise PymergeError(
                f"{op}: {name} has {v.num} elements, {first} has {num}; all counts must be equal"
            )
        if v.num and not v.ptr:
            raise PymergeError(f"{op}: {name} has {v.num} elements at address 0")
    if out is not None:
        for name, v in named:
            if out.ptr < v.ptr + _num_bytes(v) and v.ptr < out.ptr + _num_bytes(out):
                raise PymergeError(
                    f"{op}: the output overlaps {name} in memory; give it memory of its own"
                )
    return num


def check_writable(op: str, out: View) -> None:
    """Raises unless a kernel can round to the output's format."""
    if not BY_CODE[out.code].writable:
        names = ", ".join(f.name for f in BY_CODE.values() if f.writable)
        raise PymergeError(f"{op}: cannot round to {BY_CODE[out.code].name}; writable are {names}")


def floats(op: str, name: str, values: Sequence[float], count: int) -> list[float]:
    """``count`` numbers rounded to float32."""
    if len(values) != count:
        raise PymergeError(f"{op}: expected {count} {name}, one per input, found {len(values)}")
    with np.errstate(over="ignore"):
        rounded: list[float] = np.asarray(values, dtype=np.float64).astype(np.float32).tolist()
    return rounded


def integers(op: str, name: str, values: Any, count: int, low: int, high: int) -> list[int]:
    """``count`` integers in [low, high], from any sequence or numpy array of integers."""
    found = np.asarray(values)
    if found.shape != (count,):
        raise PymergeError(
            f"{op}: expected {count} {name}, one per model, found shape {found.shape}"
        )
    if found.dtype.kind not in "iu":
        raise PymergeError(f"{op}: expected integer {name}, found {found.dtype.name}")
    result: list[int] = found.tolist()
    for i, value in enumerate(result):
        if not low <= value <= high:
            raise PymergeError(f"{op}: {name}[{i}] is {value}, expected {low} to {high}")
    return result


def check_range(op: str, name: str, value: int, low: int, high: int) -> None:
    """Raises unless low <= value <= high."""
    if not low <= value <= high:
        raise PymergeError(f"{op}: {name} is {value}, expected {low} to {high}")


def check_sampling(op: str, num: int, start: int, group: int, stride: int) -> int:
    """The number of elements that a sample of ``num`` elements from index ``start`` takes."""
    check_range(op, "start", start, 0, 2**62)
    check_range(op, "group", group, 1, 2**31)
    check_range(op, "stride", stride, 1, 2**31)

    def sampled_before(end: int) -> int:
        period = group * stride
        return end // period * group + min(end % period, group)

    return sampled_before(start + num) - sampled_before(start)


def brackets(op: str, low: Any, high: Any, count: int) -> tuple[list[int], list[int]]:
    """The ends of one key range per model, low <= high."""
    lows = integers(op, "low", low, count, -1, INT32_MAX)
    highs = integers(op, "high", high, count, -1, INT32_MAX)
    for i, (a, b) in enumerate(zip(lows, highs, strict=True)):
        if a > b:
            raise PymergeError(f"{op}: low[{i}] is {a} and above high[{i}], which is {b}")
    return lows, highs


def selection(
    op: str, thresholds: Any, cutoffs: Any, start: int, count: int
) -> tuple[list[int], list[int]]:
    """The threshold and tie cutoff of each model, and the tensor index of the first element."""
    check_range(op, "start", start, 0, 2**62)
    limits = integers(op, "thresholds", thresholds, count, -(2**31), INT32_MAX)
    return limits, integers(op, "cutoffs", cutoffs, count, -(2**63), 2**63 - 1)


def check_histogram(
    num_models: int, counts: Any, shift: int, prefix: Any, prefix_shift: int | None
) -> tuple[list[int] | None, int]:
    """Checks bins against shifts; returns the prefixes and the shift above the binned bits."""
    op = "magnitude_histogram"
    if (prefix is None) != (prefix_shift is None):
        raise PymergeError(f"{op}: prefix and prefix_shift go together, found only one of them")
    top = 31 if prefix_shift is None else prefix_shift
    check_range(op, "prefix_shift", top, 0, 31)
    check_range(op, "shift", shift, 0, top)
    shape = (num_models, 2 ** (top - shift))
    if (
        not isinstance(counts, np.ndarray)
        or counts.dtype != np.uint64
        or counts.shape != shape
        or not counts.flags.c_contiguous
        or not counts.flags.writeable
    ):
        found = (
            f"{counts.dtype.name} {counts.shape}"
            if isinstance(counts, np.ndarray)
            else type(counts).__name__
        )
        raise PymergeError(
            f"{op}: expected counts as a writable, contiguous uint64 array of shape {shape}, "
            f"found {found}"
        )
    if prefix is None:
        return None, top
    return integers(op, "prefix", prefix, num_models, -1, INT32_MAX), top


def _num_bytes(v: View) -> int:
    return v.num * BY_CODE[v.code].num_bytes

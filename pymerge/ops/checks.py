"""Single checks of op arguments; pymerge/ops/arguments.py composes them for each op.

A merge calls ops on small tiles too, so a check of what is right costs a few microseconds: messages
and names are made only when something is wrong.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from ctypes import c_float
from math import isfinite
from operator import index as as_index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.errors import PymergeError
from pymerge.formats import BY_CODE
from pymerge.ops.selection import ALL_DRAWS, Keep
from pymerge.ops.view import View

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
SEED_MAX = 2**64 - 1
#: No tensor has more elements; sums of two such indices still fit 64 bits.
INDEX_MAX = 2**62

_NUM_BYTES = {code: format.num_bytes for code, format in BY_CODE.items()}


def check_views(
    op: str,
    base: View | None,
    models: Sequence[View],
    out: View | None = None,
    *,
    score: View | None = None,
    masks: Sequence[int] = (),
    writes_masks: bool = False,
) -> int:
    """Checks formats, element counts and overlap; returns the number of elements.

    ``masks``: addresses of packed bits, 8 elements a byte, read or written along with the views.
    """
    if not models:
        raise PymergeError(f"{op}: expected at least one input, found none")
    inputs = models if base is None else (base, *models)
    if score is not None:
        inputs = (*inputs, score)
    num = inputs[0].num if out is None else out.num
    for v in inputs:
        if v.num != num or v.code not in BY_CODE or not v.ptr:
            _explain(op, base, inputs, out, score)
            break
    if out is not None:
        if out.code not in BY_CODE or not out.ptr:
            _explain(op, base, inputs, out, score)
        begin, end = out.ptr, out.ptr + num * _NUM_BYTES[out.code]
        for v in inputs:
            if begin < v.ptr + num * _NUM_BYTES[v.code] and v.ptr < end:
                name = _names(base, inputs, score)[inputs.index(v)]
                raise PymergeError(
                    f"{op}: the output overlaps {name} in memory; give it memory of its own"
                )
    if num < 0:
        _explain(op, base, inputs, out, score)
    if masks:
        _check_masks(op, inputs, out, masks, num, writes_masks)
    return num


def _names(base: View | None, inputs: Sequence[View], score: View | None) -> list[str]:
    first = [] if base is None else ["the base"]
    last = [] if score is None else ["the score"]
    num_models = len(inputs) - len(first) - len(last)
    return [*first, *(f"input {i}" for i in range(num_models)), *last]


def _explain(
    op: str, base: View | None, inputs: Sequence[View], out: View | None, score: View | None
) -> None:
    """Raises for the first view that is wrong in itself or in its count."""
    named = [*zip(_names(base, inputs, score), inputs, strict=True)]
    if out is not None:
        named.append(("the output", out))
    first, reference = named[0] if out is None else named[-1]
    for name, v in named:
        if v.code not in BY_CODE:
            raise PymergeError(
                f"{op}: {name} has format code {v.code}, known are {sorted(BY_CODE)}"
            )
        if v.num != reference.num or v.num < 0:
            raise PymergeError(
                f"{op}: {name} has {v.num} elements, {first} has {reference.num}; "
                "all counts must be equal and not negative"
            )
        if v.num and not v.ptr:
            raise PymergeError(f"{op}: {name} has {v.num} elements at address 0")


def _check_masks(
    op: str,
    inputs: Sequence[View],
    out: View | None,
    masks: Sequence[int],
    num: int,
    writes: bool,
) -> None:
    """Addresses are there, and what is written overlaps nothing else."""
    length = -(-num // 8)
    ranges = []
    for i, address in enumerate(masks):
        if as_index(address) <= 0 and num:
            raise PymergeError(f"{op}: mask {i} has {num} bits at address {address}")
        ranges.append((address, address + length, writes, f"mask {i}"))
    views = list(inputs) if writes else []
    views += [] if out is None else [out]
    ranges += [
        (
            v.ptr,
            v.ptr + num * _NUM_BYTES[v.code],
            v is out,
            "the output" if v is out else "an input",
        )
        for v in views
    ]
    any_end, any_name, written_end, written_name = 0, "", 0, ""
    for begin, end, written, name in sorted(ranges):
        if begin == end:
            continue
        if begin < (any_end if written else written_end):
            other = any_name if written else written_name
            raise PymergeError(
                f"{op}: {name} overlaps {other} in memory; what is written needs memory of its own"
            )
        if end > any_end:
            any_end, any_name = end, name
        if written and end > written_end:
            written_end, written_name = end, name


def check_base(op: str, base: View | None) -> None:
    """Raises where an op that compares with a base has none."""
    if base is None:
        raise PymergeError(f"{op}: expected a base, found None")


def check_writable(op: str, out: View) -> None:
    """Raises unless a kernel can round to the output's format."""
    format = BY_CODE.get(out.code)
    if format is None or not format.writable:
        found = f"format code {out.code}" if format is None else format.name
        names = ", ".join(f.name for f in BY_CODE.values() if f.writable)
        raise PymergeError(f"{op}: cannot round to {found}; writable are {names}")


def floats(op: str, name: str, values: Sequence[float], count: int) -> list[float]:
    """``count`` numbers rounded to float32, which overflows to infinity."""
    try:
        rounded = array("f", values).tolist()
    except TypeError as error:
        raise PymergeError(f"{op}: expected numbers as {name}: {error}") from error
    if len(rounded) != count:
        raise PymergeError(f"{op}: expected {count} {name}, one per input, found {len(rounded)}")
    return rounded


def number(op: str, name: str, value: float) -> float:
    """A number rounded to float32, which overflows to infinity."""
    try:
        return c_float(value).value
    except TypeError as error:
        raise PymergeError(
            f"{op}: {name} is {value!r}, expected a number ({type(value).__name__} found)"
        ) from error


def finite(op: str, name: str, value: float) -> float:
    """A number rounded to float32, where it must be finite."""
    rounded = number(op, name, value)
    if not isfinite(rounded):
        raise PymergeError(f"{op}: {name} is {value}, expected a finite float32")
    return rounded


def table(op: str, name: str, values: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A contiguous float32 array of a shape, rounded where it is not float32 yet."""
    try:
        found = np.asarray(values)
        if found.dtype != np.float32:
            with np.errstate(over="ignore"):
                found = found.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise PymergeError(f"{op}: expected numbers as {name}: {error}") from error
    if found.shape != shape:
        raise PymergeError(f"{op}: expected {name} of shape {shape}, found {found.shape}")
    return np.ascontiguousarray(found)


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


def check_range(op: str, name: str, value: int, low: int, high: int) -> int:
    """The value as an int; raises unless it is an integer in [low, high]."""
    try:
        found = as_index(value)
    except TypeError:
        raise PymergeError(f"{op}: {name} is {value!r}, expected an integer") from None
    if not low <= found <= high:
        raise PymergeError(f"{op}: {name} is {found}, expected {low} to {high}")
    return found


def check_word(op: str, name: str, value: str, words: Iterable[str]) -> None:
    """Raises unless the value is one of the words."""
    if value not in words:
        choices = ", ".join(repr(word) for word in words)
        raise PymergeError(f"{op}: {name} is {value!r}, expected one of {choices}")


def check_rows(op: str, num: int, columns: int, most: int = INDEX_MAX) -> int:
    """The number of rows of ``columns`` elements, which must all be whole."""
    check_range(op, "columns", columns, 1, most)
    if num % columns:
        raise PymergeError(
            f"{op}: expected whole rows of {columns} elements, found {num} elements; "
            "cut tiles at the ends of rows"
        )
    return num // columns


def check_spans(op: str, num: int, span: int) -> int:
    """The number of spans of ``span`` elements, the last of which may be shorter."""
    return -(-num // check_range(op, "span", span, 1, INDEX_MAX))


def check_start(op: str, start: int) -> int:
    """The index in the full tensor of the first element."""
    return check_range(op, "start", start, 0, INDEX_MAX)


def check_sampling(op: str, num: int, start: int, group: int, stride: int) -> int:
    """The number of elements that a sample of ``num`` elements from index ``start`` takes."""
    check_start(op, start)
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


_KEEP_RANGES = (
    ("threshold", INT32_MIN, INT32_MAX),
    ("cutoff", INT64_MIN, INT64_MAX),
    ("ceiling", INT32_MIN, INT32_MAX),
    ("ceiling_cutoff", INT64_MIN, INT64_MAX),
    ("draws", 0, ALL_DRAWS),
    ("seed", 0, SEED_MAX),
)


def keeps(op: str, values: Sequence[Keep], count: int) -> list[Keep]:
    """One :class:`Keep` of Python ints per model, every field in its range."""
    if len(values) != count:
        raise PymergeError(f"{op}: expected {count} keeps, one per model, found {len(values)}")
    checked = []
    for i, keep in enumerate(values):
        if not isinstance(keep, Keep):
            raise PymergeError(f"{op}: keeps[{i}] is {keep!r}, expected a Keep")
        threshold, cutoff, ceiling, ceiling_cutoff, draws, seed = keep
        if not (
            type(threshold) is type(cutoff) is type(ceiling) is type(ceiling_cutoff) is int
            and type(draws) is type(seed) is int
            and INT32_MIN <= threshold <= INT32_MAX
            and INT64_MIN <= cutoff <= INT64_MAX
            and INT32_MIN <= ceiling <= INT32_MAX
            and INT64_MIN <= ceiling_cutoff <= INT64_MAX
            and 0 <= draws <= ALL_DRAWS
            and 0 <= seed <= SEED_MAX
        ):
            keep = _exact_keep(op, i, keep)
        checked.append(keep)
    return checked


def _exact_keep(op: str, position: int, keep: Keep) -> Keep:
    """The keep with Python ints in the place of other integers; raises where one is not right."""
    return Keep(
        *(
            check_range(op, f"keeps[{position}].{name}", value, low, high)
            for value, (name, low, high) in zip(keep, _KEEP_RANGES, strict=True)
        )
    )


def check_sums(op: str, sums: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Raises unless an array that is added to has the right type, shape and layout."""
    expected = np.dtype(dtype)
    if (
        not isinstance(sums, np.ndarray)
        or sums.dtype != expected
        or sums.shape != shape
        or not sums.flags.c_contiguous
        or not sums.flags.writeable
    ):
        found = (
            f"{sums.dtype.name} {sums.shape}"
            if isinstance(sums, np.ndarray)
            else type(sums).__name__
        )
        raise PymergeError(
            f"{op}: expected a writable, contiguous {expected.name} array of shape {shape} to add "
            f"to, found {found}"
        )


def check_histogram(
    num_models: int, counts: Any, shift: int, prefix: Any, prefix_shift: int | None
) -> tuple[list[int] | None, int]:
    """Checks bins against shifts; returns the prefixes and the shift above the binned bits."""
    op = "magnitude_histogram"
    if (prefix is None) != (prefix_shift is None):
        raise PymergeError(f"{op}: prefix and prefix_shift go together, found only one of them")
    top = 31 if prefix_shift is None else check_range(op, "prefix_shift", prefix_shift, 0, 31)
    check_range(op, "shift", shift, 0, top)
    check_sums(op, counts, (num_models, 2 ** (top - shift)), np.uint64)
    if prefix is None:
        return None, top
    return integers(op, "prefix", prefix, num_models, -1, INT32_MAX), top

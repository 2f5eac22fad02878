"""The ops as plain numpy: the truth that every kernel is tested against, bit by bit.

Written for reading, not for speed: whole tensors in memory, one statement per step of the
definition. Formats are decoded and rounded by hand, so that nothing here depends on the kernels or
on torch.

Shared definitions: value(x) is the float32 of an element; delta_i = value(x_i) - value(base) in
float32; the key of a delta is the int32 pattern of its magnitude, with every NaN as 0x7fc00000, so
that keys order like magnitudes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.formats import BF16, BY_CODE, F8_E4M3, F8_E5M2, F16, F32, F64
from pymerge.ops import checks
from pymerge.ops.view import View

Floats = NDArray[np.float32]
Keys = NDArray[np.int32]

QUIET_NAN = 0x7FC00000


def why_not(op: str | None = None) -> str | None:
    """Why this backend cannot run ``op``; numpy is everywhere, so always None."""
    return None


# ---- formats


def value(v: View) -> Floats:
    """The elements as float32; exact for every format but float64, which rounds to nearest even."""
    raw: NDArray[Any] = _bytes(v).copy()
    if v.code == F64.code:
        with np.errstate(all="ignore"):
            return np.asarray(raw.view(np.float64).astype(np.float32))
    if v.code == F32.code:
        return raw.view(np.float32)
    if v.code == BF16.code:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if v.code == F16.code:
        return decode_float(raw.view(np.uint16), exponent_bits=5, mantissa_bits=10, has_inf=True)
    if v.code == F8_E4M3.code:
        return decode_float(raw, exponent_bits=4, mantissa_bits=3, has_inf=False)
    assert v.code == F8_E5M2.code
    return decode_float(raw, exponent_bits=5, mantissa_bits=2, has_inf=True)


def decode_float(
    patterns: NDArray[Any], *, exponent_bits: int, mantissa_bits: int, has_inf: bool
) -> Floats:
    """Small floats from their bit patterns: (-1)^s 2^(e - bias) 1.m, subnormals 2^(1 - bias) 0.m.

    ``has_inf``: the top exponent means infinity and NaN; otherwise only the all-ones pattern is
    NaN.
    """
    bits = patterns.astype(np.int64)
    sign = bits >> (exponent_bits + mantissa_bits)
    exponent = (bits >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = bits & (2**mantissa_bits - 1)
    bias = 2 ** (exponent_bits - 1) - 1
    fraction = mantissa / 2.0**mantissa_bits
    magnitude = np.where(
        exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, exponent - bias)
    )
    top = exponent == 2**exponent_bits - 1
    if has_inf:
        magnitude = np.where(top, np.where(mantissa == 0, np.inf, np.nan), magnitude)
    else:
        magnitude = np.where(top & (mantissa == 2**mantissa_bits - 1), np.nan, magnitude)
    return np.where(sign == 1, -magnitude, magnitude).astype(np.float32)


def store(out: View, x: Floats) -> int:
    """Rounds to nearest even into ``out``, every NaN as the positive quiet one.

    Returns how many elements are not finite after rounding.
    """
    with np.errstate(all="ignore"):
        nan = np.isnan(x)
        bits = x.view(np.uint32).astype(np.uint64)
        if out.code == F64.code:
            rounded: NDArray[Any] = np.where(nan, np.nan, x.astype(np.float64))
            nonfinite = ~np.isfinite(rounded)
        elif out.code == F32.code:
            rounded = np.where(nan, QUIET_NAN, bits).astype(np.uint32)
            nonfinite = ~np.isfinite(x)
        elif out.code == BF16.code:
            odd = (bits >> 16) & 1
            rounded = np.where(nan, 0x7FC0, (bits + 0x7FFF + odd) >> 16).astype(np.uint16)
            nonfinite = (rounded & 0x7F80) == 0x7F80
        else:
            assert out.code == F16.code
            rounded = np.where(nan, 0x7E00, encode_f16(x)).astype(np.uint16)
            nonfinite = (rounded & 0x7C00) == 0x7C00
    _bytes(out)[:] = rounded.view(np.uint8)
    return int(np.count_nonzero(nonfinite))


def encode_f16(x: Floats) -> NDArray[np.int64]:
    """float16 patterns of float32 numbers (not NaN): the magnitude in units of its last place, to
    nearest even.

    The patterns of magnitudes count upwards by one unit, so an exponent that the rounding carries
    into needs no care, and 65520 and above end at or beyond 0x7c00, which is infinity.
    """
    wide = np.abs(np.where(np.isfinite(x), x, 0)).astype(np.float64)
    exponent = np.where(wide == 0, -14, np.maximum(np.frexp(wide)[1] - 1, -14))
    units = np.rint(np.ldexp(wide, 10 - exponent)).astype(np.int64)
    pattern = ((exponent + 14) << 10) + units
    pattern = np.where(np.isinf(x), 0x7C00, np.minimum(pattern, 0x7C00))
    return np.asarray(pattern | np.where(np.signbit(x), 0x8000, 0))


# ---- ops; signatures and definitions are those of pymerge/ops/table.py


def axpy_n(
    out: View,
    inputs: Sequence[View],
    weights: Sequence[float],
    *,
    base: View | None = None,
    divisor: float = 1.0,
    scale: float = 1.0,
) -> int:
    checks.check_views("axpy_n", base, inputs, out)
    checks.check_writable("axpy_n", out)
    w = np.asarray(checks.floats("axpy_n", "weights", weights, len(inputs)), np.float32)
    with np.errstate(all="ignore"):
        terms = [w[i] * _delta(base, x) for i, x in enumerate(inputs)]
        acc = terms[0]
        for term in terms[1:]:
            acc = acc + term
        if divisor != 1:
            acc = acc / np.float32(divisor)
        if scale != 1:
            acc = acc * np.float32(scale)
        if base is not None:
            acc = value(base) + acc
    return store(out, acc)


def magnitude_sample(
    base: View | None, models: Sequence[View], start: int, *, group: int, stride: int
) -> Keys:
    num = checks.check_views("magnitude_sample", base, models)
    checks.check_sampling("magnitude_sample", num, start, group, stride)
    index = start + np.arange(num, dtype=np.int64)
    sampled = (index // group) % stride == 0
    return np.stack([_key(_delta(base, x))[sampled] for x in models])


def bracket_count(
    base: View | None, models: Sequence[View], low: ArrayLike, high: ArrayLike, capacity: int
) -> tuple[NDArray[np.int64], list[Keys]]:
    checks.check_views("bracket_count", base, models)
    checks.check_range("bracket_count", "capacity", capacity, 0, 2**62)
    lows, highs = checks.brackets("bracket_count", low, high, len(models))
    counts = np.zeros((len(models), 4), np.int64)
    candidates = []
    for i, x in enumerate(models):
        key = _key(_delta(base, x))
        between = (key > lows[i]) & (key < highs[i])
        at_low = np.count_nonzero(key == lows[i]) if lows[i] != highs[i] else 0
        above, at_high = np.count_nonzero(key > highs[i]), np.count_nonzero(key == highs[i])
        counts[i] = above, at_high, at_low, np.count_nonzero(between)
        candidates.append(key[between][:capacity])
    return counts, candidates


def magnitude_histogram(
    base: View | None,
    models: Sequence[View],
    counts: NDArray[np.uint64],
    *,
    shift: int,
    prefix: ArrayLike | None = None,
    prefix_shift: int | None = None,
) -> None:
    checks.check_views("magnitude_histogram", base, models)
    prefixes, top = checks.check_histogram(len(models), counts, shift, prefix, prefix_shift)
    num_bins = counts.shape[1]
    for i, x in enumerate(models):
        key = _key(_delta(base, x)).astype(np.int64)
        if prefixes is not None:
            key = key[key >> top == prefixes[i]]
        bins = (key >> shift) & (num_bins - 1)
        counts[i] += np.bincount(bins, minlength=num_bins).astype(np.uint64)


def locate_equal(base: View | None, model: View, key: int, nth: int) -> tuple[int, int]:
    checks.check_views("locate_equal", base, [model])
    checks.check_range("locate_equal", "key", key, 0, checks.INT32_MAX)
    checks.check_range("locate_equal", "nth", nth, 0, 2**62)
    found = np.flatnonzero(_key(_delta(base, model)) == key)
    return (int(found[nth]), nth + 1) if nth < len(found) else (-1, len(found))


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
    num_elements = checks.check_views(op, base, models, out)
    checks.check_writable(op, out)
    w = np.asarray(checks.floats(op, "weights", weights, len(models)), np.float32)
    limits, ends = checks.selection(op, thresholds, cutoffs, start, len(models))
    index = start + np.arange(num_elements, dtype=np.int64)
    with np.errstate(all="ignore"):
        votes = []
        for i, x in enumerate(models):
            delta = _delta(base, x)
            key = _key(delta)
            keep = (key > limits[i]) | ((key == limits[i]) & (index < ends[i]))
            votes.append(np.where(keep, w[i] * delta, np.float32(0)))
        total = votes[0]
        for vote in votes[1:]:
            total = total + vote
        positive = total >= 0
        num: Floats = np.zeros(num_elements, np.float32)
        den: Floats = np.zeros(num_elements, np.float32)
        for i, vote in enumerate(votes):
            selected = np.where(positive, vote > 0, vote < 0)
            num = np.where(selected, num + vote, num)
            den = np.where(selected, den + w[i], den)
        if normalize:
            den[den == 0] = 1
            num = num / den
        num[np.isnan(total)] = np.nan
        if scale != 1:
            num = num * np.float32(scale)
        return store(out, value(base) + num)


def convert(out: View, input: View) -> int:
    checks.check_views("convert", None, [input], out)
    if out.code == input.code:
        _bytes(out)[:] = _bytes(input)
        return count_nonfinite(input)
    checks.check_writable("convert", out)
    return store(out, value(input))


def count_nonfinite(input: View) -> int:
    checks.check_views("count_nonfinite", None, [input])
    if input.code == F64.code:
        return int(np.count_nonzero(~np.isfinite(_bytes(input).copy().view(np.float64))))
    return int(np.count_nonzero(~np.isfinite(value(input))))


def _delta(base: View | None, x: View) -> Floats:
    """value(x) - value(base), or value(x) without a base."""
    with np.errstate(all="ignore"):
        return value(x) if base is None else value(x) - value(base)


def _key(delta: Floats) -> Keys:
    magnitude = delta.view(np.uint32) & np.uint32(0x7FFFFFFF)
    keys: Keys = np.minimum(magnitude, np.uint32(QUIET_NAN)).view(np.int32)
    return keys


def _bytes(v: View) -> NDArray[np.uint8]:
    """The memory of a view, not copied."""
    if v.num == 0:
        return np.empty(0, np.uint8)
    length = v.num * BY_CODE[v.code].num_bytes
    return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(v.ptr))

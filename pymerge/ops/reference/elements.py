"""Elements as numbers and back: formats decoded and rounded by hand; deltas, keys, span sums."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge.formats import BF16, BY_CODE, F8_E4M3, F8_E5M2, F16, F32, F64
from pymerge.ops.view import View

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Keys = NDArray[np.int32]

INFINITY, QUIET_NAN = np.uint32(0x7F800000), 0x7FC00000
#: The lanes of a sum over a span.
LANES = 64


def value(v: View) -> Floats:
    """The elements as float32; exact for every format but float64, which rounds to nearest even."""
    raw: NDArray[Any] = memory_of(v).copy()
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
    memory_of(out)[:] = rounded.view(np.uint8)
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


def delta_of(base: View | None, x: View) -> Floats:
    """value(x) - value(base), or value(x) without a base."""
    with np.errstate(all="ignore"):
        return value(x) if base is None else value(x) - value(base)


def widened(x: Floats) -> Doubles:
    """The same numbers in float64; a signalling NaN is one."""
    with np.errstate(invalid="ignore"):
        return x.astype(np.float64)


def key_of(delta: Floats) -> Keys:
    magnitude = delta.view(np.uint32) & np.uint32(0x7FFFFFFF)
    keys: Keys = np.where(magnitude > INFINITY, np.uint32(QUIET_NAN), magnitude).view(np.int32)
    return keys


def memory_of(v: View) -> NDArray[np.uint8]:
    """The memory of a view, not copied."""
    if v.num == 0:
        return np.empty(0, np.uint8)
    length = v.num * BY_CODE[v.code].num_bytes
    return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(v.ptr))


def span_sums(values: Doubles, span: int) -> Doubles:
    """The sum of each span of ``span`` elements of float64 ``values`` [n], the last one shorter.

    64 lanes: lane l adds elements l, l + 64, ... of its span in order, from +0; then lane l adds
    lane l + 32, then 16, 8, 4, 2, 1. So a sum depends on its span alone, and vectors, warps and
    loops all add in this order. A NaN becomes the positive quiet one.
    """
    span = min(span, max(len(values), 1))
    num_spans = -(-len(values) // span)
    steps = -(-span // LANES)
    whole = np.zeros((num_spans, steps * LANES))
    for index in range(num_spans):
        part = values[index * span : (index + 1) * span]
        whole[index, : len(part)] = part
    lanes = np.zeros((num_spans, LANES))
    with np.errstate(all="ignore"):
        for step in range(steps):
            lanes = lanes + whole[:, step * LANES : (step + 1) * LANES]
        width = LANES // 2
        while width:
            lanes = lanes[:, :width] + lanes[:, width:]
            width //= 2
    return np.where(np.isnan(lanes[:, 0]), np.nan, lanes[:, 0])

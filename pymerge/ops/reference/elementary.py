"""exp, log and tanh in float32 as fixed sequences of rounded operations.

Libraries round these differently from version to version and device to device; a merge that selects
by a score must not. Every step below is one float32 operation, to nearest even, so every backend
that repeats the steps has the same bits. Constants are those of Cephes (expf, logf, tanhf); errors
are below 2 units in the last place on the domains named.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_f = np.float32

#: Adding and subtracting it rounds a float32 of magnitude below 2**22 to an integer.
ROUNDER = _f(12582912.0)
LOG2_E = _f(1.44269504)
LN2_HIGH, LN2_LOW = _f(0.693359375), _f(-2.12194440e-4)
EXP_TOP, EXP_BOTTOM = _f(88.72284), _f(-87.33654)
EXP = tuple(
    map(
        _f,
        (
            1.9875691500e-4,
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ),
    )
)
SQRT_HALF = _f(0.70710678)
LOG = tuple(
    map(
        _f,
        (
            7.0376836292e-2,
            -1.1514610310e-1,
            1.1676998740e-1,
            -1.2420140846e-1,
            1.4249322787e-1,
            -1.6668057665e-1,
            2.0000714765e-1,
            -2.4999993993e-1,
            3.3333331174e-1,
        ),
    )
)
TANH_SPLIT, TANH_TOP = _f(0.625), _f(9.0)
TANH = tuple(
    map(
        _f,
        (
            -5.70498872745e-3,
            2.06390887954e-2,
            -5.37397155531e-2,
            1.33314422036e-1,
            -3.33332819422e-1,
        ),
    )
)


def _horner(coefficients: tuple[np.float32, ...], x: Floats) -> Floats:
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = y * x + coefficient
    return y


def power_of_two(n: NDArray[np.int32]) -> Floats:
    """2**n for -126 <= n <= 127, by its bits."""
    result: Floats = ((n + np.int32(127)) << np.int32(23)).astype(np.int32).view(np.float32)
    return result


def exp(x: Floats) -> Floats:
    """e**x: 0 below -87.33654, where the result would leave the normal range, infinity above
    88.72284."""
    with np.errstate(all="ignore"):
        inside = np.where((x >= EXP_BOTTOM) & (x <= EXP_TOP), x, _f(0)).astype(np.float32)
        n = (inside * LOG2_E + ROUNDER) - ROUNDER
        r = (inside - n * LN2_HIGH) - n * LN2_LOW
        y = (_horner(EXP, r) * (r * r) + r) + _f(1)
        whole = n.astype(np.int32)
        half = whole >> np.int32(1)
        y = (y * power_of_two(half)) * power_of_two(whole - half)
        y = np.where(x > EXP_TOP, _f(np.inf), np.where(x < EXP_BOTTOM, _f(0), y))
        result: Floats = np.where(np.isnan(x), _f(np.nan), y).astype(np.float32)
        return result


def log(x: Floats) -> Floats:
    """The natural logarithm of positive normal numbers; infinity of infinity; NaN of anything
    else."""
    with np.errstate(all="ignore"):
        valid = (x >= _f(1.17549435e-38)) & (x < _f(np.inf))
        bits = np.where(valid, x, _f(1)).astype(np.float32).view(np.int32)
        exponent = (bits >> np.int32(23)) - np.int32(126)
        m = ((bits & np.int32(0x7FFFFF)) | np.int32(0x3F000000)).view(np.float32)
        small = m < SQRT_HALF
        exponent = np.where(small, exponent - 1, exponent).astype(np.int32)
        m = np.where(small, (m + m) - _f(1), m - _f(1)).astype(np.float32)
        e = exponent.astype(np.float32)
        z = m * m
        y = (_horner(LOG, m) * m) * z
        y = y + e * LN2_LOW
        y = y + _f(-0.5) * z
        y = (m + y) + e * LN2_HIGH
        y = np.where(valid, y, np.where(x == _f(np.inf), x, _f(np.nan)))
        result: Floats = y.astype(np.float32)
        return result


def tanh(x: Floats) -> Floats:
    """The hyperbolic tangent; ±1 beyond ±9."""
    with np.errstate(all="ignore"):
        size = np.abs(x)
        z = x * x
        near = (_horner(TANH, z) * z) * x + x
        t = exp(np.where(size > TANH_TOP, _f(0), size + size).astype(np.float32))
        far = _f(1) - _f(2) / (t + _f(1))
        far = np.where(size > TANH_TOP, _f(1), far)
        y = np.where(size < TANH_SPLIT, near, np.copysign(far, x))
        result: Floats = np.where(np.isnan(x), _f(np.nan), y).astype(np.float32)
        return result

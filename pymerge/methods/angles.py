"""Sine and arc cosine in float64 from additions, products and square roots alone.

Libraries round these functions differently from one instruction set and version to the next, and a
coefficient that goes by them would then differ between machines. Every step below is one operation
that IEEE 754 fixes, so the same input gives the same bits everywhere. Errors are below 1e-15 for
angles of a few turns.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Doubles = NDArray[np.float64]

_PI = Fraction("3.14159265358979323846264338327950288419716939937510")
#: π in three parts; the products of the first two with a whole number below 2**20 are exact.
_PI_HIGH = math.floor(_PI * 2**30) / 2**30
_PI_MIDDLE = math.floor((_PI - Fraction(_PI_HIGH)) * 2**62) / 2**62
_PI_LOW = float(_PI - Fraction(_PI_HIGH) - Fraction(_PI_MIDDLE))
#: Taylor coefficients in x², highest first: of sin(x)/x up to |x| = π/2, asin(x)/x up to 1/2.
_SINE = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(12, -1, -1))
_ARCSINE = tuple(math.comb(2 * k, k) / (4**k * (2 * k + 1)) for k in range(26, -1, -1))


def _odd(coefficients: tuple[float, ...], x: Doubles) -> Doubles:
    square = x * x
    y: Any = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = y * square + coefficient
    result: Doubles = y * x
    return result


def sine(x: ArrayLike) -> Doubles:
    """sin(x), elementwise."""
    with np.errstate(all="ignore"):
        wide = np.asarray(x, np.float64)
        turns = np.rint(wide * (1 / math.pi))
        rest = ((wide - turns * _PI_HIGH) - turns * _PI_MIDDLE) - turns * _PI_LOW
        result: Doubles = np.asarray(_odd(_SINE, rest) * (1 - 2 * (turns % 2)))
        return result


def cosine(x: ArrayLike) -> Doubles:
    """cos(x), elementwise."""
    return sine(math.pi / 2 - np.asarray(x, np.float64))


def arccosine(c: ArrayLike) -> Doubles:
    """acos(c), elementwise, for ``c`` in [-1, 1]; NaN of NaN. Exact to the last place near 0 and π,
    where it goes by 1 - |c|."""
    with np.errstate(all="ignore"):
        wide = np.asarray(c, np.float64)
        near_end = np.abs(wide) > 0.5
        half = np.sqrt((1 - np.abs(wide)) * 0.5)
        arc = _odd(_ARCSINE, np.where(near_end, half, wide))
        from_end = np.where(wide > 0, 2 * arc, math.pi - 2 * arc)
        result: Doubles = np.asarray(np.where(near_end, from_end, math.pi / 2 - arc))
        return result

"""Odd functions near 1 on an interval [low, high]: what iterations for the polar factor apply to
the singular values."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Rational(NamedTuple):
    """``x · scale · (1 + Σ weights / (x² + shifts))``, within [low, 1] on the interval asked."""

    shifts: tuple[float, ...]
    weights: tuple[float, ...]
    scale: float
    low: float


def zolotarev(low: float, terms: int) -> Rational:
    """The best odd rational approximation of 1 on [low, 1] with ``terms`` poles (Nakatsukasa and
    Freund, SIAM Review 58, 2016), for 0 < low < 1."""
    nodes = []
    quarter = math.pi / (2 * _mean(1.0, low))
    for i in range(1, 2 * terms + 1):
        sine, cosine = _elliptic(i * quarter / (2 * terms + 1), low)
        nodes.append((low * sine / cosine) ** 2)
    poles, zeros = nodes[::2], nodes[1::2]
    weights = []
    for j, pole in enumerate(poles):
        above = math.prod(zero - pole for zero in zeros)
        weights.append(above / math.prod(q - pole for k, q in enumerate(poles) if k != j))
    x = np.geomspace(low, 1.0, 4001)
    y = x * (1 + sum(w / (x * x + c) for w, c in zip(weights, poles, strict=True)))
    # The grid may miss an extremum by its spacing squared.
    top = 1.0001 * float(y.max())
    return Rational(tuple(poles), tuple(weights), 1 / top, 0.9999 * float(y.min()) / top)


def _mean(a: float, b: float) -> float:
    """The arithmetic-geometric mean."""
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return a


def _elliptic(u: float, complement: float) -> tuple[float, float]:
    """Jacobi's sn(u) and cn(u) to the complementary modulus, by descending Landen transforms."""
    a, b = 1.0, complement
    steps = []
    while abs(a - b) > 1e-15 * a:
        steps.append((a, (a - b) / 2))
        a, b = (a + b) / 2, math.sqrt(a * b)
    means = [a for a, _ in steps[1:]] + [a]
    angle = 2 ** len(steps) * a * u
    for mean, (_, difference) in zip(reversed(means), reversed(steps), strict=True):
        angle = (angle + math.asin(difference / mean * math.sin(angle))) / 2
    return math.sin(angle), math.cos(angle)


def quintic(low: float, high: float) -> tuple[float, float, float, float]:
    """The best a·x + b·x³ + c·x⁵ for 1 on [low, high] by Remez' exchange, and its largest error
    (Polar Express, arXiv 2505.16932)."""
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    error, before = math.inf, 0.0
    a = b = c = 0.0
    for _ in range(100):
        if abs(error - before) <= 1e-15:
            break
        before = error
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, error = (float(v) for v in np.linalg.solve(system, np.ones(4)))
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
    return a, b, c, abs(error)

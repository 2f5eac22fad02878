"""Matrices with the spectra that are hard for decompositions."""

from __future__ import annotations

import numpy as np


def with_values(m, n, values, seed=0):
    """float32 [m, n] with singular values ``values``, but for its rounding."""
    draw = np.random.default_rng(seed)
    k = len(values)
    left, _ = np.linalg.qr(draw.standard_normal((m, k)))
    right, _ = np.linalg.qr(draw.standard_normal((n, k)))
    return ((left * values) @ right.T).astype(np.float32)


def gaussian(m, n, seed=0):
    return np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32)


def conditioned(m, n, condition, seed=0):
    return with_values(m, n, np.geomspace(1, 1 / condition, min(m, n)), seed)


def integers(m, n, rank, seed=0):
    """Of exactly this rank: small integers are exact in float32."""
    draw = np.random.default_rng(seed)
    left = draw.integers(-3, 4, (m, rank))
    return (left @ draw.integers(-3, 4, (rank, n))).astype(np.float32)


def duplicated(m, n, seed=0):
    """Every row twice."""
    return np.repeat(gaussian((m + 1) // 2, n, seed), 2, axis=0)[:m]

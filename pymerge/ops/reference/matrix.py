"""Gram matrices, singular value decompositions and polar factors in float64: the truth that
pymerge/ops/matrix is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def gram(x: Any, *, side: str, base: Any = None) -> Doubles:
    """``xᵀx`` (columns) or ``xxᵀ`` (rows); of the float32 difference to ``base`` if given."""
    if base is not None:
        x = np.asarray(x, np.float32) - np.asarray(base, np.float32)
    wide = np.asarray(x, np.float64)
    result: Doubles = wide.T @ wide if side == "columns" else wide @ wide.T
    return result


def truncated_svd(
    x: Any, rank: int, *, cut: float = 1e-6
) -> tuple[Doubles, Doubles, Doubles, float]:
    """Left [m, k], values [k], right [k, n] and the energy left out, k the number of values among
    the first ``rank`` that are above ``cut`` times the largest."""
    left, values, right = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    k = int(np.sum(values[:rank] > cut * values[:1]))
    return left[:, :k], values[:k], right[:k], float(np.sum(values[k:] ** 2))


def svt(x: Any, threshold: float) -> Doubles:
    """Singular values lowered by ``threshold``, not below 0."""
    left, values, right = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    result: Doubles = (left * np.maximum(values - threshold, 0)) @ right
    return result


def polar(x: Any, *, cut: float = 1e-6) -> tuple[Doubles, int, float]:
    """The polar factor over the singular values of at least ``cut`` times the largest, how many
    those are, and their sum."""
    left, values, right = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    kept = (values >= cut * values[:1]) & (values > 0)
    return left[:, kept] @ right[kept], int(kept.sum()), float(values[kept].sum())


def inverse_sqrt(g: Any, *, cut: float = 1e-6) -> tuple[Doubles, int]:
    """The inverse square root on the directions whose root eigenvalues are at least ``cut`` times
    the largest, and how many those are."""
    values, vectors = np.linalg.eigh(np.asarray(g, np.float64))
    kept = (values >= cut * cut * values[-1:]) & (values > 0)
    result: Doubles = (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T
    return result, int(kept.sum())

"""The naive float64 truth of the matrix ops that solve: see pymerge/ops/matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def solve_spd(a: Matrix, b: Matrix, *, ridge: float = 0.0) -> Matrix:
    """X of (A + ridge mean(diag A) I) X = B."""
    shifted = a + ridge * np.mean(np.diag(a)) * np.eye(len(a))
    return np.asarray(np.linalg.solve(shifted, b))


def spectral_filter(c: Matrix, theta: Matrix, *, time: float) -> Matrix:
    """theta phi(C), phi(l) = (1 - exp(-time l)) / l and phi(0) = time, by eigendecomposition."""
    values, vectors = np.linalg.eigh(c)
    exponents = time * values
    flat = exponents == 0
    ratio = np.where(flat, 1.0, -np.expm1(-exponents) / np.where(flat, 1.0, exponents))
    return np.asarray(theta @ (vectors * (time * ratio)) @ vectors.T)


def adam(
    theta: Matrix,
    taus: Sequence[Matrix],
    weights: Sequence[float],
    *,
    steps: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Matrix:
    """theta after ``steps`` steps of Adam on sum_i weights[i] ||(theta - tau_i) tau_i^T||_F^2."""
    theta = theta.copy()
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    beta1, beta2 = betas
    for step in range(1, steps + 1):
        gradient = np.zeros_like(theta)
        for tau, weight in zip(taus, weights, strict=True):
            gradient += 2 * weight * ((theta - tau) @ tau.T) @ tau
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        unbiased = first / (1 - beta1**step), second / (1 - beta2**step)
        theta -= lr * unbiased[0] / (np.sqrt(unbiased[1]) + eps)
    return theta


def quadratic_of(taus: Sequence[Matrix], weights: Sequence[float]) -> tuple[Matrix, Matrix]:
    """C = sum_i w_i tau_i^T tau_i and D = sum_i w_i tau_i tau_i^T tau_i of that objective."""
    rows, columns = taus[0].shape
    c, d = np.zeros((columns, columns)), np.zeros((rows, columns))
    for tau, weight in zip(taus, weights, strict=True):
        c += weight * tau.T @ tau
        d += weight * tau @ (tau.T @ tau)
    return c, d

"""The table of matrix ops: what each computes, and how near to the exact result it is.

The exact result is that of float64 arithmetic on the same input (pymerge/ops/reference/matrix.py).
Matrices are torch tensors, ``ws`` is a Workspace; a result does not depend on the workspace's
threads. Input that is not finite gives NaN, wrong arguments raise PymergeError. In the bounds,
condition is the largest singular value over the smallest that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from pymerge.ops.definitions import NumericsClass


@dataclass(frozen=True)
class MatrixOp:
    """One matrix op. ``bound`` says how far from the exact result it may be."""

    name: str
    signature: str
    doc: str
    bound: str
    numerics: NumericsClass = "iterative"


_OPS = (
    MatrixOp(
        "gram",
        'gram(x, ws, *, side, dtype="float64") -> [c, c]',
        "xᵀx (side columns) or xxᵀ (rows) of float32 x, symmetric to the bit.",
        "‖error‖_F <= 1e-14 ‖x‖_F² in float64, 1e-6 ‖x‖_F² in float32",
    ),
    MatrixOp(
        "gram_acc",
        'gram_acc(total, x, ws, *, side="columns", base=None, backend=None)',
        "Adds the Gram matrix of x, or of x - base in float32, to the float64 total in place; on a "
        "GPU by the Triton kernel.",
        "‖error‖_F <= 1e-14 ‖x - base‖_F² for each call by torch, 1e-6 ‖x - base‖_F² by Triton",
    ),
    MatrixOp(
        "gram_eigh",
        "gram_eigh(g, ws) -> Spectrum(values, vectors)",
        "Eigenvalues, descending and clamped at 0, and eigenvectors of a positive semidefinite "
        "matrix, float64.",
        "‖g - V diag(values) Vᵀ‖_F <= 1e-13 ‖g‖_F, ‖VᵀV - 1‖_F <= 1e-13 c",
    ),
    MatrixOp(
        "truncated_svd",
        'truncated_svd(x, rank, ws, *, route="gram", dtype="float64", cut=1e-6, oversample=None, '
        "power_steps=6) -> Svd(left, values, right, tail)",
        "The largest singular values and their vectors; tail is the energy left out.",
        "gram route: ‖x - x_k‖_F² exceeds the least possible by at most 1e-12 ‖x‖_F² in float64 "
        "and 1e-6 ‖x‖_F² in float32; randomized: tail says how much is left out",
    ),
    MatrixOp(
        "svt",
        'svt(x, threshold, ws, dtype="float64") -> like x',
        "x with its singular values lowered by the threshold, those below it dropped.",
        "‖error‖_F <= 1e-6 ‖x‖_F in float64, 1e-3 ‖x‖_F in float32",
    ),
    MatrixOp(
        "polar",
        'polar(x, ws, *, cut=1e-6, route="auto") -> Polar(factor, rank, nuclear, residual)',
        "U Vᵀ of the singular value decomposition over the values of at least cut times the "
        "largest, and the sum of those.",
        "‖error‖_F <= 1e-5 ‖P‖_F for condition numbers up to 1e4 (routes gram and qdwh); nuclear "
        "to 1e-6",
    ),
    MatrixOp(
        "inverse_sqrt",
        "inverse_sqrt(g, ws, cut=1e-6) -> float64 [c, c], rank",
        "The inverse square root of a positive semidefinite matrix, 0 on the directions whose root "
        "eigenvalues are below cut times the largest.",
        "‖S g S - Q‖_F <= 1e-13 c condition², Q the projection on what is kept",
    ),
    MatrixOp(
        "solve_spd",
        "solve_spd(a, b, ws, *, ridge=0.0) -> Solution(x, ridge, residual)",
        "The solution of (a + ridge mean(diag a)) x = b by Cholesky with one step of refinement; "
        "the ridge grows tenfold until it factorises.",
        "residual, which is reported",
    ),
    MatrixOp(
        "chebyshev_filter",
        "chebyshev_filter(c, theta, ws, *, time) -> like theta",
        "theta phi(c) with phi(l) = (1 - exp(-time l)) / l, by a Chebyshev expansion up to a "
        "guaranteed bound of the largest eigenvalue.",
        "what the expansion leaves out changes phi by at most 1e-7 of its largest value, time",
    ),
    MatrixOp(
        "polynomial_filter",
        "polynomial_filter(c, theta, ws, phi) -> like theta",
        "theta phi(c) for a smooth function of the eigenvalues, by a Chebyshev expansion up to the "
        "same bound.",
        "what the expansion leaves out changes phi by at most 1e-7 of its largest value",
    ),
    MatrixOp(
        "adam_quadratic",
        "adam_quadratic(theta, c, d, ws, *, steps, lr, betas=(0.9, 0.999), eps=1e-8) -> like theta",
        "theta after steps of Adam with the gradient 2 (theta c - d).",
        "the iterates of torch.optim.Adam up to the rounding of theta's dtype",
    ),
)

MATRIX_OPS: dict[str, MatrixOp] = {op.name: op for op in _OPS}

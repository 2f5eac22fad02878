"""Iso-C: isotropic merging in the common subspace, Marczak et al. 2025, arXiv 2502.04959.

For each matrix, with ``W = Σ wᵢ·τᵢ``: ``out = θ₀ + λ·σ̄·P``, where ``P = U·Vᵀ`` is the polar factor
of W and σ̄ the mean of its singular values: all directions that the sum has count alike. σ̄ is
``⟨P, W⟩ / min(m, n)``.

The official code takes the singular vectors of an SVD, which are arbitrary where singular values
vanish: with few adapters of low rank most of the result would be what LAPACK fills in. Here P is
the partial isometry: directions with ``σ < 10⁻⁶·σ₁`` are left out. ``mean_over: rank`` divides by
the number of those that are left instead of min(m, n).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.methods.layout import LAYOUT
from pymerge.methods.matrices import (
    FLOAT,
    TILE_OPS,
    Asking,
    Matrix,
    matrix_cost,
    merge_matrices,
    others,
    reads_of,
)
from pymerge.methods.parameters import LAMBDA, by_name
from pymerge.methods.protocol import Apply, Cost, Solve, Solving, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec

if TYPE_CHECKING:
    import torch

SPEC = MethodSpec(
    name="iso_c",
    summary="Summed task vectors with all their singular values made equal.",
    paper="https://arxiv.org/abs/2502.04959",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec("weight", "float", "model", 1.0, "Factor on the model's task vector."),
        LAMBDA,
        ParameterSpec(
            "mean_over",
            "str",
            "shared",
            "full",
            "Over what singular values are averaged: as many as the matrix has rows or columns "
            "(the authors), or as many as its rank.",
            choices=("full", "rank"),
        ),
        others("mean"),
        *LAYOUT,
    ),
    statistics="tensor",
)


def _cost(rows: int, columns: int, num_models: int) -> Cost:
    short, long = sorted((rows, columns))
    # The sum, its polar factor and the factor's next iterate; the Gram matrix, its vectors and what
    # their solver holds.
    num_bytes = 3 * FLOAT * rows * columns + 5 * 8 * short**2
    from_gram = 3.0 * short**2 * long
    if short <= 128:
        return Cost(num_bytes, 0.0, from_gram, 9.0 * short**3)
    # A rational step from four inverses in float64, then three steps in float32; what is of lower
    # rank takes an eigenproblem instead.
    return Cost(num_bytes, 3 * from_gram + 6.0 * short**3, from_gram + 9.0 * short**3)


@method(
    SPEC,
    ops=TILE_OPS,
    looks=lambda tensor: reads_of(tensor, totals=1),
    cost=lambda tensor: matrix_cost(tensor, _cost),
)
def iso_c(tensor: Tensor) -> Apply | Solving:
    """Gather the weighted sum; its polar factor, times the mean singular value, is the result."""

    def solve(matrix: Matrix) -> Asking:
        total = yield from matrix.total(tensor.each("weight"))
        return (yield Solve(lambda: isotropic(matrix, total)))

    return merge_matrices(tensor, solve, isometric=True)


def isotropic(matrix: Matrix, total: torch.Tensor) -> torch.Tensor:
    """``σ̄·polar(total)``, float32 [rows, columns]."""
    from pymerge.ops.matrix.polar import polar

    found = polar(total, matrix.ws)
    over_rank = matrix.tensor.parameters["mean_over"] == "rank"
    count = found.rank if over_rank else matrix.full_rank
    factor = found.factor
    return factor.mul_(found.nuclear / max(count, 1))

"""Ops on whole matrices: torch tensors in, torch tensors out, on a Workspace. Importing them loads
no torch."""

from __future__ import annotations

from pymerge.ops.matrix.adam import adam_quadratic
from pymerge.ops.matrix.chebyshev import chebyshev_filter, polynomial_filter
from pymerge.ops.matrix.gram import gram, gram_acc
from pymerge.ops.matrix.polar import Polar, inverse_sqrt, polar
from pymerge.ops.matrix.solve import Solution, solve_spd
from pymerge.ops.matrix.spectrum import Spectrum, Svd, gram_eigh, svt, truncated_svd
from pymerge.ops.matrix.table import MATRIX_OPS, MatrixOp

__all__ = [
    "MATRIX_OPS",
    "MatrixOp",
    "Polar",
    "Solution",
    "Spectrum",
    "Svd",
    "adam_quadratic",
    "chebyshev_filter",
    "gram",
    "gram_acc",
    "gram_eigh",
    "inverse_sqrt",
    "polar",
    "polynomial_filter",
    "solve_spd",
    "svt",
    "truncated_svd",
]

"""Spherical interpolation between two models or between their task vectors, of whole tensors, rows
or columns; mergekit's ``nuslerp``.

``out = [sin((1 − t)·φ)·x₀ + sin(t·φ)·x₁] / sin φ`` with ``t = w₁ / (w₀ + w₁)``, one half where the
weights sum to less than 1e-6. Without a ``base_model`` the xᵢ are the models; with one they are the
task vectors ``τᵢ = θᵢ − θ₀`` and the base is added back. The angle φ is that between whole tensors,
or, with ``nuslerp_flatten: false``, between rows (vectors along the last dimension), each with its
own φ; ``nuslerp_row_wise: true`` then means vectors along the first dimension, the columns of a
matrix: the name says the reverse of what it does, as in mergekit. A tensor of one dimension is one
vector in every mode.

Vectors that are (anti)parallel, |sin φ| of 1e-6 or less, are interpolated linearly. mergekit draws
that line at 1e-8, which the float32 sine of opposite vectors escapes, so that there they blow up.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from pymerge.methods.angles import arccosine, sine
from pymerge.methods.gram import (
    Doubles,
    cosines,
    gram_of_columns,
    gram_of_rows,
    gram_of_tensor,
    row_pieces,
    task_vectors,
)
from pymerge.methods.parameters import WEIGHT, by_name
from pymerge.methods.protocol import Apply, Measuring, Tensor, Tile
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec
from pymerge.ops.view import View

SPEC = MethodSpec(
    name="nuslerp",
    summary="Spherical interpolation between two models or task vectors, by tensor, row or column.",
    paper="https://en.wikipedia.org/wiki/Slerp",
    base="optional",
    min_models=2,
    max_models=2,
    parameters=by_name(
        WEIGHT,
        ParameterSpec(
            "nuslerp_flatten",
            "bool",
            "shared",
            True,
            "Take each tensor as one vector; false: each of its rows or columns.",
        ),
        ParameterSpec(
            "nuslerp_row_wise",
            "bool",
            "shared",
            False,
            "Without nuslerp_flatten: vectors along the first dimension (columns) instead of the "
            "last (rows).",
        ),
    ),
    statistics="row or tensor",
)

SMALLEST_NORM = 1e-7
SMALLEST_SINE = 1e-6
SMALLEST_TOTAL = 1e-6


def nuslerp_weights(products: Doubles, t: float) -> Doubles:
    """The factors [2, ...] on both vectors, from their inner products [3, ...]: of the first with
    itself, of both, of the second with itself."""
    norms = np.maximum(np.sqrt(products[[0, 2]]), SMALLEST_NORM)
    cosine = cosines(products[1], norms[0] * norms[1])
    with np.errstate(all="ignore"):
        straight = (1 - cosine) * (1 + cosine) <= SMALLEST_SINE**2
        angle = arccosine(np.where(straight, 0.0, cosine))
        share = np.stack([sine((1 - t) * angle), sine(t * angle)])
        linear = np.array([1 - t, t]).reshape(2, *[1] * np.ndim(cosine))
        return np.where(straight, linear, share / sine(angle))


def _mode(tensor: Tensor) -> Literal["tensor", "rows", "columns"]:
    if tensor.parameters["nuslerp_flatten"] or len(tensor.shape) < 2 or not tensor.num_elements:
        return "tensor"
    return "columns" if tensor.parameters["nuslerp_row_wise"] else "rows"


def _columns(tensor: Tensor) -> int:
    """Elements of a row in the layout of the mode: along the first dimension every index into the
    others is a column."""
    return tensor.columns if _mode(tensor) == "rows" else math.prod(tensor.shape[1:])


def _granule(tensor: Tensor) -> int:
    return 1 if _mode(tensor) == "tensor" else _columns(tensor)


def interpolation(weights: list[float]) -> float:
    """t, where 0 is the first model and 1 the second."""
    total = weights[0] + weights[1]
    return 0.5 if abs(total) < SMALLEST_TOTAL else weights[1] / total


@method(
    SPEC,
    ops=("gram_n", "gram_columns", "axpy_n", "axpy_grid"),
    looks=lambda tensor: 0 if _mode(tensor) == "rows" else 1,
    granule=_granule,
)
def nuslerp(tensor: Tensor) -> Measuring:
    """Measure the angles, then one weighted sum; a tile's rows are measured and merged at once."""
    t = interpolation(tensor.each("weight"))
    mode, columns = _mode(tensor), _columns(tensor)
    if mode == "tensor":
        weights = [0.0, 0.0]
        if tensor.num_elements:
            gram = yield from gram_of_tensor(tensor, task_vectors)
            weights = nuslerp_weights(gram[np.triu_indices(2)], t).tolist()
        return Apply(lambda tile, out: tensor.ops.axpy_n(out, tile.models, weights, base=tile.base))
    if mode == "columns":
        sums = yield from gram_of_columns(tensor, task_vectors, 3, columns)
        grid = nuslerp_weights(sums, t).astype(np.float32)
        return Apply(
            lambda tile, out: tensor.ops.axpy_grid(
                out, tile.models, grid, columns=columns, along="columns", base=tile.base
            )
        )

    def merge_rows(tile: Tile, out: View) -> int:
        nonfinite = 0
        for first, piece in row_pieces(tile, columns):
            grid = nuslerp_weights(gram_of_rows(tensor, task_vectors(piece)), t)
            nonfinite += tensor.ops.axpy_grid(
                out.part(first, piece.num),
                piece.models,
                grid.astype(np.float32),
                columns=columns,
                along="rows",
                base=piece.base,
            )
        return nonfinite

    return Apply(merge_rows)

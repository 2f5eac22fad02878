"""Inner products of a tensor's inputs, for methods whose output is a linear combination of them.

The Gram matrix of N inputs decides the coefficients however many steps that takes; the inputs are
read twice, once to measure and once to combine. It is exact to a few units of float64: products of
float32 are exact there, and the spans are added without rounding. A cosine is then known to about
1e-16. Near 0 and π that leaves an angle open by up to 1e-8, but not the coefficients: those of an
interpolation go by the square of a small angle. What is lost is the direction of a sum that nearly
vanishes, which RESOLUTION bounds.

Arrays hold one number per pair (i, j) with i <= j, row by row, in their first axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.methods.protocol import SPAN, Measure, Tensor, Tile, remembered
from pymerge.ops.view import View

Doubles = NDArray[np.float64]
#: The base (None to take the inputs as they are) and the inputs whose products are wanted.
Inputs = tuple[View | None, Sequence[View]]
GramMeasuring = Generator[Measure, Any, Doubles]

#: Rows that are measured at once: a row's products and factors take some hundred bytes, which for
#: rows of few elements is far more than the elements.
ROWS = 1 << 12

#: A sum of unit vectors that is shorter than this share of its terms has no known direction.
RESOLUTION = 1e-7


def every_input(tile: Tile) -> Inputs:
    """The base, where there is one, and the models, none taken against another."""
    return None, tile.models if tile.base is None else (tile.base, *tile.models)


def task_vectors(tile: Tile) -> Inputs:
    """The models against the base, or as they are where there is none."""
    return tile.base, tile.models


def gram_of_tensor(tensor: Tensor, inputs: Callable[[Tile], Inputs]) -> GramMeasuring:
    """float64 [num_inputs, num_inputs] over all elements of the tensor; ``inputs`` depends on
    nothing but its tile."""

    def look(tile: Tile) -> Doubles:
        base, models = inputs(tile)
        sums: Doubles = tensor.ops.gram_n(base, models, span=SPAN)
        return sums

    def measure() -> GramMeasuring:
        tiles = yield Measure(look)
        return square([exact_sum(column) for column in np.concatenate(tiles).T])

    return remembered(tensor, ("gram", inputs), measure)


def gram_of_columns(
    tensor: Tensor, inputs: Callable[[Tile], Inputs], num_pairs: int, columns: int
) -> GramMeasuring:
    """float64 [num_pairs, columns]: inner products down each column of rows of ``columns``."""

    def measure() -> GramMeasuring:
        sums = np.zeros((num_pairs, columns))

        def look(tile: Tile) -> None:
            base, models = inputs(tile)
            tensor.ops.gram_columns(base, models, sums, columns=columns)

        yield Measure(look, ordered=True)
        return sums

    return remembered(tensor, ("columns", inputs, columns), measure)


def row_pieces(tile: Tile, columns: int) -> Iterator[tuple[int, Tile]]:
    """The tile in pieces of whole rows, each with the index of its first element in the tile."""
    return tile.pieces(ROWS * columns)


def gram_of_rows(tensor: Tensor, inputs: Inputs) -> Doubles:
    """float64 [num_pairs, rows] of the whole rows that one tile's inputs hold; no look is needed
    where a tile has all that its rows are decided by."""
    base, models = inputs
    sums: Doubles = tensor.ops.gram_n(base, models, span=tensor.columns).T
    return sums


def square(pairs: Sequence[float]) -> Doubles:
    """The symmetric matrix whose upper triangle is given row by row."""
    num = math.isqrt(2 * len(pairs))
    matrix = np.empty((num, num))
    matrix[np.triu_indices(num)] = pairs
    matrix.T[np.triu_indices(num)] = pairs
    return matrix


def exact_sum(values: NDArray[Any]) -> float:
    """The sum of float64 ``values``, rounded once; NaN or infinity where one of them is."""
    if np.all(np.isfinite(values)):
        return math.fsum(values.tolist())
    with np.errstate(all="ignore"):
        return float(np.sum(values))


def cosines(dots: Doubles, norm_products: Doubles) -> Doubles:
    """dot / norm product, held in [-1, 1]; NaN where the products are."""
    with np.errstate(all="ignore"):
        return np.clip(dots / norm_products, -1.0, 1.0)


def norm_of(combination: ArrayLike, gram: Doubles) -> float:
    """The norm of Σ cᵢ xᵢ from the Gram matrix of the xᵢ."""
    c = np.asarray(combination, np.float64)
    with np.errstate(all="ignore"):
        terms = (c[:, None] * c[None, :] * gram).ravel()
    total = exact_sum(terms)
    return math.nan if math.isnan(total) else math.sqrt(max(0.0, total))

"""RegMean: regression mean, Jin et al. 2023, arXiv 2212.09849.

For each linear layer the weights whose outputs are nearest to those of every model on its own
inputs: ``W`` minimises ``Σₖ cₖ·‖Xₖ·(W − Wₖ)ᵀ‖² / Nₖ``. With the Grams ``Gₖ = XₖᵀXₖ / Nₖ`` of
the inputs, their off-diagonal elements times ``alpha``, and the mean of the weights W̄:

``out = W̄ + [(Σ Gₖ + ridge·d̄·I)⁻¹ · Σ Gₖ·(Wₖ − W̄)ᵀ]ᵀ``, d̄ the mean of the diagonal of ``Σ Gₖ``.

The authors invert ``Σ Gₖ``; here one Cholesky factorisation solves for the difference from the
mean, which is the same without a ridge and stays the mean where no input was ever seen. ``alpha``
below 1 pulls towards each model's own weights: insurance where few rows were seen.

The Grams are collected beside each model by ``pymerge.collect(model, kind="gram")`` while the model
runs on a few batches without labels. Layers without Grams, biases and norms become the mean. Two
matrices of the layer's inputs are in memory at once, however many models there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pymerge.errors import PymergeError, RecipeError
from pymerge.methods.layout import LAYOUT
from pymerge.methods.matrices import (
    FLOAT,
    TILE_OPS,
    Asking,
    Matrix,
    matrix_cost,
    merge_matrices,
    reads_of,
)
from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import (
    NO_COST,
    Apply,
    Cost,
    Solve,
    Solving,
    Statistic,
    Tensor,
    Tile,
)
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec
from pymerge.ops.view import View

if TYPE_CHECKING:
    import torch

SPEC = MethodSpec(
    name="regmean",
    summary="Least squares between the models' outputs on their own inputs, from saved Grams.",
    paper="https://arxiv.org/abs/2212.09849",
    base="optional",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec(
            "weight", "float", "model", 1.0, "Factor on the model's Gram matrix.", minimum=0.0
        ),
        ParameterSpec(
            "alpha",
            "float",
            "shared",
            0.95,
            "Factor on the Gram matrices' elements off the diagonal; 1 is plain least squares.",
            minimum=0.0,
            maximum=1.0,
        ),
        ParameterSpec(
            "ridge",
            "float",
            "shared",
            1e-4,
            "Added to the diagonal of the sum of Grams, relative to its mean.",
            minimum=0.0,
        ),
        *LAYOUT,
    ),
    statistics="tensor",
)

#: Inputs up to which Grams are summed and solved in float64.
LARGEST_DOUBLE = 8192


def _type(columns: int) -> str:
    return "float64" if columns <= LARGEST_DOUBLE else "float32"


def _cost(rows: int, columns: int, num_models: int) -> Cost:
    size = 8 if _type(columns) == "float64" else FLOAT
    # A model's Gram from its triangle beside the sum; or the sum and its factor in float64.
    both = 2 * size * columns**2 + FLOAT * columns * (columns + 1) // 2
    grams = max(both, (size + 8) * columns**2)
    # Mean, difference, right-hand side and solution, and the products that make it.
    num_bytes = grams + (2 * FLOAT + 3 * size) * rows * columns
    products = 2.0 * num_models * columns**2 * rows
    solves = columns**3 / 3 + 8.0 * columns**2 * rows
    if size == FLOAT:
        return Cost(num_bytes, flops32=products + solves)
    return Cost(num_bytes, flops64=products + solves)


def _cost_of(tensor: Tensor) -> Cost:
    return matrix_cost(tensor, _cost) if tensor.statistics else NO_COST


def check(tensors: Sequence[Tensor]) -> None:
    """:raises RecipeError: every weight of a tensor with statistics is zero."""
    for tensor in tensors:
        if tensor.statistics and not any(tensor.each("weight")):
            raise RecipeError(
                f"regmean: every weight of tensor {tensor.name!r} is 0, so that no model's Gram "
                "counts and nothing is least; give at least one model a weight above 0"
            )


@method(
    SPEC,
    ops=TILE_OPS,
    looks=lambda t: reads_of(t, totals=1, deltas=t.num_models) if t.statistics else 0.0,
    cost=_cost_of,
    reads="gram",
    check=check,
)
def regmean(tensor: Tensor) -> Apply | Solving:
    """Sum the Grams and their products with each model's difference from the mean; one solve."""
    if not tensor.statistics:
        return mean_of(tensor)

    def solve(matrix: Matrix) -> Asking:
        return (yield from _least_squares(matrix))

    return merge_matrices(tensor, solve, adds_base=False, scale=1.0, alone=mean_of)


def mean_of(tensor: Tensor) -> Apply:
    """The plain mean of the models."""
    ones, count = [1.0] * tensor.num_models, float(tensor.num_models)
    ops = tensor.ops
    return Apply(lambda tile, out: ops.axpy_n(out, tile.models, ones, divisor=count))


def _least_squares(matrix: Matrix) -> Asking:
    ws, ops, num = matrix.ws, matrix.tensor.ops, matrix.num_models
    kind, columns = _type(matrix.columns), matrix.columns

    def put(out: View, tile: Tile) -> None:
        ops.axpy_n(out, tile.models, [1.0] * num, divisor=float(num))

    mean = yield from matrix.gather(put, tuple(range(num)))
    grams = ws.zeros(columns, columns, dtype=kind)
    right = ws.zeros(columns, matrix.rows, dtype=kind)
    for model, weight in enumerate(matrix.tensor.each("weight")):
        if weight == 0:
            continue
        triangle = yield Statistic(model)
        difference = yield from matrix.weight(model)

        def add(triangle: Any = triangle, difference: Any = difference, c: float = weight) -> None:
            gram = _gram(matrix, triangle, kind, c)
            grams.add_(gram)
            turned = difference.sub_(mean).T.to(grams.dtype)
            ws.map(lambda p: right[p].addmm_(gram[p], turned), ws.panels(columns))

        yield Solve(add)
        del triangle, difference, add
    return (yield Solve(lambda: _add_solution(matrix, mean, grams, right)))


def _gram(matrix: Matrix, triangle: Any, kind: str, weight: float) -> torch.Tensor:
    """A Gram matrix from its lower triangle, times a weight and off the diagonal alpha."""
    import torch

    ws, size = matrix.ws, matrix.columns
    alpha = float(matrix.tensor.parameters["alpha"])
    if triangle.size != size * (size + 1) // 2:
        raise PymergeError(
            f"regmean: tensor {matrix.tensor.name!r} has {size} inputs, but the Gram collected for "
            f"it has {triangle.size} elements instead of {size * (size + 1) // 2}; is it stored as "
            "[inputs, outputs]? Then name it in the parameter transpose"
        )
    packed = torch.from_numpy(triangle)
    gram = ws.zeros(size, size, dtype=kind)
    for row in range(size):
        first = row * (row + 1) // 2
        gram[row, : row + 1] = packed[first : first + row + 1].to(gram.device)
    diagonal = gram.diagonal().clone()

    def scale(rows: slice) -> None:
        gram[rows] *= alpha * weight

    def mirror(rows: slice) -> None:
        gram[rows, rows.stop :] = gram[rows.stop :, rows].T
        gram[rows, rows] += gram[rows, rows].tril(-1).T

    ws.map(scale, ws.panels(size))
    ws.map(mirror, ws.panels(size))
    gram.diagonal().copy_(diagonal * weight)
    return gram


def _add_solution(
    matrix: Matrix, mean: torch.Tensor, grams: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    from pymerge.ops.matrix.solve import solve_spd

    ridge = float(matrix.tensor.parameters["ridge"])
    return mean.add_(solve_spd(grams, right, matrix.ws, ridge=ridge).x.T)

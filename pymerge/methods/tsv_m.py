"""TSV-M: task singular vectors without their interference, Gargiulo et al. 2024, arXiv 2412.00081.

For each matrix, with ``r = min(m, n)`` and N models, every task vector ``wᵢ·τᵢ = Uᵢ·Sᵢ·Vᵢᵀ`` keeps
its ``k = ⌊r/N⌋`` largest singular values. Side by side, ``U = [U₁ … U_N]`` and ``V = [V₁ … V_N]``
are replaced by the nearest orthonormal sets:
``out = θ₀ + λ·U(UᵀU)^(−1/2) · S · (VᵀV)^(−1/2)Vᵀ``.

The weight on a task vector is the authors' list of scales, λ their single one. The decompositions
are those of Gram matrices in float64; what is whitened decides by its smallest singular values, so
that the float32 SVD of the authors' code is good to 1e-5 here. Departures from it:

- A task vector's directions with ``σ < 10⁻⁶·σ₁`` are left out before the vectors are put together.
  Those of an SVD are arbitrary there, and of task vectors of low rank most of the result would be
  what LAPACK fills in.
- Where U or V are dependent (models that are copies of others) the inverse roots leave those
  directions out. Where more than 1 % of their singular values are below 10⁻⁴ a warning says so.
- k is exact where the authors' ``int(r·(1/N))`` may be one less.

With more models than rows or columns k is 0 and the matrix stays the base's, with a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
from pymerge.methods.whitening import CUT, Stack, group_size, whitened

if TYPE_CHECKING:
    import torch

DOUBLE = 8

SPEC = MethodSpec(
    name="tsv_m",
    summary="The largest singular vectors of every task vector, made orthonormal together.",
    paper="https://arxiv.org/abs/2412.00081",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec("weight", "float", "model", 1.0, "Factor on the model's task vector."),
        LAMBDA,
        others("mean"),
        *LAYOUT,
    ),
    statistics="tensor",
)


def _cost(rows: int, columns: int, num_models: int) -> Cost:
    short, long = sorted((rows, columns))
    both, group = rows + columns, min(group_size(rows, columns), num_models)
    keep = short // num_models
    kept = keep * num_models
    stacks = DOUBLE * both * kept
    # A task vector, its Gram matrix with a chunk of rows or with vectors and their solver, factors.
    gram = max(5 * short**2, short**2 + short * min(long, 1024))
    decompose = group * (FLOAT * rows * columns + DOUBLE * (gram + 3 * keep * both))
    # Both inverse roots as they are solved for; then rows in float64 and all of them in float32.
    merge = max(
        2 * DOUBLE * 5 * kept**2,
        DOUBLE * (2 * kept**2 + kept * long) + FLOAT * both * kept,
        FLOAT * (both * kept + rows * columns),
    )
    return Cost(
        stacks + max(decompose, merge),
        2.0 * rows * columns * kept,
        num_models * 1.0 * short**2 * long + 2.0 * kept * rows * columns + 3.0 * kept**2 * both,
        9.0 * (num_models * short**3 + 2 * kept**3),
    )


@method(
    SPEC,
    ops=TILE_OPS,
    looks=lambda tensor: reads_of(tensor, deltas=tensor.num_models),
    cost=lambda tensor: matrix_cost(tensor, _cost),
)
def tsv_m(tensor: Tensor) -> Apply | Solving:
    """Decompose a few task vectors at a time; whiten all that was kept of them."""

    def solve(matrix: Matrix) -> Asking:
        ws, num_models = matrix.ws, matrix.num_models
        keep = matrix.full_rank // num_models
        if not keep:
            tensor.warn(
                f"{num_models} models share {matrix.full_rank} singular values, which leaves none "
                "for each: the matrix stays the base's; exclude it to merge it otherwise"
            )
            return ws.zeros(matrix.rows, matrix.columns)
        weights = tensor.each("weight")
        used = [index for index, weight in enumerate(weights) if weight]
        merge = Merge(matrix, keep * len(used))
        size = group_size(matrix.rows, matrix.columns)
        for first in range(0, len(used), size):
            group = used[first : first + size]
            deltas = []
            for index in group:
                deltas.append((yield from matrix.delta(index)))
            yield Solve(partial(merge.add, deltas, [weights[index] for index in group], keep))
        return (yield Solve(merge.result))

    return merge_matrices(tensor, solve, isometric=True)


class Merge:
    """The singular vectors and values that are kept of the models so far."""

    def __init__(self, matrix: Matrix, num: int) -> None:
        self._matrix = matrix
        self._left = Stack(num, matrix.rows, matrix.ws)
        self._right = Stack(num, matrix.columns, matrix.ws)
        self._values: list[torch.Tensor] = []

    def add(self, deltas: list[torch.Tensor], weights: Sequence[float], keep: int) -> None:
        """Keep the largest ``keep`` singular values of each task vector, which is used up."""
        from pymerge.ops.matrix.spectrum import truncated_svd

        ws = self._matrix.ws
        found = ws.map(lambda x: truncated_svd(x, keep, ws, cut=CUT), deltas)
        deltas.clear()
        for svd, weight in zip(found, weights, strict=True):
            self._left.add(svd.left.t())
            self._right.add(svd.right)
            self._values.append(svd.values * weight)

    def result(self) -> torch.Tensor:
        """The merged task vector."""
        import torch

        matrix, ws = self._matrix, self._matrix.ws
        if not len(self._left.rows):
            return ws.zeros(matrix.rows, matrix.columns)
        left, right = whitened((self._left.rows, self._right.rows), ws, matrix.tensor.warn)
        left.mul_(torch.cat(self._values).float()[:, None])
        return ws.matmul(left.t(), right)

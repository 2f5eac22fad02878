"""Iso-CTS: isotropic merging in common and task-specific subspaces, Marczak et al. 2025,
arXiv 2502.04959.

For each matrix, with ``r = min(m, n)``, ``W = Σ wᵢ·τᵢ`` and ``f = common_space_fraction``:

- ``d = round((r − ⌊r·f⌋) / N)`` directions for each task (a half rounds to even) and the other
  ``c = r − N·d`` for what the tasks have in common: W's c largest singular triplets, with the left
  vectors ``U_c``.
- Of every task the d largest triplets of ``wᵢ·τᵢ − U_c·U_cᵀ·wᵢ·τᵢ``.
- All left vectors side by side, U, and all right ones, V, give way to the nearest orthonormal sets:
  ``out = θ₀ + λ·s̄·U(UᵀU)^(−1/2)(VᵀV)^(−1/2)Vᵀ``, s̄ being the mean of all singular values.

The tasks' left vectors are orthogonal to ``U_c``, so that only they are made orthonormal. Where
m <= n their decompositions have the size m − c, in the complement of ``U_c``.

Departures from the authors' code: directions with ``σ < 10⁻⁶·σ₁`` of W, or ``10⁻⁶·‖wᵢ·τᵢ‖`` of a
task, are left out, since singular vectors are arbitrary there; the mean is over r values all the
same, or with ``mean_over: rank`` over those that are there. N·d never exceeds r. All decompositions
are those of Gram matrices in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

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

    from pymerge.ops.workspace import Workspace

DOUBLE = 8

SPEC = MethodSpec(
    name="iso_cts",
    summary="Iso-C with a share of the directions taken from each task alone.",
    paper="https://arxiv.org/abs/2502.04959",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec("weight", "float", "model", 1.0, "Factor on the model's task vector."),
        LAMBDA,
        ParameterSpec(
            "common_space_fraction",
            "float",
            "shared",
            0.8,
            "Share of the directions that are those of the summed task vectors.",
            minimum=0.0,
            maximum=1.0,
        ),
        ParameterSpec(
            "mean_over",
            "str",
            "shared",
            "full",
            "Over what singular values are averaged: as many as the matrix has rows or columns "
            "(the authors), or as many as there are.",
            choices=("full", "rank"),
        ),
        others("mean"),
        *LAYOUT,
    ),
    statistics="tensor",
)


class Split(NamedTuple):
    """How many directions are common, and how many each task has."""

    common: int
    task: int


def split_of(rank: int, fraction: float, num_models: int) -> Split:
    """The directions of a matrix with ``rank`` of them."""
    task = round((rank - int(rank * fraction)) / num_models)
    task = min(task, rank // num_models)
    return Split(rank - task * num_models, task)


def _cost(rows: int, columns: int, num_models: int, fraction: float) -> Cost:
    short, long = sorted((rows, columns))
    split = split_of(short, fraction, num_models)
    every = split.task * num_models
    gram = 5 * short**2 + short * min(long, 1024)
    # All right vectors, the tasks' left ones and U_c, in the complement's case with the complement.
    kept = DOUBLE * (short * columns + every * rows + short * rows)
    common = FLOAT * rows * columns + DOUBLE * (gram + 2 * short * long)
    group = 1 if rows <= columns else min(group_size(rows, columns), num_models)
    task = group * (
        FLOAT * rows * columns
        + DOUBLE * (gram + short * columns + 3 * split.task * (rows + columns))
    )
    whiten = DOUBLE * 5 * (short**2 + every**2) + DOUBLE * short * long
    end = FLOAT * (short * (rows + columns) * 2 + rows * columns)
    size = rows - split.common if rows <= columns else short
    through = size if rows <= columns else split.common
    products = 2.0 * rows * columns * (split.common + num_models * through)
    return Cost(
        kept + max(common, task, whiten, end),
        2.0 * rows * columns * short,
        products + (1.0 + num_models) * short * rows * columns + 3.0 * short**2 * columns,
        9.0 * (2 * short**3 + num_models * size**3 + every**3),
    )


@method(
    SPEC,
    ops=TILE_OPS,
    looks=lambda tensor: reads_of(tensor, totals=1, deltas=tensor.num_models),
    cost=lambda tensor: matrix_cost(
        tensor,
        lambda rows, columns, num_models: _cost(
            rows, columns, num_models, float(tensor.parameters["common_space_fraction"])
        ),
    ),
)
def iso_cts(tensor: Tensor) -> Apply | Solving:
    """Gather the weighted sum, then one task vector after the other."""
    fraction = float(tensor.parameters["common_space_fraction"])

    def solve(matrix: Matrix) -> Asking:
        weights = tensor.each("weight")
        split = split_of(matrix.full_rank, fraction, matrix.num_models)
        merge = Merge(matrix, split)
        total = yield from matrix.total(weights)
        yield Solve(partial(merge.add_common, [total]))
        del total
        used = [i for i, weight in enumerate(weights) if weight and split.task]
        size = 1 if merge.in_complement else group_size(matrix.rows, matrix.columns)
        for first in range(0, len(used), size):
            group = used[first : first + size]
            deltas = []
            for index in group:
                deltas.append((yield from matrix.delta(index)))
            yield Solve(partial(merge.add_tasks, deltas, [weights[index] for index in group]))
        return (yield Solve(merge.result))

    return merge_matrices(tensor, solve, isometric=True)


class Triplets(NamedTuple):
    """Left vectors as columns, singular values, right vectors as rows."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


class Merge:
    """The directions found so far."""

    def __init__(self, matrix: Matrix, split: Split) -> None:
        ws = matrix.ws
        self._matrix, self._split = matrix, split
        #: Whether U_c and its complement are at hand: together they are square, of the short side.
        self.in_complement = matrix.rows <= matrix.columns
        shortest = min(matrix.rows, matrix.columns)
        num_of_tasks = min(split.task, shortest) * matrix.num_models
        self._left = Stack(num_of_tasks, matrix.rows, ws)
        self._right = Stack(min(split.common, shortest) + num_of_tasks, matrix.columns, ws)
        self._values: list[torch.Tensor] = []
        self._rest: torch.Tensor | None = None

    def add_common(self, totals: list[torch.Tensor]) -> None:
        """Take U_c, its singular values and right vectors from the one matrix in the list."""
        found = (self._common_by_rows if self.in_complement else self._common)(totals.pop())
        self._basis = found.left
        self._values.append(found.values)
        self._right.add(found.right)

    def add_tasks(self, deltas: list[torch.Tensor], weights: Sequence[float]) -> None:
        """Take the largest triplets that task vectors have outside of U_c."""
        found = self._matrix.ws.map(
            self._task_by_rows if self.in_complement else self._task, deltas
        )
        deltas.clear()
        for (left, values, right), weight in zip(found, weights, strict=True):
            self._left.add(left.t())
            self._values.append(values * abs(weight))
            self._right.add(right if weight > 0 else -right)

    def result(self) -> torch.Tensor:
        """The merged task vector."""
        import torch

        matrix, ws = self._matrix, self._matrix.ws
        values = torch.cat(self._values)
        if not len(values):
            return ws.zeros(matrix.rows, matrix.columns)
        over_rank = matrix.tensor.parameters["mean_over"] == "rank"
        mean = float(values.sum()) / (len(values) if over_rank else matrix.full_rank)
        self._rest = None
        stacks = (self._left.rows, self._right.rows)
        tasks, right = whitened(stacks, ws, matrix.tensor.warn)
        left = torch.cat((self._basis.t().float(), tasks)).mul_(mean)
        return ws.matmul(left.t(), right)

    def _common_by_rows(self, total: torch.Tensor) -> Triplets:
        import torch

        from pymerge.ops.matrix.gram import gram
        from pymerge.ops.matrix.products import product
        from pymerge.ops.matrix.spectrum import gram_eigh

        ws, num = self._matrix.ws, self._split.common
        vectors = gram_eigh(gram(total, ws, side="rows"), ws).vectors
        basis, rest = vectors[:, :num].contiguous(), vectors[:, num:].contiguous()
        del vectors
        image = product(total.t(), basis, ws)
        values = torch.linalg.vector_norm(image, dim=0)
        kept = _kept(values, float(values.max()) if len(values) else 0.0)
        if not bool(kept.all()):
            rest = torch.cat((basis[:, ~kept], rest), dim=1)
            basis, image, values = basis[:, kept], image[:, kept], values[kept]
        self._rest = rest
        return Triplets(basis, values, image.div_(values).t())

    def _task_by_rows(self, delta: torch.Tensor) -> Triplets:
        import torch

        from pymerge.ops.matrix.products import product
        from pymerge.ops.matrix.spectrum import truncated_svd

        ws, rest = self._matrix.ws, self._rest
        if rest is None:
            raise RuntimeError("a task came after the result")
        norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
        outside = product(delta.t(), rest, ws)
        svd = truncated_svd(outside, self._split.task, ws, cut=CUT)
        kept = _kept(svd.values, norm)
        right, values, within = svd.left[:, kept].t(), svd.values[kept], svd.right[kept]
        return Triplets(product(rest, within.t(), ws), values, right)

    def _common(self, total: torch.Tensor) -> Triplets:
        from pymerge.ops.matrix.spectrum import truncated_svd

        ws = self._matrix.ws
        svd = truncated_svd(total, self._split.common, ws, cut=CUT)
        return Triplets(_orthonormal(svd.left, ws), svd.values, svd.right)

    def _task(self, delta: torch.Tensor) -> Triplets:
        import torch

        from pymerge.ops.matrix.gram import gram
        from pymerge.ops.matrix.products import product
        from pymerge.ops.matrix.spectrum import gram_eigh

        ws, basis = self._matrix.ws, self._basis
        g = gram(delta, ws, side="columns")
        g -= gram(product(delta.t(), basis, ws), ws, side="rows")
        vectors = gram_eigh(g, ws).vectors[:, : self._split.task].contiguous()
        del g
        image = product(delta, vectors, ws)
        # Twice, so that rounding leaves nothing of the basis in it.
        for _ in range(2):
            image -= product(basis, product(basis.t(), image, ws), ws)
        values = torch.linalg.vector_norm(image, dim=0)
        kept = _kept(values, float(torch.linalg.vector_norm(delta, dtype=torch.float64)))
        image, values = image[:, kept], values[kept]
        return Triplets(image.div_(values), values, vectors[:, kept].t())


def _kept(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Which values are not negligible; what is not a number stays, to be seen in the result."""
    return ~(values <= CUT * scale)


def _orthonormal(basis: torch.Tensor, ws: Workspace) -> torch.Tensor:
    """Nearly orthonormal columns made so by Newton-Schulz steps: those of small singular values are
    quotients of small numbers."""
    import torch

    from pymerge.ops.matrix.gram import gram
    from pymerge.ops.matrix.products import product

    for _ in range(4):
        step = gram(basis, ws, side="columns").neg_()
        step.diagonal().add_(1.0)
        if not float(torch.linalg.vector_norm(step)) > 1e-12:
            break
        basis += product(basis, step.mul_(0.5), ws)
    return basis

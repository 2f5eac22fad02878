"""Merging matrices: gather them in the workspace, solve, put the result on the base.

A method of matrices gives a function of a :class:`Matrix`, a generator that asks for what it needs
(``delta``, ``total``, ``weight``, ``Solve``) and returns the merged task vector, float32 [rows,
columns]. Here is what all of them share: the tensors that are no matrices, several matrices in one
tensor, and models that are LoRA adapters, whose task vectors are products of factors: for a method
that commutes with isometries they are merged in their small core space (arXiv 2509.17786).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pymerge.formats import F32
from pymerge.methods.layout import Block, blocks_of
from pymerge.methods.protocol import (
    Apply,
    Cost,
    Factors,
    Measure,
    Question,
    Solve,
    Solving,
    Tensor,
    Tile,
)
from pymerge.methods.spec import ParameterSpec
from pymerge.ops.view import View

if TYPE_CHECKING:
    import torch

    from pymerge.ops.matrix.core import Core
    from pymerge.ops.workspace import Workspace

Asking = Generator[Question, Any, Any]
MatrixSolve = Callable[["Matrix"], Asking]

#: Ops that every method of matrices may need.
TILE_OPS = ("axpy_n", "convert")
FLOAT = F32.num_bytes


def others(default: str = "mean") -> ParameterSpec:
    """What becomes of the tensors that are no matrices."""
    return ParameterSpec(
        "others",
        "str",
        "shared",
        default,
        "What the tensors that are no matrices become: the base with the mean or the sum of their "
        "task vectors, times lambda, or the base alone.",
        choices=("mean", "sum", "base"),
    )


@dataclass(frozen=True)
class Matrix:
    """One matrix of every model. Its size is ``rows`` (outputs) by ``columns`` (inputs); in core
    space that of the cores, and ``full_rank`` is what it could be of the matrix as stored.

    Questions of its methods read the base and the models named alone; float32 tensors of the
    workspace come back, which belong to the caller.
    """

    tensor: Tensor
    block: Block
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None
    core: Core | None = None

    @property
    def ws(self) -> Workspace:
        return self.tensor.room

    @property
    def num_models(self) -> int:
        return self.tensor.num_models

    @property
    def rows(self) -> int:
        return self.block.rows if self.core is None else self.core.left.shape[1]

    @property
    def columns(self) -> int:
        return self.block.columns if self.core is None else self.core.right.shape[1]

    @property
    def full_rank(self) -> int:
        return min(self.block.rows, self.block.columns)

    def delta(self, model: int) -> Asking:
        """The task vector of a model."""
        if self.core is not None:
            return self.core.cores[model].float()
        if self.factors is not None:
            left, right = self.factors[model]
            return (yield Solve(lambda: self.ws.matmul(left, right)))
        ops = self.tensor.ops

        def put(out: View, tile: Tile) -> None:
            ops.axpy_n(out, tile.models, [1.0], base=tile.base, add_base=False)

        return (yield from self.gather(put, (model,)))

    def total(self, weights: Sequence[float]) -> Asking:
        """The weighted sum of the task vectors."""
        ops = self.tensor.ops
        if self.core is not None or self.factors is not None:
            return (yield Solve(lambda: self._factored_total(weights)))

        def put(out: View, tile: Tile) -> None:
            ops.axpy_n(out, tile.models, weights, base=tile.base, add_base=False)

        return (yield from self.gather(put, tuple(range(self.num_models))))

    def weight(self, model: int) -> Asking:
        """The weights of a model themselves."""
        ops = self.tensor.ops
        return (
            yield from self.gather(lambda out, tile: ops.convert(out, tile.models[0]), (model,))
        )

    def _factored_total(self, weights: Sequence[float]) -> torch.Tensor:
        if self.core is not None:
            pairs = zip(weights, self.core.cores, strict=True)
            return sum(weight * core for weight, core in pairs).float()  # type: ignore[union-attr]
        total = self.ws.zeros(self.rows, self.columns)
        for weight, (left, right) in zip(weights, self.factors or (), strict=True):
            total.add_(self.ws.matmul(left, right), alpha=weight)
        return total

    def gather(self, put: Callable[[View, Tile], Any], models: tuple[int, ...]) -> Asking:
        """A matrix that ``put(out, tile)`` writes by runs of its elements."""
        block, out = self.block, self.ws.empty(self.block.stored_rows, self.block.stored_columns)
        view = view_of(out)

        def run(tile: Tile) -> None:
            for part, place in block.runs(tile):
                put(view.part(place, part.num), part)

        yield Measure(run, models=models, within=block.within)
        return (yield Solve(out.T.contiguous)) if block.transposed else out


def merge_matrices(
    tensor: Tensor,
    solve: MatrixSolve,
    *,
    isometric: bool = False,
    adds_base: bool = True,
    scale: float | None = None,
    alone: Callable[[Tensor], Apply] | None = None,
) -> Apply | Solving:
    """Merge a tensor by its matrices, or as one that is none.

    :param isometric: the method commutes with orthogonal bases of rows and of columns, so that it
        may work in the core space of low-rank task vectors.
    :param adds_base: the method returns a task vector; else the merged weights themselves.
    :param scale: the factor on the merged task vector; default the parameter ``lambda``.
    :param alone: merges a tensor that is no matrix; default by the parameter ``others``.
    """
    factor = float(tensor.parameters["lambda"]) if scale is None else scale
    blocks = blocks_of(tensor)
    if not blocks:
        return merge_others(tensor, factor) if alone is None else alone(tensor)
    return _merge_blocks(tensor, blocks, solve, isometric, adds_base, factor)


def merge_others(tensor: Tensor, scale: float) -> Apply:
    """A tensor that is no matrix: what the parameter ``others`` says."""
    ops, count = tensor.ops, tensor.num_models
    how = tensor.parameters["others"]
    if how == "base" and tensor.has_base:
        return Apply(lambda tile, out: ops.convert(out, tile.base), models=())
    weights = [1.0] * count
    divisor = float(count) if how == "mean" else 1.0
    return Apply(
        lambda tile, out: ops.axpy_n(
            out, tile.models, weights, base=tile.base, divisor=divisor, scale=scale
        )
    )


def _merge_blocks(
    tensor: Tensor,
    blocks: Sequence[Block],
    solve: MatrixSolve,
    isometric: bool,
    adds_base: bool,
    scale: float,
) -> Solving:
    merged = yield from solve_blocks(tensor, blocks, solve, isometric, adds_base)
    return put_on_base(tensor, merged, scale) if adds_base else put_alone(tensor, merged)


def solve_blocks(
    tensor: Tensor,
    blocks: Sequence[Block],
    solve: MatrixSolve,
    isometric: bool = False,
    factored: bool = True,
) -> Asking:
    """What ``solve`` makes of a tensor's matrices, as a float32 matrix in the tensor's own layout.

    :param isometric: as of :func:`merge_matrices`.
    :param factored: the task vectors of adapters may come from their factors.
    """
    factors = (yield Factors()) if tensor.has_base and factored else None
    merged: Any = None
    for block in blocks:
        matrix = yield from _matrix(tensor, block, factors, isometric)
        result = yield from solve(matrix)
        if matrix.core is not None:
            result = yield Solve(partial(matrix.core.expand, result, matrix.ws))
        if block.transposed:
            result = result.T
        if len(blocks) == 1:
            return result if result.is_contiguous() else (yield Solve(result.contiguous))
        if merged is None:
            merged = tensor.room.empty(tensor.num_rows, tensor.columns)
        yield Solve(partial(_window(merged, block).copy_, result))
        # The next matrix needs the memory of this one.
        del matrix, result
    return merged


def _window(whole: torch.Tensor, block: Block) -> torch.Tensor:
    rows = slice(block.first_row, block.first_row + block.stored_rows)
    return whole[rows, block.first_column : block.first_column + block.stored_columns]


def look_at_matrices(tensor: Tensor, visit: MatrixSolve) -> Asking:
    """What ``visit`` makes of each of a tensor's matrices, as a list; nothing is merged."""
    blocks = blocks_of(tensor)
    factors = (yield Factors()) if tensor.has_base and blocks else None
    found = []
    for block in blocks:
        matrix = yield from _matrix(tensor, block, factors, False)
        found.append((yield from visit(matrix)))
    return found


def _matrix(tensor: Tensor, block: Block, factors: Sequence[Any] | None, isometric: bool) -> Asking:
    """The matrix of a block, in core space where that is smaller."""
    if factors is None:
        return Matrix(tensor, block)

    def place() -> Matrix:
        import torch

        from pymerge.ops.matrix.core import core_space

        pairs = []
        for left, right in factors:
            left = left[block.first_row : block.first_row + block.stored_rows]
            right = right[:, block.first_column : block.first_column + block.stored_columns]
            pair = (right.T, left.T) if block.transposed else (left, right)
            first, last = (torch.tensor(each, device=tensor.room.device) for each in pair)
            pairs.append((first, last))
        rank = sum(left.shape[1] for left, _ in pairs)
        if isometric and rank and rank < min(block.rows, block.columns):
            return Matrix(tensor, block, core=core_space(pairs, tensor.room))
        return Matrix(tensor, block, factors=pairs)

    return (yield Solve(place))


def put_on_base(tensor: Tensor, merged: torch.Tensor, scale: float) -> Apply:
    """The base plus a task vector in the workspace, times ``scale``."""

    def run(tile: Tile, out: View) -> int:
        inputs = [_base(tile), view_of(merged).part(tile.start, tile.num)]
        count: int = tensor.ops.axpy_n(out, inputs, [1.0, scale])
        return count

    return Apply(run, models=())


def put_alone(tensor: Tensor, merged: torch.Tensor) -> Apply:
    """Merged weights in the workspace as they are."""

    def run(tile: Tile, out: View) -> int:
        count: int = tensor.ops.convert(out, view_of(merged).part(tile.start, tile.num))
        return count

    return Apply(run, models=())


def matrix_cost(tensor: Tensor, of_matrix: Callable[[int, int, int], Cost]) -> Cost:
    """The cost of a tensor from that of one matrix: ``of_matrix(rows, columns, num_models)`` counts
    everything the solve holds at its peak, its result included."""
    blocks = blocks_of(tensor)
    costs = [of_matrix(block.rows, block.columns, tensor.num_models) for block in blocks]
    if not costs:
        return Cost()
    beside = tensor.num_elements * FLOAT if len(blocks) > 1 else 0
    turned = max(FLOAT * block.num_elements if block.transposed else 0 for block in blocks)
    return Cost(
        max(cost.num_bytes for cost in costs) + beside + turned,
        sum(cost.flops32 for cost in costs),
        sum(cost.flops64 for cost in costs),
        sum(cost.eigen64 for cost in costs),
    )


def reads_of(tensor: Tensor, *, totals: int = 0, deltas: int = 0) -> float:
    """``looks`` of a method: whole looks at all models, looks at the base and one model each, and
    the map that reads the base alone, in units of one look at everything."""
    if not blocks_of(tensor):
        return 0.0
    inputs = tensor.num_models + int(tensor.has_base)
    once = (int(tensor.has_base) + 1) * deltas + int(tensor.has_base)
    return totals + once / inputs - 1.0


def _base(tile: Tile) -> View:
    if tile.base is None:
        raise RuntimeError("a task vector has no base to be put on")
    return tile.base


def view_of(matrix: torch.Tensor) -> View:
    """A contiguous float32 matrix of the workspace as the ops take it."""
    if F32.code is None or not matrix.is_contiguous():
        raise RuntimeError("expected a contiguous matrix of float32")
    return View(matrix.data_ptr(), F32.code, matrix.numel())

"""DOGE-TA: task arithmetic with a shared correction found by projected gradient descent, Wei et al.
2025, arXiv 2501.01230.

For each matrix, with ``r = min(m, n)``, N models, ``λᵢ = lamda/‖τᵢ‖`` and ``Λ = Σ λᵢ``:

1. P projects onto what the tasks share: the ``⌊r/N⌋`` largest left singular vectors of every τᵢ
   side by side, and of these the ``⌊r/subspace⌋`` largest left singular vectors U, ``P = U·Uᵀ``.
2. A correction Δ, the same for all tasks, brings every task's own share of the sum near the task:
   ``L(Δ) = Σᵢ Σ_rows ⟨τᵢ, τᵢ − Σⱼ λⱼ·(τⱼ + Δ)⟩²``, the inner products row by row. It starts from 0
   and takes ``steps`` steps of Adam at ``lr``, with ``(1 − P)·∇L`` for the gradient.
3. ``out = θ₀ + λ·Σ λᵢ·(τᵢ + Δ)`` where ``|τᵢ|`` is among the share ``density`` of the largest of
   model i: all that reach the (⌊density·d⌋ + 1)-th of the d elements of the selected matrices of
   the whole model (``scope: tensor``: of each tensor alone).

The loss of the paper's documentation is another one; this is the authors' code's. So are the facts
that the mask looks at |τᵢ| alone, that ``subspace`` is a divisor, and that Δ, moved element by
element, leaves the complement of P. Adam's stop is part of the method: the loss has many minima and
an exact solver goes to another one. Each row of the loss has N terms, so the gradient is
``2Λ·Σⱼ (Λ·⟨τⱼ, Δ⟩ − ⟨τⱼ, τⱼ − Σᵢ λᵢ·τᵢ⟩)·τⱼ``: a step reads the task vectors once, row by row,
and takes two thin products.

Everything that is not selected stays at the base. ``preset: official`` selects what the authors'
code does for CLIP and T5, encoder weights without layer norms; by default all matrices are.

Departures from the official code: a task vector of zeros has no part in the matrix (there λᵢ is
infinite); directions of rank 0 (``σ < 10⁻⁶·σ₁``) are not projected onto, where the authors take
what LAPACK fills in; with one task vector, whose left vectors are orthonormal, U are its largest.
Where the vectors side by side have equal singular values around the cut, U is arbitrary, as there.
All task vectors of a matrix are in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pymerge.errors import RecipeError
from pymerge.methods.key_counts import COUNT_OPS, KeyCounts, rank_of, value_of
from pymerge.methods.layout import LAYOUT, blocks_of
from pymerge.methods.matrices import (
    FLOAT,
    TILE_OPS,
    Asking,
    Matrix,
    matrix_cost,
    merge_others,
    others,
    put_on_base,
    reads_of,
    solve_blocks,
)
from pymerge.methods.parameters import LAMBDA, by_name, preset
from pymerge.methods.protocol import (
    Apply,
    Cost,
    EachTensor,
    Measure,
    ModelMeasuring,
    Solve,
    Solving,
    Tensor,
    Tile,
)
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec, ParameterValue
from pymerge.methods.whitening import CUT, Stack, group_size

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

DOUBLE = 8
#: Elements of the task vectors of a tile of rows: fewer are still near the core when they are read
#: the second time, but a step's calls cost more.
TILE = 1 << 19

PRESETS: Mapping[str, Mapping[str, ParameterValue]] = {
    "pymerge": {},
    "official": {
        "layers": r"^(?=.*encoder)(?=.*weight)(?!.*layer_norm)",
        "exclude": "",
    },
}

SPEC = MethodSpec(
    name="doge_ta",
    summary="Scaled task vectors with a correction outside of what the tasks have in common.",
    paper="https://arxiv.org/abs/2501.01230",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec(
            "lamda", "float", "shared", 0.07, "Norm of each task vector's share of a matrix."
        ),
        LAMBDA,
        ParameterSpec(
            "density",
            "float",
            "shared",
            0.3,
            "Share of each task vector's elements that counts, largest magnitudes first.",
            minimum=0.0,
            maximum=1.0,
        ),
        ParameterSpec(
            "scope",
            "str",
            "shared",
            "model",
            "Rank magnitudes over all selected matrices of the model (the authors) or within each "
            "tensor.",
            choices=("model", "tensor"),
        ),
        ParameterSpec(
            "subspace",
            "float",
            "shared",
            6.0,
            "Divisor: the projection has min(m, n)/subspace directions.",
            minimum=1.0,
        ),
        ParameterSpec("steps", "int", "shared", 400, "Steps of the descent.", minimum=0),
        ParameterSpec("lr", "float", "shared", 1e-4, "Learning rate.", minimum=0.0),
        others("base"),
        *LAYOUT,
        preset(
            "pymerge",
            {
                "pymerge": "every matrix but embeddings and heads",
                "official": "the encoder weights that the authors' code selects",
            },
        ),
    ),
    statistics="tensor or model",
    presets=PRESETS,
)

Counting = Generator[Measure, Any, int]


def _is_model_wide(tensor: Tensor) -> bool:
    return tensor.parameters["scope"] == "model"


def _sizes(rows: int, columns: int, num_models: int, divisor: float) -> tuple[int, int]:
    """Left vectors of each model, and directions of the projection."""
    short = min(rows, columns)
    keep = short // num_models
    return keep, min(int(short / divisor), keep * num_models)


def _cost(tensor: Tensor) -> Cost:
    divisor, steps = float(tensor.parameters["subspace"]), float(tensor.parameters["steps"])

    def of_matrix(rows: int, columns: int, num_models: int) -> Cost:
        short, long = sorted((rows, columns))
        keep, size = _sizes(rows, columns, num_models, divisor)
        stacked, whole = keep * num_models, rows * columns
        group = min(group_size(rows, columns), num_models)
        gather = FLOAT * whole
        # Gram matrices with a chunk of rows or with their solver; vectors of both sides.
        gram = max(5 * short**2, short**2 + short * min(long, 1024))
        decompose = DOUBLE * (stacked * rows + group * (gram + 3 * keep * (rows + columns)))
        low, high = sorted((stacked, rows))
        join = DOUBLE * (stacked * rows + 5 * low**2 + low * high + 3 * size * (stacked + rows))
        # Δ and its gradient, two moments and a product; what the rows aim at; the projection.
        descend = FLOAT * (5 * whole + rows * num_models + size * (2 * rows + columns))
        descend += DOUBLE * size * rows
        flops = steps * (4.0 * num_models * whole + 4.0 * size * whole)
        return Cost(
            FLOAT * num_models * whole + max(gather, decompose, join, descend),
            flops,
            num_models * (1.0 * short**2 * long + 2.0 * keep * whole) + 1.0 * low**2 * high,
            9.0 * (num_models * short**3 + low**3),
        )

    return matrix_cost(tensor, of_matrix)


def measure_model(tensors: Sequence[Tensor]) -> ModelMeasuring:
    """The keys of the thresholds, over all matrices of the model together."""
    if len({tuple(tensor.model_names) for tensor in tensors}) > 1:
        raise RecipeError(
            "doge_ta with scope: model ranks all matrices of a model together: every model must "
            "have every tensor; leave out --allow-missing or use scope: tensor"
        )
    for name in ("scope", "density"):
        values = {tensor.parameters[name] for tensor in tensors}
        if len(values) > 1:
            raise RecipeError(
                f"doge_ta with scope: model ranks a whole model at once, so {name} must not vary "
                f"over tensors, found {sorted(values, key=str)}; remove its gradient or filter or "
                "use scope: tensor"
            )
    first = tensors[0]
    counts = KeyCounts(first.num_models)
    sizes = yield EachTensor(partial(_count, counts))
    counts.narrow([_rank(first, sum(sizes.values()))] * first.num_models)
    yield EachTensor(partial(_count, counts))
    return counts.keys()


def _rank(tensor: Tensor, num: int) -> int:
    return rank_of(float(tensor.parameters["density"]), num)


def _count(counts: KeyCounts, tensor: Tensor) -> Counting:
    """Count the magnitudes of a tensor's matrices; returns how many elements they have."""
    num = 0
    for block in blocks_of(tensor):

        def look(tile: Tile, block: Any = block) -> NDArray[np.uint64]:
            parts = ((part.base, part.models) for part, _ in block.runs(tile))
            return counts.count(tensor.ops, parts)

        counts.add((yield Measure(look, fold=np.add, within=block.within)))
        num += block.num_elements
    return num


@method(
    SPEC,
    ops=(*TILE_OPS, *COUNT_OPS),
    looks=lambda tensor: reads_of(
        tensor, totals=0 if _is_model_wide(tensor) else 2, deltas=tensor.num_models
    ),
    model_wide=_is_model_wide,
    measure_model=measure_model,
    model_looks=2,
    cost=_cost,
)
def doge_ta(tensor: Tensor) -> Apply | Solving:
    """Gather all task vectors, find their correction, merge what the thresholds keep."""
    scale = float(tensor.parameters["lambda"])
    return _merge(tensor, scale) if blocks_of(tensor) else merge_others(tensor, scale)


def _merge(tensor: Tensor, scale: float) -> Solving:
    keys = tensor.state
    if not _is_model_wide(tensor):
        counts = KeyCounts(tensor.num_models)
        num = yield from _count(counts, tensor)
        counts.narrow([_rank(tensor, num)] * tensor.num_models)
        yield from _count(counts, tensor)
        keys = counts.keys()

    def solve(matrix: Matrix) -> Asking:
        shape = (matrix.rows, matrix.num_models, matrix.columns)
        taus = yield Solve(lambda: matrix.ws.empty(*shape))
        for model in range(matrix.num_models):
            tau = yield from matrix.delta(model)
            yield Solve(partial(taus[:, model].copy_, tau))
            del tau
        return (yield Solve(lambda: merged_vector(taus, keys, tensor, matrix.ws)))

    # Thresholds and task vectors are those of the weights themselves, not of adapters' factors.
    merged = yield from solve_blocks(tensor, blocks_of(tensor), solve, factored=False)
    return put_on_base(tensor, merged, scale)


def merged_vector(
    taus: torch.Tensor, keys: Sequence[int], tensor: Tensor, ws: Workspace
) -> torch.Tensor:
    """The merged task vector, float32 [m, n]; NaN where a task vector is not finite.

    :param taus: float32 [m, N, n].
    :param keys: of each model's threshold.
    """
    import torch

    rows, num, columns = taus.shape
    norms = ws.map(
        lambda i: float(torch.linalg.vector_norm(taus[:, i], dtype=torch.float64)), range(num)
    )
    if not all(map(math.isfinite, norms)):
        return ws.empty(rows, columns).fill_(math.nan)
    lamda = float(tensor.parameters["lamda"])
    factors = [lamda / norm if norm else 0.0 for norm in norms]
    steps = int(tensor.parameters["steps"])
    basis = None
    if steps and any(factors):
        used = [i for i, factor in enumerate(factors) if factor]
        basis = shared_directions(taus, used, float(tensor.parameters["subspace"]), ws)
    descent = Descent(taus, factors, basis, ws)
    correction = descent.run(steps, float(tensor.parameters["lr"]))
    del descent
    limits = [value_of(key) for key in keys]
    out = ws.empty(rows, columns)

    def panel(part: slice) -> None:
        total = out[part].zero_()
        for i, factor in enumerate(factors):
            tau = taus[part, i]
            moved = (tau + correction[part]).mul_(tau.abs() >= limits[i])
            total.add_(moved, alpha=factor)

    ws.map(panel, ws.panels(rows))
    return out


def shared_directions(
    taus: torch.Tensor, used: Sequence[int], divisor: float, ws: Workspace
) -> torch.Tensor | None:
    """``Uᵀ``, float32 [k, m]; None where k is 0."""
    from pymerge.ops.matrix.spectrum import truncated_svd

    rows, num, columns = taus.shape
    keep, size = _sizes(rows, columns, num, divisor)
    if not size:
        return None
    stack = Stack(keep * len(used), rows, ws)
    group = group_size(rows, columns)

    def left(model: int) -> torch.Tensor:
        return truncated_svd(taus[:, model], keep, ws, cut=CUT).left.t()

    for first in range(0, len(used), group):
        for vectors in ws.map(left, used[first : first + group]):
            stack.add(vectors)
    if len(used) == 1:
        return stack.rows[:size].float()
    return truncated_svd(stack.rows, size, ws, cut=CUT).right.float()


class Descent:
    """Adam on the correction Δ.

    :param taus: float32 [m, N, n]: a row's N task vectors are beside one another.
    :param factors: λ of each model.
    :param basis: Uᵀ of the projection, float32 [k, m], or None.
    """

    def __init__(
        self,
        taus: torch.Tensor,
        factors: Sequence[float],
        basis: torch.Tensor | None,
        ws: Workspace,
    ) -> None:
        self._taus, self._ws = taus, ws
        self._basis = basis
        self._directions = None if basis is None else basis.t().contiguous()
        self._lamda = math.fsum(factors)
        self._factors = factors
        rows, num, columns = taus.shape
        self._delta = ws.zeros(rows, columns)
        self._gradient = ws.empty(rows, columns)
        self._moments = ws.zeros(2, rows, columns)
        self._aims = ws.empty(rows, num, 1)
        self._along = None if basis is None else ws.empty(len(basis), columns)
        size = max(1, TILE // (num * columns))
        self._tiles = ws.panels(rows, size if ws.on_host else None)

    def run(self, steps: int, lr: float) -> torch.Tensor:
        """Δ [m, n] after ``steps`` steps."""
        from pymerge.ops.matrix.adam import stepper

        if not steps or not self._lamda:
            return self._delta
        ws = self._ws
        steppers = []
        for part in self._tiles:
            first, second = self._moments[:, part]
            steppers.append(stepper(self._delta[part], first, second, self._gradient[part], ws))

        def begin(index: int) -> None:
            self._aim(self._tiles[index])
            self._differentiate(self._tiles[index])

        def advance(index: int, step: int) -> None:
            part = self._tiles[index]
            if self._directions is not None and self._along is not None:
                self._gradient[part].addmm_(self._directions[part], self._along, alpha=-1)
            steppers[index](lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, step=step)
            if step < steps:
                self._differentiate(part)

        tiles = range(len(self._tiles))
        ws.map(begin, tiles)
        for step in range(1, steps + 1):
            self._project()
            ws.map(partial(advance, step=step), tiles)
        return self._delta

    def _aim(self, part: slice) -> None:
        """``2Λ·⟨τⱼ, τⱼ − Σᵢ λᵢ·τᵢ⟩`` of every row, the products in float64."""
        for row in range(*part.indices(len(self._taus))):
            taus = self._taus[row].double()
            weights = taus.new_tensor(self._factors)
            found = taus.square().sum(1) - taus @ (weights @ taus)
            self._aims[row, :, 0] = found * (2 * self._lamda)

    def _differentiate(self, part: slice) -> None:
        """The gradient of rows: ``Σⱼ (2Λ²·⟨τⱼ, Δ⟩ − aimⱼ)·τⱼ``."""
        import torch

        taus = self._taus[part]
        errors = torch.bmm(taus, self._delta[part].unsqueeze(2))
        errors.mul_(2 * self._lamda**2).sub_(self._aims[part])
        torch.bmm(errors.transpose(1, 2), taus, out=self._gradient[part].unsqueeze(1))

    def _project(self) -> None:
        """``Uᵀ·∇L``, by panels of columns: each sums over all rows in one order."""
        import torch

        basis, along = self._basis, self._along
        if basis is None or along is None:
            return

        def panel(part: slice) -> None:
            torch.mm(basis, self._gradient[:, part], out=along[:, part])

        self._ws.map(panel, self._ws.panels(along.shape[1]))

"""OPCM: task vectors added one by one, each orthogonally to those before. Tang et al. 2025, arXiv
2501.09522.

With ``A₁ = τ₁``, for each matrix and in the order of the recipe

    ``Aₜ = Aₜ₋₁ + P(τₜ)``,    ``A = U·Σ·Vᵀ``,    ``P(τ) = U·X·Vᵀ``,

where X is ``Uᵀ·τ·V`` without its diagonal and without its leading block of the s* directions that
come before the singular values exceed the share α of their sum. All other tensors are summed. Then
``out = θ₀ + λ·(n̄/‖A‖)·A``: the norms are those of whole models, n̄ the mean of the ``‖τₜ‖``.

The authors rescale after every step, by a factor that they multiply in again before the next. It
changes neither U, V nor s*, so that it cancels but for the last one: a matrix passes through all
its steps by itself, and only the norms need the whole model. A step is ``A ← A + τ − U·B·Vᵀ``, B
what P takes out of ``Uᵀ·τ·V``: no more than its diagonal and leading block, so that the thin U and
V will do. A, the eigenvectors V of ``AᵀA`` and ``U = A·V·Σ⁻¹`` are float64.

The order matters: the authors shuffle the models, here the recipe tells it. Departures from the
official code: beyond A's rank (``σ < 10⁻⁶·σ₁``) there are no pairs of singular vectors, and nothing
is taken from X's diagonal there, where the authors take what LAPACK fills in; α = 1 takes out all
directions rather than none; output heads are summed like embeddings unless ``exclude`` says
otherwise; parameters of CLIP that are no layer of their own (``class_embedding``) are summed too,
where the authors keep the first model's. Tensors that ``others`` leaves at the base are in neither
norm, nor are tensors that are not finite.

The look at the model keeps A, four bytes for each element of a matrix, in a scratch file in the
output folder until the tensors are written.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pymerge.methods.gram import exact_sum, gram_of_tensor, task_vectors
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
    solve_blocks,
)
from pymerge.methods.parameters import LAMBDA, by_name
from pymerge.methods.protocol import (
    Apply,
    Cost,
    EachTensor,
    ModelMeasuring,
    Question,
    Solve,
    Solving,
    Store,
    Tensor,
)
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

#: Singular values below this share of the largest are zero.
CUT = 1e-6

SPEC = MethodSpec(
    name="opcm",
    summary="Task vectors added in order, each without what lies along those before it.",
    paper="https://arxiv.org/abs/2501.09522",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        LAMBDA,
        ParameterSpec(
            "alpha",
            "float",
            "shared",
            0.5,
            "Share of the sum of singular values whose directions a new task vector stays out of.",
            minimum=0.0,
            maximum=1.0,
        ),
        others("sum"),
        *LAYOUT,
    ),
    statistics="model",
)


class Squares(NamedTuple):
    """Squared norms of a tensor: of what its task vectors became, and of each by its model's
    number."""

    merged: float
    models: dict[int, float]


def _cost(rows: int, columns: int, num_models: int) -> Cost:
    short, long = sorted((rows, columns))
    # A in float64 and a task vector; beside them first the Gram matrix, its vectors and what their
    # solver holds, then U with the task vector's image, V, and what is taken out.
    num_bytes = (8 + FLOAT) * rows * columns
    num_bytes += max(5 * 8 * short**2, 2 * FLOAT * rows * columns + 5 * FLOAT * short**2)
    steps = max(num_models - 1, 0)
    product = steps * long * short**2
    return Cost(num_bytes, 4.0 * product, 3.0 * product, steps * 9.0 * short**3)


def measure_model(tensors: Sequence[Tensor]) -> ModelMeasuring:
    """The factor n̄/‖A‖; every A is kept on the way."""
    found = yield EachTensor(_explore)
    return factor([squares for squares in found.values() if squares is not None])


def factor(squares: Iterable[Squares]) -> float:
    """What gives the merged model the mean norm of the task vectors; 1 where all are zero."""
    finite = [
        each for each in squares if math.isfinite(each.merged + math.fsum(each.models.values()))
    ]
    merged = math.sqrt(math.fsum(each.merged for each in finite))
    numbers = sorted({number for each in finite for number in each.models})
    norms = [math.sqrt(math.fsum(each.models.get(n, 0.0) for each in finite)) for n in numbers]
    return math.fsum(norms) / len(norms) / merged if merged else 1.0


@method(
    SPEC,
    ops=(*TILE_OPS, "gram_n"),
    model_wide=lambda tensor: True,
    measure_model=measure_model,
    model_looks=1,
    cost=lambda tensor: matrix_cost(tensor, _cost),
)
def opcm(tensor: Tensor) -> Apply | Solving:
    """Put what was kept on the base, times the model's factor."""
    scale = float(tensor.parameters["lambda"]) * (1.0 if tensor.state is None else tensor.state)
    return _put(tensor, scale) if blocks_of(tensor) else merge_others(tensor, scale)


def _put(tensor: Tensor, scale: float) -> Solving:
    def place() -> torch.Tensor:
        import torch

        return torch.from_numpy(_store(tensor).get(tensor.name)).to(tensor.room.device)

    merged = yield Solve(place)
    return put_on_base(tensor, merged, scale)


def _explore(tensor: Tensor) -> Generator[Question, Any, Squares | None]:
    """Merge a tensor, but for the factor; None where it stays at the base."""
    blocks = blocks_of(tensor)
    if not blocks:
        return (yield from _squares_of_other(tensor))
    alpha = float(tensor.parameters["alpha"])
    merged: list[float] = []
    models: list[list[float]] = [[] for _ in tensor.model_numbers]

    def solve(matrix: Matrix) -> Asking:
        found = yield Solve(lambda: Recursion(matrix.rows, matrix.columns, alpha, matrix.ws))
        for model in range(matrix.num_models):
            tau = yield from matrix.delta(model)
            models[model].append((yield Solve(partial(found.add, tau))))
            del tau
        merged.append((yield Solve(lambda: squared_norm(found.sum, matrix.ws))))
        return (yield Solve(found.sum.float))

    result = yield from solve_blocks(tensor, blocks, solve, isometric=True)
    yield Solve(lambda: _store(tensor).put(tensor.name, result.cpu().numpy()))
    sums = [math.fsum(each) for each in models]
    return Squares(math.fsum(merged), dict(zip(tensor.model_numbers, sums, strict=True)))


def _squares_of_other(tensor: Tensor) -> Generator[Question, Any, Squares | None]:
    """Of a tensor that is no matrix."""
    how = tensor.parameters["others"]
    if how == "base" or not tensor.num_elements:
        return None
    gram = yield from gram_of_tensor(tensor, task_vectors)
    divisor = tensor.num_models**2 if how == "mean" else 1
    own = dict(zip(tensor.model_numbers, np.diag(gram).tolist(), strict=True))
    return Squares(max(exact_sum(gram.ravel()), 0.0) / divisor, own)


def _store(tensor: Tensor) -> Store:
    if tensor.store is None:
        raise RuntimeError(f"{tensor.name}: nothing is kept while a plan is made")
    return tensor.store


class Recursion:
    """``Aₜ`` of one matrix, ``sum``, float64 [rows, columns]."""

    def __init__(self, rows: int, columns: int, alpha: float, ws: Workspace) -> None:
        self.sum = ws.empty(rows, columns, dtype="float64")
        self._ws = ws
        self._alpha = alpha
        self._is_first = True

    def add(self, tau: torch.Tensor) -> float:
        """One step, for a task vector float32 [rows, columns]; returns its squared norm.

        One that is not finite makes everything NaN.
        """
        square = squared_norm(tau, self._ws)
        if not math.isfinite(square):
            self.sum.fill_(math.nan)
        elif self._is_first:
            self.sum.copy_(tau)
        else:
            self._step(
                *(each if len(tau) >= tau.shape[1] else each.t() for each in (self.sum, tau))
            )
        self._is_first = False
        return square

    def _step(self, tall: torch.Tensor, tau: torch.Tensor) -> None:
        """``A ← A + τ − U·B·Vᵀ``, both with the short side in columns."""
        pair = self._along(tall, tau)

        def put(rows: slice) -> None:
            part = tall[rows]
            if pair is not None:
                part -= pair[0][rows] @ pair[1]
            part += tau[rows]

        self._ws.map(put, self._ws.panels(len(tall)))

    def _along(
        self, tall: torch.Tensor, tau: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """U [m, r] and ``B·Vᵀ`` [r, n]; None where A is zero or not finite. U and V are found in
        float64; they are orthonormal, so that what follows is float32."""
        import torch

        ws = self._ws
        found = self._directions(tall)
        if found is None:
            return None
        sigma, vectors = found
        block = leading(sigma, self._alpha)
        right = vectors.float()
        left = ws.empty(len(tall), len(sigma))
        image = ws.empty(len(tall), block)

        def project(rows: slice) -> torch.Tensor:
            u = tall[rows] @ vectors
            u /= sigma
            left[rows] = u
            along = tau[rows] @ right
            image[rows] = along[:, :block]
            return (u[:, block:] * along[:, block:]).sum(0)

        diagonal = torch.stack(ws.map(project, ws.panels(len(tall)))).sum(0).float()
        taken = ws.empty(len(sigma), tall.shape[1])
        inner = ws.matmul(left[:, :block].t(), image)
        ws.matmul(inner, right[:, :block].t(), out=taken[:block])
        taken[block:] = (right[:, block:] * diagonal).t()
        return left, taken

    def _directions(self, tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The singular values [r] that are not zero and their right vectors [n, r], float64; None
        where A is zero or not finite."""
        from pymerge.ops.matrix.gram import gram
        from pymerge.ops.matrix.spectrum import gram_eigh

        values, vectors = gram_eigh(gram(tall, self._ws, side="columns"), self._ws)
        sigma = values.sqrt()
        rank = int((sigma > CUT * sigma[:1]).sum())
        return (sigma[:rank], vectors[:, :rank]) if rank else None


def leading(sigma: torch.Tensor, alpha: float) -> int:
    """How many singular values come before the one with which their sum exceeds the share
    ``alpha`` of the whole; all of them where none does."""
    above = sigma.cumsum(0) > alpha * sigma.sum()
    return int(above.double().argmax()) if bool(above.any()) else len(sigma)


def squared_norm(x: torch.Tensor, ws: Workspace) -> float:
    """``‖x‖²`` summed in float64, whatever the threads; NaN or infinity where x is not finite."""
    found = ws.map(lambda rows: float(x[rows].double().square().sum()), ws.panels(len(x)))
    return math.fsum(found)

"""OptMerge: interference minimised on low-rank parts of the task vectors, Wei et al. 2025, arXiv
2505.19892.

As WUDI-Merging, but of each task vector only the ``k = ⌊min(m, n)/N⌋`` largest singular directions
count, which leaves the noise out: ``L(θ) = Σᵢ ‖(θ − tᵢ)·pᵢᵀ‖² / ‖τᵢ‖²``, where the projector pᵢ is
τᵢ cut to rank k. The result is ``θ₀ + λ·θ``. The authors have two forms:

- ``preset: full``, for models that were trained as a whole: the target is the mean τ̄ and what τᵢ
  has beside it, ``tᵢ = τ̄ + cut(τᵢ − τ̄)``; 300 steps of Adam at 10⁻⁵ from the sum of the task
  vectors.
- ``preset: lora``, for adapters: ``tᵢ = pᵢ``; 300 steps of gradient descent with momentum 0.9 at
  10⁻⁴ from the mean, which stays near it. The steps together are one polynomial of C, which takes a
  few products (see quadratic.py), and adapters are merged in their core space.

In either form C and R are built from k directions a model and one model at a time. The singular
directions are those of the Gram matrix of the short side in float64. ``rank`` sets k.

Departures from the official code: singular values below 10⁻⁶ of the largest count as zero; a task
vector of zeros has no part in the tensor (there 0/0); with more models than min(m, n) the rank is 0
and the result is where the descent starts, as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from pymerge.methods.layout import LAYOUT
from pymerge.methods.matrices import (
    TILE_OPS,
    Asking,
    Matrix,
    matrix_cost,
    merge_matrices,
    others,
    reads_of,
)
from pymerge.methods.parameters import LAMBDA, by_name, preset
from pymerge.methods.protocol import Apply, Cost, Solve, Solving, Tensor
from pymerge.methods.quadratic import Quadratic, iterative_cost
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec, ParameterValue
from pymerge.methods.wudi import LEARNING_RATE, STEPS

if TYPE_CHECKING:
    import torch

PRESETS: Mapping[str, Mapping[str, ParameterValue]] = {
    "full": {},
    "lora": {"optimizer": "sgd", "lr": 1e-4, "start": "mean", "center": False},
}
#: Products with C that the polynomial of the momentum takes at the authors' steps and rate.
MOMENTUM_PRODUCTS = 16

SPEC = MethodSpec(
    name="optmerge",
    summary="WUDI-Merging on the largest singular directions of each task vector.",
    paper="https://arxiv.org/abs/2505.19892",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        LAMBDA,
        ParameterSpec(
            "rank",
            "int",
            "shared",
            0,
            "Singular directions of each task vector that count; 0 takes the rank of the matrix "
            "divided by the number of models.",
            minimum=0,
        ),
        ParameterSpec(
            "optimizer",
            "str",
            "shared",
            "adam",
            "Adam, or gradient descent with momentum.",
            choices=("adam", "sgd"),
        ),
        STEPS,
        LEARNING_RATE,
        ParameterSpec("momentum", "float", "shared", 0.9, "Of sgd.", minimum=0.0, maximum=1.0),
        ParameterSpec(
            "start",
            "str",
            "shared",
            "sum",
            "Where the descent starts: at the sum or the mean of the task vectors.",
            choices=("sum", "mean"),
        ),
        ParameterSpec(
            "center",
            "bool",
            "shared",
            True,
            "Cut what a task vector has beside the mean, not the whole of it, for its target.",
        ),
        others("mean"),
        *LAYOUT,
        preset(
            "full",
            {"full": "for models trained as a whole", "lora": "for adapters"},
        ),
    ),
    statistics="tensor",
    presets=PRESETS,
)


def _rank(tensor: Tensor, full_rank: int) -> int:
    given = int(tensor.parameters["rank"])
    return min(given or full_rank // tensor.num_models, full_rank)


def _cost(tensor: Tensor) -> Cost:
    def of_matrix(rows: int, columns: int, num_models: int) -> Cost:
        adam = tensor.parameters["optimizer"] == "adam"
        products = float(tensor.parameters["steps"]) if adam else MOMENTUM_PRODUCTS
        solving = iterative_cost(rows, columns, 0, products)
        short, long = sorted((rows, columns))
        rank = _rank(tensor, short)
        parts = 1 + int(bool(tensor.parameters["center"]))
        # The Gram matrix, its vectors and their solver's work; factors of both sides with a copy.
        building = 5 * 8 * short**2 + 8 * rank * 4 * (rows + columns)
        gram = 2.0 * short**2 * long + 2.0 * rank * short * long
        added = num_models * 2.0 * rank * columns * (rows + columns)
        return Cost(
            solving.num_bytes + building,
            solving.flops32 + added,
            num_models * parts * gram,
            num_models * parts * 9.0 * short**3,
        )

    return matrix_cost(tensor, of_matrix)


def _looks(tensor: Tensor) -> float:
    return reads_of(tensor, totals=1, deltas=tensor.num_models)


@method(SPEC, ops=TILE_OPS, looks=_looks, cost=_cost)
def optmerge(tensor: Tensor) -> Apply | Solving:
    """Add up C and R from the largest directions of each model; descend from the sum or mean."""
    parameters = tensor.parameters
    count = tensor.num_models
    weight = 1.0 if parameters["start"] == "sum" else 1.0 / count

    def solve(matrix: Matrix) -> Asking:
        start = yield from matrix.total([weight] * count)
        found = yield Solve(lambda: Quadratic(start, matrix.ws))
        for model in range(count):
            held = [(yield from matrix.delta(model))]
            yield Solve(partial(_add, found, held, matrix, 1 / (count * weight)))
        return (yield Solve(lambda: _solution(found, parameters)))

    return merge_matrices(tensor, solve, isometric=parameters["optimizer"] == "sgd")


def _add(found: Quadratic, held: list[torch.Tensor], matrix: Matrix, share: float) -> None:
    """One more task, taken out of the list; the mean task vector is ``share`` times the start."""
    from pymerge.ops.matrix import truncated_svd

    ws = matrix.ws
    tau = held.pop()
    norm = found.norm(tau)
    if not found.finite or norm == 0:
        return
    rank = _rank(matrix.tensor, matrix.full_rank)
    projector = truncated_svd(tau, rank, ws)
    right = projector.right
    center = bool(matrix.tensor.parameters["center"])
    if center:
        ws.map(lambda part: tau[part].sub_(found.start[part], alpha=share), ws.panels(tau.shape[0]))
        beside = truncated_svd(tau, rank, ws)
        turned = beside.values[:, None] * (beside.right @ right.t())
        image = ws.matmul(beside.left, turned)
    else:
        image = projector.left * projector.values
    # The mean is in a centered target, and the start is taken off.
    times = (share if center else 0.0) - 1.0

    def from_start(part: slice) -> None:
        image[part].addmm_(found.start[part].double(), right.t(), alpha=times)

    ws.map(from_start, ws.panels(image.shape[0]))
    found.add_factors(norm, image, projector.values, right)


def _solution(found: Quadratic, parameters: Mapping[str, ParameterValue]) -> torch.Tensor:
    """The merged task vector, float32 [rows, columns]; NaN where a task vector is not finite."""
    if not found.finite:
        return found.start.fill_(math.nan)
    found.mirror()
    steps, lr = int(parameters["steps"]), float(parameters["lr"])
    if parameters["optimizer"] == "adam":
        return found.adam(steps, lr)
    return found.momentum(steps, lr, float(parameters["momentum"]))

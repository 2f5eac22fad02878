"""LoRE-Merging: low-rank task vectors estimated without a base model, Liu et al. 2025, arXiv
2502.10749.

For each matrix a base θ and one low-rank task vector for each model minimise

    ``Σᵢ ‖θ + δᵢ − θᵢ‖² + μ·penalty(δᵢ)``

by coordinate descent from ``δ = 0``: ``δᵢ ← S(θᵢ − θ)``, ``θ ← mean(θᵢ − δᵢ)``, ``iterations``
times. S lowers all singular values by a threshold and drops those below it:

- ``threshold: fixed`` (default) lowers them by μ, whatever they are. That is what is known of the
  authors' algorithm, and minimises the penalty ``2·‖δ‖_*``, the sum of the singular values.
- ``threshold: squared`` minimises the penalty that the paper prints, ``‖δ‖_*²``: the threshold is
  μ times the sum of the lowered values.

Then ``out = θ + λ·merge(δ)``, merged by ``mean``, ``sum``, or ``ties`` (trimmed to ``density``,
elected and averaged matrix by matrix, see ties). The steps need only the mean ``δ̄``:
``δᵢ ← S(θᵢ − θ̄ + δ̄)``, ``θ = θ̄ − δ̄``.

Some settings give the plain mean ``θ̄`` of the models, whatever the descent finds, and are merged as
it without a descent, with a warning in the plan: ``mean`` with λ = 1 (``θ + δ̄ = θ̄``) and ``sum``
with λ = 1/N; with two models, where ``δ₁ = −δ₂`` at every step, ``mean`` and ``sum`` with every λ;
one model alone.

No code of the authors is public: the defaults are those of a re-implementation, and the number of
steps after which it stops is part of the result (the descent is slow where μ keeps most of the
rank). Tensors that are no matrices become the mean. With a ``base_model`` adapters are merged from
their factors, by ``mean`` and ``sum`` in their core space; it changes nothing else. All models'
matrices are in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from pymerge.methods.layout import LAYOUT, blocks_of
from pymerge.methods.matrices import (
    FLOAT,
    TILE_OPS,
    Asking,
    Matrix,
    matrix_cost,
    merge_matrices,
    reads_of,
    view_of,
)
from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import (
    NO_COST,
    Apply,
    Cost,
    Measure,
    Solve,
    Solving,
    Tensor,
    Tile,
    answer,
)
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec
from pymerge.methods.ties import num_kept
from pymerge.methods.trim import TRIM_OPS, trim_tensor

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

#: Elements that the ops of TIES take at once.
PIECE = 1 << 19

SPEC = MethodSpec(
    name="lore",
    summary="Low-rank task vectors and their base, estimated from the models alone, then merged.",
    paper="https://arxiv.org/abs/2502.10749",
    base="optional",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec(
            "lambda", "float", "shared", 1.0, "Factor on the merged task vector of a matrix."
        ),
        ParameterSpec(
            "mu",
            "float",
            "shared",
            0.01,
            "Weight of the penalty: larger leaves task vectors of lower rank.",
            minimum=0.0,
        ),
        ParameterSpec(
            "iterations", "int", "shared", 20, "Steps of the coordinate descent.", minimum=0
        ),
        ParameterSpec(
            "threshold",
            "str",
            "shared",
            "fixed",
            "By what singular values are lowered: mu, or mu times the sum of those lowered, which "
            "minimises the squared penalty that the paper prints.",
            choices=("fixed", "squared"),
        ),
        ParameterSpec(
            "merge",
            "str",
            "shared",
            "mean",
            "What becomes of the task vectors. mean is the plain mean of the models unless lambda "
            "differs from 1 and there are three models or more.",
            choices=("mean", "sum", "ties"),
        ),
        ParameterSpec(
            "density",
            "float",
            "shared",
            0.2,
            "Share of each task vector's elements that ties keeps, largest magnitudes first.",
            minimum=0.0,
            maximum=1.0,
        ),
        *LAYOUT,
    ),
    statistics="tensor",
)


def _is_plain_mean(tensor: Tensor) -> bool:
    """Whether the result is the mean of the models by algebra."""
    how, factor = tensor.parameters["merge"], float(tensor.parameters["lambda"])
    count = tensor.num_models
    if count == 1:
        return True
    if how == "ties":
        return False
    return count == 2 or factor * (count if how == "sum" else 1) == 1


def _warnings(tensors: Sequence[Tensor]) -> list[str]:
    """What the settings make of the method, in a sentence for each reason."""
    found = []
    for tensor in tensors:
        if not blocks_of(tensor) or not _is_plain_mean(tensor):
            continue
        how, count = tensor.parameters["merge"], tensor.num_models
        factor = f"{float(tensor.parameters['lambda']):g}"
        if count == 1:
            reason, remedy = "of one model", "give three models or more"
        elif count == 2:
            reason = f"of two models with merge: {how}"
            remedy = "give three models or more, or set merge: ties"
        else:
            reason = f"with merge: {how} and lambda: {factor}"
            remedy = "set merge: ties or another lambda"
        found.append(f"lore {reason} is the plain mean of the models, whatever mu is; {remedy}")
    return list(dict.fromkeys(found))


def _cost(tensor: Tensor) -> Cost:
    if _is_plain_mean(tensor):
        return NO_COST
    steps = float(tensor.parameters["iterations"]) * tensor.num_models

    def of_matrix(rows: int, columns: int, num_models: int) -> Cost:
        short, long = sorted((rows, columns))
        # Every model, their mean, the last step's mean and this one's; the Gram matrix, its vectors
        # and what their solver holds.
        matrices = FLOAT * rows * columns * (num_models + 3)
        num_bytes = matrices + 5 * 8 * short**2
        return Cost(
            num_bytes, 0.0, steps * (3.0 * long * short**2 + 2 * short**3), steps * 9.0 * short**3
        )

    return matrix_cost(tensor, of_matrix)


def _looks(tensor: Tensor) -> float:
    return 0.0 if _is_plain_mean(tensor) else reads_of(tensor, deltas=tensor.num_models)


@method(
    SPEC,
    ops=(*TILE_OPS, *TRIM_OPS, "disjoint_merge"),
    looks=_looks,
    cost=_cost,
    warnings=_warnings,
)
def lore(tensor: Tensor) -> Apply | Solving:
    """Gather every model, descend, merge what was found."""
    if _is_plain_mean(tensor):
        return _mean(tensor)

    def solve(matrix: Matrix) -> Asking:
        found = []
        for model in range(matrix.num_models):
            found.append((yield from matrix.delta(model)))
        return (yield Solve(lambda: estimate(found, matrix)))

    return merge_matrices(
        tensor,
        solve,
        isometric=tensor.parameters["merge"] != "ties",
        adds_base=tensor.has_base,
        scale=1.0,
        alone=_mean,
    )


def _mean(tensor: Tensor) -> Apply:
    weights, count = [1.0] * tensor.num_models, float(tensor.num_models)
    return Apply(
        lambda tile, out: tensor.ops.axpy_n(
            out, tile.models, weights, base=tile.base, divisor=count
        )
    )


def estimate(models: Sequence[torch.Tensor], matrix: Matrix) -> torch.Tensor:
    """The merged matrix, float32 [rows, columns]; NaN where a model is not finite.

    :param models: float32 [rows, columns], overwritten.
    """
    import torch

    ws, parameters = matrix.ws, matrix.tensor.parameters
    mean = center(models, ws)
    if not bool(torch.isfinite(mean).all()):
        return mean.fill_(math.nan)
    by_ties, factor = parameters["merge"] == "ties", float(parameters["lambda"])
    minus = descend(models, matrix, keep=by_ties)
    if by_ties:
        return elect(mean.add_(minus), models, matrix)
    count = len(models) if parameters["merge"] == "sum" else 1
    return mean.sub_(minus, alpha=factor * count - 1)


def center(models: Sequence[torch.Tensor], ws: Workspace) -> torch.Tensor:
    """The mean of the models, which is subtracted from each in place."""
    mean = ws.empty(*models[0].shape)

    def panel(rows: slice) -> None:
        exact = models[0][rows].double()
        for model in models[1:]:
            exact += model[rows]
        exact /= len(models)
        mean[rows] = exact
        for model in models:
            model[rows] = model[rows] - exact

    ws.map(panel, ws.panels(len(mean)))
    return mean


def descend(models: Sequence[torch.Tensor], matrix: Matrix, keep: bool) -> torch.Tensor:
    """Minus the mean of the δᵢ after the last step.

    :param models: the models less their mean; with ``keep`` the δᵢ take their place.
    """
    import torch

    ws, parameters = matrix.ws, matrix.tensor.parameters
    weight, iterations = float(parameters["mu"]), int(parameters["iterations"])
    lower = by_sum if parameters["threshold"] == "squared" else by_weight
    minus = ws.zeros(*models[0].shape)
    is_fixed = False
    for step in range(iterations):
        is_last = is_fixed or step == iterations - 1
        total = ws.zeros(*minus.shape)
        for model in models:
            shrink(model, minus, total, ws, lambda sigma: lower(sigma, weight), keep and is_last)
        total /= -len(models)
        if is_last:
            return total
        # At a fixed point only the δᵢ themselves may still be wanted.
        is_fixed = torch.equal(total, minus)
        if is_fixed and not keep:
            return total
        minus = total
        del total
    if keep:
        for model in models:
            model.zero_()
    return minus


def by_weight(sigma: torch.Tensor, weight: float) -> float:
    """The threshold μ."""
    return weight


def by_sum(sigma: torch.Tensor, weight: float) -> float:
    """The threshold μ·Σs of the lowered values ``s = (σ − μ·Σs)₊``, for σ descending: with k of
    them kept ``Σs = Σσ/(1 + k·μ)``, and k is the most that all keep above 0."""
    import torch

    counts = torch.arange(1, len(sigma) + 1, dtype=sigma.dtype, device=sigma.device)
    thresholds = weight * sigma.cumsum(0) / (1 + counts * weight)
    kept = int((sigma > thresholds).sum())
    return float(thresholds[kept - 1]) if kept else 0.0


def shrink(
    x: torch.Tensor,
    minus: torch.Tensor,
    total: torch.Tensor,
    ws: Workspace,
    lower: Callable[[torch.Tensor], float],
    keep: bool,
) -> None:
    """Add ``S(x − minus)`` to ``total``, and put it into ``x`` too with ``keep``.

    With eigenvectors V of ``YᵀY`` it is ``Y·V·diag((σ − threshold)/σ)·Vᵀ`` of those that stay.
    """
    from pymerge.ops.matrix.gram import gram_acc
    from pymerge.ops.matrix.spectrum import gram_eigh

    if len(x) < x.shape[1]:
        x, minus, total = x.t(), minus.t(), total.t()
    size = x.shape[1]
    gram = ws.zeros(size, size, dtype="float64")
    gram_acc(gram, x, ws, base=minus, backend="torch")
    values, vectors = gram_eigh(gram, ws)
    del gram
    sigma = values.sqrt()
    threshold = lower(sigma)
    rank = int((sigma > threshold).sum())
    factors = 1 - threshold / sigma[:rank]
    left, right = vectors[:, :rank] * factors, vectors[:, :rank].t()
    whole = ws.matmul(left, right) if 2 * rank > size else None

    def panel(rows: slice) -> None:
        y = (x[rows] - minus[rows]).double()
        y = y @ left @ right if whole is None else y @ whole
        total[rows] += y
        if keep:
            x[rows] = y

    if rank or keep:
        ws.map(panel, ws.panels(len(x)))


def elect(base: torch.Tensor, models: Sequence[torch.Tensor], matrix: Matrix) -> torch.Tensor:
    """``base + λ·TIES(δ)``, float32."""
    ws, tensor = matrix.ws, replace(matrix.tensor, shape=tuple(base.shape))
    density, factor = (float(tensor.parameters[name]) for name in ("density", "lambda"))
    out = ws.empty(*base.shape)
    whole = Tile(0, base.numel(), view_of(base), tuple(view_of(model) for model in models))
    tiles = [tile for _, tile in whole.pieces(PIECE)]
    deltas = [tile._replace(base=None) for tile in tiles]

    def measure(question: Measure) -> Any:
        asked = deltas if question.only is None else [deltas[question.only]]
        found = ws.map(question.run, asked)
        return found if question.fold is None else reduce(question.fold, found)

    quota = [num_kept(density, tensor.num_elements)] * len(models)
    keeps = answer(trim_tensor(tensor, quota), measure)
    weights = [1.0] * len(models)

    def merge(tile: Tile) -> None:
        tensor.ops.disjoint_merge(
            view_of(out).part(tile.start, tile.num),
            tile.base,
            tile.models,
            weights,
            keeps,
            tile.start,
            elect="weighted",
            zero_sign=1,
            combine="mean",
            scale=factor,
            deltas=True,
        )

    ws.map(merge, tiles)
    return out

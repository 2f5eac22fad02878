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
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from pymerge.methods.layout import LAYOUT, blocks_of
from pymerge.methods.matrices import (
    FLOAT,
    MATRIX_OPS,
    Asking,
    Matrix,
    matrix_cost,
    merge_matrices,
    put_alone,
    put_on_base,
    reads_of,
    solve_blocks,
    view_of,
)
from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import NO_COST, Apply, Cost, Measure, Solve, Solving, Tensor, Tile, answer
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec
from pymerge.methods.ties import num_kept
from pymerge.methods.trim import TRIM_OPS, trim_tensor

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

#: Rows of a Gram matrix's input that are converted to float64 at a time.
CHUNK = 1024
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
            "By what singular values are lowered: mu, or mu times their sum, which is the minimiser "
            "of the squared penalty that the paper prints.",
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
        # and what their solver holds; rows in float64.
        matrices = FLOAT * rows * columns * (num_models + 3)
        num_bytes = matrices + 5 * 8 * short**2 + 2 * 8 * CHUNK * short
        return Cost(
            num_bytes, 0.0, steps * (3.0 * long * short**2 + 2 * short**3), steps * 9.0 * short**3
        )

    return matrix_cost(tensor, of_matrix)


def _looks(tensor: Tensor) -> float:
    return 0.0 if _is_plain_mean(tensor) else reads_of(tensor, deltas=tensor.num_models)


@method(
    SPEC,
    ops=(*MATRIX_OPS, *TRIM_OPS, "disjoint_merge"),
    looks=_looks,
    cost=_cost,
    warnings=_warnings,
)
def lore(tensor: Tensor) -> Apply | Solving:
    """Gather every model, descend, merge what was found."""
    if _is_plain_mean(tensor) or not blocks_of(tensor):
        return _mean(tensor)
    return _merge(tensor)


def _mean(tensor: Tensor) -> Apply:
    weights, count = [1.0] * tensor.num_models, float(tensor.num_models)
    return Apply(
        lambda tile, out: tensor.ops.axpy_n(out, tile.models, weights, base=tile.base, divisor=count)
    )


def _merge(tensor: Tensor) -> Solving:
    by_ties = tensor.parameters["merge"] == "ties"

    def solve(matrix: Matrix) -> Asking:
        found = []
        for model in range(matrix.num_models):
            found.append((yield from matrix.delta(model)))
        return (yield Solve(lambda: estimate(found, matrix)))

    merged = yield from solve_blocks(tensor, blocks_of(tensor), solve, isometric=not by_ties)
    return put_on_base(tensor, merged, 1.0) if tensor.has_base else put_alone(tensor, merged)

"""WUDI-Merging: interference minimised layer by layer without data, Cheng et al. 2025, arXiv
2503.08099.

A task vector's rows span what its layer's inputs look like, so a merged task vector θ disturbs task
i by its product with τᵢᵀ: ``L(θ) = Σᵢ ‖(θ − τᵢ)·τᵢᵀ‖² / ‖τᵢ‖²``. It starts from ``Στᵢ``, and the
result is ``θ₀ + λ·θ``. L is quadratic: at ``θ = S + δ`` with ``S = Στᵢ`` it is ``∇L = 2·(δC − R)``,
``C = Σᵢ τᵢᵀτᵢ/‖τᵢ‖²`` and ``R = Σᵢ (τᵢ − S)·τᵢᵀτᵢ/‖τᵢ‖²``. Every solver works on C and R, whose
size does not depend on the number of models, and one model is in memory at a time.

- ``solver: adam`` (default) makes the authors' iterates: Adam, ``steps`` of them at ``lr``.
  That early stop is their regulariser: the minimiser is another point, and merged models made of it
  are less accurate (82.3 against 84.6 on eight CLIP tasks, by the authors of OptMerge). Adam is not
  free of scale: an element moves by at most about ``lr·steps``.
- ``solver: spectral`` follows the gradient flow from the same start for a ``time``:
  ``θ = S + R·φ(C)``, ``φ(λ) = (1 − e^(−time·λ))/λ``, a few dozen products by a Chebyshev expansion.
  ``keep`` below 1 also leaves all but that share of C's directions, the largest, as they are in S
  (SWUDI), which takes an eigendecomposition.
- ``solver: closed`` is the minimiser, in float64: ``φ(λ) = 1/λ``, eigenvalues below 10⁻¹⁰ of the
  largest left out; with ``ridge`` ``1/(λ + ridge·mean)``, the mean being that of C's diagonal.

The matrices act on the input side: a matrix stored as [inputs, outputs] is turned first. Fused
matrices (OpenCLIP's ``in_proj_weight``) and their parts (Hugging Face's q, k, v) give different
results, since the tasks' norms and directions are shared; ``split`` takes fused ones apart.

Spectral and closed commute with isometries, so adapters are merged in their core space; Adam works
element by element and takes the products of their factors.

Presets: ``official_vit`` merges only attention projections and MLP matrices and leaves all else at
the base, as the authors' code for CLIP; ``official_llm`` has the learning rate of their code for
RoBERTa; ``fusionbench`` takes every matrix, embeddings too, for 400 steps.

Departures from the official code: a task vector of zeros has no part in the tensor (there 0/0), and
embeddings and output heads are no matrices unless ``exclude`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from pymerge.methods.quadratic import Quadratic, direct_cost, iterative_cost
from pymerge.methods.registry import method
from pymerge.methods.spec import PRESET, MethodSpec, ParameterSpec, ParameterValue
from pymerge.names import listed

if TYPE_CHECKING:
    import torch

#: Attention projections and MLP matrices of CLIP's encoders, by the names of OpenCLIP and of
#: Hugging Face.
VIT_LAYERS = (
    r"\.attn\.(in_proj_weight|out_proj\.weight)$|\.mlp\.(c_fc|c_proj)\.weight$"
    r"|\.self_attn\.(q|k|v|out)_proj\.weight$|\.mlp\.fc[12]\.weight$"
)
#: Products of a [m, n] matrix with C that the expansion takes, as the spec's table of costs has it.
FLOW_PRODUCTS = 80

PRESETS: Mapping[str, Mapping[str, ParameterValue]] = {
    "pymerge": {},
    "official_vit": {"layers": VIT_LAYERS, "others": "base"},
    "official_llm": {"lr": 2e-5},
    "fusionbench": {"steps": 400, "exclude": ""},
}

#: The parameters that each solver reads beside those of all.
READS: Mapping[str, tuple[str, ...]] = {
    "adam": ("steps", "lr"),
    "spectral": ("time", "keep"),
    "closed": ("ridge",),
}

STEPS = ParameterSpec("steps", "int", "shared", 300, "Steps of the descent.", minimum=0)
LEARNING_RATE = ParameterSpec("lr", "float", "shared", 1e-5, "Learning rate.", minimum=0.0)

SPEC = MethodSpec(
    name="wudi",
    summary="Task vector that disturbs every task's inputs least, found from the weights alone.",
    paper="https://arxiv.org/abs/2503.08099",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        LAMBDA,
        ParameterSpec(
            "solver",
            "str",
            "shared",
            "adam",
            "adam makes the authors' iterates, spectral stops the gradient flow at a time, closed "
            "is the minimiser.",
            choices=("adam", "spectral", "closed"),
        ),
        STEPS,
        LEARNING_RATE,
        ParameterSpec(
            "time", "float", "shared", 300.0, "When spectral stops the gradient flow.", minimum=0.0
        ),
        ParameterSpec(
            "keep",
            "float",
            "shared",
            1.0,
            "Share of the input directions that spectral moves, the most shared first.",
            minimum=0.0,
            maximum=1.0,
        ),
        ParameterSpec(
            "ridge",
            "float",
            "shared",
            0.0,
            "Pull of closed towards the sum, relative to the mean of C's diagonal.",
            minimum=0.0,
        ),
        others("mean"),
        *LAYOUT,
        preset(
            "pymerge",
            {
                "pymerge": "every matrix but embeddings and heads",
                "official_vit": "the authors' code for CLIP",
                "official_llm": "the authors' code for RoBERTa",
                "fusionbench": "FusionBench's",
            },
        ),
    ),
    statistics="tensor",
    presets=PRESETS,
)


def _solver(tensor: Tensor) -> str:
    """The way to the solution: adam, flow, keep, closed or ridge."""
    name = str(tensor.parameters["solver"])
    if name == "spectral":
        return "flow" if float(tensor.parameters["keep"]) == 1 else "keep"
    if name == "closed":
        return "ridge" if float(tensor.parameters["ridge"]) > 0 else "closed"
    return name


def _cost(tensor: Tensor) -> Cost:
    how = _solver(tensor)

    def of_matrix(rows: int, columns: int, num_models: int) -> Cost:
        if how == "adam":
            products = float(tensor.parameters["steps"])
            return iterative_cost(rows, columns, num_models, products)
        if how == "flow":
            return iterative_cost(rows, columns, num_models, FLOW_PRODUCTS)
        return direct_cost(rows, columns, num_models, double=how != "keep", eigen=how != "ridge")

    return matrix_cost(tensor, of_matrix)


def _warnings(tensors: Sequence[Tensor]) -> list[str]:
    """Values that the solver does not read, where they are not the defaults."""
    found = {}
    for tensor in tensors:
        parameters = tensor.parameters
        solver, named = str(parameters["solver"]), parameters[PRESET]
        for name in ("steps", "lr", "time", "keep", "ridge"):
            if name not in READS[solver] and parameters[name] != SPEC.default(name, named):
                found[solver, name] = (
                    f"wudi: solver: {solver} does not read {name}, so that "
                    f"{name}: {parameters[name]} changes nothing; {solver} reads "
                    f"{listed(READS[solver])}"
                )
    return list(found.values())


@method(
    SPEC,
    ops=TILE_OPS,
    looks=lambda tensor: reads_of(tensor, totals=1, deltas=tensor.num_models),
    cost=_cost,
    warnings=_warnings,
)
def wudi(tensor: Tensor) -> Apply | Solving:
    """Sum the task vectors, add up C and R model by model; the solver's point is the result."""
    how = _solver(tensor)
    kind = "float64" if how in ("closed", "ridge") else "float32"

    def solve(matrix: Matrix) -> Asking:
        start = yield from matrix.total([1.0] * matrix.num_models)
        found = yield Solve(lambda: Quadratic(start, matrix.ws, kind))
        for model in range(matrix.num_models):
            held = [(yield from matrix.delta(model))]
            yield Solve(partial(found.add, held))
        return (yield Solve(lambda: solution(found, matrix, how)))

    return merge_matrices(tensor, solve, isometric=how != "adam")


def solution(found: Quadratic, matrix: Matrix, how: str) -> torch.Tensor:
    """The merged task vector, float32 [rows, columns]; NaN where a task vector is not finite."""
    parameters = matrix.tensor.parameters
    if not found.finite:
        return found.start.fill_(math.nan)
    found.mirror()
    if how == "adam":
        return found.adam(int(parameters["steps"]), float(parameters["lr"]))
    if how == "ridge":
        # In core space the diagonal has fewer elements and the same sum.
        share = matrix.columns / matrix.block.columns
        return found.ridge(float(parameters["ridge"]) * share)
    if how == "closed":
        return found.spectral(lambda values: 1 / values)
    time = float(parameters["time"])
    if how == "flow":
        return found.flow(time)
    most = math.ceil(float(parameters["keep"]) * matrix.block.columns - 1e-9)
    return found.spectral(lambda values: -(-time * values).expm1() / values, most)

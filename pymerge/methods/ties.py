"""TIES-Merging: trim, elect sign, disjoint mean. Yadav et al. 2023, arXiv 2306.01708.

Each task vector ``τᵢ = θᵢ − θ₀`` keeps its ``k = ⌊density·n⌋`` elements of largest magnitude (at
least one; equal magnitudes in index order), is weighted, each element elects the sign of the
weighted sum (zero votes plus), and the weighted mean over the models that agree is added to the
base: ``out = θ₀ + λ·mean``. That is what mergekit does; mergekit leaves open which of several equal
magnitudes stay.

``trim_scope: tensor`` (default) trims each tensor alone; ``trim_scope: model`` ranks the magnitudes
of the whole model together, as in the paper. ``ties: all`` is the rule of the authors' code: it
keeps every element that reaches the (k+1)-th largest magnitude, so k + 1 and all that equal the
smallest of them (models stored in 16 bits have many). ``zero_sign`` says what a vote of exactly
zero elects: plus; the sign that the majority of elements elects, over the whole model where the
trim ranks it whole and else over the tensor (a draw elects minus, as in the authors' code); or no
sign, so that the element contributes nothing. ``elect: plain`` leaves the weights out of the vote.
``merge`` is the weighted mean, the sum divided by the number of models that agree (``count``), the
plain sum, or the element of largest magnitude (``max``). ``rescale`` multiplies each trimmed task
vector, tensor by tensor, so that its sum of magnitudes is what it was before.

``preset: official`` follows the authors' code on the whole model: the 20 % largest, ties all,
majority, plain vote, mean by count, weights of 1. ``preset: peft`` follows PEFT's ``ties``: per
tensor, plain vote, weighted sum divided by the count.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymerge.errors import RecipeError
from pymerge.methods.parameters import (
    DENSITY,
    INT8_MASK,
    LAMBDA,
    WEIGHT,
    by_name,
    normalize,
    preset,
)
from pymerge.methods.protocol import (
    Measure,
    Measuring,
    ModelMeasuring,
    Tensor,
    Tile,
    remembered,
)
from pymerge.methods.registry import method
from pymerge.methods.sparsify import KEEP_OPS, Combination, l1_factors, merge_kept, rescale
from pymerge.methods.spec import MethodSpec, ParameterSpec, ParameterValue
from pymerge.methods.trim import (
    TRIM_OPS,
    Quota,
    Trimming,
    locate_cutoffs,
    model_keys,
    tensor_keys,
    trim_model,
    trim_tensor,
)
from pymerge.ops.selection import ABOVE_ALL, BELOW_ALL, Keep

PRESETS: Mapping[str, Mapping[str, ParameterValue]] = {
    "mergekit": {},
    "official": {
        "weight": 1.0,
        "density": 0.2,
        "trim_scope": "model",
        "ties": "all",
        "zero_sign": "majority",
        "elect": "plain",
        "merge": "count",
    },
    "peft": {"elect": "plain", "merge": "count"},
}

SPEC = MethodSpec(
    name="ties",
    summary="Trim task vectors by magnitude, elect a sign per element, mean of those that agree.",
    paper="https://arxiv.org/abs/2306.01708",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        WEIGHT,
        DENSITY,
        normalize(True, "Divide a mean by the weights of the models that agree; false sums."),
        LAMBDA,
        ParameterSpec(
            "trim_scope",
            "str",
            "shared",
            "tensor",
            "Rank magnitudes within each tensor (mergekit) or over the whole model (the paper); "
            "then the density must be the same for all tensors of a model.",
            choices=("tensor", "model"),
        ),
        ParameterSpec(
            "ties",
            "str",
            "shared",
            "index",
            "Of equal magnitudes keep as many as fit, in index order, or all (the authors' code).",
            choices=("index", "all"),
        ),
        ParameterSpec(
            "elect",
            "str",
            "shared",
            "weighted",
            "Whether the task vectors vote with their weights.",
            choices=("weighted", "plain"),
        ),
        ParameterSpec(
            "zero_sign",
            "str",
            "shared",
            "plus",
            "The sign that a vote of exactly zero elects; skip elects none.",
            choices=("plus", "majority", "skip"),
        ),
        ParameterSpec(
            "merge",
            "str",
            "shared",
            "mean",
            "What becomes of the elements that agree.",
            choices=("mean", "count", "sum", "max"),
        ),
        rescale(False, "Rescale what is kept to the sum of magnitudes before."),
        preset(
            "mergekit",
            {
                "mergekit": "per tensor, weighted",
                "official": "the authors' code, over the whole model",
                "peft": "PEFT's combination of adapters",
            },
        ),
        INT8_MASK,
    ),
    statistics="tensor or model",
    presets=PRESETS,
)


@dataclass(frozen=True)
class WholeModel:
    """What the look at the whole model found: quotas by tensor, and the sign of a zero vote."""

    quotas: Mapping[str, Sequence[Quota]]
    zero_sign: int


def num_kept(density: float, num_elements: int) -> int:
    """Elements that survive the trim: floor(density·n), at least one unless the density is zero."""
    if density <= 0:
        return 0
    return min(num_elements, max(1, int(density * num_elements)))


def _is_model_wide(tensor: Tensor) -> bool:
    return tensor.parameters["trim_scope"] == "model"


def _by_majority(tensor: Tensor) -> bool:
    return tensor.parameters["zero_sign"] == "majority"


def _keeps_all_ties(tensor: Tensor) -> bool:
    return tensor.parameters["ties"] == "all"


def _elect(tensor: Tensor) -> str:
    return str(tensor.parameters["elect"])


def _looks(tensor: Tensor) -> int:
    if _is_model_wide(tensor):
        return 0
    trims = any(density < 1 for density in tensor.each("density"))
    return 2 * int(trims) + int(bool(tensor.parameters["rescale"])) + int(_by_majority(tensor))


def measure_model(tensors: Sequence[Tensor]) -> ModelMeasuring:
    """Thresholds over the whole model: one density for each model, counted over all its tensors."""
    if len({tuple(tensor.model_names) for tensor in tensors}) > 1:
        raise RecipeError(
            "ties with trim_scope: model ranks all tensors of a model together: every model must "
            "have every tensor; leave out --allow-missing or use trim_scope: tensor"
        )
    for name in ("trim_scope", "ties", "elect", "zero_sign"):
        words = {str(tensor.parameters[name]) for tensor in tensors}
        if len(words) > 1:
            raise RecipeError(
                f"ties with trim_scope: model ranks a whole model at once, so {name} must not vary "
                f"over tensors, found {sorted(words)}; remove its filter or use trim_scope: tensor"
            )
    densities = [tensor.each("density") for tensor in tensors]
    for tensor, values in zip(tensors, densities, strict=True):
        if values != densities[0]:
            raise RecipeError(
                "ties with trim_scope: model ranks a whole model at once, so density must not vary "
                f"over tensors: {tensors[0].name!r} has {densities[0]}, {tensor.name!r} has "
                f"{values}; remove the gradient or filter from density or use trim_scope: tensor"
            )
    _check_majority(tensors)
    total = sum(tensor.num_elements for tensor in tensors)
    if not _keeps_all_ties(tensors[0]):
        quotas = yield from remembered(
            tensors[0],
            ("trim of the model", tuple(densities[0])),
            lambda: trim_model(tensors, [num_kept(d, total) for d in densities[0]]),
        )
        return WholeModel(quotas, _fixed_sign(tensors[0]))
    thresholds = yield from remembered(
        tensors[0],
        ("thresholds of the model", tuple(densities[0])),
        lambda: _thresholds(
            densities[0], total, lambda ranks, models: model_keys(tensors[0].ops, ranks, models)
        ),
    )
    sign = _fixed_sign(tensors[0])
    if _by_majority(tensors[0]) and total:
        sign = yield from _majority(tensors[0], [Keep(key, total) for key in thresholds])
    return WholeModel({t.name: [Quota(key, 0, 0) for key in thresholds] for t in tensors}, sign)


def _check_majority(tensors: Sequence[Tensor]) -> None:
    """The vote of a whole model is counted before its tensors are looked at one by one."""
    if not _by_majority(tensors[0]):
        return
    where = "ties with trim_scope: model and zero_sign: majority"
    if not _keeps_all_ties(tensors[0]):
        raise RecipeError(
            f"{where} counts the signs of a whole model, which needs ties: all; set that, or "
            "zero_sign: plus or skip"
        )
    if any(tensor.parameters["rescale"] for tensor in tensors):
        raise RecipeError(f"{where} cannot be combined with rescale: true; leave one of them out")
    weights = [tensor.each("weight") for tensor in tensors]
    for tensor, values in zip(tensors, weights, strict=True):
        if values != weights[0] and _elect(tensor) == "weighted":
            raise RecipeError(
                f"{where} needs weights that do not vary over tensors: {tensors[0].name!r} has "
                f"{weights[0]}, {tensor.name!r} has {values}; set elect: plain to vote without them"
            )


@method(
    SPEC,
    ops=(*TRIM_OPS, *KEEP_OPS, "count_votes"),
    looks=_looks,
    model_wide=_is_model_wide,
    measure_model=measure_model,
    model_looks=3,
)
def ties(tensor: Tensor) -> Measuring:
    """Measure the trim thresholds, then one fused mask → sign → mean → add."""
    if _is_model_wide(tensor):
        quotas = tensor.state.quotas[tensor.name]
        keeps = yield from remembered(
            tensor, ("cutoffs", tuple(quotas)), lambda: locate_cutoffs(tensor, quotas)
        )
    else:
        keeps = yield from _trim(tensor)
    factors = None
    if tensor.parameters["rescale"]:
        factors = yield from l1_factors(tensor, keeps)
    sign = tensor.state.zero_sign if _is_model_wide(tensor) else _fixed_sign(tensor)
    if _by_majority(tensor) and not _is_model_wide(tensor) and tensor.num_elements:
        sign = yield from _majority(tensor, keeps, factors)
    merge = str(tensor.parameters["merge"])
    if merge == "mean" and not tensor.parameters["normalize"]:
        merge = "sum"
    how = Combination(
        tensor.each("weight"), _elect(tensor), merge, 1.0, float(tensor.parameters["lambda"]), sign
    )
    return merge_kept(tensor, keeps, how, factors)


def _trim(tensor: Tensor) -> Trimming:
    n = tensor.num_elements
    densities = tensor.each("density")

    def of_index() -> Trimming:
        return trim_tensor(tensor, [num_kept(density, n) for density in densities])

    def of_all() -> Trimming:
        thresholds = yield from _thresholds(
            densities, n, lambda ranks, models: tensor_keys(tensor, ranks, models=models)
        )
        return [Keep(key, n) for key in thresholds]

    keeps_all = _keeps_all_ties(tensor)
    key = ("trim", keeps_all, tuple(densities))
    return (yield from remembered(tensor, key, of_all if keeps_all else of_index))


def _thresholds(
    densities: Sequence[float], n: int, keys: Any
) -> Generator[Measure, Any, list[int]]:
    """The key of the (⌊density·n⌋ + 1)-th largest magnitude of each model, as the authors' code."""
    ranks = [int(density * n) + 1 for density in densities]
    thresholds = [ABOVE_ALL if density <= 0 else BELOW_ALL for density in densities]
    asked = [i for i, rank in enumerate(ranks) if densities[i] > 0 and rank <= n]
    if asked:
        found = yield from keys([ranks[i] for i in asked], asked)
        for i, key in zip(asked, found, strict=True):
            thresholds[i] = key
    return thresholds


def _fixed_sign(tensor: Tensor) -> int:
    """The sign of a zero vote where it is not measured."""
    return 0 if tensor.parameters["zero_sign"] == "skip" else 1


def _majority(
    tensor: Tensor, keeps: Sequence[Keep], factors: Sequence[float] | None = None
) -> Generator[Measure, Any, int]:
    """The sign that more elements elect, minus in a draw; over all tiles that the look is at."""
    ops, weights, elect = tensor.ops, tensor.each("weight"), _elect(tensor)

    def count(tile: Tile) -> Any:
        return np.array(
            ops.count_votes(
                tile.base, tile.models, weights, keeps, tile.start, elect=elect, factors=factors
            )
        )

    plus, minus = yield Measure(count, fold=np.add)
    return 1 if plus > minus else -1

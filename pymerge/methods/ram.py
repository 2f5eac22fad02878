"""Reinforced Agent Merging (RAM, RAM+), Yuan et al. 2026, arXiv 2601.13572.

A model changed an element where ``|τᵢ| > epsilon``. Where one model did, its ``τᵢ`` is kept whole;
where several did, the mean of theirs; else nothing: ``out = θ₀ + merged``. RAM+ multiplies what
only model i changed by ``λᵢ``, from ``ρᵢ``, the elements that it changed together with others over
those that it alone changed.

``ramplus_tl`` counts within each tensor and takes ``λᵢ = 1 + r·min(ρᵢ, alpha)``, as mergekit does.
``preset: official`` counts over the whole model and takes ``λᵢ = 1 + (r − 1)·min(1, ρᵢ)`` with ``r
= 1.05``, as the authors' code does (its arm-r-v2); that code divides by zero for a model without
elements of its own, which has nothing that λᵢ could multiply and here takes ρᵢ = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pymerge.errors import RecipeError
from pymerge.methods.parameters import by_name, preset
from pymerge.methods.protocol import Apply, Measure, Measuring, ModelMeasuring, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import PRESET, MethodSpec, ParameterSpec

PAPER = "https://arxiv.org/abs/2601.13572"
EPSILON = ParameterSpec(
    "epsilon",
    "float",
    "shared",
    1e-5,
    "Changes of at most this size count as none and are dropped.",
    minimum=0.0,
)

RAM = MethodSpec(
    name="ram",
    summary="Changes of one model are kept, those of several averaged (RAM).",
    paper=PAPER,
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(EPSILON),
)

RAMPLUS = MethodSpec(
    name="ramplus_tl",
    summary="RAM with the changes of a single model enlarged by its overlap with the others.",
    paper=PAPER,
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec(
            "r", "float", "shared", 0.1, "How much the overlap enlarges; see the formula of each."
        ),
        ParameterSpec(
            "alpha",
            "float",
            "shared",
            0.2,
            "Largest overlap that counts; preset official has no such bound.",
            minimum=0.0,
        ),
        EPSILON,
        preset(
            "mergekit",
            {
                "mergekit": "overlap within each tensor",
                "official": "overlap over the whole model, the authors' formula",
            },
        ),
    ),
    statistics="tensor or model",
    presets={"official": {"r": 1.05}},
)


@method(RAM, ops=("overlap_merge",))
def ram(tensor: Tensor) -> Apply:
    """One fused pass; nothing is enlarged."""
    return _merge(tensor, [1.0] * tensor.num_models)


def _is_official(tensor: Tensor) -> bool:
    return tensor.parameters[PRESET] == "official"


def measure_model(tensors: Sequence[Tensor]) -> ModelMeasuring:
    """The overlap of every model by its number, counted over all tensors."""
    if not all(map(_is_official, tensors)):
        raise RecipeError(
            "ramplus_tl with preset: official counts over the whole model, so preset must be the "
            "same for all tensors; remove its filter"
        )
    epsilons = sorted({float(tensor.parameters["epsilon"]) for tensor in tensors})
    if len(epsilons) > 1:
        raise RecipeError(
            "ramplus_tl with preset: official counts over the whole model, so epsilon must be the "
            f"same for all tensors, found {epsilons}; remove its gradient or filter"
        )
    ops, epsilon = tensors[0].ops, epsilons[0]
    found = yield Measure(lambda tile: ops.overlap_counts(tile.base, tile.models, epsilon=epsilon))
    counts: dict[int, NDArray[np.int64]] = {}
    for tensor in tensors:
        for tile in found[tensor.name]:
            for number, row in zip(tensor.model_numbers, tile, strict=True):
                counts[number] = counts.get(number, np.zeros(2, np.int64)) + row
    return {number: _overlap(*map(int, row)) for number, row in counts.items()}


@method(
    RAMPLUS,
    ops=("overlap_counts", "overlap_merge"),
    looks=lambda tensor: 0 if _is_official(tensor) else 1,
    model_wide=_is_official,
    measure_model=measure_model,
    model_looks=1,
)
def ramplus_tl(tensor: Tensor) -> Measuring:
    """Count what each model changed and what it alone did; decide the factors; one fused pass."""
    r = float(tensor.parameters["r"])
    if _is_official(tensor):
        overlaps = [tensor.state.get(number, 0.0) for number in tensor.model_numbers]
        return _merge(tensor, [1 + (r - 1) * min(1.0, overlap) for overlap in overlaps])
    epsilon, alpha = (float(tensor.parameters[name]) for name in ("epsilon", "alpha"))
    counts = np.zeros((tensor.num_models, 2), np.int64)
    if tensor.num_elements:
        counts = yield Measure(
            lambda tile: tensor.ops.overlap_counts(tile.base, tile.models, epsilon=epsilon),
            fold=np.add,
        )
    overlaps = [_overlap(int(changed), int(alone)) for changed, alone in counts]
    return _merge(tensor, [1 + r * min(alpha, overlap) for overlap in overlaps])


def _overlap(changed: int, alone: int) -> float:
    return (changed - alone) / alone if alone else 0.0


def _merge(tensor: Tensor, factors: list[float]) -> Apply:
    epsilon = float(tensor.parameters["epsilon"])
    return Apply(
        lambda tile, out: tensor.ops.overlap_merge(
            out, tile.base, tile.models, factors, epsilon=epsilon
        )
    )

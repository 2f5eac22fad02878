"""TIES-Merging: trim, elect sign, disjoint mean. Yadav et al. 2023, arXiv 2306.01708.

Each task vector ``τᵢ = θᵢ − θ₀`` keeps its ``k = floor(density·n)`` elements of largest magnitude
(at least one; equal magnitudes in index order), is weighted, each element elects the sign of the
weighted sum (zero votes plus), and the mean over the models that agree is added to the base: ``out
= θ₀ + λ·mean``.

``trim_scope: tensor`` (default) trims each tensor alone, as mergekit does; ``trim_scope: model``
ranks the magnitudes of the whole model together, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.errors import RecipeError
from pymerge.methods.parameters import DENSITY, INT8_MASK, LAMBDA, WEIGHT, by_name, normalize
from pymerge.methods.protocol import Apply, Measuring, ModelMeasuring, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec
from pymerge.methods.trim import TRIM_OPS, locate_cutoffs, trim_model, trim_tensor

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
        normalize(True, "Divide by the weights of the models that agree (the disjoint mean)."),
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
            "rescale",
            "bool",
            "shared",
            False,
            "Must be false: mergekit's rescaling of trimmed task vectors is not supported yet.",
        ),
        INT8_MASK,
    ),
)


def num_kept(density: float, num_elements: int) -> int:
    """Elements that survive the trim: floor(density·n), at least one unless the density is zero."""
    if density <= 0:
        return 0
    return min(num_elements, max(1, int(density * num_elements)))


def _is_model_wide(tensor: Tensor) -> bool:
    return tensor.parameters["trim_scope"] == "model"


def _looks(tensor: Tensor) -> int:
    trims = any(density < 1 for density in tensor.each("density"))
    return 0 if not trims or _is_model_wide(tensor) else 2


def measure_model(tensors: Sequence[Tensor]) -> ModelMeasuring:
    """Thresholds over the whole model: one density for each model, counted over all its tensors."""
    if len({tuple(tensor.model_names) for tensor in tensors}) > 1:
        raise RecipeError(
            "ties with trim_scope: model ranks all tensors of a model together: every model must "
            "have every tensor; leave out --allow-missing or use trim_scope: tensor"
        )
    densities = [tensor.each("density") for tensor in tensors]
    for tensor, values in zip(tensors, densities, strict=True):
        if values != densities[0]:
            raise RecipeError(
                "ties with trim_scope: model ranks a whole model at once, so density must not vary "
                f"over tensors: {tensors[0].name!r} has {densities[0]}, {tensor.name!r} has "
                f"{values}; remove the gradient or filter from density or use trim_scope: tensor"
            )
    total = sum(tensor.num_elements for tensor in tensors)
    return (yield from trim_model(tensors, [num_kept(d, total) for d in densities[0]]))


@method(
    SPEC,
    ops=(*TRIM_OPS, "disjoint_merge"),
    looks=_looks,
    model_wide=_is_model_wide,
    measure_model=measure_model,
    model_looks=3,
)
def ties(tensor: Tensor) -> Measuring:
    """Refuse what is not there, so that the plan says it; then :func:`trim_and_merge`."""
    if tensor.parameters["rescale"]:
        raise RecipeError(
            "ties: rescale: true is not supported in this version; leave it out to merge the "
            "trimmed task vectors at their own size, as the paper and mergekit's default do"
        )
    return trim_and_merge(tensor)


def trim_and_merge(tensor: Tensor) -> Measuring:
    """Measure the trim thresholds, then one fused mask → sign → mean → add."""
    if _is_model_wide(tensor):
        trims = yield from locate_cutoffs(tensor, tensor.state[tensor.name])
    else:
        keep = [num_kept(density, tensor.num_elements) for density in tensor.each("density")]
        trims = yield from trim_tensor(tensor, keep)
    weights = tensor.each("weight")
    thresholds = [trim.threshold for trim in trims]
    cutoffs = [trim.cutoff for trim in trims]
    by_weight = bool(tensor.parameters["normalize"])
    scale = float(tensor.parameters["lambda"])
    return Apply(
        lambda tile, out: tensor.ops.disjoint_merge(
            out,
            tile.base,
            tile.models,
            weights,
            thresholds,
            cutoffs,
            tile.start,
            normalize=by_weight,
            scale=scale,
        )
    )

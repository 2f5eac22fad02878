"""Spherical mean of any number of models or task vectors; mergekit's ``multislerp``, Goddard 2024.

``out = θ₀ + (Σ wᵢ·nᵢ)·μ/‖μ‖`` with ``μ = Σ wᵢ·uᵢ``, unit vectors ``uᵢ = xᵢ / (nᵢ + eps)`` and norms
``nᵢ = ‖xᵢ‖`` of whole tensors. The xᵢ are the models, or with a ``base_model`` θ₀ the task vectors.
mergekit goes on from μ by an average in the tangent space there, which is zero identically: μ is
the weighted mean already. One model is returned as it is.

Where μ vanishes the mean has no direction: two tensors are then interpolated linearly, more are an
error. It counts as zero below ``eps`` and below 1e-7 of the summed weights, where its direction is
rounding. Tensors that are all zero (task vectors of a tensor that no model changed) are zero;
mergekit refuses three or more of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pymerge.errors import RecipeError
from pymerge.methods.gram import RESOLUTION, Doubles, gram_of_tensor, norm_of, task_vectors
from pymerge.methods.parameters import WEIGHT, by_name
from pymerge.methods.protocol import Apply, Measuring, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec

SPEC = MethodSpec(
    name="multislerp",
    summary="Spherical weighted mean of any number of models or task vectors.",
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    base="optional",
    min_models=1,
    max_models=None,
    parameters=by_name(
        WEIGHT,
        ParameterSpec(
            "normalize_weights", "bool", "shared", True, "Divide the weights by their sum."
        ),
        ParameterSpec(
            "eps",
            "float",
            "shared",
            1e-8,
            "Added to norms; the length of the mean direction that counts as zero.",
            minimum=0.0,
        ),
    ),
    statistics="tensor",
)


def _weights(tensor: Tensor) -> list[float]:
    """The weights, divided by their sum where asked.

    :raises RecipeError: the sum is zero.
    """
    weights = tensor.each("weight")
    if not tensor.parameters["normalize_weights"]:
        return weights
    total = math.fsum(weights)
    if total == 0:
        raise RecipeError(
            f"multislerp: the weights of tensor {tensor.name!r} sum to zero ({weights}) and cannot "
            "be normalized; change the weights or set normalize_weights: false"
        )
    return [weight / total for weight in weights]


def multislerp_weights(
    gram: Doubles, weights: Sequence[float], eps: float, name: str
) -> list[float]:
    """The factor on each tensor, from their Gram matrix.

    :raises RecipeError: the weighted mean of three or more directions vanishes.
    """
    if not np.isfinite(gram).all():
        return [math.nan] * len(weights)
    norms = np.sqrt(np.diag(gram)).tolist()
    if not any(norms):
        return [0.0] * len(weights)
    units = [w / (n + eps) if n > 0 else 0.0 for w, n in zip(weights, norms, strict=True)]
    length = norm_of(units, gram)
    known = math.fsum(abs(c) * n for c, n in zip(units, norms, strict=True)) * RESOLUTION
    if length < max(eps, known):
        if len(weights) == 2:
            return list(weights)
        raise RecipeError(
            f"multislerp: the weighted mean of the directions of tensor {name!r} is zero, so that "
            f"it has no direction to go (weights {list(weights)}); change the weights"
        )
    size = math.fsum(w * n for w, n in zip(weights, norms, strict=True))
    return [size / length * unit for unit in units]


@method(
    SPEC,
    ops=("gram_n", "axpy_n", "convert"),
    looks=lambda tensor: 1 if tensor.num_models > 1 else 0,
)
def multislerp(tensor: Tensor) -> Apply | Measuring:
    """Refuse what the recipe alone shows to be wrong, and return one model as it is."""
    if tensor.num_models == 1:
        return Apply(lambda tile, out: tensor.ops.convert(out, tile.models[0]))
    return _merge(tensor, _weights(tensor))


def _merge(tensor: Tensor, weights: list[float]) -> Measuring:
    """Measure the Gram matrix, then one weighted sum."""
    factors = [0.0] * len(weights)
    if tensor.num_elements:
        gram = yield from gram_of_tensor(tensor, task_vectors)
        eps = float(tensor.parameters["eps"])
        factors = multislerp_weights(gram, weights, eps, tensor.name)
    return Apply(lambda tile, out: tensor.ops.axpy_n(out, tile.models, factors, base=tile.base))

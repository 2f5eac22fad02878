"""Parameters that several methods share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pymerge.errors import RecipeError
from pymerge.methods.spec import PRESET, ParameterSpec

#: Sums of weights below this count as 1 (mergekit's constant).
SMALLEST_DIVISOR = 1e-8

WEIGHT = ParameterSpec("weight", "float", "model", None, "Relative weight of the model.")
DENSITY = ParameterSpec(
    "density",
    "float",
    "model",
    1.0,
    "Share of the task vector's elements that is kept, largest magnitudes first.",
    minimum=0.0,
    maximum=1.0,
)
LAMBDA = ParameterSpec(
    "lambda", "float", "shared", 1.0, "Factor on the merged task vector before the base is added."
)
INT8_MASK = ParameterSpec(
    "int8_mask",
    "bool",
    "shared",
    False,
    "Accepted for mergekit's recipes; masks are never stored, so it changes nothing.",
    ignored=True,
)


def preset(default: str, presets: Mapping[str, str]) -> ParameterSpec:
    """The switch between sets of defaults; ``presets`` maps each name to what it follows."""
    follows = "; ".join(f"{name}: {what}" for name, what in presets.items())
    return ParameterSpec(
        PRESET,
        "str",
        "shared",
        default,
        f"Whose defaults the parameters that are not given take. {follows}.",
        choices=tuple(presets),
    )


def normalize(default: bool, doc: str) -> ParameterSpec:
    """The ``normalize`` switch with the method's own default."""
    return ParameterSpec("normalize", "bool", "shared", default, doc)


def by_name(*parameters: ParameterSpec) -> Mapping[str, ParameterSpec]:
    """A specification's mapping of parameters, in the order given."""
    return {parameter.name: parameter for parameter in parameters}


def sum_or_one(weights: list[float]) -> float:
    """The sum of the weights as a divisor; a vanishing one counts as 1, as in mergekit."""
    total = sum(weights)
    return 1.0 if abs(total) < SMALLEST_DIVISOR else total


def nonzero_sum(weights: list[float], tensor: str, method: str) -> float:
    """The float32 sum of the weights, in order, as the divisor of a weighted mean.

    :raises RecipeError: the sum is zero, so that the mean does not exist.
    """
    total = np.float32(0)
    for weight in weights:
        total = np.float32(total + np.float32(weight))
    if total == 0:
        raise RecipeError(
            f"{method}: the weights of tensor {tensor!r} sum to zero ({weights}), so their mean "
            "does not exist; change the weights or set normalize: false"
        )
    return float(total)

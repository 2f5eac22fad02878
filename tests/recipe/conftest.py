"""Specs of four small methods, independent of those that pymerge ships."""

from collections.abc import Callable
from typing import Any

import pytest

from pymerge.methods.spec import MethodSpec, ParameterSpec
from pymerge.recipe import Recipe, load_recipe

WEIGHT = ParameterSpec("weight", "float", "model", None, "share of the model")
DENSITY = ParameterSpec("density", "float", "model", 1.0, "kept", minimum=0.0, maximum=1.0)
LAMBDA = ParameterSpec("lambda", "float", "shared", 1.0, "scale of the sum")
INT8_MASK = ParameterSpec("int8_mask", "bool", "shared", False, "ignored", ignored=True)
SCALE = ParameterSpec("scale", "float", "model", 1.0, "factor")
TRIM_SCOPE = ParameterSpec(
    "trim_scope", "str", "shared", "tensor", "unit of trimming", choices=("tensor", "model")
)


def _normalize(default: bool) -> ParameterSpec:
    return ParameterSpec("normalize", "bool", "shared", default, "divide by the weights")


def _spec(name: str, base: Any, least: int, most: int | None, *parameters: ParameterSpec):
    return MethodSpec(name, "", "", base, least, most, {p.name: p for p in parameters})


SPECS = {
    spec.name: spec
    for spec in (
        _spec("linear", "input", 1, None, WEIGHT, _normalize(True)),
        _spec(
            "ties",
            "required",
            1,
            None,
            WEIGHT,
            DENSITY,
            _normalize(True),
            LAMBDA,
            INT8_MASK,
            TRIM_SCOPE,
        ),
        _spec("task_arithmetic", "required", 1, None, WEIGHT, _normalize(False), LAMBDA),
        _spec("blend", "optional", 2, 2, WEIGHT),
        _spec("passthrough", "input", 1, 1, SCALE),
    )
}


@pytest.fixture(scope="session")
def specs() -> dict[str, MethodSpec]:
    return SPECS


@pytest.fixture(scope="session")
def load() -> Callable[..., Recipe]:
    def load(source: Any, **options: Any) -> Recipe:
        return load_recipe(source, specs=SPECS, **options)

    return load

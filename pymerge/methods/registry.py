"""The methods by name; each method file registers itself by decorator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from pymerge.errors import RecipeError
from pymerge.methods.protocol import (
    Apply,
    Extra,
    Measuring,
    Method,
    ModelMeasuring,
    Scales,
    Tensor,
)
from pymerge.methods.spec import MethodSpec
from pymerge.names import listed, nearest

_METHODS: dict[str, Method] = {}

#: Every registered method by its name in the recipe.
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)


def method(
    spec: MethodSpec,
    *,
    ops: tuple[str, ...],
    looks: Callable[[Tensor], int] = lambda tensor: 0,
    model_wide: Callable[[Tensor], bool] = lambda tensor: False,
    measure_model: Callable[[Sequence[Tensor]], ModelMeasuring] | None = None,
    model_looks: int = 0,
    granule: Callable[[Tensor], int] = lambda tensor: 1,
    extras: tuple[Extra, ...] = (),
    check: Callable[[Sequence[Tensor]], None] = lambda tensors: None,
    scales: Scales | None = None,
) -> Callable[[Callable[[Tensor], Apply | Measuring]], Callable[[Tensor], Apply | Measuring]]:
    """Register the decorated function as the ``merge`` of ``spec.name``."""

    def register(
        merge: Callable[[Tensor], Apply | Measuring],
    ) -> Callable[[Tensor], Apply | Measuring]:
        if spec.name in _METHODS:
            raise ValueError(f"a method named {spec.name!r} is registered already")
        _METHODS[spec.name] = Method(
            spec,
            merge,
            ops,
            looks,
            model_wide,
            measure_model,
            model_looks,
            granule,
            extras,
            check,
            scales,
        )
        return merge

    return register


def get_method(name: str) -> Method:
    """The method called ``name``.

    :raises RecipeError: no such method; the message lists all and the nearest.
    """
    try:
        return _METHODS[name]
    except KeyError:
        near = nearest(name, _METHODS)
        hint = "" if near is None else f"; did you mean {near!r}?"
        raise RecipeError(
            f"merge method {name!r} does not exist{hint or ';'} methods: {listed(_METHODS)}"
        ) from None


def specs() -> dict[str, MethodSpec]:
    """The specification of every method by name."""
    return {name: entry.spec for name, entry in _METHODS.items()}

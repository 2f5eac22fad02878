"""Parameters as a call gives them: for all tensors, or told apart by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from pymerge.errors import RecipeError
from pymerge.methods.spec import PRESET, MethodSpec, ParameterSpec, ParameterValue
from pymerge.methods.values import check_value
from pymerge.names import listed, nearest

#: Filters that every name matches, as in a recipe.
EVERY_NAME = ("*", "")


class Values(NamedTuple):
    """The parameters of one tensor: shared, and of each model."""

    shared: dict[str, ParameterValue]
    per_model: list[dict[str, ParameterValue]]


class Settings:
    """The parameters of a call.

    A value is what a recipe may give it, for one of each model a sequence too; or a function of the
    tensor's name; or a mapping from names or parts of them to values, of which the tensor's own
    holds, else the first that matches.

    :raises RecipeError: the method has no such parameter.
    """

    def __init__(self, spec: MethodSpec, given: Mapping[str, Any], num_models: int) -> None:
        self._spec, self._num_models = spec, num_models
        self._given = named(given)
        check_names(spec, self._given)
        self._by_name = [
            name
            for name, value in self._given.items()
            if callable(value) or isinstance(value, Mapping)
        ]
        self._common: Values | None = None

    def of(self, tensor: str) -> Values:
        """The values for a tensor of this name.

        :raises RecipeError: a parameter is missing, or its value is not allowed.
        """
        if not self._by_name:
            if self._common is None:
                self._common = checked(self._spec, self._given, self._num_models)
            return self._common
        given = dict(self._given)
        for name in self._by_name:
            value = _for_name(given.pop(name), tensor)
            if value is not None:
                given[name] = value
        try:
            return checked(self._spec, given, self._num_models)
        except RecipeError as error:
            raise RecipeError(f"tensor {tensor!r}: {error}") from None

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """A sentence for each filter that is part of no name."""
        sentences = []
        for parameter in self._by_name:
            value = self._given[parameter]
            filters = [str(key) for key in value] if isinstance(value, Mapping) else []
            for text in filters:
                if text in EVERY_NAME or any(text in name for name in names):
                    continue
                near = nearest(text, names)
                hint = f"; did you mean {near!r}?" if near else ""
                sentences.append(f"{parameter}: no merged tensor has {text!r} in its name{hint}")
        return sentences


def _for_name(value: Any, tensor: str) -> Any:
    """What a function or the filters say of a tensor; None where they say nothing."""
    if isinstance(value, Mapping):
        if tensor in value:
            return value[tensor]
        found = (v for key, v in value.items() if key in EVERY_NAME or str(key) in tensor)
        return next(found, None)
    return cast(Callable[[str], Any], value)(tensor)


def named(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by their names, which Python's ``lambda_`` is not.

    :raises RecipeError: one is given in both spellings.
    """
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = key.rstrip("_")
        if name in found:
            raise RecipeError(f"expected {name} or {name}_, found both")
        found[name] = value
    return found


def check_names(spec: MethodSpec, given: Mapping[str, Any]) -> None:
    """:raises RecipeError: the method has no parameter of a name."""
    for name in given:
        if name not in spec.parameters:
            near = nearest(name, spec.parameters)
            hint = ";" if near is None else f"; did you mean {near!r}?"
            raise RecipeError(
                f"{spec.name} has no parameter {name!r}{hint} its parameters are "
                f"{listed(spec.parameters)}"
            )


def checked(spec: MethodSpec, given: Mapping[str, Any], num_models: int) -> Values:
    """Shared and per-model parameters, each checked against its specification."""
    shared: dict[str, ParameterValue] = {}
    per_model: list[dict[str, ParameterValue]] = [{} for _ in range(num_models)]
    preset = given.get(PRESET, spec.parameters[PRESET].default if PRESET in spec.parameters else "")
    for name, parameter in spec.parameters.items():
        value = given[name] if name in given else spec.default(name, preset)
        if value is None:
            raise RecipeError(
                f"{spec.name} needs the parameter {name!r} ({parameter.doc.rstrip('.')}), found no "
                f"value; give {name}=... (in a mapping: for the tensor's name or for '*')"
            )
        if parameter.scope == "shared":
            shared[name] = _checked(spec, parameter, value)
            continue
        values = _of_models(value, num_models)
        if len(values) != num_models:
            raise RecipeError(
                f"{spec.name}: parameter {name!r} has {len(values)} values for {num_models} tensors"
            )
        if name not in given or isinstance(value, (int, float)):
            each = _checked(spec, parameter, value)
            for row in per_model:
                row[name] = each
            continue
        for row, one in zip(per_model, values, strict=True):
            row[name] = _checked(spec, parameter, one)
    return Values(shared, per_model)


def _of_models(value: Any, num_models: int) -> list[Any]:
    """The values of the models: those of a sequence, array or torch tensor, else one for all."""
    if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1:
        return list(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return [value] * num_models


def _checked(spec: MethodSpec, parameter: ParameterSpec, value: Any) -> ParameterValue:
    if isinstance(value, np.generic) or (hasattr(value, "data_ptr") and not value.ndim):
        value = value.item()
    try:
        return check_value(value, parameter)
    except ValueError as error:
        raise RecipeError(f"{spec.name}: {error}") from None

"""What a merge method tells the outside: its name, its inputs and its parameters.

Pure data without imports of pymerge, so that the recipe can check a document against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ParameterValue = float | int | bool | str
#: What a method measures before it merges: nothing, each tensor (or each of its rows), or the whole
#: model.
Statistics = Literal["none", "row", "tensor", "model", "tensor or model", "row or tensor"]
#: The parameter that names one of a method's presets.
PRESET = "preset"


def value_text(value: ParameterValue | None) -> str:
    """A value as a recipe writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a method.

    ``scope`` is ``model`` where each input model has its own value and ``shared`` where the tensor
    has one. ``default`` None means required. ``choices`` lists the words a string parameter may
    take; ``minimum`` and ``maximum`` bound a number, both included. ``ignored`` marks a parameter
    of other tools that is accepted and changes nothing.
    """

    name: str
    kind: Literal["float", "int", "bool", "str"]
    scope: Literal["model", "shared"]
    default: ParameterValue | None
    doc: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    ignored: bool = False

    @property
    def required(self) -> bool:
        return self.default is None

    @property
    def bounds(self) -> str:
        """``0 to 1``, ``at least 0``, ``at most 1``; empty where nothing bounds the number."""
        low, high = (
            None if bound is None else f"{bound:.10g}" for bound in (self.minimum, self.maximum)
        )
        if low is None:
            return "" if high is None else f"at most {high}"
        return f"at least {low}" if high is None else f"{low} to {high}"


@dataclass(frozen=True)
class MethodSpec:
    """One merge method as the recipe, the help and the documentation see it.

    ``base`` says what a ``base_model`` means: ``required``, ``optional``, or ``input`` where the
    base is only the donor of names and configuration and takes part like any other model.
    ``min_models`` and ``max_models`` count the models other than a required or optional base.
    ``statistics`` says over what the method measures before it merges. ``presets`` names sets of
    defaults: a value that the recipe does not give is taken from the preset it names in the
    parameter ``preset``, else from the parameter's own default.
    """

    name: str
    summary: str
    paper: str
    base: Literal["required", "optional", "input"]
    min_models: int
    max_models: int | None
    parameters: Mapping[str, ParameterSpec] = field(default_factory=dict)
    statistics: Statistics = "none"
    presets: Mapping[str, Mapping[str, ParameterValue]] = field(default_factory=dict)

    @property
    def model_count(self) -> str:
        """``2``, ``1 to 84``, ``1 or more``."""
        if self.max_models == self.min_models:
            return str(self.min_models)
        end = "or more" if self.max_models is None else f"to {self.max_models}"
        return f"{self.min_models} {end}"

    def preset_lines(self) -> dict[str, list[str]]:
        """What each preset sets, as a recipe writes it; empty for the one that is the default."""
        found = {}
        for name in self.parameters[PRESET].choices if PRESET in self.parameters else ():
            values = self.presets.get(name, {})
            found[name] = [f"{key}: {value_text(value)}" for key, value in values.items()]
        return found

    def default(self, name: str, preset: ParameterValue | None) -> ParameterValue | None:
        """The value of a parameter that is not given; None where it is required."""
        named = self.presets.get(str(preset), {})
        return named.get(name, self.parameters[name].default)

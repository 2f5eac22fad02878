"""What a merge method tells the outside: its name, its inputs and its parameters.

Pure data without imports of pymerge, so that the recipe can check a document against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ParameterValue = float | int | bool | str


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


@dataclass(frozen=True)
class MethodSpec:
    """One merge method as the recipe, the help and the documentation see it.

    ``base`` says what a ``base_model`` means: ``required``, ``optional``, or ``input`` where the
    base is only the donor of names and configuration and takes part like any other model.
    ``min_models`` and ``max_models`` count the models other than a required or optional base.
    """

    name: str
    summary: str
    paper: str
    base: Literal["required", "optional", "input"]
    min_models: int
    max_models: int | None
    parameters: Mapping[str, ParameterSpec] = field(default_factory=dict)

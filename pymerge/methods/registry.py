"""The methods by name; each method file registers itself by decorator, when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Literal, TypeVar

from pymerge.errors import RecipeError
from pymerge.methods.protocol import (
    Apply,
    Cost,
    Description,
    Extra,
    Measuring,
    Method,
    ModelMeasuring,
    Scales,
    Solving,
    Tensor,
)
from pymerge.methods.spec import MethodSpec
from pymerge.methods.table import MODULES
from pymerge.names import listed, nearest

Merge = Callable[[Tensor], Apply | Measuring | Solving]

_METHODS: dict[str, Method] = {}

Entry = TypeVar("Entry")


class _ByName(Mapping[str, Entry]):
    """``read(method)`` by the method's name: the names are known, a value imports its module."""

    def __init__(self, read: Callable[[Method], Entry]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> Entry:
        if name not in _METHODS and name in MODULES:
            import_module(f"pymerge.methods.{MODULES[name]}")
        return self._read(_METHODS[name])

    def __contains__(self, name: object) -> bool:
        return name in MODULES or name in _METHODS

    def __iter__(self) -> Iterator[str]:
        return iter({**MODULES, **_METHODS})

    def __len__(self) -> int:
        return len(MODULES.keys() | _METHODS.keys())


#: Every method by its name in the recipe: those of the table and those registered besides.
METHODS: Mapping[str, Method] = _ByName(lambda method: method)


def method(
    spec: MethodSpec,
    *,
    ops: tuple[str, ...],
    looks: Callable[[Tensor], float] = lambda tensor: 0,
    model_wide: Callable[[Tensor], bool] = lambda tensor: False,
    measure_model: Callable[[Sequence[Tensor]], ModelMeasuring] | None = None,
    model_looks: int = 0,
    granule: Callable[[Tensor], int] = lambda tensor: 1,
    extras: tuple[Extra, ...] = (),
    check: Callable[[Sequence[Tensor]], None] = lambda tensors: None,
    scales: Scales | None = None,
    cost: Callable[[Tensor], Cost] | None = None,
    reads: Literal["gram", "fisher"] | None = None,
    warnings: Callable[[Sequence[Tensor]], list[str]] = lambda tensors: [],
    description: Description | None = None,
) -> Callable[[Merge], Merge]:
    """Register the decorated function as the ``merge`` of ``spec.name``."""

    def register(
        merge: Merge,
    ) -> Merge:
        home = f"pymerge.methods.{MODULES.get(spec.name, '')}"
        if spec.name in _METHODS or (spec.name in MODULES and merge.__module__ != home):
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
            cost,
            reads,
            warnings,
            description,
        )
        return merge

    return register


def get_method(name: str) -> Method:
    """The method called ``name``.

    :raises RecipeError: no such method; the message lists all and the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    near = nearest(name, METHODS)
    hint = "" if near is None else f"; did you mean {near!r}?"
    raise RecipeError(
        f"merge method {name!r} does not exist{hint or ';'} methods: {listed(METHODS)}"
    )


def specs() -> Mapping[str, MethodSpec]:
    """The specification of every method by name; a value is imported when it is read."""
    return _ByName(lambda method: method.spec)

"""The form of every merge method: measure → decide → apply.

A method is a function of one :class:`Tensor`. Where it needs statistics it is a generator: each
``yield Measure(...)`` asks for one look at the tensor's tiles and receives what was measured; it
returns an :class:`Apply`, the map that the engine runs over the tiles to produce the output. A
method without statistics is a plain function that returns its ``Apply``. It never opens a file,
names a device, starts a thread or allocates an output.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pymerge.methods.spec import MethodSpec, ParameterValue
from pymerge.ops.opset import OpSet
from pymerge.ops.view import View


class Tile(NamedTuple):
    """A run of consecutive elements of one tensor, of every input, in memory.

    ``start`` is the index of its first element in the full tensor, so that results cannot depend on
    how the tensor was cut.
    """

    start: int
    num: int
    base: View | None
    models: tuple[View, ...]


@dataclass(frozen=True)
class Measure:
    """One look at the tiles: ``run(tile)`` on each, combined by ``fold``.

    ``fold`` must not depend on the order (integer sums); without it the answer is the list of
    results in tile order. ``only`` restricts the look to one tile.
    """

    run: Callable[[Tile], Any]
    fold: Callable[[Any, Any], Any] | None = None
    only: int | None = None


@dataclass(frozen=True)
class Apply:
    """The map that writes the output: ``run(tile, out)`` returns the count of non-finite
    elements."""

    run: Callable[[Tile, View], int]


@dataclass(frozen=True)
class Tensor:
    """What a method knows of one output tensor.

    ``parameters`` are the shared ones, ``model_parameters`` those of each model in order (the base
    excluded where the method has one). ``state`` is what the method's model-wide measurement
    returned.
    """

    name: str
    shape: tuple[int, ...]
    num_models: int
    has_base: bool
    parameters: Mapping[str, ParameterValue]
    model_parameters: Sequence[Mapping[str, ParameterValue]]
    ops: OpSet
    model_names: Sequence[str] = ()
    state: Any = None

    @property
    def num_elements(self) -> int:
        total = 1
        for extent in self.shape:
            total *= extent
        return total

    def each(self, parameter: str) -> list[float]:
        """The values of a numeric per-model parameter, in model order."""
        return [float(values[parameter]) for values in self.model_parameters]


Measuring = Generator[Measure, Any, Apply]
ModelMeasuring = Generator[Measure, Any, Any]


@dataclass(frozen=True)
class Method:
    """A registered method.

    ``merge`` is described in the module's docstring. ``measure_model``, where present and where
    ``model_wide(tensor)`` says so, runs before any tensor is merged: a generator over the list of
    all tensors whose ``Measure`` without ``fold`` is answered by a dict from tensor name to the
    list of tile results, and with ``fold`` by one value for the whole model. ``looks`` tells how
    often a tensor is measured, for the plan's estimate of what a streamed tensor costs.
    """

    spec: MethodSpec
    merge: Callable[[Tensor], Apply | Measuring]
    ops: tuple[str, ...]
    looks: Callable[[Tensor], int] = field(default=lambda tensor: 0)
    model_wide: Callable[[Tensor], bool] = field(default=lambda tensor: False)
    measure_model: Callable[[Sequence[Tensor]], ModelMeasuring] | None = None
    model_looks: int = 0


def decide(method: Method, tensor: Tensor, measure: Callable[[Measure], Any]) -> Apply:
    """Run a method up to its ``Apply``, answering each ``Measure`` by ``measure``."""
    outcome = method.merge(tensor)
    if isinstance(outcome, Apply):
        return outcome
    apply: Apply = answer(outcome, measure)
    return apply


def answer(questions: Generator[Measure, Any, Any], measure: Callable[[Measure], Any]) -> Any:
    """Drive a generator of measurements to its return value."""
    reply: Any = None
    while True:
        try:
            question = questions.send(reply)
        except StopIteration as stop:
            return stop.value
        reply = measure(question)

"""A tensor in memory as what is merged: one item, or of packed experts one for each.

The inputs of a tensor are read once for all of its items, which are merged one after another, and
the result is in its place when the last of them is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pymerge.in_memory.beside import Beside
from pymerge.in_memory.driver import Inputs
from pymerge.in_memory.models import Entry
from pymerge.in_memory.targets import Targets, view_of
from pymerge.in_memory.tiles import cut, tile_elements
from pymerge.methods.protocol import Method, Tensor
from pymerge.ops.view import View


@dataclass(frozen=True)
class Held:
    """Inputs of a tensor in memory, and the triangles of the Grams beside it."""

    base: Any | None
    models: Sequence[Any]
    diagonals: Sequence[Any] = ()
    grams: Sequence[Any] = ()

    def inputs(self, method: Method, tensor: Tensor, number: int = 0) -> Inputs:
        """The tiles of ``tensor``, which is part ``number`` of as many as there are of its size."""
        num = tensor.num_elements

        def views(arrays: Sequence[Any]) -> list[View]:
            return [view_of(array).part(number * num, num) for array in arrays]

        base = None if self.base is None else views([self.base])[0]
        size = tile_elements(method, tensor)
        return Inputs(cut(base, views(self.models), size, views(self.diagonals)), self.grams)

    @property
    def arrays(self) -> list[Any]:
        """What owns the memory; the first model's first."""
        return [*self.models, *self.diagonals, *(() if self.base is None else (self.base,))]

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Where the arrays begin and end."""
        return [span_of(array) for array in self.arrays]

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor shares memory with one of the arrays."""
        begin, last = span_of(tensor)
        return any(begin < end and first < last for first, end in self.places)


def span_of(tensor: Any) -> tuple[int, int]:
    """Where a torch tensor's memory begins and ends, gaps between its elements included."""
    begin = int(tensor.data_ptr())
    if not tensor.numel():
        return begin, begin
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in strides)
    return begin, begin + int(extent) * int(tensor.element_size())


class Whole:
    """A tensor while it is merged: ``hold`` gives its inputs, which are let go after the last item
    unless somebody else keeps them."""

    def __init__(
        self, entry: Entry, method: Method, device: str, targets: Targets, hold: Callable[[], Held]
    ) -> None:
        self.entry, self.method = entry, method
        self._device, self._targets, self._hold = device, targets, hold
        self._held: Held | None = None
        self._written: Any = None

    def items(self, tensors: Sequence[Tensor], num_bytes: int) -> list[Item]:
        """The items that make the tensor; its inputs have so many bytes."""
        count = len(tensors)
        return [
            Item(self, tensor, number, count, num_bytes // count)
            for number, tensor in enumerate(tensors)
        ]

    def held(self) -> Held:
        if self._held is None:
            self._held = self._hold()
        return self._held

    def let_go(self) -> None:
        """Of the inputs."""
        self._held = None

    def output(self, tensor: Tensor) -> View:
        """Memory for all of the result."""
        if self._written is None:
            taken = self.held().holds
            self._written = self._targets.memory(self.entry, tensor.format, self._device, taken)
        return view_of(self._written)

    def finish(self) -> None:
        """Put the result in its place."""
        written, self._written = self._written, None
        self._targets.put(self.entry, written)


@dataclass
class Item:
    """Part ``number`` of ``count`` of a tensor along its first dimension, or all of it."""

    whole: Whole
    tensor: Tensor
    number: int
    count: int
    num_bytes: int
    beside: Beside | None = None

    @property
    def entry(self) -> Entry:
        return self.whole.entry

    @contextmanager
    def inputs(self) -> Iterator[Inputs]:
        try:
            yield self.whole.held().inputs(self.whole.method, self.tensor, self.number)
        finally:
            if self._is_last:
                self.whole.let_go()

    @contextmanager
    def output(self) -> Iterator[View]:
        num = self.tensor.num_elements
        yield self.whole.output(self.tensor).part(self.number * num, num)
        if self._is_last:
            self.whole.finish()

    @property
    def _is_last(self) -> bool:
        return self.number == self.count - 1

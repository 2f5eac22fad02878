"""Tensors that are a run of another's elements, and tensors that are others one after another."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pymerge.checkpoint.adapter import AdapterTensor, nominal_format
from pymerge.checkpoint.derived import DerivedTensor
from pymerge.checkpoint.header import TensorEntry


@dataclass(frozen=True, eq=False)
class PartTensor(DerivedTensor):
    """A run of the elements of a derived tensor, from element ``first`` on."""

    whole: DerivedTensor
    first: int

    @property
    def scratch_blocks(self) -> int:
        return self.whole.scratch_blocks

    @property
    def read_bytes(self) -> int:
        """Its share of what the whole takes."""
        return -(-self.whole.read_bytes * self.num_elements // max(1, self.whole.num_elements))

    def fingerprint(self) -> str:
        whole = self.whole
        return f"{self.first} of {list(whole.shape)} {type(whole).__name__} {whole.fingerprint()}"


@dataclass(frozen=True, eq=False)
class JoinedTensor(DerivedTensor):
    """The elements of ``stored``, all of one format, one tensor after another."""

    @property
    def scratch_blocks(self) -> int:
        """A block for a part that is no whole tile, and what makes that part."""
        inner = (e.scratch_blocks for e in self.stored if isinstance(e, DerivedTensor))
        return 1 + max(inner, default=0)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first element of each part, and the end."""
        return (0, *itertools.accumulate(entry.num_elements for entry in self.stored))

    def runs(self, first: int, num: int) -> Iterator[tuple[TensorEntry, int, int]]:
        """The parts that ``num`` elements from element ``first`` on lie in: (part, first element in
        it, number of elements)."""
        end = first + num
        for index in range(bisect_right(self.starts, first) - 1, len(self.stored)):
            begin, stop = self.starts[index], self.starts[index + 1]
            if begin >= end:
                return
            low, high = max(first, begin), min(end, stop)
            if low < high:
                yield self.stored[index], low - begin, high - low

    def fingerprint(self) -> str:
        return "joined"


def joined(name: str, shape: Sequence[int], parts: Sequence[TensorEntry]) -> TensorEntry:
    """Tensors of one format, one after another, as a tensor of this shape."""
    first = parts[0]
    if any(part.format != first.format for part in parts):
        raise ValueError(f"{name}: parts of one format are joined")
    if len(parts) == 1:
        return cut(first, 0, shape, name)
    return JoinedTensor(
        name,
        first.format,
        tuple(shape),
        first.file,
        first.offset,
        sum(part.num_bytes for part in parts),
        tuple(parts),
        nominal_format(first),
    )


def cut(entry: TensorEntry, first: int, shape: Sequence[int], name: str) -> TensorEntry:
    """The elements from element ``first`` on as a tensor of this shape.

    :raises ValueError: an adapter's update is on the tensor, or elements are no whole bytes.
    """
    num = math.prod(shape)
    if isinstance(entry, AdapterTensor) and entry.update is not None:
        raise ValueError(f"{entry.name} has an update of a matrix on it and is not cut")
    if isinstance(entry, JoinedTensor):
        parts = [
            cut(part, begin, (count,), name) if count != part.num_elements else part
            for part, begin, count in entry.runs(first, num)
        ]
        return joined(name, shape, parts)
    if isinstance(entry, PartTensor):
        return cut(entry.whole, entry.first + first, shape, name)
    size = entry.format.num_bytes
    if not isinstance(entry, DerivedTensor):
        return replace(
            entry,
            name=name,
            shape=tuple(shape),
            offset=entry.offset + first * size,
            num_bytes=num * size,
        )
    if first == 0 and tuple(shape) == entry.shape:
        return entry
    return PartTensor(
        name,
        entry.format,
        tuple(shape),
        entry.file,
        entry.offset,
        num * size,
        entry.stored,
        entry.nominal,
        entry,
        first,
    )

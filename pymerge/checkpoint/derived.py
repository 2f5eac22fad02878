"""Tensors that no file holds as they are: their elements are made of stored ones when a tile of
them is read.

Codes with scales, rows gathered for another vocabulary and the output of a merge that is not
written are all of this kind. Here is only what is made of what; the engine makes it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from pymerge.checkpoint.header import TensorEntry
from pymerge.errors import CheckpointError
from pymerge.formats import Format


@dataclass(frozen=True, eq=False)
class DerivedTensor(TensorEntry):
    """``format`` is that of the elements that are made, ``nominal`` the one that the tensor counts
    as where formats are compared; ``file`` and ``offset`` are those of the first of ``stored``.

    Equality is identity: a plan names the same object where it means the same elements.
    """

    stored: tuple[TensorEntry, ...]
    nominal: Format

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @property
    def scratch_blocks(self) -> int:
        """Blocks beside the result's that making a tile takes."""
        return 1

    @property
    def key(self) -> Hashable:
        return self

    @property
    def read_bytes(self) -> int:
        return sum(entry.read_bytes for entry in self.stored)

    def fingerprint(self) -> str:
        """What is done to the stored tensors, as a text that differs where the elements do."""
        raise NotImplementedError


def refuse_derived(entry: TensorEntry) -> None:
    """For readers of plain bytes.

    :raises CheckpointError: no file holds the tensor's elements as they are.
    """
    if isinstance(entry, DerivedTensor):
        raise CheckpointError(
            f"{entry.file}, tensor {entry.name!r}: expected plain weights, found them made of "
            f"{entry.stored[0].format.name} codes with scales; merge the model alone by "
            "passthrough first, which writes it unquantised, and name that output"
        )


def entries_within(entry: TensorEntry) -> tuple[TensorEntry, ...]:
    """The tensor and everything that it is made of, what is made in between among it."""
    if isinstance(entry, DerivedTensor):
        return (entry, *(part for each in entry.stored for part in entries_within(each)))
    return (entry,)


def stored_entries(entry: TensorEntry) -> tuple[TensorEntry, ...]:
    """What is read of files for a tensor, the matrices of an adapter apart."""
    if isinstance(entry, DerivedTensor):
        return tuple(part for each in entry.stored for part in stored_entries(each))
    return (entry,)

"""Making the tiles of tensors that are parts of others, or others one after another."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.checkpoint import DerivedTensor, JoinedTensor, PartTensor, TensorEntry
from pymerge.engine.updates import float_view
from pymerge.ops.view import View

if TYPE_CHECKING:
    from pymerge.engine.derived import Make
    from pymerge.engine.loader import TileLoader


def make_part(
    make: Make,
    loader: TileLoader,
    entry: PartTensor,
    start: int,
    num: int,
    block: int,
    scratch: Sequence[int],
) -> View:
    """The whole makes it."""
    return make(loader, entry.whole, entry.first + start, num, block, scratch)


def make_joined(
    make: Make,
    loader: TileLoader,
    entry: JoinedTensor,
    start: int,
    num: int,
    block: int,
    scratch: Sequence[int],
) -> View:
    """Each part is brought into a block of scratch and moved to its place behind the one before; a
    tile within one part is brought in place."""
    runs = list(entry.runs(start, num))
    if len(runs) == 1:
        return _bring(make, loader, *runs[0], block, scratch)
    size, done = entry.format.num_bytes, 0
    for part, first, count in runs:
        view = _bring(make, loader, part, first, count, scratch[0], scratch[1:])
        ctypes.memmove(block + done * size, view.ptr, count * size)
        done += count
    return float_view(block, entry.format, num)


def _bring(
    make: Make,
    loader: TileLoader,
    part: TensorEntry,
    first: int,
    num: int,
    block: int,
    scratch: Sequence[int],
) -> View:
    if isinstance(part, DerivedTensor):
        return make(loader, part, first, num, block, scratch)
    size = part.format.num_bytes
    with loader.context.events.stage("read", part.name, num * size):
        address = loader.read(part, first * size, num * size, block)
    return float_view(address, part.format, num)

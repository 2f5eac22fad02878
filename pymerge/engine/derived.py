"""Making the tiles of tensors that no file holds as they are, by the kind of the tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import DerivedTensor
from pymerge.ops.view import View
from pymerge.plan import Job

if TYPE_CHECKING:
    from pymerge.engine.loader import TileLoader

#: ``make(loader, entry, start, num, block, scratch)`` makes ``num`` elements from element ``start``
#: on in the block and returns their view; ``scratch`` are the entry's ``scratch_blocks`` blocks.
Make = Callable[["TileLoader", Any, int, int, int, Sequence[int]], View]

MAKERS: Mapping[type[DerivedTensor], Make] = {}


def make_tile(
    loader: TileLoader,
    job: Job,
    entry: DerivedTensor,
    start: int,
    num: int,
    block: int,
    scratch: Sequence[int],
) -> View:
    """The elements of a tile of a derived tensor, in host memory."""
    maker = MAKERS.get(type(entry))
    if maker is None:
        raise RuntimeError(f"{job.name}: nothing makes a {type(entry).__name__}")
    return maker(loader, entry, start, num, block, scratch)

"""Making the tiles of tensors that no file holds as they are, by the kind of the tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import DerivedTensor, JoinedTensor, PartTensor, ScaledTensor
from pymerge.checkpoint.rows import RowsTensor
from pymerge.engine.gathered import make_rows
from pymerge.engine.merged import make_merged
from pymerge.engine.parts import make_joined, make_part
from pymerge.engine.scaled import make_scaled
from pymerge.ops.view import View
from pymerge.plan.merged import MergedTensor

if TYPE_CHECKING:
    from pymerge.engine.loader import TileLoader

#: ``make(loader, entry, start, num, block, scratch)`` makes ``num`` elements from element ``start``
#: on in the block and returns their view; ``scratch`` are the entry's ``scratch_blocks`` blocks.
Make = Callable[["TileLoader", Any, int, int, int, Sequence[int]], View]


def make_tile(
    loader: TileLoader,
    entry: DerivedTensor,
    start: int,
    num: int,
    block: int,
    scratch: Sequence[int],
) -> View:
    """The elements of a tile of a derived tensor, in host memory."""
    maker = MAKERS.get(type(entry))
    if maker is None:
        raise RuntimeError(f"{entry.name}: nothing makes a {type(entry).__name__}")
    return maker(loader, entry, start, num, block, scratch)


MAKERS: Mapping[type[DerivedTensor], Make] = {
    JoinedTensor: partial(make_joined, make_tile),
    MergedTensor: make_merged,
    RowsTensor: partial(make_rows, make_tile),
    PartTensor: partial(make_part, make_tile),
    ScaledTensor: make_scaled,
}

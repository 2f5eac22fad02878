"""Exact order statistics of scores that exist only piece by piece, in two looks.

The first look counts the high halves of the scores' keys, the second the low halves of those in the
bins where the wanted ranks lie. Keys are magnitudes, so negative scores are counted on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge.methods.protocol import Measure, Tile
from pymerge.methods.trim import LOOK_BINS, LOOK_SHIFT, REFINE_BINS
from pymerge.ops.opset import OpSet
from pymerge.ops.selection import NAN_KEY
from pymerge.ops.view import View

#: What a method that asks for order statistics must name among its ops.
ORDER_OPS = ("magnitude_histogram",)

#: The scores of a tile in pieces: one view of those that are not negative, and where there are
#: negative ones a second view, of their magnitudes, as long as the first. Each holds NaN where the
#: other one's are, and the first where a score is NaN.
Scores = Callable[[Tile], Iterator[tuple[View, ...]]]


@dataclass(frozen=True)
class _Place:
    """Where a rank lies after the first look: which view, which bin, and the rank inside it."""

    sign: int
    bin: int
    rank: int


def order_statistics(
    ops: OpSet, scores: Scores, ranks: Sequence[int]
) -> Generator[Measure, Any, list[np.float32]]:
    """The scores that would stand at ``ranks``, counted from 0, if all were sorted upwards; NaN
    sorts last, and -0 and 0 are equal."""

    def look(tile: Tile) -> NDArray[np.uint64]:
        counts = np.zeros((2, LOOK_BINS), np.uint64)
        for views in scores(tile):
            ops.magnitude_histogram(None, views, counts[: len(views)], shift=LOOK_SHIFT)
        return counts

    counts = (yield Measure(look, fold=np.add)).astype(np.int64)
    counts[:, NAN_KEY >> LOOK_SHIFT] = 0  # holds nothing but NaN
    places = [_place(counts, rank) for rank in ranks]

    def refine(tile: Tile) -> NDArray[np.uint64]:
        counts = np.zeros((len(places), REFINE_BINS), np.uint64)
        for views in scores(tile):
            for row, place in enumerate(places):
                if place is not None and place.sign < len(views):
                    ops.magnitude_histogram(
                        None,
                        views[place.sign : place.sign + 1],
                        counts[row : row + 1],
                        shift=0,
                        prefix=[place.bin],
                        prefix_shift=LOOK_SHIFT,
                    )
        return counts

    low_counts = (yield Measure(refine, fold=np.add)).astype(np.int64)
    found = []
    for place, row in zip(places, low_counts, strict=True):
        if place is None:
            found.append(np.float32(np.nan))
            continue
        low, _ = _bin_of(row, place.rank)
        magnitude = np.int32(place.bin << LOOK_SHIFT | low).view(np.float32)
        found.append(-magnitude if place.sign else magnitude)
    return found


def _place(counts: NDArray[np.int64], rank: int) -> _Place | None:
    """The place of a rank, or None where it falls among the NaN."""
    positive, negative = (int(total) for total in counts.sum(axis=1))
    if rank < negative:  # the largest magnitude comes first
        return _Place(1, *_bin_of(counts[1], negative - 1 - rank))
    if rank < negative + positive:
        return _Place(0, *_bin_of(counts[0], rank - negative))
    return None


def _bin_of(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin that holds a rank, and the rank inside it."""
    ends = np.cumsum(counts)
    place = int(np.searchsorted(ends, rank, side="right"))
    return place, rank - int(ends[place] - counts[place])

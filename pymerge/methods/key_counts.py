"""Exact selection over the matrices of a whole model, in two rounds of counting.

A magnitude's key is the bits of its float32: the first round counts high halves, the second the low
halves of the keys that share the high half of the one sought (see trim.py). What is counted may
come in any order, from any number of threads, and only a table is kept. NaNs are left out, so that
a damaged tensor does not move the threshold of the others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pymerge.methods.trim import LOOK_BINS, LOOK_SHIFT, REFINE_BINS
from pymerge.ops.opset import OpSet
from pymerge.ops.selection import ABOVE_ALL, BELOW_ALL, NAN_KEY
from pymerge.ops.view import View

#: Ops that counting takes.
COUNT_OPS = ("magnitude_histogram",)

Part = tuple[View | None, Sequence[View]]


class KeyCounts:
    """The counts of ``num_rows`` rankings, of one model each.

    Count everything, :meth:`narrow`, count everything again, then :meth:`keys`.
    """

    def __init__(self, num_rows: int) -> None:
        self._counts = np.zeros((num_rows, LOOK_BINS), np.uint64)
        self._keys: list[int] = []
        self._within: list[int] = []
        self._prefix: NDArray[np.int32] | None = None
        self._lock = threading.Lock()

    def count(
        self, ops: OpSet, parts: Iterable[Part], rows: slice = slice(None)
    ) -> NDArray[np.uint64]:
        """The counts of some tiles, uint64 [rows, bins]: each a base or None, and a view of the
        values for each of the ``rows``."""
        counts = np.zeros_like(self._counts[rows])
        if self._prefix is None:
            for base, models in parts:
                ops.magnitude_histogram(base, models, counts, shift=LOOK_SHIFT)
        else:
            prefix = self._prefix[rows]
            for base, models in parts:
                ops.magnitude_histogram(
                    base, models, counts, shift=0, prefix=prefix, prefix_shift=LOOK_SHIFT
                )
        return counts

    def add(self, counts: NDArray[np.uint64], rows: slice = slice(None)) -> None:
        """Take in what was counted; any thread may."""
        with self._lock:
            self._counts[rows] += counts

    def narrow(self, ranks: Sequence[int]) -> None:
        """End the first round. The ranks sought begin at 1 for the largest; 0 keeps nothing, and
        one beyond all values everything."""
        self._counts[:, NAN_KEY >> LOOK_SHIFT] = 0
        prefix = np.zeros(len(ranks), np.int32)
        for row, (counts, rank) in enumerate(zip(self._counts, ranks, strict=True)):
            if rank == 0 or rank > int(counts.sum()):
                self._keys.append(BELOW_ALL if rank else ABOVE_ALL)
                self._within.append(0)
                continue
            place, rest = _place(counts, rank)
            prefix[row] = place
            self._keys.append(place << LOOK_SHIFT)
            self._within.append(rest)
        self._prefix = prefix
        self._counts = np.zeros((len(ranks), REFINE_BINS), np.uint64)

    def keys(self) -> list[int]:
        """End the second round: the key of each rank."""
        found = []
        for key, rest, counts in zip(self._keys, self._within, self._counts, strict=True):
            found.append(key | _place(counts, rest)[0] if rest else key)
        return found


def _place(counts: NDArray[np.uint64], rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest, and its rank within."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, rank, side="left"))
    before = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before


def rank_of(density: float, num: int) -> int:
    """The rank of the smallest magnitude that is kept of ``num`` in the authors' code of TIES: it
    keeps what reaches the (⌊density·num⌋ + 1)-th largest."""
    return int(density * num) + 1 if density > 0 else 0


def value_of(key: int) -> float:
    """The magnitude that a key stands for: everything reaches that of ``BELOW_ALL``, nothing that
    of ``ABOVE_ALL``."""
    if key == BELOW_ALL:
        return 0.0
    return float("inf") if key == ABOVE_ALL else float(np.int32(key).view(np.float32))

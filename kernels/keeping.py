"""Which elements a Keep keeps, from their keys and their indices in the full tensor.

    kept = (key > threshold or key == threshold before cutoff)
           and not (key above the ceiling, likewise) and draw(index) < draws

Moves nothing. Bitwise: integers only. Other backends: csrc/include/pymerge (cpu, cuda),
pymerge/ops/reference/merge.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from pymerge.kernels.elements import integer
from pymerge.kernels.philox import draws_of, draws_of_quarters

#: How draws are made: not at all; for each element; for four elements at once, where every block
#: begins at a multiple of 4.
NO_DRAWS, EACH_DRAW, QUARTER_DRAWS = 0, 1, 2
NONE = tl.constexpr(NO_DRAWS)
QUARTERS = tl.constexpr(QUARTER_DRAWS)
NUM_FIELDS = 6
FIELDS = tl.constexpr(NUM_FIELDS)

_BELOW_ALL, _ABOVE_ALL, _ALL_DRAWS = -1, 0x7FFFFFFF, 1 << 32


class Keeping(NamedTuple):
    """What the keeps of some models need at compile time."""

    select: bool
    ceiling: bool
    draws: int


def keeping_of(keeps: Sequence[Any], start: int) -> Keeping:
    return Keeping(
        any(k.threshold > _BELOW_ALL or k.cutoff for k in keeps),
        any(k.ceiling < _ABOVE_ALL for k in keeps),
        _draws_of(keeps, start),
    )


def _draws_of(keeps: Sequence[Any], start: int) -> int:
    if all(k.draws >= _ALL_DRAWS for k in keeps):
        return NO_DRAWS
    return EACH_DRAW if start % 4 else QUARTER_DRAWS


def table_of(keeps: Sequence[Any]) -> NDArray[np.int64]:
    """int64 [num_models, 6], the seed's 64 bits as they are."""
    rows = [
        (k.threshold, k.cutoff, k.ceiling, k.ceiling_cutoff, k.draws, signed(k.seed)) for k in keeps
    ]
    return np.array(rows, np.int64)


def signed(seed: int) -> int:
    """The int64 of the same 64 bits."""
    return seed - (1 << 64) if seed >> 63 else seed


@triton.jit
def draws_at(element, quarter, seed, DRAWS: tl.constexpr):
    """The draws of elements: of ``quarter``, the quarters that they make up, or one by one."""
    if DRAWS == QUARTERS:
        drawn = draws_of_quarters(quarter, seed)
    else:
        drawn = draws_of(element, seed)
    return drawn


@triton.jit
def kept_mask(
    key,
    element,
    quarter,
    keeps,
    i,
    SELECT: tl.constexpr,
    CEILING: tl.constexpr,
    DRAWS: tl.constexpr,
):
    """Which elements model ``i`` of a table of keeps keeps."""
    kept = key >= 0
    if SELECT:
        threshold = integer(keeps, i * FIELDS).to(tl.int32)
        cutoff = integer(keeps, i * FIELDS + 1)
        kept = (key > threshold) | ((key == threshold) & (element < cutoff))
    if CEILING:
        ceiling = integer(keeps, i * FIELDS + 2).to(tl.int32)
        cutoff = integer(keeps, i * FIELDS + 3)
        cut = (key > ceiling) | ((key == ceiling) & (element < cutoff))
        kept = kept & ((cut == 0) | (key == 0x7FC00000))
    if DRAWS != NONE:
        draws = integer(keeps, i * FIELDS + 4)
        seed = integer(keeps, i * FIELDS + 5)
        drawn = draws_at(element, quarter, seed, DRAWS)
        kept = kept & ((drawn.to(tl.int64) < draws) | (key == 0x7FC00000))
    return kept

"""Which elements of a task vector survive: a value that every backend reads alike."""

from __future__ import annotations

from typing import NamedTuple

#: Below and above every key.
BELOW_ALL = -1
ABOVE_ALL = 0x7FFFFFFF
#: The key of every NaN.
NAN_KEY = 0x7FC00000
#: As many draws as there are: nothing is dropped.
ALL_DRAWS = 1 << 32


class Keep(NamedTuple):
    """What is kept of one model's task vector, as a pure function of an element's key and its index
    in the full tensor.

    Kept are keys above ``threshold``, and those equal to it at an index below ``cutoff``; of these
    the keys above ``ceiling``, and those equal to it at an index below ``ceiling_cutoff``, go again
    (never a NaN); and of the rest those stay whose Philox draw is below ``draws`` (and every NaN:
    chance must not hide one). The draw of
    index e is word e % 4 of Philox4x32-10 with counter (low 32 bits of e // 4, high 32 bits, 0, 0)
    and key (low, high 32 bits of ``seed``).

    Without arguments everything is kept.
    """

    threshold: int = BELOW_ALL
    cutoff: int = 0
    ceiling: int = ABOVE_ALL
    ceiling_cutoff: int = 0
    draws: int = ALL_DRAWS
    seed: int = 0

"""Philox4x32-10 (Salmon et al., SC 2011), the counter-based generator behind every random mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: Any, key: tuple[int, int]) -> NDArray[np.uint32]:
    """The four words for each counter, uint32 [4, n], of ``counter`` [4, n] and a key of two
    words."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        first = np.uint64(MULTIPLIERS[0]) * c0
        second = np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (second >> _HALF) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _HALF) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def draws(seed: int, index: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The draw of each element index: word ``e % 4`` of counter ``e // 4``."""
    quarter = (index >> 2).astype(np.uint64)
    zero = np.zeros_like(quarter)
    words = philox(
        (quarter & _LOW, quarter >> _HALF, zero, zero), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    )
    result: NDArray[np.uint32] = words[index & 3, np.arange(len(index))]
    return result

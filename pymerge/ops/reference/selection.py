"""Selection by magnitude: samples, counts, histograms and the place of a tie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.ops import arguments
from pymerge.ops.reference.elements import Keys, delta_of, key_of
from pymerge.ops.view import View


def magnitude_sample(
    base: View | None, models: Sequence[View], start: int, *, group: int, stride: int
) -> Keys:
    num, _ = arguments.magnitude_sample(base, models, start, group=group, stride=stride)
    index = start + np.arange(num, dtype=np.int64)
    sampled = (index // group) % stride == 0
    return np.stack([key_of(delta_of(base, x))[sampled] for x in models])


def bracket_count(
    base: View | None, models: Sequence[View], low: ArrayLike, high: ArrayLike, capacity: int
) -> tuple[NDArray[np.int64], list[Keys]]:
    _, lows, highs, capacity = arguments.bracket_count(base, models, low, high, capacity)
    counts = np.zeros((len(models), 4), np.int64)
    candidates = []
    for i, x in enumerate(models):
        key = key_of(delta_of(base, x))
        between = (key > lows[i]) & (key < highs[i])
        at_low = np.count_nonzero(key == lows[i]) if lows[i] != highs[i] else 0
        above, at_high = np.count_nonzero(key > highs[i]), np.count_nonzero(key == highs[i])
        counts[i] = above, at_high, at_low, np.count_nonzero(between)
        candidates.append(key[between][:capacity])
    return counts, candidates


def magnitude_histogram(
    base: View | None,
    models: Sequence[View],
    counts: NDArray[np.uint64],
    *,
    shift: int,
    prefix: ArrayLike | None = None,
    prefix_shift: int | None = None,
) -> None:
    _, prefixes, top = arguments.magnitude_histogram(
        base, models, counts, shift=shift, prefix=prefix, prefix_shift=prefix_shift
    )
    num_bins = counts.shape[1]
    for i, x in enumerate(models):
        key = key_of(delta_of(base, x)).astype(np.int64)
        if prefixes is not None:
            key = key[key >> top == prefixes[i]]
        bins = (key >> shift) & (num_bins - 1)
        counts[i] += np.bincount(bins, minlength=num_bins).astype(np.uint64)


def locate_equal(base: View | None, model: View, key: int, nth: int) -> tuple[int, int]:
    arguments.locate_equal(base, model, key, nth)
    found = np.flatnonzero(key_of(delta_of(base, model)) == key)
    return (int(found[nth]), nth + 1) if nth < len(found) else (-1, len(found))

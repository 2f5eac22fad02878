"""Arguments of samples, counts, histograms and the place of a tie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.ops import checks
from pymerge.ops.view import View


def magnitude_sample(
    base: View | None, models: Sequence[View], start: int, *, group: int, stride: int
) -> tuple[int, int]:
    """num, the number of elements sampled."""
    num = checks.check_views("magnitude_sample", base, models)
    return num, checks.check_sampling("magnitude_sample", num, start, group, stride)


def bracket_count(
    base: View | None, models: Sequence[View], low: ArrayLike, high: ArrayLike, capacity: int
) -> tuple[int, list[int], list[int], int]:
    """num, low, high, the capacity that num elements can need."""
    op = "bracket_count"
    num = checks.check_views(op, base, models)
    lows, highs = checks.brackets(op, low, high, len(models))
    return num, lows, highs, min(num, checks.check_range(op, "capacity", capacity, 0, 2**62))


def magnitude_histogram(
    base: View | None,
    models: Sequence[View],
    counts: NDArray[np.uint64],
    *,
    shift: int,
    prefix: ArrayLike | None = None,
    prefix_shift: int | None = None,
) -> tuple[int, list[int] | None, int]:
    """num, prefix, prefix_shift (31 without one)."""
    num = checks.check_views("magnitude_histogram", base, models)
    return num, *checks.check_histogram(len(models), counts, shift, prefix, prefix_shift)


def locate_equal(base: View | None, model: View, key: int, nth: int) -> tuple[int, int, int]:
    """num, key, nth."""
    op = "locate_equal"
    num = checks.check_views(op, base, (model,))
    key = checks.check_range(op, "key", key, 0, checks.INT32_MAX)
    return num, key, checks.check_range(op, "nth", nth, 0, 2**62)

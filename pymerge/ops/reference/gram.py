"""Inner products of inputs, in float64: products of float32 are exact there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pymerge.ops import arguments
from pymerge.ops.reference.elements import Doubles, delta_of, span_sums, widened
from pymerge.ops.view import View


def pairs(num: int) -> list[tuple[int, int]]:
    """(i, j) with i <= j, row by row: the order in which inner products are given."""
    return [(i, j) for i in range(num) for j in range(i, num)]


def gram_n(base: View | None, inputs: Sequence[View], *, span: int) -> Doubles:
    """float64 [num_spans, num_pairs]."""
    arguments.gram_n(base, inputs, span=span)
    wide = [widened(delta_of(base, x)) for x in inputs]
    with np.errstate(all="ignore"):
        sums = [span_sums(wide[i] * wide[j], span) for i, j in pairs(len(inputs))]
    return np.stack(sums, axis=-1)


def gram_columns(base: View | None, inputs: Sequence[View], sums: Doubles, *, columns: int) -> None:
    """Adds to ``sums`` float64 [num_pairs, columns], row after row; NaN as the positive quiet
    one."""
    arguments.gram_columns(base, inputs, sums, columns=columns)
    wide = [widened(delta_of(base, x)).reshape(-1, columns) for x in inputs]
    with np.errstate(all="ignore"):
        for number, (i, j) in enumerate(pairs(len(inputs))):
            for a, b in zip(wide[i], wide[j], strict=True):
                sums[number] = sums[number] + a * b
    sums[np.isnan(sums)] = np.nan

"""Arguments of inner products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pymerge.ops import checks
from pymerge.ops.view import View


def gram_n(base: View | None, inputs: Sequence[View], *, span: int) -> tuple[int, int]:
    """num, the number of spans."""
    num = checks.check_views("gram_n", base, inputs)
    return num, checks.check_spans("gram_n", num, span)


def gram_columns(
    base: View | None, inputs: Sequence[View], sums: NDArray[np.float64], *, columns: int
) -> tuple[int, int]:
    """num, the number of rows."""
    op = "gram_columns"
    num = checks.check_views(op, base, inputs)
    num_rows = checks.check_rows(op, num, columns)
    num_pairs = len(inputs) * (len(inputs) + 1) // 2
    checks.check_sums(op, sums, (num_pairs, columns), np.float64)
    return num, num_rows

"""Arguments of ops that look at whole rows, and of low-rank additions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.errors import PymergeError
from pymerge.ops import checks
from pymerge.ops.selection import ALL_DRAWS
from pymerge.ops.view import View

Floats = NDArray[np.float32]


class Sparsify(NamedTuple):
    """Checked arguments of row_sparsify."""

    num: int
    num_rows: int
    start: int
    first: int
    last: int
    draws_low: int
    draws_span: int
    seed: int


def row_sparsify(
    out: View,
    base: View | None,
    model: View,
    start: int,
    *,
    columns: int,
    first: int = 0,
    last: int | None = None,
    draws_low: int = ALL_DRAWS,
    draws_span: int = 0,
    seed: int = 0,
    rescale: bool = False,
) -> Sparsify:
    op = "row_sparsify"
    num = checks.check_views(op, base, (model,), out)
    checks.check_writable(op, out)
    num_rows = checks.check_rows(op, num, columns, checks.INT32_MAX)
    return Sparsify(
        num,
        num_rows,
        checks.check_start(op, start),
        checks.check_range(op, "first", first, 0, columns),
        checks.check_range(op, "last", columns if last is None else last, 0, columns),
        checks.check_range(op, "draws_low", draws_low, 0, ALL_DRAWS),
        checks.check_range(op, "draws_span", draws_span, 0, ALL_DRAWS),
        checks.check_range(op, "seed", seed, 0, checks.SEED_MAX),
    )


def row_divergence(base: View, model: View, *, columns: int) -> tuple[int, int]:
    """num, the number of rows."""
    checks.check_base("row_divergence", base)
    num = checks.check_views("row_divergence", base, (model,))
    return num, checks.check_rows("row_divergence", num, columns)


def row_scores(
    out: View, base: View, model: View, factors: ArrayLike, *, columns: int
) -> tuple[int, Floats]:
    """num, factors."""
    return _scores("row_scores", out, base, model, factors, columns)


def select_by_score(
    out: View, base: View, model: View, factors: ArrayLike, threshold: float, *, columns: int
) -> tuple[int, Floats, float]:
    """num, factors, threshold."""
    op = "select_by_score"
    num, checked = _scores(op, out, base, model, factors, columns)
    return num, checked, checks.number(op, "threshold", threshold)


def _scores(
    op: str, out: View, base: View, model: View, factors: ArrayLike, columns: int
) -> tuple[int, Floats]:
    checks.check_base(op, base)
    num = checks.check_views(op, base, (model,), out)
    checks.check_writable(op, out)
    num_rows = checks.check_rows(op, num, columns)
    return num, checks.table(op, "factors", factors, (num_rows,))


class Lora(NamedTuple):
    """Checked arguments of lora_add: ``left`` [num_rows, rank], ``right`` [rank, columns]."""

    num: int
    left: Floats
    right: Floats
    start: int
    scale: float
    factors: Floats | None


def lora_add(
    out: View,
    weight: View,
    left: ArrayLike,
    right: ArrayLike,
    start: int,
    *,
    columns: int,
    scale: float,
    factors: ArrayLike | None = None,
) -> Lora:
    op = "lora_add"
    num = checks.check_views(op, None, (weight,), out)
    checks.check_writable(op, out)
    checks.check_range(op, "columns", columns, 1, checks.INDEX_MAX)
    start = checks.check_start(op, start)
    shape = np.shape(left)
    if len(shape) != 2 or shape[1] < 1:
        raise PymergeError(f"{op}: expected left of shape (num_rows, rank), found {shape}")
    num_rows, rank = shape
    if start + num > num_rows * columns:
        raise PymergeError(
            f"{op}: expected elements of a tensor of {num_rows} rows, as left has, of {columns}, "
            f"found elements {start} to {start + num}"
        )
    return Lora(
        num,
        checks.table(op, "left", left, (num_rows, rank)),
        checks.table(op, "right", right, (rank, columns)),
        start,
        checks.number(op, "scale", scale),
        None if factors is None else checks.table(op, "factors", factors, (num_rows,)),
    )

"""Arguments of weighted sums, the disjoint merge and what it measures, conversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.ops import checks
from pymerge.ops.selection import Keep
from pymerge.ops.view import View

#: How disjoint_merge elects: signs of weighted or plain deltas, or every kept model is selected.
ELECT = ("weighted", "plain", "none")
#: What disjoint_merge makes of the selected: their sum over the sum of their weights, over their
#: number, undivided, or the one of largest magnitude.
COMBINE = ("mean", "count", "sum", "max")
ALONG = ("rows", "columns")

Floats = NDArray[np.float32]


def axpy_n(
    out: View,
    inputs: Sequence[View],
    weights: Sequence[float],
    *,
    base: View | None = None,
    divisor: float = 1.0,
    scale: float = 1.0,
    add_base: bool = True,
) -> tuple[int, list[float], float, float]:
    """num, weights, divisor, scale."""
    op = "axpy_n"
    num = checks.check_views(op, base, inputs, out)
    checks.check_writable(op, out)
    rounded = checks.floats(op, "weights", weights, len(inputs))
    return num, rounded, checks.number(op, "divisor", divisor), checks.number(op, "scale", scale)


def axpy_grid(
    out: View,
    inputs: Sequence[View],
    weights: ArrayLike,
    *,
    columns: int,
    along: str,
    base: View | None = None,
) -> tuple[int, Floats]:
    """num, weights."""
    op = "axpy_grid"
    num = checks.check_views(op, base, inputs, out)
    checks.check_writable(op, out)
    checks.check_word(op, "along", along, ALONG)
    num_rows = checks.check_rows(op, num, columns)
    shape = (len(inputs), num_rows if along == "rows" else columns)
    return num, checks.table(op, "weights", weights, shape)


class Disjoint(NamedTuple):
    """Checked arguments of disjoint_merge; ``factors`` is None where none were given."""

    num: int
    weights: list[float]
    keeps: list[Keep]
    start: int
    factors: list[float] | None
    divisor: float
    scale: float


def disjoint_merge(
    out: View,
    base: View | None,
    models: Sequence[View],
    weights: Sequence[float],
    keeps: Sequence[Keep],
    start: int,
    *,
    elect: str = "weighted",
    zero_sign: int = 1,
    combine: str = "mean",
    factors: Sequence[float] | None = None,
    divisor: float = 1.0,
    scale: float = 1.0,
    score: View | None = None,
    deltas: bool = False,
) -> Disjoint:
    op = "disjoint_merge"
    num = checks.check_views(op, base, models, out, score=score)
    checks.check_writable(op, out)
    checks.check_word(op, "elect", elect, ELECT)
    checks.check_word(op, "combine", combine, COMBINE)
    checks.check_range(op, "zero_sign", zero_sign, -1, 1)
    count = len(models)
    return Disjoint(
        num,
        checks.floats(op, "weights", weights, count),
        checks.keeps(op, keeps, count),
        checks.check_start(op, start),
        None if factors is None else checks.floats(op, "factors", factors, count),
        checks.number(op, "divisor", divisor),
        checks.number(op, "scale", scale),
    )


def count_votes(
    base: View | None,
    models: Sequence[View],
    weights: Sequence[float],
    keeps: Sequence[Keep],
    start: int,
    *,
    elect: str = "weighted",
    factors: Sequence[float] | None = None,
) -> tuple[int, list[float], list[Keep], int, list[float] | None]:
    """num, weights, keeps, start, factors."""
    op = "count_votes"
    num = checks.check_views(op, base, models)
    checks.check_word(op, "elect", elect, ELECT)
    count = len(models)
    return (
        num,
        checks.floats(op, "weights", weights, count),
        checks.keeps(op, keeps, count),
        checks.check_start(op, start),
        None if factors is None else checks.floats(op, "factors", factors, count),
    )


def kept_sums(
    base: View | None,
    models: Sequence[View],
    keeps: Sequence[Keep],
    start: int,
    *,
    span: int,
    score: View | None = None,
) -> tuple[int, list[Keep], int, int]:
    """num, keeps, start, the number of spans."""
    op = "kept_sums"
    num = checks.check_views(op, base, models, score=score)
    checked = checks.keeps(op, keeps, len(models))
    return num, checked, checks.check_start(op, start), checks.check_spans(op, num, span)


def convert(out: View, input: View) -> int:
    """num."""
    num = checks.check_views("convert", None, (input,), out)
    if out.code != input.code:
        checks.check_writable("convert", out)
    return num


def count_nonfinite(input: View) -> int:
    """num."""
    return checks.check_views("count_nonfinite", None, (input,))

"""Ops that look at whole rows of ``columns`` elements."""

from __future__ import annotations

from pymerge.ops.definitions import MAPS_ONE, READS_ONE, Op

ROWS = (
    Op(
        "row_sparsify",
        "row_sparsify(out, base, model, start, *, columns, first=0, last=None, "
        "draws_low=4294967296, draws_span=0, seed=0, rescale=False) -> int",
        "The delta of each kept element, 0 elsewhere. rank is the place of an element's key in its "
        "row, from 0 for the smallest to columns - 1; of equal keys the one of lower index ranks "
        "higher. T = draws_low + rank * draws_span // (columns - 1), or draws_low + draws_span // "
        "2 in a row of one. Kept is where first <= rank < last and the draw is below T, and every "
        "NaN. last=None "
        "is columns. rescale: delta / p with p = float32(T) * 2**-32 where T is below 2**32. base "
        "may be None.",
        MAPS_ONE,
    ),
    Op(
        "row_divergence",
        "row_divergence(base, model, *, columns) -> float32 [num_rows]",
        "The divergence of the model's row from the base's: the sum over the row of p log(p / q), "
        "with p = softmax(model) + 1e-8 and q = softmax(base) + 1e-8 in float32. The largest "
        "element, NaN aside, is taken from each before exp; the sums are span sums of float64 over "
        "the row, rounded to float32.",
        READS_ONE,
    ),
    Op(
        "row_scores",
        "row_scores(out, base, model, factors, *, columns) -> int",
        "out = round(|delta| * factors[row]), factors float32 [num_rows]; rows are counted from "
        "the first element given.",
        MAPS_ONE,
    ),
    Op(
        "select_by_score",
        "select_by_score(out, base, model, factors, threshold, *, columns) -> int",
        "out = round(base) where |delta| * factors[row] < threshold, else round(model).",
        MAPS_ONE,
    ),
)

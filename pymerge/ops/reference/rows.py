"""Ops that look at whole rows: ranks of magnitudes, divergence of softmaxes, scores scaled by
row."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.ops import arguments
from pymerge.ops.reference import elementary
from pymerge.ops.reference.elements import Floats, delta_of, key_of, span_sums, store, value
from pymerge.ops.reference.philox import draws
from pymerge.ops.selection import ALL_DRAWS
from pymerge.ops.view import View


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
) -> int:
    """The delta of each kept element, 0 elsewhere.

    rank: 0 for the smallest key of a row to columns - 1; of equal keys the lower index ranks
    higher. T = draws_low + rank * draws_span // (columns - 1), or draws_low + draws_span // 2 in a
    row of one; kept where first <= rank < last and draw < T, and every NaN. rescale: delta / p with
    p = float32(T) * 2**-32 where T < 2**32.
    """
    checked = arguments.row_sparsify(
        out,
        base,
        model,
        start,
        columns=columns,
        first=first,
        last=last,
        draws_low=draws_low,
        draws_span=draws_span,
        seed=seed,
        rescale=rescale,
    )
    num, last = checked.num, checked.last
    delta: Floats = delta_of(base, model)
    ranks = _ranks(key_of(delta).reshape(-1, columns)).reshape(-1)
    if columns > 1:
        limit = draws_low + ranks * draws_span // (columns - 1)
    else:
        limit = np.full(num, draws_low + draws_span // 2)
    index = start + np.arange(num, dtype=np.int64)
    kept = (ranks >= first) & (ranks < last) & (draws(seed, index) < limit)
    kept |= np.isnan(delta)
    if rescale:
        share = np.where(limit < ALL_DRAWS, limit.astype(np.float32) * np.float32(2.0**-32), 1)
        with np.errstate(all="ignore"):
            delta = np.asarray(delta / share.astype(np.float32), np.float32)
    return store(out, np.where(kept, delta, np.float32(0)).astype(np.float32))


def _ranks(keys: NDArray[np.int32]) -> NDArray[np.int64]:
    columns = keys.shape[1]
    order = np.argsort(-keys.astype(np.int64), axis=1, kind="stable")  # largest first, then index
    ranks = np.empty(keys.shape, np.int64)
    descending = np.broadcast_to(np.arange(columns - 1, -1, -1), keys.shape)
    np.put_along_axis(ranks, order, descending, axis=1)
    return ranks


def row_divergence(base: View, model: View, *, columns: int) -> Floats:
    """float32 [num_rows]: sum of p log(p / q) with p, q = softmax of the model's and the base's row
    + 1e-8."""
    arguments.row_divergence(base, model, columns=columns)
    p, q = (_softmax(value(x).reshape(-1, columns)) + np.float32(1e-8) for x in (model, base))
    with np.errstate(all="ignore"):
        terms = p * elementary.log(p / q)
        return span_sums(terms.astype(np.float64).reshape(-1), columns).astype(np.float32)


def _softmax(x: Floats) -> Floats:
    with np.errstate(all="ignore"):
        top = np.fmax.reduce(x, axis=1, keepdims=True)
        e = elementary.exp(x - top)
        total = span_sums(e.astype(np.float64).reshape(-1), x.shape[1]).astype(np.float32)
        result: Floats = e / total[:, None]
        return result


def row_scores(out: View, base: View, model: View, factors: ArrayLike, *, columns: int) -> int:
    """|delta| * factors[row]."""
    num, r = arguments.row_scores(out, base, model, factors, columns=columns)
    return store(out, _row_scores(base, model, r, columns, num))


def select_by_score(
    out: View, base: View, model: View, factors: ArrayLike, threshold: float, *, columns: int
) -> int:
    """The base where the row score is below the threshold, else the model."""
    num, r, limit = arguments.select_by_score(out, base, model, factors, threshold, columns=columns)
    scores = _row_scores(base, model, r, columns, num)
    return store(out, np.where(scores < np.float32(limit), value(base), value(model)))


def _row_scores(base: View, model: View, factors: Floats, columns: int, num: int) -> Floats:
    row = np.arange(num) // columns
    with np.errstate(all="ignore"):
        result: Floats = np.abs(delta_of(base, model)) * factors[row]
        return result


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
) -> int:
    """``left`` float32 [num_rows, rank], ``right`` float32 [rank, columns], of the full tensor; row
    and column are those of the element's index in it.

    acc = left[r, 0] right[0, c] + left[r, 1] right[1, c] + ...; out = (weight + scale * acc), times
    factors[r] where given.
    """
    num, a, b, start, scale, r = arguments.lora_add(
        out, weight, left, right, start, columns=columns, scale=scale, factors=factors
    )
    index = start + np.arange(num, dtype=np.int64)
    row, column = index // columns, index % columns
    with np.errstate(all="ignore"):
        acc = a[row, 0] * b[0, column]
        for k in range(1, a.shape[1]):
            acc = acc + a[row, k] * b[k, column]
        x = value(weight) + np.float32(scale) * acc
        if r is not None:
            x = x * r[row]
    return store(out, x)

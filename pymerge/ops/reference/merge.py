"""Weighted sums, the disjoint merge and what it measures, conversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.formats import F64
from pymerge.ops import arguments
from pymerge.ops.reference.elements import (
    Doubles,
    Floats,
    delta_of,
    key_of,
    memory_of,
    span_sums,
    store,
    value,
    widened,
)
from pymerge.ops.reference.philox import draws
from pymerge.ops.selection import ALL_DRAWS, NAN_KEY, Keep
from pymerge.ops.view import View

Mask = NDArray[np.bool_]


def axpy_n(
    out: View,
    inputs: Sequence[View],
    weights: Sequence[float],
    *,
    base: View | None = None,
    divisor: float = 1.0,
    scale: float = 1.0,
    add_base: bool = True,
) -> int:
    _, weights, divisor, scale = arguments.axpy_n(
        out, inputs, weights, base=base, divisor=divisor, scale=scale
    )
    w = np.asarray(weights, np.float32)
    with np.errstate(all="ignore"):
        acc = in_order([w[i] * delta_of(base, x) for i, x in enumerate(inputs)])
        if divisor != 1:
            acc = acc / np.float32(divisor)
        if scale != 1:
            acc = acc * np.float32(scale)
        if base is not None and add_base:
            acc = value(base) + acc
    return store(out, acc)


def axpy_grid(
    out: View,
    inputs: Sequence[View],
    weights: ArrayLike,
    *,
    columns: int,
    along: str,
    base: View | None = None,
) -> int:
    """``weights`` float32 [num_inputs, num_rows] or, along columns, [num_inputs, columns]."""
    num, w = arguments.axpy_grid(out, inputs, weights, columns=columns, along=along, base=base)
    index = np.arange(num)
    place = index // columns if along == "rows" else index % columns
    with np.errstate(all="ignore"):
        acc = in_order([w[i][place] * delta_of(base, x) for i, x in enumerate(inputs)])
        if base is not None:
            acc = value(base) + acc
    return store(out, acc)


def kept_mask(key: NDArray[np.int32], keep: Keep, start: int) -> Mask:
    """Which elements a :class:`Keep` keeps, from their keys."""
    index = start + np.arange(len(key), dtype=np.int64)
    kept = (key > keep.threshold) | ((key == keep.threshold) & (index < keep.cutoff))
    cut = (key > keep.ceiling) | ((key == keep.ceiling) & (index < keep.ceiling_cutoff))
    kept &= ~cut | (key == NAN_KEY)
    if keep.draws < ALL_DRAWS:
        kept &= (draws(keep.seed, index) < keep.draws) | (key == NAN_KEY)
    result: Mask = kept
    return result


def _kept(
    base: View | None, models: Sequence[View], keeps: Sequence[Keep], start: int, score: View | None
) -> tuple[list[Floats], list[Mask]]:
    deltas = [delta_of(base, x) for x in models]
    keys = [key_of(delta if score is None else value(score)) for delta in deltas]
    return deltas, [kept_mask(k, keep, start) for k, keep in zip(keys, keeps, strict=True)]


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
) -> int:
    checked = arguments.disjoint_merge(
        out,
        base,
        models,
        weights,
        keeps,
        start,
        elect=elect,
        zero_sign=zero_sign,
        combine=combine,
        factors=factors,
        divisor=divisor,
        scale=scale,
        score=score,
        deltas=deltas,
    )
    w = np.asarray(checked.weights, np.float32)
    votes, ballots, total, masks = _votes(
        None if deltas else base, models, w, keeps, start, elect, checked.factors, score
    )
    with np.errstate(all="ignore"):
        if elect == "none":
            chosen = masks
        else:
            plus = (total > 0) | ((total == 0) & (zero_sign > 0))
            minus = (total < 0) | ((total == 0) & (zero_sign < 0))
            chosen = [(plus & (ballot > 0)) | (minus & (ballot < 0)) for ballot in ballots]
        num = np.zeros(checked.num, np.float32)
        den = np.zeros(checked.num, np.float32)
        for i, vote in enumerate(votes):
            if combine == "max":
                larger = chosen[i] & (np.abs(vote) > np.abs(num))
                num = np.where(larger, vote, num)
            else:
                num = np.where(chosen[i], num + vote, num)
            den = np.where(chosen[i], den + (w[i] if combine == "mean" else np.float32(1)), den)
        if combine in ("mean", "count"):
            den[den == 0] = 1
            num = num / den
        num[np.isnan(total)] = np.nan
        if divisor != 1:
            num = num / np.float32(checked.divisor)
        if scale != 1:
            num = num * np.float32(checked.scale)
        return store(out, num if base is None else value(base) + num)


def _votes(
    base: View | None,
    models: Sequence[View],
    w: Floats,
    keeps: Sequence[Keep],
    start: int,
    elect: str,
    factors: Sequence[float] | None,
    score: View | None,
) -> tuple[list[Floats], list[Floats], Floats, list[Mask]]:
    """Weighted votes, the ballots that elect, the ballots' total and the masks."""
    taus, masks = _kept(base, models, keeps, start, score)
    zero = np.float32(0)
    with np.errstate(all="ignore"):
        if factors is not None:
            r = np.asarray(factors, np.float32)
            taus = [r[i] * tau for i, tau in enumerate(taus)]
        votes = [
            np.where(m, w[i] * tau, zero)
            for i, (m, tau) in enumerate(zip(masks, taus, strict=True))
        ]
        ballots = votes
        if elect == "plain":
            ballots = [np.where(m, tau, zero) for m, tau in zip(masks, taus, strict=True)]
        return votes, ballots, in_order(ballots), masks


def count_votes(
    base: View | None,
    models: Sequence[View],
    weights: Sequence[float],
    keeps: Sequence[Keep],
    start: int,
    *,
    elect: str = "weighted",
    factors: Sequence[float] | None = None,
) -> tuple[int, int]:
    _, weights, keeps, start, factors = arguments.count_votes(
        base, models, weights, keeps, start, elect=elect, factors=factors
    )
    w = np.asarray(weights, np.float32)
    _, _, total, _ = _votes(base, models, w, keeps, start, elect, factors, None)
    return int(np.count_nonzero(total > 0)), int(np.count_nonzero(total < 0))


def kept_sums(
    base: View | None,
    models: Sequence[View],
    keeps: Sequence[Keep],
    start: int,
    *,
    span: int,
    score: View | None = None,
) -> Doubles:
    """float64 [num_spans, num_models, 3]: sums of |delta|, of |delta| kept, of delta² kept."""
    arguments.kept_sums(base, models, keeps, start, span=span, score=score)
    deltas, masks = _kept(base, models, keeps, start, score)
    sums = []
    for delta, mask in zip(deltas, masks, strict=True):
        wide = np.abs(widened(delta))
        kept = np.where(mask, wide, 0.0)
        with np.errstate(all="ignore"):
            sums.append(np.stack([span_sums(x, span) for x in (wide, kept, kept * kept)], axis=-1))
    return np.stack(sums, axis=1)


def convert(out: View, input: View) -> int:
    arguments.convert(out, input)
    if out.code == input.code:
        memory_of(out)[:] = memory_of(input)
        return count_nonfinite(input)
    return store(out, value(input))


def count_nonfinite(input: View) -> int:
    arguments.count_nonfinite(input)
    if input.code == F64.code:
        return int(np.count_nonzero(~np.isfinite(memory_of(input).copy().view(np.float64))))
    return int(np.count_nonzero(~np.isfinite(value(input))))


def in_order(terms: Sequence[Any]) -> Floats:
    """t_0 + t_1 + ..., from left to right."""
    total: Floats = terms[0]
    for term in terms[1:]:
        total = total + term
    return total

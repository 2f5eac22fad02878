"""What the ops mean, against independent maths: exact top-k by a stable sort, sums in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from pymerge import ops
from pymerge.ops import view
from pymerge.ops.selection import Keep

NUM = 20_011
START = 2**31 + 77


def top_k(model: np.ndarray[Any, Any], k: int) -> tuple[int, int]:
    """Threshold and cutoff, by the ops, that keep the k largest, ties in index order."""
    sample = ops.magnitude_sample(None, [view(model)], START, group=64, stride=4)[0]
    spread = np.sort(sample)[::-1]
    middle = k * len(sample) // NUM
    high = int(spread[max(middle - 400, 0)])
    low = int(spread[min(middle + 400, len(sample) - 1)])
    counts, candidates = ops.bracket_count(None, [view(model)], [low], [high], NUM)
    above, at_high, at_low, between = (int(c) for c in counts[0])
    descending = np.sort(candidates[0])[::-1]
    assert len(descending) == between
    assert above < k <= above + at_high + between + at_low
    if k <= above + at_high:
        threshold, kept_above = high, above
    elif k <= above + at_high + between:
        threshold = int(descending[k - above - at_high - 1])
        kept_above = above + at_high + int(np.count_nonzero(descending > threshold))
    else:
        threshold, kept_above = low, above + at_high + between
    index, _ = ops.locate_equal(None, view(model), threshold, k - kept_above - 1)
    return threshold, START + index + 1


@pytest.mark.parametrize("k", [500, 4002, 10_000, 15_000])
@pytest.mark.parametrize("kind", ["normal", "tied", "rounded"])
def test_kept_elements_are_those_of_a_stable_sort(kind: str, k: int, isa: str) -> None:
    rng = np.random.default_rng(k)
    model = rng.normal(size=NUM).astype(np.float32)
    if kind == "tied":
        model = rng.choice(np.array([-2, -1, 1, 2, 3], np.float32), NUM)
    elif kind == "rounded":
        model = np.rint(model * 50).astype(np.float32) + np.float32(0.5)
    expected = np.zeros(NUM, bool)
    expected[np.argsort(-np.abs(model), kind="stable")[:k]] = True

    threshold, cutoff = top_k(model, k)
    base, out = np.zeros(NUM, np.float32), np.empty(NUM, np.float32)
    ops.disjoint_merge(
        view(out), view(base), [view(model)], [1.0], [Keep(threshold, cutoff)], START, combine="sum"
    )
    np.testing.assert_array_equal(out, np.where(expected, model, 0))


def test_histogram_finds_the_rank_exactly(isa: str) -> None:
    """Two looks, top 11 bits and then the next 20 of one bin, name the key of any rank."""
    model = np.random.default_rng(5).normal(size=NUM).astype(np.float32)
    keys = np.sort(np.abs(model).view(np.int32))[::-1]
    for rank in (0, 17, NUM // 3, NUM - 1):
        coarse = np.zeros((1, 2**11), np.uint64)
        ops.magnitude_histogram(None, [view(model)], coarse, shift=20)
        above = np.cumsum(coarse[0][::-1]).astype(np.int64)
        top = 2**11 - 1 - int(np.searchsorted(above, rank, side="right"))
        rest = rank - int(above[2**11 - 1 - top] - coarse[0, top])
        fine = np.zeros((1, 2**20), np.uint64)
        ops.magnitude_histogram(None, [view(model)], fine, shift=0, prefix=[top], prefix_shift=20)
        below = np.cumsum(fine[0][::-1]).astype(np.int64)
        low = 2**20 - 1 - int(np.searchsorted(below, rest, side="right"))
        assert (top << 20 | low) == keys[rank]


def models(count: int) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(count)
    base = rng.normal(0, 0.02, NUM).astype(np.float32)
    return base, [base + rng.normal(0, 1e-3, NUM).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 4, 17])
def test_weighted_sum_is_close_to_float64(count: int, isa: str) -> None:
    base, inputs = models(count)
    weights = np.random.default_rng(1).uniform(-1, 1, count)
    wide = [x.astype(np.float64) for x in inputs]
    out = np.empty(NUM, np.float32)

    ops.axpy_n(view(out), [view(x) for x in inputs], list(weights), divisor=0.3)
    exact = sum(w * x for w, x in zip(weights, wide, strict=True)) / 0.3
    size = sum(abs(w * x) for w, x in zip(weights, wide, strict=True)) / 0.3
    assert np.all(np.abs(out - exact) <= (count + 3) * 2.0**-24 * size)

    ops.axpy_n(view(out), [view(x) for x in inputs], list(weights), base=view(base), scale=0.5)
    deltas = [x - base.astype(np.float64) for x in wide]
    exact = base + 0.5 * sum(w * d for w, d in zip(weights, deltas, strict=True))
    size = np.abs(base) + sum(abs(w * d) for w, d in zip(weights, deltas, strict=True))
    assert np.all(np.abs(out - exact) <= (count + 4) * 2.0**-24 * size)


@pytest.mark.parametrize("count", [1, 4, 17])
def test_disjoint_mean_is_close_to_float64(count: int, isa: str) -> None:
    """The published rule: keep, elect the sign of the sum, average those that agree."""
    base, inputs = models(count)
    weights = np.random.default_rng(2).uniform(0.1, 1, count)
    deltas = np.stack([x.astype(np.float64) - base for x in inputs])
    limit = np.float32(7e-4)
    kept = np.where(np.abs(deltas.astype(np.float32)) > limit, deltas, 0) * weights[:, None]
    elected = np.where(kept.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(kept) == elected
    den = np.where(agree, weights[:, None], 0).sum(axis=0)
    exact = base + np.where(agree, kept, 0).sum(axis=0) / np.where(den == 0, 1, den)

    out = np.empty(NUM, np.float32)
    threshold = int(limit.view(np.int32))
    ops.disjoint_merge(
        view(out),
        view(base),
        [view(x) for x in inputs],
        list(weights),
        [Keep(threshold)] * count,
        0,
    )
    # A vote that float32 cannot tell from a tie may go either way.
    clear = np.abs(kept.sum(axis=0)) > count * 2.0**-23 * np.abs(kept).sum(axis=0)
    clear |= np.count_nonzero(kept, axis=0) == 0
    size = np.abs(base) + np.abs(kept).sum(axis=0)
    assert np.count_nonzero(clear) > 0.999 * NUM
    assert np.all((np.abs(out - exact) <= (2 * count + 6) * 2.0**-24 * size / 0.1)[clear])


def test_a_bad_value_never_disappears(isa: str) -> None:
    """inf against -inf, and NaN, come out as NaN even where no model is selected."""
    base = np.array([1, 1, 1, np.nan, 1], np.float32)
    first = np.array([np.inf, np.nan, np.inf, 1, 2], np.float32)
    second = np.array([-np.inf, 1, 3, 1, 2], np.float32)
    out = np.empty(5, np.float32)
    bad = ops.disjoint_merge(
        view(out),
        view(base),
        [view(first), view(second)],
        [1, 1],
        [Keep(0), Keep(0)],
        0,
    )
    assert bad == 4
    np.testing.assert_array_equal(out, np.array([np.nan, np.nan, np.inf, np.nan, 2], np.float32))


def test_threads_share_the_ops() -> None:
    base, inputs = models(4)
    expected = np.empty(NUM, np.float32)
    views = [view(x) for x in inputs]
    ops.axpy_n(view(expected), views, [0.1, 0.2, 0.3, 0.4], base=view(base))

    def merge(_: int) -> np.ndarray[Any, Any]:
        out = np.empty(NUM, np.float32)
        ops.axpy_n(view(out), views, [0.1, 0.2, 0.3, 0.4], base=view(base))
        return out

    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(merge, range(32)):
            np.testing.assert_array_equal(out.view(np.int32), expected.view(np.int32))

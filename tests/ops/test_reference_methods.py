"""The reference's ops against the published rules, transcribed to float64 over whole vectors.

A rule with an election or a threshold is a step function: where float32 cannot tell on which side
an element is, float64 cannot judge it. Such elements are left out, counted, and few.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pymerge.ops import View, reference, view
from pymerge.ops.reference.philox import draws
from pymerge.ops.selection import Keep

Array = np.ndarray[Any, Any]
NUM = 20_000
ULP = 2.0**-24


def task_vectors(count: int, seed: int = 0) -> tuple[Array, list[Array], Array]:
    """A base, models, and the exact deltas of their float32 differences."""
    rng = np.random.default_rng([count, seed])
    base = rng.normal(0, 0.02, NUM).astype(np.float32)
    models = [base + rng.normal(0, 1e-3, NUM).astype(np.float32) for _ in range(count)]
    return base, models, np.stack([(m - base).astype(np.float64) for m in models])


def views(arrays: list[Array]) -> list[View]:
    return [view(x) for x in arrays]


def bits(limit: float) -> int:
    return int(np.float32(limit).view(np.int32))


@pytest.mark.parametrize("elect", ["weighted", "plain", "none"])
@pytest.mark.parametrize("combine", ["mean", "count", "sum", "max"])
def test_disjoint_merge_is_the_published_rule(elect: str, combine: str) -> None:
    """Trim, drop, weigh, elect, combine what agrees, divide, scale, add: spec 3.0 and 3.1."""
    count = 5
    base, models, tau = task_vectors(count)
    rng = np.random.default_rng(1)
    weights, ratios = rng.uniform(0.1, 1, count), rng.uniform(1, 2, count)
    limit, outlier, density = 4e-4, 3e-3, 0.7
    keep = Keep(bits(limit), 0, bits(outlier), 0, int(density * 2**32), 11)
    size = np.abs(tau)
    drawn = draws(11, 40 + np.arange(NUM)).astype(np.float64) < int(density * 2**32)
    mask = (size > np.float64(np.float32(limit))) & (size <= np.float64(np.float32(outlier)))
    mask = mask & drawn
    votes = np.where(mask, weights[:, None] * ratios[:, None] * tau, 0)
    ballots = votes if elect == "weighted" else np.where(mask, ratios[:, None] * tau, 0)
    total = ballots.sum(axis=0)
    chosen = mask
    if elect != "none":
        chosen = np.sign(ballots) == np.where(total >= 0, 1, -1)
    num = np.where(chosen, votes, 0).sum(axis=0)
    if combine == "mean":
        den = np.where(chosen, weights[:, None], 0).sum(axis=0)
        num = num / np.where(den == 0, 1, den)
    elif combine == "count":
        num = num / np.maximum(chosen.sum(axis=0), 1)
    elif combine == "max":
        best = np.argmax(np.where(chosen, np.abs(votes), -1), axis=0)
        num = np.where(chosen.any(axis=0), votes[best, np.arange(NUM)], 0)
    exact = base + num / 0.7 * 1.3

    out = np.empty(NUM, np.float32)
    reference.disjoint_merge(
        view(out), view(base), views(models), list(weights), [keep] * count, 40, elect=elect,
        combine=combine, factors=list(ratios), divisor=0.7, scale=1.3,
    )  # fmt: skip
    clear = np.abs(total) > 30 * ULP * np.abs(ballots).sum(axis=0)
    clear |= ~mask.any(axis=0)
    bound = (
        30 * ULP * (np.abs(base) + np.abs(votes).sum(axis=0) / (0.1 if combine == "mean" else 1))
    )
    assert np.count_nonzero(clear) > 0.999 * NUM
    assert np.all((np.abs(out - exact) <= bound)[clear])


@pytest.mark.parametrize(("zero_sign", "sign"), [(1, 1.0), (-1, -1.0), (0, 0.0)])
def test_a_tied_election_goes_where_it_is_told(zero_sign: int, sign: float) -> None:
    deltas = [np.array([1, -2, 0], np.float32), np.array([-1, 2, 0], np.float32)]
    out = np.empty(3, np.float32)
    reference.disjoint_merge(
        view(out), None, views(deltas), [1, 1], [Keep()] * 2, 0, zero_sign=zero_sign
    )
    np.testing.assert_array_equal(out, np.array([1, 2, 0]) * sign)


def test_ties_and_weights_that_cancel() -> None:
    """Of equal votes the first is taken, weights that sum to 0 divide by 1, and the election of
    elect_max gives a tie to minus."""
    up, down, out = (np.array([x], np.float32) for x in (2, -2, 7))
    keeps = [Keep()] * 2
    for first, second in ((up, down), (down, up)):
        reference.disjoint_merge(
            view(out), None, views([first, second]), [1, 1], keeps, 0, elect="none", combine="max"
        )
        assert out[0] == first[0]
    reference.disjoint_merge(view(out), None, views([up, down]), [1, -1], keeps, 0)
    assert out[0] == 4
    zero = np.zeros(1, np.float32)
    reference.elect_max(view(out), view(zero), views([up, down]))
    assert out[0] == -2


def test_votes_are_counted_by_sign() -> None:
    base, models, tau = task_vectors(3)
    limit = np.float64(np.float32(8e-4))
    total = (np.array([[1.0], [2.0], [0.5]]) * np.where(np.abs(tau) > limit, tau, 0)).sum(axis=0)
    keeps = [Keep(bits(8e-4))] * 3
    plus, minus = reference.count_votes(view(base), views(models), [1, 2, 0.5], keeps, 0)
    unsure = np.count_nonzero(np.abs(total) < 1e-10) - np.count_nonzero(total == 0)
    assert abs(plus - np.count_nonzero(total > 0)) <= unsure
    assert abs(minus - np.count_nonzero(total < 0)) <= unsure
    assert plus + minus < NUM


def test_kept_sums_are_the_exact_sums() -> None:
    base, models, tau = task_vectors(2)
    limit = np.float64(np.float32(1e-3))
    keeps = [Keep(bits(1e-3)), Keep(draws=2**31, seed=5)]
    found = reference.kept_sums(view(base), views(models), keeps, 0, span=3000)
    assert found.shape == (7, 2, 3)
    for i, mask in enumerate((np.abs(tau[0]) > limit, draws(5, np.arange(NUM)) < 2**31)):
        for span, first in enumerate(range(0, NUM, 3000)):
            size = np.abs(tau[i, first : first + 3000])
            kept = size[mask[first : first + 3000]]
            for sum_, terms in zip(found[span, i], (size, kept, kept * kept), strict=True):
                assert abs(sum_ - math.fsum(terms)) <= 1e-12 * math.fsum(terms)


def test_gram_is_the_exact_inner_product() -> None:
    base, models, tau = task_vectors(3)
    pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    found = reference.gram_n(view(base), views(models), span=NUM)
    for sum_, (i, j) in zip(found[0], pairs, strict=True):
        exact = math.fsum(tau[i] * tau[j])
        assert abs(sum_ - exact) <= 1e-12 * math.fsum(np.abs(tau[i] * tau[j]))
    columns = np.full((6, 50), 2.0)
    reference.gram_columns(view(base), views(models), columns, columns=50)
    for sums, (i, j) in zip(columns, pairs, strict=True):
        exact = (tau[i] * tau[j]).reshape(-1, 50).sum(axis=0)
        np.testing.assert_allclose(sums - 2.0, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_a_grid_of_weights_is_a_product(along: str) -> None:
    base, models, tau = task_vectors(2)
    rows = 100
    weights = np.random.default_rng(0).normal(size=(2, rows if along == "rows" else NUM // rows))
    w = weights.astype(np.float32).astype(np.float64)
    w = w[:, :, None] if along == "rows" else w[:, None, :]
    exact = base + (w * tau.reshape(2, rows, -1)).sum(axis=0).reshape(-1)
    out = np.empty(NUM, np.float32)
    reference.axpy_grid(
        view(out), views(models), weights, columns=NUM // rows, along=along, base=view(base)
    )
    np.testing.assert_allclose(out, exact, rtol=0, atol=8 * ULP * 0.2)


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_lora_is_a_matrix_product(rank: int) -> None:
    rows, columns, scale = 120, 75, 0.25
    rng = np.random.default_rng(rank)
    weight = rng.normal(size=(rows, columns)).astype(np.float32)
    left = rng.normal(size=(rows, rank)).astype(np.float32)
    right = rng.normal(size=(rank, columns)).astype(np.float32)
    factors = rng.uniform(0.5, 2, rows).astype(np.float32)
    product = left.astype(np.float64) @ right.astype(np.float64)
    exact = (weight + scale * product) * factors[:, None].astype(np.float64)
    size = np.abs(left).astype(np.float64) @ np.abs(right)
    bound = (rank + 4) * ULP * (np.abs(weight) + scale * size) * factors[:, None] * 2
    out = np.empty_like(weight)
    options = {"columns": columns, "scale": scale, "factors": factors}
    reference.lora_add(view(out), view(weight), left, right, 0, **options)
    assert np.all(np.abs(out - exact) <= bound)
    part = np.empty(1000, np.float32)
    begin = 1234
    reference.lora_add(
        view(part), view(weight.reshape(-1)[begin : begin + 1000]), left, right, begin, **options
    )
    np.testing.assert_array_equal(part, out.reshape(-1)[begin : begin + 1000])


def test_divergence_and_selection_by_its_score() -> None:
    """spec 2.10, by float64 softmaxes."""
    rows, columns = 40, 333
    rng = np.random.default_rng(3)
    base = rng.normal(0, 2, (rows, columns)).astype(np.float32)
    model = base + rng.normal(0, 0.3, (rows, columns)).astype(np.float32)

    def softmax(x: Array) -> Array:
        e = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
        result: Array = e / e.sum(axis=1, keepdims=True)
        return result

    p, q = softmax(model) + 1e-8, softmax(base) + 1e-8
    exact = (p * np.log(p / q)).sum(axis=1)
    found = reference.row_divergence(view(base), view(model), columns=columns)
    np.testing.assert_allclose(found, exact, rtol=2e-4)
    assert np.all(found > 0)

    out = np.empty((rows, columns), np.float32)
    reference.row_scores(view(out), view(base), view(model), found, columns=columns)
    score = np.abs(model.astype(np.float64) - base) * found[:, None]
    np.testing.assert_allclose(out, score, rtol=1e-5, atol=1e-9)
    limit = float(np.median(out))
    reference.select_by_score(view(out), view(base), view(model), found, limit, columns=columns)
    clear = np.abs(score - limit) > 1e-5 * limit
    np.testing.assert_array_equal(out[clear], np.where(score >= limit, model, base)[clear])


def test_nearswap_clips_the_difference() -> None:
    """out = a + clip(b - a, -t, t), the identity of spec 2.9, where b - a is not tiny; there w is
    limited to 1, so that b comes out."""
    base, models, _ = task_vectors(1)
    models[0][:100] = base[:100] + np.float32(1e-7)
    out = np.empty(NUM, np.float32)
    reference.nearswap(view(out), view(base), view(models[0]), t=7e-4)
    clipped = base + np.clip(models[0].astype(np.float64) - base, -7e-4, 7e-4)
    np.testing.assert_allclose(out, clipped, rtol=0, atol=8 * ULP * 0.2)
    np.testing.assert_array_equal(out[:100], models[0][:100])
    reference.nearswap(view(out), view(base), view(models[0]), t=5e-7)
    half = models[0][:100].astype(np.float64) * 0.5 + base[:100] * 0.5
    np.testing.assert_allclose(out[:100], half, rtol=0, atol=8 * ULP * 0.2)


@pytest.mark.parametrize("count", [2, 7])
def test_variance_is_that_of_numpy(count: int) -> None:
    base, models, tau = task_vectors(count)
    out = np.empty(NUM, np.float32)
    reference.variance_score(view(out), view(base), views(models))
    np.testing.assert_allclose(out, tau.var(axis=0), rtol=1e-4, atol=1e-12)


def test_overlap_is_shared_out() -> None:
    """spec 3.6: what one model changes alone is scaled, what several change is averaged."""
    base, models, tau = task_vectors(4)
    epsilon = 9e-4
    active = np.abs(tau) > np.float64(np.float32(epsilon))
    number = active.sum(axis=0)
    counts = reference.overlap_counts(view(base), views(models), epsilon=epsilon)
    np.testing.assert_array_equal(counts[:, 0], active.sum(axis=1))
    np.testing.assert_array_equal(counts[:, 1], (active & (number == 1)).sum(axis=1))
    factors = np.array([1.0, 1.25, 1.5, 2.0])
    shares = np.where(number == 1, factors[:, None], 1 / np.maximum(number, 1))
    exact = base + np.where(active, shares * tau, 0).sum(axis=0)
    out = np.empty(NUM, np.float32)
    reference.overlap_merge(view(out), view(base), views(models), list(factors), epsilon=epsilon)
    np.testing.assert_allclose(out, exact, rtol=0, atol=8 * ULP * 0.2)


def test_magmax_takes_the_largest_and_of_equals_the_last() -> None:
    base, models, tau = task_vectors(5)
    best = tau[np.argmax(np.abs(tau), axis=0), np.arange(NUM)]
    out = np.empty(NUM, np.float32)
    reference.magmax_merge(view(out), view(base), views(models), scale=0.5)
    np.testing.assert_allclose(out, base + 0.5 * best, rtol=0, atol=4 * ULP * 0.2)
    zero, one = np.zeros(1, np.float32), [np.array([x], np.float32) for x in (1, -2, 2)]
    reference.magmax_merge(view(out[:1]), view(zero), views(one), scale=1)
    assert out[0] == 2


def unpacked(masks: list[Array], num: int) -> Array:
    return np.stack([np.unpackbits(m, count=num, bitorder="little") for m in masks]).astype(bool)


@pytest.mark.parametrize("num", [NUM, 1, 7, 9])
def test_tall_masks_and_the_consensus_that_they_make(num: int) -> None:
    """TALL masks: |tau_i| > lambda_i |tau_MTL - tau_i|; consensus keeps what enough tasks use."""
    base, models, tau = task_vectors(4)
    base, models, tau = base[:num], [m[:num] for m in models], tau[:, :num]
    limits = [0.2, 0.4, 0.6, 0.3]
    total = tau.sum(axis=0)
    left, right = np.abs(tau), np.array(limits)[:, None] * np.abs(total - tau)
    used = left > right
    clear = (np.abs(left - right) > 1e-6 * (left + right)).all(axis=0)
    assert np.count_nonzero(clear) > 0.999 * num - 1
    masks = [np.full(-(-num // 8), 0xFF, np.uint8) for _ in models]
    reference.tall_masks([m.ctypes.data for m in masks], view(base), views(models), limits)
    np.testing.assert_array_equal(unpacked(masks, num)[:, clear], used[:, clear])
    if num % 8:
        assert all(m[-1] >> num % 8 == 0 for m in masks)

    out = np.empty(num, np.float32)
    reference.consensus_merge(view(out), view(base), views(models), limits, minimum=2, scale=0.3)
    exact = base + 0.3 * np.where(used.sum(axis=0) >= 2, total, 0)
    np.testing.assert_allclose(out[clear], exact[clear], rtol=0, atol=8 * ULP * 0.2)


def test_emr_elects_masks_and_rescales() -> None:
    """spec 3.9: the elected vector, a mask per task, and sums whose ratio scales a task."""
    base, models, tau = task_vectors(3)
    total = tau.sum(axis=0)
    agrees = np.where(total > 0, tau > 0, tau < 0)
    clear = np.abs(total) > 1e-8
    best = np.argmax(np.where(agrees, np.abs(tau), -1), axis=0)
    elected = np.where(agrees.any(axis=0), tau[best, np.arange(NUM)], 0)
    vector = np.empty(NUM, np.float32)
    reference.elect_max(view(vector), view(base), views(models))
    np.testing.assert_array_equal(vector[clear], elected.astype(np.float32)[clear])

    masks = [np.full(-(-NUM // 8), 0xAA, np.uint8) for _ in models]
    addresses = [m.ctypes.data for m in masks]
    reference.elect_masks(addresses, view(base), views(models))
    found = unpacked(masks, NUM)
    np.testing.assert_array_equal(found[:, clear], agrees[:, clear])

    sums = reference.masked_sums(view(vector), addresses, span=NUM)
    for sum_, mask in zip(sums[0], found, strict=True):
        assert abs(sum_ - math.fsum(np.abs(vector[mask].astype(np.float64)))) < 1e-9
    out = np.empty(NUM, np.float32)
    reference.apply_task(view(out), view(base), view(vector), addresses[1], scale=0.8)
    exact = base + 0.8 * np.where(found[1], vector, 0)
    np.testing.assert_allclose(out, exact, rtol=0, atol=4 * ULP * 0.2)


def pcb_of_the_paper(tau: Array, mode: str, q: float, ratio: float) -> tuple[Array, list[Any]]:
    """The whole-vector form of spec 3.7 in float64: the merged vector, the scores, the limits."""
    count, d = tau.shape
    size = np.sort(np.abs(tau), axis=1)
    lows, highs = size[:, int(d * q)], size[:, int(d * (1 - q) - 1)]
    a = np.clip(np.abs(tau), lows[:, None], highs[:, None])
    clipped = np.sign(tau) * a
    normal = (a - a.min(axis=1, keepdims=True)) / np.ptp(a, axis=1)[:, None]
    signed = np.sign(tau) * normal
    intra = np.exp(count * normal**2)
    if mode == "raw":
        inter = np.tanh(tau * tau.sum(axis=0))
    elif mode == "normalized":
        inter = np.tanh(tau * signed.sum(axis=0))
    else:
        inter = np.tanh(signed[:, None, :] * signed[None, :, :]).sum(axis=1)
    score = intra * inter
    cuts, tops = np.sort(score, axis=1)[:, int(d * (1 - ratio))], score.max(axis=1)
    kept = np.clip(score, cuts[:, None], tops[:, None]) - cuts[:, None]
    kept /= (tops - cuts)[:, None]
    merged = (kept * clipped).sum(axis=0) / np.maximum(kept.sum(axis=0), 1e-12)
    return merged, [score, lows, highs, cuts, tops, kept]


@pytest.mark.parametrize("mode", ["raw", "normalized", "pairwise"])
def test_pcb_is_the_whole_vector_form(mode: str) -> None:
    base, models, tau = task_vectors(4)
    merged, (score, lows, highs, cuts, tops, kept) = pcb_of_the_paper(tau, mode, 0.01, 0.3)
    limits = (list(lows), list(highs))
    for part in (1, -1):
        out = np.empty(NUM, np.float32)
        reference.pcb_score(view(out), view(base), views(models), 2, *limits, mode=mode, part=part)
        # Near 0 the score is a difference of nearly equal deltas: as exact as those are.
        np.testing.assert_allclose(
            out, np.maximum(part * score[2], 0), rtol=1e-4, atol=1e-6 * np.abs(score[2]).max()
        )
    reference.pcb_merge(
        view(out), view(base), views(models), *limits, list(cuts), list(tops), [1.0] * 4,
        mode=mode, scale=0.9,
    )  # fmt: skip
    # A survivor just above the cut has a share that is rounding alone.
    weight = kept.sum(axis=0)
    clear = (weight == 0) | (weight > 1e-3)
    assert np.count_nonzero(clear & (weight > 0)) > 0.3 * NUM
    size = np.abs(tau).max(axis=0) + np.abs(base)
    error = np.abs(out - (base + 0.9 * merged))
    unsure = (np.abs(score - cuts[:, None]) < 1e-6 * tops[:, None]).any(axis=0) & (weight < 1e-3)
    assert np.all((error <= 1e-3 * np.abs(tau).max(axis=0) + 8 * ULP * size)[clear & ~unsure])


def test_models_may_be_weighted_in_pcb() -> None:
    base, models, tau = task_vectors(3)
    _, (_, lows, highs, cuts, tops, kept) = pcb_of_the_paper(tau, "normalized", 0.01, 0.5)
    weights = np.array([0.5, 1.0, 2.0])
    a = np.clip(np.abs(tau), lows[:, None], highs[:, None])
    num = (weights[:, None] * kept * np.sign(tau) * a).sum(axis=0)
    exact = base + num / np.maximum(kept.sum(axis=0), 1e-12)
    out = np.empty(NUM, np.float32)
    reference.pcb_merge(
        view(out), view(base), views(models), list(lows), list(highs), list(cuts), list(tops),
        list(weights), mode="normalized", scale=1.0,
    )  # fmt: skip
    clear = kept.sum(axis=0) > 1e-2
    assert np.all((np.abs(out - exact) <= 1e-3 * np.abs(tau).max(axis=0) + 1e-8)[clear])


def test_bad_values_stay_visible() -> None:
    """A NaN of any model is a NaN of the result in every map that takes all models; an infinity
    is not finite there either."""
    base = np.zeros(3, np.float32)
    models = [np.array([np.nan, 1, 2], np.float32), np.array([1, np.inf, -2], np.float32)]
    out = np.empty(3, np.float32)
    given = (view(base), views(models))
    runs = {
        "elect_max": lambda: reference.elect_max(view(out), *given),
        "magmax_merge": lambda: reference.magmax_merge(view(out), *given, scale=1),
        "overlap_merge": lambda: reference.overlap_merge(view(out), *given, [1, 1], epsilon=1e-5),
        "variance_score": lambda: reference.variance_score(view(out), *given),
        "consensus_merge": lambda: reference.consensus_merge(
            view(out), *given, [0.4, 0.4], minimum=1, scale=1
        ),
        "disjoint_merge": lambda: reference.disjoint_merge(
            view(out), *given, [1, 1], [Keep(), Keep()], 0
        ),
    }
    for name, run in runs.items():
        bad = run()
        assert np.isnan(out[0]), name
        assert not np.isfinite(out[1]), name
        assert np.isfinite(out[2]), name
        assert bad == 2, name

"""The reference's building blocks against other truths: published answers, float64, scipy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pymerge.formats import F32
from pymerge.ops import View, reference, view
from pymerge.ops.reference import elementary
from pymerge.ops.reference.elements import span_sums
from pymerge.ops.reference.merge import kept_mask
from pymerge.ops.reference.philox import draws, philox
from pymerge.ops.selection import NAN_KEY, Keep

ALL_ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: str
) -> None:
    """The known answers that come with Random123."""
    found = philox(np.array(counter, np.uint64)[:, None], key)[:, 0]
    assert " ".join(f"{word:08x}" for word in found) == words


def philox_by_integers(index: int, seed: int) -> int:
    """The draw of an element by Python's own integers, from the paper's description."""
    counter = [index // 4 % 2**32, index // 4 // 2**32, 0, 0]
    key = [seed % 2**32, seed // 2**32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second // 2**32 ^ counter[1] ^ key[0],
            second % 2**32,
            first // 2**32 ^ counter[3] ^ key[1],
            first % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter[index % 4]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF])
def test_a_draw_is_a_function_of_seed_and_index(seed: int) -> None:
    for start in (0, 3, 2**31 - 2, 2**34 - 3, 2**40 + 1, 2**61):
        found = draws(seed, start + np.arange(9))
        assert found.tolist() == [philox_by_integers(start + i, seed) for i in range(9)]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9])
def test_draws_keep_the_share_that_was_asked_for(share: float) -> None:
    """Within 5 sigma, in every lane, and independently of a neighbour and of another seed."""
    num = 1 << 18
    limit = math.floor(share * 2**32)
    index = np.arange(num, dtype=np.int64)
    kept = draws(12345, index) < limit
    other = draws(12346, index) < limit

    def near(found: int, chance: float, trials: int) -> bool:
        return abs(found - chance * trials) <= 5 * math.sqrt(trials * chance * (1 - chance))

    for lane in range(4):
        assert near(np.count_nonzero(kept[lane::4]), share, num // 4)
    assert near(np.count_nonzero(kept[1::2] & kept[::2]), share**2, num // 2)
    assert near(np.count_nonzero(kept & other), share**2, num)


def test_a_keep_is_what_its_definition_says() -> None:
    """Element by element, in plain Python."""
    rng = np.random.default_rng(4)
    key = rng.choice([0, 1, 5, 6, 7, 9, 0x7F800000, NAN_KEY], 3000).astype(np.int32)
    start = 2**33 + 3
    for keep in (
        Keep(),
        Keep(5, start + 1500),
        Keep(1, start + 700, 7, start + 2000),
        Keep(-1, 0, 6, 0),
        Keep(-(2**31), 0, -1, 0),
        Keep(0, start, draws=2**31, seed=9),
        Keep(5, start + 100, 9, start + 2999, 3 * 2**30, 2**63 + 1),
    ):
        found = kept_mask(key, keep, start)
        for place, k in enumerate(key.tolist()):
            index = start + place
            kept = k > keep.threshold or (k == keep.threshold and index < keep.cutoff)
            cut = k > keep.ceiling or (k == keep.ceiling and index < keep.ceiling_cutoff)
            kept = kept and not (cut and k != NAN_KEY)
            kept = kept and (philox_by_integers(index, keep.seed) < keep.draws or k == NAN_KEY)
            assert bool(found[place]) == kept, (keep, place)


def ulps(found: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The error in units in the last place of the exact value's float32."""
    return np.abs(found.astype(np.float64) - exact) / np.spacing(
        np.abs(exact).astype(np.float32)
    ).astype(np.float64)


Function = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


@pytest.mark.parametrize(
    ("ours", "exact", "low", "high"),
    [
        (elementary.exp, np.exp, -87.3, 88.7),
        (elementary.exp, np.exp, -1e-3, 1e-3),
        (elementary.log, np.log, 0.5, 2.0),
        (elementary.log, np.log, 1e-30, 1e30),
        (elementary.tanh, np.tanh, -9.5, 9.5),
        (elementary.tanh, np.tanh, -0.7, 0.7),
        (elementary.tanh, np.tanh, -1e-3, 1e-3),
    ],
    ids=["exp", "exp-near-0", "log-near-1", "log", "tanh", "tanh-split", "tanh-near-0"],
)
def test_elementary_functions_are_within_two_units(
    ours: Function, exact: Function, low: float, high: float
) -> None:
    rng = np.random.default_rng(2)
    x = rng.uniform(low, high, 300_000).astype(np.float32)
    if low > 0:
        x = np.exp(rng.uniform(math.log(low), math.log(high), 300_000)).astype(np.float32)
    truth = exact(x.astype(np.float64))
    far = np.abs(truth) >= np.finfo(np.float32).tiny
    assert np.max(ulps(ours(x), truth)[far]) <= 2.0


def test_elementary_functions_at_their_ends() -> None:
    inf, nan = np.float32(np.inf), np.float32(np.nan)

    def at(function: Function, *x: float) -> list[float]:
        return [float(y) for y in function(np.array(x, np.float32))]

    assert at(elementary.exp, 0, -0.0, inf, -inf, 89, -88) == [1, 1, inf, 0, inf, 0]
    assert at(elementary.log, 1, inf) == [0, inf]
    assert all(math.isnan(y) for y in at(elementary.log, 0, -0.0, -1, nan, 1e-40, -inf))
    assert at(elementary.tanh, 0, inf, -inf, 20, -20) == [0, 1, -1, 1, -1]
    assert math.isnan(at(elementary.tanh, nan)[0])
    assert math.isnan(at(elementary.exp, nan)[0])
    tiny = np.array([1e-42, -1e-30, 3e-8], np.float32)
    np.testing.assert_array_equal(elementary.tanh(tiny), tiny)


@pytest.mark.parametrize("num", [0, 1, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("span", [1, 7, 64, 1000, 10**12])
def test_span_sums_are_the_sums_of_their_spans(num: int, span: int) -> None:
    values = np.random.default_rng(num).normal(size=num)
    found = span_sums(values, span)
    parts = [values[i : i + span] for i in range(0, num, span)]
    assert len(found) == len(parts)
    for sum_, part in zip(found, parts, strict=True):
        bound = len(part) * 2.0**-53 * np.abs(part).sum()
        assert abs(sum_ - math.fsum(part)) <= bound


def test_span_sums_add_in_the_order_of_their_definition() -> None:
    """Lane by lane in plain Python: other orders give other bits."""
    values = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(1000) ** 0.3
    lanes = [0.0] * 64
    for i, x in enumerate(values.tolist()):
        lanes[i % 64] += x
    width = 32
    while width:
        lanes = [lanes[i] + lanes[i + width] for i in range(width)]
        width //= 2
    assert span_sums(values, 1000)[0] == lanes[0]
    assert lanes[0] != sum(values.tolist())


@pytest.mark.parametrize("columns", [1, 2, 7, 500])
@pytest.mark.parametrize("content", ["distinct", "ties", "zeros and NaN"])
def test_ranks_are_those_of_a_stable_sort(columns: int, content: str) -> None:
    """row_sparsify keeps ranks [first, last): scipy's ordinal ranks of the row read backwards, so
    that of equal magnitudes the lower index ranks higher."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(6, columns)).astype(np.float32)
    if content != "distinct":
        x = rng.choice(np.array([0, -0.0, 1, -1, 2], np.float32), (6, columns))
    if content == "zeros and NaN":
        x[rng.random(x.shape) < 0.2] = np.nan
    size = np.where(np.isnan(x), 1e30, np.abs(x))
    ranks = stats.rankdata(size[:, ::-1], method="ordinal", axis=1)[:, ::-1] - 1
    for first, last in ((0, columns), (columns // 3, columns), (1, max(columns - 2, 0))):
        out = np.empty_like(x)
        reference.row_sparsify(view(out), None, view(x), 0, columns=columns, first=first, last=last)
        expected = np.where((ranks >= first) & (ranks < last) | np.isnan(x), x, 0)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("columns", [1, 9, 128])
def test_rows_are_drawn_with_a_probability_linear_in_the_rank(columns: int) -> None:
    """spec 3.3: p = (d - eps) + 2 eps rank / (n - 1), the mean where a row has one element; what
    stays is divided by p, so that the expectation of an element is its delta."""
    num_rows, density, epsilon = 4000, 0.5, 0.3
    rng = np.random.default_rng(columns)
    x = rng.permuted(np.tile(np.arange(1, columns + 1), (num_rows, 1)), axis=1).astype(np.float32)
    out = np.empty_like(x)
    reference.row_sparsify(
        view(out), None, view(x), 7, columns=columns, draws_low=int((density - epsilon) * 2**32),
        draws_span=int(2 * epsilon * 2**32), seed=3, rescale=True,
    )  # fmt: skip
    for rank in range(columns):
        p = density if columns == 1 else density - epsilon + 2 * epsilon * rank / (columns - 1)
        mine = out[x == rank + 1]
        kept = np.count_nonzero(mine)
        assert abs(kept - p * num_rows) <= 5 * math.sqrt(num_rows * p * (1 - p))
        np.testing.assert_allclose(mine[mine != 0], (rank + 1) / p, rtol=1e-6)


def test_views_of_nothing() -> None:
    nothing = View(0, F32.code or 0, 0)
    assert reference.gram_n(None, [nothing], span=5).shape == (0, 1)
    assert reference.count_nonfinite(nothing) == 0
    assert reference.row_divergence(nothing, nothing, columns=4).shape == (0,)

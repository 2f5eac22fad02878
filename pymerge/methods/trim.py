"""Exact selection of the k largest magnitudes of each task vector, without sorting it.

A magnitude is known by its *key*, the bits of |delta| as an integer, which order like the
magnitudes. The outcome for each model is a :class:`Trim`: keep keys above ``threshold``, and of the
keys equal to it those at an index below ``cutoff``. That is a pure function of key and index, so
the apply pass needs no state, and exactly k elements are kept whatever the tiles, threads and
backend: equal magnitudes in index order.

A tensor is trimmed in two looks: a sample brackets the threshold, then one sweep counts what lies
above the bracket and collects what lies inside it. The counts prove the answer; where the sample
misled, a histogram of the keys' high and low halves gives it instead. Whole models always take the
histogram: it never holds more than a table.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge.methods.protocol import Measure, ModelMeasuring, Tensor, Tile

#: What a method that trims must name among its ops.
TRIM_OPS = ("magnitude_sample", "bracket_count", "magnitude_histogram", "locate_equal")

ABOVE_ALL = 0x7FFFFFFF
BELOW_ALL = -1
NAN_KEY = 0x7FC00000

#: Tensors up to this size are collected whole: a sample would cost more than it saves.
COLLECT_LIMIT = 1 << 18
SAMPLE_GROUP = 8
#: Elements sampled: enough for a narrow bracket, more for a tensor so large that 1 % of it is much.
SAMPLE_SIZE = 1 << 17
SAMPLE_SHARE = 512
#: Neighbouring elements are correlated, so the bracket is wider than independent draws would need.
BRACKET_SIGMAS = 8.0
#: Inside the bracket at most this share of a tile is collected, and so many keys of a model; more
#: means that the sample misled.
CAPACITY_SHARE = 16
CAPACITY = 1 << 23

LOOK_SHIFT = 15
LOOK_BINS = 1 << 16
REFINE_BINS = 1 << 15


@dataclass(frozen=True)
class Trim:
    """Keep ``key > threshold``, or ``key == threshold`` at an index below ``cutoff``."""

    threshold: int
    cutoff: int


@dataclass(frozen=True)
class Quota:
    """A threshold whose ties are not placed yet: of ``num_ties`` equal keys the first ``kept``
    stay."""

    threshold: int
    kept: int
    num_ties: int


Trimming = Generator[Measure, Any, list[Trim]]


def trim_tensor(tensor: Tensor, keep: Sequence[int]) -> Trimming:
    """The trim of each model of one tensor that keeps ``keep[i]`` elements of model i."""
    n = tensor.num_elements
    if all(k == 0 or k >= n for k in keep):
        return [_trivial(k, n) for k in keep]
    if n <= COLLECT_LIMIT:
        low = np.full(tensor.num_models, BELOW_ALL, np.int32)
        high = np.full(tensor.num_models, ABOVE_ALL, np.int32)
        share = 1.0
    else:
        stride = max(1, n // max(SAMPLE_SIZE, n // SAMPLE_SHARE))
        samples = yield Measure(
            lambda tile: tensor.ops.magnitude_sample(
                tile.base, tile.models, tile.start, group=SAMPLE_GROUP, stride=stride
            )
        )
        low, high = _bracket(np.concatenate(samples, axis=1), keep, n)
        share = min(1 / CAPACITY_SHARE, CAPACITY / n)
    tiles = yield Measure(
        lambda tile: tensor.ops.bracket_count(
            tile.base, tile.models, low, high, max(1024, int(tile.num * share))
        )
    )
    trims: list[Trim | None] = []
    for model, k in enumerate(keep):
        if k == 0 or k >= n:
            trims.append(_trivial(k, n))
            continue
        counts = np.stack([tile_counts[model] for tile_counts, _ in tiles])
        found = [candidates[model] for _, candidates in tiles]
        quota, ties = _rank(k, counts, found, int(low[model]), int(high[model]))
        if quota is None:
            trims.append(None)
        else:
            trims.append((yield from _place(tensor, model, quota, ties)))
    if None in trims:
        missed = [model for model, trim in enumerate(trims) if trim is None]
        rescued = yield from _trim_by_histogram(tensor, [keep[model] for model in missed], missed)
        for model, trim in zip(missed, rescued, strict=True):
            trims[model] = trim
    return [trim for trim in trims if trim is not None]


def trim_model(tensors: Sequence[Tensor], keep: Sequence[int]) -> ModelMeasuring:
    """Quotas of every tensor such that model i keeps ``keep[i]`` elements over all tensors
    together.

    Ties are kept in the order of the tensors, then of the index.
    """
    ops, models = tensors[0].ops, tensors[0].num_models
    total = sum(tensor.num_elements for tensor in tensors)
    if total == 0:
        return {tensor.name: [Quota(ABOVE_ALL, 0, 0)] * models for tensor in tensors}
    thresholds, kept = yield from _threshold_by_histogram(ops, keep, range(models), total)
    equal = yield Measure(
        lambda tile: ops.bracket_count(tile.base, tile.models, thresholds, thresholds, 0)[0][:, 1]
    )
    left = list(kept)
    quotas: dict[str, list[Quota]] = {}
    for tensor in tensors:
        ties = np.sum(equal[tensor.name], axis=0) if equal[tensor.name] else np.zeros(models, int)
        row = []
        for model in range(models):
            count = int(ties[model])
            stays = min(count, left[model])
            left[model] -= stays
            row.append(Quota(int(thresholds[model]), stays, count))
        quotas[tensor.name] = row
    return quotas


def locate_cutoffs(tensor: Tensor, quotas: Sequence[Quota]) -> Trimming:
    """Turn the quotas of one tensor into trims; only a tensor that splits its ties is looked at."""
    split = any(0 < quota.kept < quota.num_ties for quota in quotas)
    ties: NDArray[np.int64] | None = None
    if split:
        thresholds = np.array([quota.threshold for quota in quotas], np.int32)
        tiles = yield Measure(
            lambda tile: tensor.ops.bracket_count(
                tile.base, tile.models, thresholds, thresholds, 0
            )[0][:, 1]
        )
        ties = np.stack(tiles)  # [num_tiles, num_models]
    trims = []
    for model, quota in enumerate(quotas):
        counts = np.zeros(0, np.int64) if ties is None else ties[:, model]
        trims.append((yield from _place(tensor, model, quota, counts)))
    return trims


def _trivial(k: int, n: int) -> Trim:
    return Trim(ABOVE_ALL, 0) if k == 0 else Trim(BELOW_ALL, n)


def _bracket(
    samples: NDArray[np.int32], keep: Sequence[int], n: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Keys that enclose the k-th largest with near certainty, from sampled keys [models, m]."""
    m = samples.shape[1]
    low = np.full(len(keep), BELOW_ALL, np.int32)
    high = np.full(len(keep), ABOVE_ALL, np.int32)
    for model, k in enumerate(keep):
        share = k / n
        margin = BRACKET_SIGMAS * (m * share * (1 - share)) ** 0.5 + 1
        first, last = int(m * share - margin), int(m * share + margin) + 1
        descending = -samples[model]
        if first > 0:
            high[model] = -np.partition(descending, first)[first]
        if last < m:
            low[model] = -np.partition(descending, last)[last]
    return low, high


def _rank(
    k: int,
    counts: NDArray[np.int64],
    found: Sequence[NDArray[np.int32]],
    low: int,
    high: int,
) -> tuple[Quota | None, NDArray[np.int64]]:
    """The key of rank k and its ties in each tile, or None where the bracket does not hold it.

    ``counts`` [num_tiles, 4]: keys above, equal to high, equal to low, strictly between.
    """
    above, at_high, at_low, between = (int(total) for total in counts.sum(axis=0))
    if k <= above or k > above + at_high + between + at_low:
        return None, counts[:, 0]
    if k <= above + at_high:
        return Quota(high, k - above, at_high), counts[:, 1]
    rank = k - above - at_high
    if rank <= between:
        if any(len(keys) < count for keys, count in zip(found, counts[:, 3], strict=True)):
            return None, counts[:, 0]
        keys = np.concatenate(found)
        keys.partition(between - rank)
        threshold = int(keys[between - rank])
        larger = int(np.count_nonzero(keys > threshold))
        ties = np.array([np.count_nonzero(keys == threshold) for keys in found], np.int64)
        return Quota(threshold, rank - larger, int(ties.sum())), ties
    return Quota(low, rank - between, at_low), counts[:, 2]


def _place(
    tensor: Tensor, model: int, quota: Quota, ties: NDArray[np.int64]
) -> Generator[Measure, Any, Trim]:
    """The cutoff index of a quota, given the number of ties in each tile."""
    if quota.kept == quota.num_ties or quota.threshold == NAN_KEY:  # no NaN is ever trimmed away
        return Trim(quota.threshold, tensor.num_elements)
    if quota.kept == 0:
        return Trim(quota.threshold, 0)
    ends = np.cumsum(ties)
    index = int(np.searchsorted(ends, quota.kept, side="right"))
    nth = quota.kept - int(ends[index] - ties[index])

    def locate(tile: Tile) -> int:
        local, _ = tensor.ops.locate_equal(tile.base, tile.models[model], quota.threshold, nth)
        return tile.start + int(local)

    (cutoff,) = yield Measure(locate, only=index)
    return Trim(quota.threshold, cutoff)


def _threshold_by_histogram(
    ops: Any, keep: Sequence[int], models: Sequence[int], total: int
) -> Generator[Measure, Any, tuple[NDArray[np.int32], list[int]]]:
    """The k-th largest key of each model in two looks, and how many keys equal to it are kept."""

    def look(tile: Tile) -> NDArray[np.uint64]:
        counts = np.zeros((len(models), LOOK_BINS), np.uint64)
        chosen = tuple(tile.models[model] for model in models)
        ops.magnitude_histogram(tile.base, chosen, counts, shift=LOOK_SHIFT)
        return counts

    high_bins = yield Measure(look, fold=np.add)
    prefix = np.zeros(len(models), np.int32)
    ranks = list(keep)
    for row, k in enumerate(keep):
        prefix[row], ranks[row] = _bin_of_rank(high_bins[row], k)

    def refine(tile: Tile) -> NDArray[np.uint64]:
        counts = np.zeros((len(models), REFINE_BINS), np.uint64)
        chosen = tuple(tile.models[model] for model in models)
        ops.magnitude_histogram(
            tile.base, chosen, counts, shift=0, prefix=prefix, prefix_shift=LOOK_SHIFT
        )
        return counts

    low_bins = yield Measure(refine, fold=np.add)
    thresholds = np.zeros(len(models), np.int32)
    kept = [0] * len(models)
    for row, k in enumerate(keep):
        if k == 0 or k >= total:
            thresholds[row], kept[row] = (ABOVE_ALL, 0) if k == 0 else (BELOW_ALL, 0)
            continue
        low_bin, kept[row] = _bin_of_rank(low_bins[row], ranks[row])
        thresholds[row] = (int(prefix[row]) << LOOK_SHIFT) | low_bin
    return thresholds, kept


def _bin_of_rank(counts: NDArray[np.uint64], k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest key, and k's rank within the bin (from its top)."""
    if k == 0:
        return 0, 0
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k, side="left"))
    place = min(place, len(counts) - 1)
    before = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, k - before


def _trim_by_histogram(tensor: Tensor, keep: Sequence[int], models: Sequence[int]) -> Trimming:
    """The trims of some models of a tensor where the bracket missed."""
    thresholds, kept = yield from _threshold_by_histogram(
        tensor.ops, keep, models, tensor.num_elements
    )

    def count(tile: Tile) -> NDArray[np.int64]:
        chosen = tuple(tile.models[model] for model in models)
        counts, _ = tensor.ops.bracket_count(tile.base, chosen, thresholds, thresholds, 0)
        equal: NDArray[np.int64] = counts[:, 1]
        return equal

    ties = np.stack((yield Measure(count)))  # [num_tiles, num_models]
    trims = []
    for row, model in enumerate(models):
        quota = Quota(int(thresholds[row]), kept[row], int(ties[:, row].sum()))
        trims.append((yield from _place(tensor, model, quota, ties[:, row])))
    return trims

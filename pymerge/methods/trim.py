"""Exact selection of the k largest magnitudes of each task vector, without sorting it.

A magnitude is known by its *key*, the bits of |delta| as an integer, which order like the
magnitudes. The outcome for each model is a :class:`Keep`: keep keys above ``threshold``, and of the
keys equal to it those at an index below ``cutoff``. That is a pure function of key and index, so
the apply pass needs no state, and exactly k elements are kept whatever the tiles, threads and
backend: equal magnitudes in index order.

A tensor is trimmed in two looks: a sample brackets the threshold, then one sweep counts what lies
above the bracket and collects what lies inside it. The counts prove the answer; where the sample
misled, a histogram of the keys' high and low halves gives it instead. Whole models always take the
histogram: it never holds more than a table.

What is ranked need not be the task vectors: ``ranked`` makes of a tile the tiles whose deltas are,
for instance a score in scratch memory, piece by piece (a generator may drop a piece's memory when
the next one is asked for). ``models`` names the model that each rank is asked of, so that one model
can be asked for several.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge.methods.protocol import Measure, ModelMeasuring, Tensor, Tile
from pymerge.ops.opset import OpSet
from pymerge.ops.selection import ABOVE_ALL, BELOW_ALL, NAN_KEY, Keep
from pymerge.ops.view import View

#: What a method that trims must name among its ops.
TRIM_OPS = ("magnitude_sample", "bracket_count", "magnitude_histogram", "locate_equal")
#: What a method must name that only asks for keys over the whole model.
MODEL_KEY_OPS = ("magnitude_histogram",)

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

#: The tiles whose deltas are ranked in place of a tile's.
Ranked = Callable[[Tile], Iterable[Tile]]


def as_it_is(tile: Tile) -> Iterable[Tile]:
    """Rank the task vectors themselves."""
    return (tile,)


@dataclass(frozen=True)
class Quota:
    """A threshold whose ties are not placed yet: of ``num_ties`` equal keys the first ``kept``
    stay."""

    threshold: int
    kept: int
    num_ties: int


#: A quota with the number of its ties in each tile.
Ranking = tuple[Quota, NDArray[np.int64]]
Trimming = Generator[Measure, Any, list[Keep]]
Keys = Generator[Measure, Any, list[int]]


def trim_tensor(
    tensor: Tensor,
    keep: Sequence[int],
    *,
    models: Sequence[int] | None = None,
    ranked: Ranked = as_it_is,
) -> Trimming:
    """The trim that keeps the ``keep[i]`` largest elements of model ``models[i]`` (default: i).

    A small tensor takes one look, a larger one two; one tile more is looked at for each model that
    splits its ties, and where the sample misled there are three looks more.
    """
    n = tensor.num_elements
    models = range(len(keep)) if models is None else models
    asked = [i for i, k in enumerate(keep) if 0 < k < n]
    found = yield from _rank(tensor, [keep[i] for i in asked], [models[i] for i in asked], ranked)
    trims = [Keep(ABOVE_ALL, 0) if k == 0 else Keep(BELOW_ALL, n) for k in keep]
    for i, (quota, ties) in zip(asked, found, strict=True):
        trims[i] = yield from _place(tensor, models[i], quota, ties, ranked)
    return trims


def tensor_keys(
    tensor: Tensor,
    ranks: Sequence[int],
    *,
    models: Sequence[int] | None = None,
    ranked: Ranked = as_it_is,
) -> Keys:
    """The key of the ``ranks[i]``-th largest element, from 1 to all, of model ``models[i]``."""
    models = range(len(ranks)) if models is None else models
    found = yield from _rank(tensor, ranks, models, ranked)
    return [quota.threshold for quota, _ in found]


def model_keys(
    ops: OpSet, ranks: Sequence[int], models: Sequence[int], *, ranked: Ranked = as_it_is
) -> Keys:
    """The same over the tensors of a whole model together, in two looks and a table's memory."""
    thresholds, _ = yield from _keys_by_histogram(ops, ranks, models, ranked)
    return [int(threshold) for threshold in thresholds]


def trim_model(tensors: Sequence[Tensor], keep: Sequence[int]) -> ModelMeasuring:
    """Quotas of every tensor such that model i keeps ``keep[i]`` elements over all tensors
    together.

    Ties are kept in the order of the tensors, then of the index.
    """
    ops, models = tensors[0].ops, tensors[0].num_models
    total = sum(tensor.num_elements for tensor in tensors)
    if total == 0:
        return {tensor.name: [Quota(ABOVE_ALL, 0, 0)] * models for tensor in tensors}
    thresholds, kept = yield from _keys_by_histogram(ops, keep, range(models), as_it_is)
    for model, k in enumerate(keep):
        if k == 0 or k >= total:
            thresholds[model], kept[model] = (ABOVE_ALL, 0) if k == 0 else (BELOW_ALL, 0)
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
        trims.append((yield from _place(tensor, model, quota, counts, as_it_is)))
    return trims


def _rank(
    tensor: Tensor, ranks: Sequence[int], models: Sequence[int], ranked: Ranked
) -> Generator[Measure, Any, list[Ranking]]:
    """The element of each rank: its key, how many of the equal ones it counts, where they are."""
    if not ranks:
        return []
    ops, n = tensor.ops, tensor.num_elements
    if n <= COLLECT_LIMIT:
        low = np.full(len(ranks), BELOW_ALL, np.int32)
        high = np.full(len(ranks), ABOVE_ALL, np.int32)
        share = 1.0
    else:
        stride = max(1, n // max(SAMPLE_SIZE, n // SAMPLE_SHARE))

        def sample(tile: Tile) -> NDArray[np.int32]:
            parts = [
                ops.magnitude_sample(
                    part.base, _chosen(part, models), part.start, group=SAMPLE_GROUP, stride=stride
                )
                for part in ranked(tile)
            ]
            return np.concatenate(parts, axis=1)

        samples = yield Measure(sample)
        low, high = _bracket(np.concatenate(samples, axis=1), ranks, n)
        share = min(1 / CAPACITY_SHARE, CAPACITY / n)

    def count(tile: Tile) -> tuple[NDArray[np.int64], list[NDArray[np.int32]]]:
        counts, inside = [], []
        for part in ranked(tile):
            capacity = max(1024, int(part.num * share))
            some, keys = ops.bracket_count(part.base, _chosen(part, models), low, high, capacity)
            counts.append(some)
            inside.append(keys)
        return np.sum(counts, axis=0), [np.concatenate(keys) for keys in zip(*inside, strict=True)]

    tiles = yield Measure(count)
    found: list[Ranking | None] = []
    for row, k in enumerate(ranks):
        counts = np.stack([tile_counts[row] for tile_counts, _ in tiles])
        keys = [candidates[row] for _, candidates in tiles]
        found.append(_within(k, counts, keys, int(low[row]), int(high[row])))
    missed = [row for row, ranking in enumerate(found) if ranking is None]
    if missed:
        rescued = yield from _rank_by_histogram(
            ops, [ranks[row] for row in missed], [models[row] for row in missed], ranked
        )
        for row, ranking in zip(missed, rescued, strict=True):
            found[row] = ranking
    return [ranking for ranking in found if ranking is not None]


def _chosen(tile: Tile, models: Sequence[int]) -> tuple[View, ...]:
    return tuple(tile.models[model] for model in models)


def _bracket(
    samples: NDArray[np.int32], ranks: Sequence[int], n: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Keys that enclose the k-th largest with near certainty, from sampled keys [ranks, m]."""
    m = samples.shape[1]
    low = np.full(len(ranks), BELOW_ALL, np.int32)
    high = np.full(len(ranks), ABOVE_ALL, np.int32)
    for row, k in enumerate(ranks):
        share = k / n
        margin = BRACKET_SIGMAS * (m * share * (1 - share)) ** 0.5 + 1
        first, last = int(m * share - margin), int(m * share + margin) + 1
        descending = -samples[row]
        if first > 0:
            high[row] = -np.partition(descending, first)[first]
        if last < m:
            low[row] = -np.partition(descending, last)[last]
    return low, high


def _within(
    k: int,
    counts: NDArray[np.int64],
    found: Sequence[NDArray[np.int32]],
    low: int,
    high: int,
) -> Ranking | None:
    """The key of rank k and its ties in each tile, or None where the bracket does not hold it.

    ``counts`` [num_tiles, 4]: keys above, equal to high, equal to low, strictly between.
    """
    above, at_high, at_low, between = (int(total) for total in counts.sum(axis=0))
    if k <= above or k > above + at_high + between + at_low:
        return None
    if k <= above + at_high:
        return Quota(high, k - above, at_high), counts[:, 1]
    rank = k - above - at_high
    if rank <= between:
        if any(len(keys) < count for keys, count in zip(found, counts[:, 3], strict=True)):
            return None
        keys = np.concatenate(found)
        keys.partition(between - rank)
        threshold = int(keys[between - rank])
        larger = int(np.count_nonzero(keys > threshold))
        ties = np.array([np.count_nonzero(keys == threshold) for keys in found], np.int64)
        return Quota(threshold, rank - larger, int(ties.sum())), ties
    return Quota(low, rank - between, at_low), counts[:, 2]


def _place(
    tensor: Tensor, model: int, quota: Quota, ties: NDArray[np.int64], ranked: Ranked
) -> Generator[Measure, Any, Keep]:
    """The cutoff index of a quota, given the number of ties in each tile."""
    if quota.kept == quota.num_ties or quota.threshold == NAN_KEY:  # no NaN is ever trimmed away
        return Keep(quota.threshold, tensor.num_elements)
    if quota.kept == 0:
        return Keep(quota.threshold, 0)
    ends = np.cumsum(ties)
    index = int(np.searchsorted(ends, quota.kept, side="right"))
    nth = quota.kept - int(ends[index] - ties[index])

    def locate(tile: Tile) -> int:
        left = nth
        for part in ranked(tile):
            local, passed = tensor.ops.locate_equal(
                part.base, part.models[model], quota.threshold, left
            )
            if local >= 0:
                return part.start + int(local)
            left -= int(passed)
        raise RuntimeError(f"tensor {tensor.name!r} changed while it was measured")

    (cutoff,) = yield Measure(locate, only=index)
    return Keep(quota.threshold, cutoff)


def _keys_by_histogram(
    ops: OpSet, ranks: Sequence[int], models: Sequence[int], ranked: Ranked
) -> Generator[Measure, Any, tuple[NDArray[np.int32], list[int]]]:
    """The k-th largest key of each model in two looks, and which of the equal ones it is."""

    different = list(dict.fromkeys(models))

    def look(tile: Tile) -> NDArray[np.uint64]:
        counts = np.zeros((len(different), LOOK_BINS), np.uint64)
        for part in ranked(tile):
            ops.magnitude_histogram(part.base, _chosen(part, different), counts, shift=LOOK_SHIFT)
        return counts

    high_bins = yield Measure(look, fold=np.add)
    prefix = np.zeros(len(models), np.int32)
    within = list(ranks)
    for row, (model, k) in enumerate(zip(models, ranks, strict=True)):
        prefix[row], within[row] = _bin_of_rank(high_bins[different.index(model)], k)

    def refine(tile: Tile) -> NDArray[np.uint64]:
        counts = np.zeros((len(models), REFINE_BINS), np.uint64)
        for part in ranked(tile):
            ops.magnitude_histogram(
                part.base,
                _chosen(part, models),
                counts,
                shift=0,
                prefix=prefix,
                prefix_shift=LOOK_SHIFT,
            )
        return counts

    low_bins = yield Measure(refine, fold=np.add)
    thresholds = np.zeros(len(models), np.int32)
    for row, k in enumerate(within):
        low_bin, within[row] = _bin_of_rank(low_bins[row], k)
        thresholds[row] = (int(prefix[row]) << LOOK_SHIFT) | low_bin
    return thresholds, within


def _bin_of_rank(counts: NDArray[np.uint64], k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest key, and k's rank within the bin (from its top)."""
    if k == 0:
        return 0, 0
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k, side="left"))
    place = min(place, len(counts) - 1)
    before = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, k - before


def _rank_by_histogram(
    ops: OpSet, ranks: Sequence[int], models: Sequence[int], ranked: Ranked
) -> Generator[Measure, Any, list[Ranking]]:
    """Ranks where the bracket missed."""
    thresholds, within = yield from _keys_by_histogram(ops, ranks, models, ranked)

    def count(tile: Tile) -> NDArray[np.int64]:
        equal = [
            ops.bracket_count(part.base, _chosen(part, models), thresholds, thresholds, 0)[0][:, 1]
            for part in ranked(tile)
        ]
        total: NDArray[np.int64] = np.sum(equal, axis=0)
        return total

    ties = np.stack((yield Measure(count)))  # [num_tiles, num_ranks]
    return [
        (Quota(int(thresholds[row]), within[row], int(ties[:, row].sum())), ties[:, row])
        for row in range(len(ranks))
    ]

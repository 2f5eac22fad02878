"""How each op that selects, merges or converts runs on a tile, and what it gives.

A run takes a backend, which offers the ops as attributes, and the memory of a tile in the place
where that backend works; it yields names and results, which must be the reference's bit by bit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tiles import Array, Memory, Tile

from pymerge.formats import F32
from pymerge.ops import reference
from pymerge.ops.selection import ABOVE_ALL, BELOW_ALL, NAN_KEY, Keep

Results = Iterator[tuple[str, Any]]
Run = Callable[[Any, Memory], Results]


def some_of(calls: Iterable[Any], tile: Tile) -> list[Any]:
    """All of the calls; of a small tile's a third, another one for each tile."""
    every = list(calls)
    return every[tile.number % 3 :: 3] if tile.small else every


def weights_of(tile: Tile) -> list[float]:
    rng = np.random.default_rng(len(tile.models))
    return [float(w) for w in rng.normal(0.3, 0.4, len(tile.models))]


@functools.lru_cache(maxsize=4)
def keys_of(tile: Tile) -> list[Array]:
    """The sorted keys of each model, with -1 in front so that there is one at least."""
    memory = Memory(tile)
    keys = reference.magnitude_sample(memory.base.view, memory.views, 0, group=1, stride=1)
    return [np.concatenate([[-1], np.sort(row)]).astype(np.int32) for row in keys]


def keys_at(tile: Tile, rank: float) -> list[int]:
    """The key at a share of each model's sorted keys."""
    return [int(row[int(rank * (len(row) - 1))]) for row in keys_of(tile)]


def keeps_of(tile: Tile) -> dict[str, list[Keep]]:
    """Selections of every kind: cut at ties, outliers gone, drawn, extreme, all and nothing."""
    num_models, start, num = len(tile.models), tile.start, tile.num
    ends = [start + c for c in (0, num // 3, num // 2 + 1, num, 10**9)]
    low, middle, high = (keys_at(tile, rank) for rank in (0.3, 0.5, 0.9))
    extremes = [0, -1, ABOVE_ALL, NAN_KEY, 0x7F800000, -(2**31)]
    draws = [0, 1, 2**31, 3 * 2**30, 2**32 - 1, 2**32]
    seeds = [0, 1, 2**32 - 1, 2**64 - 1, 0x123456789ABCDEF0]

    def each(make: Callable[[int], Keep]) -> list[Keep]:
        return [make(i) for i in range(num_models)]

    return {
        "trimmed": each(lambda i: Keep(middle[i], ends[i % 5])),
        "trimmed at other ties": each(lambda i: Keep(middle[i], ends[-1 - i % 5])),
        "outliers cut": each(lambda i: Keep(low[i], ends[i % 5], high[i], ends[(i + 2) % 5])),
        "drawn": each(lambda i: Keep(draws=draws[(i + 2) % 6], seed=seeds[i % 5])),
        "all at once": each(
            lambda i: Keep(low[i], ends[2], high[i], ends[1], draws[2 + i % 3], seeds[i % 5])
        ),
        "extremes": each(
            lambda i: Keep(extremes[i % 6], ends[(i + 1) % 5], extremes[-1 - i % 6], ends[i % 5])
        ),
        "extreme ends": each(
            lambda i: Keep(middle[i], (-(2**63), 2**63 - 1)[i % 2], high[i], 2**63 - 1)
        ),
        "everything": each(lambda i: Keep()),
        "nothing": each(lambda i: Keep(ABOVE_ALL)),
        "some of each": each(lambda i: (Keep(middle[i]), Keep(), Keep(draws=2**31))[i % 3]),
    }


def run_axpy_n(backend: Any, memory: Memory) -> Results:
    weights = weights_of(memory.tile)
    base = {"base": memory.base.view}
    odd = [(np.inf, 0.0, 1e300, -1.0, np.nan, 1e-46)[i % 6] for i in range(len(weights))]
    calls = (
        ("plain", weights, {}),
        ("divided", weights, {"divisor": 0.7}),
        ("divided and scaled", weights, {"scale": 1.3, "divisor": -3.0}),
        ("base", weights, base),
        ("base divided and scaled", weights, {**base, "divisor": 3.0, "scale": 0.9}),
        ("delta alone", weights, {**base, "add_base": False, "scale": -0.1}),
        ("odd weights", odd, {**base, "divisor": 0.0}),
    )
    for name, w, options in some_of(calls, memory.tile):
        out = memory.output()
        yield f"{name} count", backend.axpy_n(out.view, memory.views, w, **options)
        yield name, out.payload


def run_magnitude_sample(backend: Any, memory: Memory) -> Results:
    samples = ((1, 1), (1, 3), (64, 7), (1000, 2), (5, 1), (2**31, 2))
    calls = itertools.product(samples, (memory.base.view, None))
    for (group, stride), base in some_of(calls, memory.tile):
        yield (
            f"group {group} stride {stride} base {base is not None}",
            backend.magnitude_sample(
                base, memory.views, memory.tile.start, group=group, stride=stride
            ),
        )


def run_bracket_count(backend: Any, memory: Memory) -> Results:
    tile = memory.tile
    nothing, everything = [BELOW_ALL] * len(tile.models), [ABOVE_ALL] * len(tile.models)
    brackets = (
        ("narrow", keys_at(tile, 0.7), keys_at(tile, 0.75), 10**6),
        ("one key", keys_at(tile, 0.5), keys_at(tile, 0.5), 100),
        ("all", nothing, everything, 100),
        ("no room", keys_at(tile, 0.1), keys_at(tile, 0.9), 0),
        ("little room", keys_at(tile, 0.1), keys_at(tile, 0.9), 37),
    )
    for bracket, base in some_of(itertools.product(brackets, (memory.base.view, None)), tile):
        name, low, high, capacity = bracket
        counts, candidates = backend.bracket_count(base, memory.views, low, high, capacity)
        yield f"{name} counts {base is not None}", counts
        for i, row in enumerate(candidates):
            yield f"{name} candidates {i} {base is not None}", row


def run_magnitude_histogram(backend: Any, memory: Memory) -> Results:
    num_models = len(memory.tile.models)
    middle = [max(key, 0) for key in keys_at(memory.tile, 0.5)]
    bins: list[tuple[int, int | None, list[int]]] = [(20, None, []), (31, None, [])]
    if num_models <= 4:
        bins.append((15, None, []))
    for shift, prefix_shift in ((9, 20), (0, 10), (20, 20)):
        bins += [(shift, prefix_shift, middle), (shift, prefix_shift, [0] * num_models)]
    calls = itertools.product(bins, (memory.base.view, None))
    for (shift, prefix_shift, keys), base in some_of(calls, memory.tile):
        top = 31 if prefix_shift is None else prefix_shift
        counts = np.full((num_models, 2 ** (top - shift)), 3, np.uint64)
        options: dict[str, Any] = {"shift": shift}
        if prefix_shift is not None:
            options |= {"prefix": [key >> top for key in keys], "prefix_shift": prefix_shift}
        backend.magnitude_histogram(base, memory.views, counts, **options)
        yield f"bits {shift} to {prefix_shift} {keys[:1]} {base is not None}", counts


def run_locate_equal(backend: Any, memory: Memory) -> Results:
    calls = []
    for i, row in enumerate(keys_of(memory.tile)[: 2 if memory.tile.small else 4]):
        for key in sorted({0, max(int(row[len(row) // 2]), 0), int(max(row[-1], 0))}):
            equals = int(np.count_nonzero(row == key))
            nths = {0, equals // 2, max(equals - 1, 0), equals, equals + 5}
            calls += [(i, key, nth) for nth in sorted(nths)]
    for i, key, nth in some_of(calls, memory.tile):
        yield (
            f"model {i} key {key} nth {nth}",
            backend.locate_equal(memory.base.view, memory.views[i], key, nth),
        )
    yield "no base", backend.locate_equal(None, memory.views[0], 0, 0)


def disjoint_variants(tile: Tile) -> list[tuple[str, dict[str, Any]]]:
    """Every election with every combination, over all selections in turn; a third of them, another
    one for each tile, but for the ties that elections are about."""
    num_models = len(tile.models)
    selections = itertools.cycle(keeps_of(tile).items())
    weights = itertools.cycle(
        [weights_of(tile), [1.0] * num_models, weights_of(tile)[::-1], [0.0] * num_models]
    )
    ratios = [1.0 + 0.3 * i for i in range(num_models)]
    extras = itertools.cycle(
        [{}, {"scale": 0.7}, {"factors": ratios}, {"divisor": -3.0, "scale": 1.5}]
    )
    variants = []
    for zero_sign, elect, combine in itertools.product(
        (1, -1, 0), ("weighted", "plain", "none"), ("mean", "count", "sum", "max")
    ):
        keeps_name, keeps = next(selections)
        options = {"elect": elect, "combine": combine, "zero_sign": zero_sign, **next(extras)}
        variants.append(
            (
                f"{len(variants)} {keeps_name} {options}",
                {"weights": next(weights), "keeps": keeps, **options},
            )
        )
    if tile.content == "ties" and not tile.small:
        return variants
    return some_of(variants[tile.number % 3 :: 3], tile)


def run_disjoint_merge(backend: Any, memory: Memory) -> Results:
    tile, base = memory.tile, memory.base.view
    score = memory.score().view
    variants = disjoint_variants(tile)
    first, second, third = (variants[(tile.number + i) % len(variants)][1] for i in (1, 2, 3))
    calls = [(name, base, options) for name, options in variants]
    calls += [
        ("defaults", base, {"weights": first["weights"], "keeps": first["keeps"]}),
        ("no base", None, first),
        ("score", base, {**second, "score": score}),
        ("deltas", base, {**third, "deltas": True}),
        ("score, deltas and no base", None, {**first, "deltas": True, "score": score}),
    ]
    for name, given, options in calls:
        out = memory.output()
        yield (
            f"{name} count",
            backend.disjoint_merge(out.view, given, memory.views, start=tile.start, **options),
        )
        yield name, out.payload


def run_count_votes(backend: Any, memory: Memory) -> Results:
    tile = memory.tile
    weights = weights_of(tile)
    ratios = [1.0 - 0.2 * i for i in range(len(weights))]
    names = itertools.cycle(("plain", "weighted", "none"))
    factors = itertools.cycle((None, ratios))
    bases = itertools.cycle((memory.base.view, memory.base.view, memory.base.view, None))
    calls = zip(keeps_of(tile).items(), names, factors, bases, strict=False)
    for (name, keeps), elect, given, base in some_of(calls, tile):
        found = backend.count_votes(
            base, memory.views, weights, keeps, tile.start, elect=elect, factors=given
        )
        yield f"{name} {base is not None}", found


def run_kept_sums(backend: Any, memory: Memory) -> Results:
    tile = memory.tile
    score = memory.score().view
    spans = itertools.cycle((4096, 100, 64, 10**12, 63, 1024))
    inputs = ((memory.base.view, None), (None, None), (memory.base.view, score))
    calls = itertools.product(keeps_of(tile).items(), inputs)
    for (name, keeps), (base, ranked) in some_of(calls, tile):
        span = next(spans)
        yield (
            f"{name} span {span} base {base is not None} score {ranked is not None}",
            backend.kept_sums(base, memory.views, keeps, tile.start, span=span, score=ranked),
        )
    if tile.num < 200:
        everything = [Keep()] * len(tile.models)
        yield "span 1", backend.kept_sums(None, memory.views, everything, tile.start, span=1)


def run_gram_n(backend: Any, memory: Memory) -> Results:
    views = memory.views[:17]
    calls = itertools.product((4096, 1000, 64, 10**12), (memory.base.view, None))
    for span, base in some_of(calls, memory.tile):
        yield f"span {span} base {base is not None}", backend.gram_n(base, views, span=span)
    if memory.tile.num < 200:
        yield "span 1", backend.gram_n(None, views, span=1)


def run_convert(backend: Any, memory: Memory) -> Results:
    calls = [
        (i, format)
        for i, model in enumerate(memory.models[:6])
        for format in dict.fromkeys((memory.tile.out, model.format, F32))
    ]
    for i, format in some_of(calls, memory.tile):
        out = memory.output(format)
        yield f"model {i} to {format.name} count", backend.convert(out.view, memory.views[i])
        yield f"model {i} to {format.name}", out.payload


def run_count_nonfinite(backend: Any, memory: Memory) -> Results:
    for i, v in enumerate(memory.views):
        yield f"model {i}", backend.count_nonfinite(v)


SELECTION_RUNS: dict[str, Run] = {
    "axpy_n": run_axpy_n,
    "disjoint_merge": run_disjoint_merge,
    "convert": run_convert,
    "gram_n": run_gram_n,
    "magnitude_sample": run_magnitude_sample,
    "bracket_count": run_bracket_count,
    "magnitude_histogram": run_magnitude_histogram,
    "locate_equal": run_locate_equal,
    "kept_sums": run_kept_sums,
    "count_votes": run_count_votes,
    "count_nonfinite": run_count_nonfinite,
}

"""Every op on every instruction set against the reference, bit by bit, over one table of tiles."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from pymerge.formats import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, Format
from pymerge.ops import OPS, cpu, reference
from pymerge.ops.view import View

SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 99991)
WRITABLE = (F64, F32, F16, BF16)
READABLE = (*WRITABLE, F8_E4M3, F8_E5M2)


@dataclass(frozen=True)
class Tile:
    """A part of a tensor: the formats of models, base and output, and what the elements are."""

    num: int
    models: tuple[Format, ...] = (BF16,) * 4
    base: Format = BF16
    out: Format = BF16
    content: str = "normal"
    offset: int = 0
    start: int = 0

    def __str__(self) -> str:
        names = "+".join(dict.fromkeys(f.name for f in self.models))
        return (
            f"n{self.num}-{len(self.models)}x{names}-base{self.base.name}-to{self.out.name}-"
            f"{self.content}-offset{self.offset}-start{self.start}"
        )


MIXED = (F64, F32, F16, BF16, F8_E4M3, F8_E5M2)
TILES = [
    *[Tile(num) for num in SIZES],
    *[Tile(num, content="special", offset=1, out=F16) for num in SIZES[:-1]],
    *[Tile(1025, (f, f), f, out, "special", 3) for f in READABLE for out in WRITABLE],
    *[Tile(613, MIXED, base, out, "normal", 5) for base in READABLE for out in WRITABLE],
    *[Tile(777, (BF16,) * count) for count in (1, 2, 3, 16, 17, 40)],
    *[
        Tile(777, (F32, F16, BF16) * 6, F32, F32, content)
        for content in ("special", "ties", "zero")
    ],
    *[Tile(4097, content=content, out=F32) for content in ("special", "ties", "zero")],
    *[Tile(1541, content="ties", offset=7, start=start) for start in (5, 2**31 - 700, 2**40 + 1)],
]


def numbers(tile: Tile, model: int) -> np.ndarray[Any, Any]:
    """The elements of model number ``model``, or of the base for -1, as float32."""
    base = np.random.default_rng([tile.num, 0]).normal(0, 0.02, tile.num).astype(np.float32)
    rng = np.random.default_rng([tile.num, 1, model + 1])
    if tile.content == "special":
        values = np.array(
            [
                *(np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 6e-8, -3e-5, 1e-38),
                *(65504, 65519.996, 65520, 3.4e38, -3.4e38, 1.0, -1.0, 0.02, 448, 57344),
            ],
            np.float32,
        )
        special = rng.random(tile.num) < 0.3
        base = np.where(special, rng.choice(values, tile.num), base)
    if model < 0 or tile.content == "zero":
        return base
    if tile.content == "ties":
        steps = np.array([0, 0.5, -0.5, 1, -1], np.float32)
        return base + rng.choice(steps, tile.num)
    return base + rng.normal(0, 1e-3, tile.num).astype(np.float32)


def encode(values: np.ndarray[Any, Any], format: Format) -> bytes:
    """Some bytes of a format near the values; how they round does not matter here."""
    with np.errstate(all="ignore"):
        if format is F64:
            # Not only numbers that are float32 already: the ops must round them.
            return (values.astype(np.float64) * (1 + 1e-9)).tobytes()
        if format is F32:
            return values.tobytes()
        if format is F16:
            return values.astype(np.float16).tobytes()
    if format is BF16:
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    # For 8 bits: some of the 256 patterns, the same for the same value.
    return (values.view(np.uint32) >> 20).astype(np.uint8).tobytes()


class Memory:
    """The guarded inputs of a tile."""

    def __init__(self, tile: Tile, guarded: Any) -> None:
        self.tile = tile
        self.guarded = guarded
        self.base = guarded(tile.base, tile.num, tile.offset, encode(numbers(tile, -1), tile.base))
        self.models = [
            guarded(f, tile.num, (tile.offset * (i + 1)) % 64, encode(numbers(tile, i), f))
            for i, f in enumerate(tile.models)
        ]

    @property
    def views(self) -> list[View]:
        return [model.view for model in self.models]

    def output(self) -> Any:
        return self.guarded(self.tile.out, self.tile.num, self.tile.offset)


def weights_of(tile: Tile) -> list[float]:
    rng = np.random.default_rng(len(tile.models))
    return [float(w) for w in rng.normal(0.3, 0.4, len(tile.models))]


def keys_of(memory: Memory) -> list[np.ndarray[Any, Any]]:
    """The sorted keys of each model, with -1 in front so that there is one at least."""
    keys = reference.magnitude_sample(memory.base.view, memory.views, 0, group=1, stride=1)
    return [np.concatenate([[-1], np.sort(row)]).astype(np.int32) for row in keys]


Results = dict[str, Any]


def run_axpy_n(backend: Any, memory: Memory) -> Results:
    results: Results = {}
    weights = weights_of(memory.tile)
    for variant in (
        {},
        {"divisor": 0.7},
        {"scale": 1.3, "divisor": -3.0},
        {"base": memory.base.view},
        {"base": memory.base.view, "divisor": 3.0, "scale": 0.9},
    ):
        out = memory.output()
        name = "+".join(variant) or "plain"
        results[f"{name} count"] = backend.axpy_n(out.view, memory.views, weights, **variant)
        results[name] = out.payload
        out.check_guards()
    return results


def run_magnitude_sample(backend: Any, memory: Memory) -> Results:
    tile = memory.tile
    results: Results = {}
    for base in (memory.base.view, None):
        for group, stride in ((1, 1), (1, 3), (64, 7), (1000, 2), (5, 1), (2**31, 2)):
            name = f"group {group} stride {stride} base {base is not None}"
            results[name] = backend.magnitude_sample(
                base, memory.views, tile.start, group=group, stride=stride
            )
    return results


def run_bracket_count(backend: Any, memory: Memory) -> Results:
    results: Results = {}
    keys = keys_of(memory)

    def at(rank: float) -> list[int]:
        return [int(row[int(rank * (len(row) - 1))]) for row in keys]

    nothing, everything = [-1] * len(keys), [2**31 - 1] * len(keys)
    for name, low, high, capacity in (
        ("narrow", at(0.7), at(0.75), 10**6),
        ("one key", at(0.5), at(0.5), 100),
        ("all", nothing, everything, 100),
        ("no room", at(0.1), at(0.9), 0),
        ("little room", at(0.1), at(0.9), 37),
    ):
        for base in (memory.base.view, None):
            counts, candidates = backend.bracket_count(base, memory.views, low, high, capacity)
            results[f"{name} counts {base is not None}"] = counts
            for i, row in enumerate(candidates):
                results[f"{name} candidates {i} {base is not None}"] = row
    return results


def run_magnitude_histogram(backend: Any, memory: Memory) -> Results:
    results: Results = {}
    keys = keys_of(memory)
    middle = [int(row[len(row) // 2]) for row in keys]
    for base in (memory.base.view, None):
        for shift in (20, 31):
            counts = np.full((len(keys), 2 ** (31 - shift)), 3, np.uint64)
            backend.magnitude_histogram(base, memory.views, counts, shift=shift)
            results[f"top bits {shift} {base is not None}"] = counts
        for shift, prefix_shift in ((9, 20), (0, 10), (20, 20)):
            for name, prefix in (("middle", middle), ("zero", [0] * len(keys))):
                prefix = [max(key, 0) >> prefix_shift for key in prefix]
                counts = np.zeros((len(keys), 2 ** (prefix_shift - shift)), np.uint64)
                backend.magnitude_histogram(
                    base,
                    memory.views,
                    counts,
                    shift=shift,
                    prefix=prefix,
                    prefix_shift=prefix_shift,
                )
                results[f"bits {shift} to {prefix_shift} {name} {base is not None}"] = counts
    return results


def run_locate_equal(backend: Any, memory: Memory) -> Results:
    results: Results = {}
    for i, row in enumerate(keys_of(memory)[:4]):
        for key in {0, max(int(row[len(row) // 2]), 0), int(max(row[-1], 0))}:
            equals = int(np.count_nonzero(row == key))
            for nth in {0, equals // 2, max(equals - 1, 0), equals, equals + 5}:
                results[f"model {i} key {key} nth {nth}"] = backend.locate_equal(
                    memory.base.view, memory.views[i], key, nth
                )
    results["no base"] = backend.locate_equal(None, memory.views[0], 0, 0)
    return results


def run_disjoint_merge(backend: Any, memory: Memory) -> Results:
    results: Results = {}
    tile = memory.tile
    keys = keys_of(memory)
    count = len(keys)
    median = [int(row[len(row) // 2]) for row in keys]
    cutoffs = [tile.start + c for c in (0, tile.num // 3, tile.num // 2 + 1, tile.num, 10**9)]
    mixed = [0, -1, 2**31 - 1, 0x7FC00000, 0x7F800000, -(2**31), *median][:count]
    mixed += median[len(mixed) :]
    for name, thresholds, ends in (
        ("median", median, [cutoffs[i % 5] for i in range(count)]),
        ("median reversed", median, [cutoffs[-1 - i % 5] for i in range(count)]),
        ("mixed", mixed, [cutoffs[(i + 1) % 5] for i in range(count)]),
        ("extreme ends", median, [(-(2**63), 2**63 - 1)[i % 2] for i in range(count)]),
        ("keep all", [-1] * count, [0] * count),
        ("keep none", [2**31 - 1] * count, [0] * count),
    ):
        for factors, normalize, scale in (
            (weights_of(tile), True, 1.0),
            (weights_of(tile), False, 0.7),
            ([1.0] * count, True, -1.5),
            ([0.0] * count, True, 1.0),
        ):
            out = memory.output()
            label = f"{name} {factors[0]} {normalize} {scale}"
            results[f"{label} count"] = backend.disjoint_merge(
                out.view, memory.base.view, memory.views, factors, thresholds, ends, tile.start,
                normalize=normalize, scale=scale,
            )  # fmt: skip
            results[label] = out.payload
            out.check_guards()
    return results


def run_convert(backend: Any, memory: Memory) -> Results:
    results: Results = {}
    for i, model in enumerate(memory.models[:6]):
        for format in dict.fromkeys((memory.tile.out, model.format)):
            out = memory.guarded(format, memory.tile.num, memory.tile.offset)
            results[f"model {i} to {format.name} count"] = backend.convert(out.view, model.view)
            results[f"model {i} to {format.name}"] = out.payload
            out.check_guards()
    return results


def run_count_nonfinite(backend: Any, memory: Memory) -> Results:
    return {f"model {i}": backend.count_nonfinite(v) for i, v in enumerate(memory.views)}


RUNS: dict[str, Callable[[Any, Memory], Results]] = {
    "axpy_n": run_axpy_n,
    "magnitude_sample": run_magnitude_sample,
    "bracket_count": run_bracket_count,
    "magnitude_histogram": run_magnitude_histogram,
    "locate_equal": run_locate_equal,
    "disjoint_merge": run_disjoint_merge,
    "convert": run_convert,
    "count_nonfinite": run_count_nonfinite,
}


def test_every_op_has_a_run() -> None:
    assert set(RUNS) == set(OPS)


@functools.cache
def expected_of(op: str, tile: Tile, guarded: Any) -> Results:
    return RUNS[op](reference, Memory(tile, guarded))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("op", RUNS)
def test_same_bytes_as_reference(
    op: str, tile: Tile, isa: str, guarded: Any, same_bytes: Any
) -> None:
    memory = Memory(tile, guarded)
    found = RUNS[op](cpu, memory)
    expected = expected_of(op, tile, guarded)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        same_bytes(value, expected[name], f"{op} on {isa}, {name}")
    for part in (memory.base, *memory.models):
        part.check_untouched()


@pytest.mark.parametrize("op", ["axpy_n", "disjoint_merge", "convert"])
def test_result_does_not_depend_on_the_tile(
    op: str, isa: str, guarded: Any, same_bytes: Any
) -> None:
    """A tensor cut at odd places gives the bytes of the whole, with indices that continue."""
    tile = Tile(4097, content="ties", start=2**33)
    memory = Memory(tile, guarded)
    weights = weights_of(tile)
    keys = keys_of(memory)
    thresholds = [int(row[len(row) // 2]) for row in keys]
    cutoffs = [tile.start + c for c in (100, 1500, 2222, 4000)]

    def apply(out: Any, begin: int, end: int) -> None:
        def part(v: View) -> View:
            return View(v.ptr + 2 * begin, v.code, end - begin)

        models = [part(v) for v in memory.views]
        if op == "axpy_n":
            cpu.axpy_n(part(out), models, weights, base=part(memory.base.view))
        elif op == "convert":
            cpu.convert(part(out), models[0])
        else:
            cpu.disjoint_merge(
                part(out), part(memory.base.view), models, weights, thresholds, cutoffs,
                tile.start + begin, normalize=True,
            )  # fmt: skip

    whole, pieces = memory.output(), memory.output()
    apply(whole.view, 0, tile.num)
    edges = [0, 1, 130, 131, 1499, 1502, 2222, 3000, 4097]
    for begin, end in itertools.pairwise(edges):
        apply(pieces.view, begin, end)
    same_bytes(pieces.payload, whole.payload, op)


def test_a_flipped_bit_is_reported(same_bytes: Any) -> None:
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = expected.copy()
    found[1, 1] = -4.0
    with pytest.raises(pytest.fail.Exception, match=r"first byte 19 at index \(1, 1\).*0xc0800000"):
        same_bytes(found, expected, "example")


def test_tiles_are_distinct() -> None:
    assert len({str(tile) for tile in TILES}) == len(TILES)
    assert replace(TILES[0], num=3) not in TILES

"""Checks of the Triton kernels in Triton's interpreter, bit by bit against the reference.

A program of its own: TRITON_INTERPRET must be set before kernels are imported, and is for this
process alone. Prints one JSON line for each check; names of checks may be given.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton
import triton.language as tl

from pymerge.formats import BF16, F8_E4M3, F8_E5M2, F16, F32, F64
from pymerge.kernels import elementary as own_elementary
from pymerge.kernels import launch, rows, selection, spans
from pymerge.ops import reference
from pymerge.ops import triton as ours
from pymerge.ops.reference import elementary
from pymerge.ops.selection import Keep
from pymerge.ops.view import View

SEED = 7
CHECKS: dict[str, Callable[[], None]] = {}
GUARD = 64


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


class Tile:
    """Elements between guards, ``offset`` bytes beyond a multiple of 16."""

    def __init__(self, format: Any, num: int, offset: int = 0, data: Any = None) -> None:
        size = num * format.num_bytes
        self.memory = np.full(size + 3 * GUARD, 0xA5, np.uint8)
        begin = GUARD + (-self.memory.ctypes.data) % 16 + offset
        self._part = slice(begin, begin + size)
        if data is not None:
            self.memory[self._part] = np.frombuffer(data.tobytes(), np.uint8)[:size]
        self.view = View(self.memory.ctypes.data + begin, format.code, num)

    def bytes(self) -> bytes:
        """All of the memory, guards too."""
        return self.memory[self._part].tobytes() + self._guards()

    def _guards(self) -> bytes:
        outside = self.memory.copy()
        outside[self._part] = 0
        return bytes([len(np.unique(outside[outside != 0]))]) + bytes(np.unique(outside))


def patterns(format: Any, num: int, salt: int, *, special: bool = True) -> Any:
    """Elements like weights, with NaN, infinities, subnormals, -0 and ties among them."""
    rng = np.random.default_rng(SEED + salt)
    x = (rng.standard_normal(num) * 0.02).astype(np.float32)
    x[rng.integers(0, 3, num) == 0] = 0.015625
    if special:
        odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, -1e-40, 6e4, -3e38, 1e-7], np.float32)
        place = rng.integers(0, 12, num) == 0
        x[place] = rng.choice(odd, int(place.sum()))
    with np.errstate(all="ignore"):
        if format is BF16:
            return (x.view(np.uint32) >> 16).astype(np.uint16)
        if format in (F8_E4M3, F8_E5M2):
            return rng.integers(0, 256, num).astype(np.uint8)
        return x.astype({F64: np.float64, F32: np.float32, F16: np.float16}[format])


def tiles(formats: Any, num: int, offset: int = 0, *, special: bool = True) -> list[View]:
    """Elements that live until the check is over, other ones at each call."""
    salt = 100 * len(_alive)
    made = [
        Tile(f, num, offset, patterns(f, num, salt + i, special=special))
        for i, f in enumerate(formats)
    ]
    _alive.append(made)
    return [tile.view for tile in made]


_alive: list[Any] = []


def same(found: Any, expected: Any, what: str) -> None:
    if isinstance(expected, tuple | list):
        assert len(found) == len(expected), what
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            same(a, b, f"{what}[{i}]")
        return
    if isinstance(expected, bytes):
        found, expected = np.frombuffer(found, np.uint8), np.frombuffer(expected, np.uint8)
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, expected {expected.dtype}"
    assert found.shape == expected.shape, f"{what}: {found.shape}, expected {expected.shape}"
    a = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
    b = np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
    wrong = np.flatnonzero(a != b)
    assert not len(wrong), f"{what}: {len(wrong)} bytes differ, the first is byte {wrong[0]}"


def written(op: str, format: Any, num: int, offset: int, *args: Any, **options: Any) -> None:
    """An op that writes gives the bytes and the count of the reference."""
    results = []
    for backend in (ours, reference):
        out = Tile(format, num, offset)
        count = getattr(backend, op)(out.view, *args, **options)
        results.append((out.bytes(), count))
    same(results[0], results[1], f"{op} {format.name} [{num}] + {offset} {options}")


def measured(op: str, *args: Any, **options: Any) -> None:
    found, expected = (getattr(backend, op)(*args, **options) for backend in (ours, reference))
    same(found, expected, f"{op} {options}")


def in_small_blocks(block: int) -> None:
    """Many programs where one would do."""
    launch.BLOCK["interpreter"] = block


@check
def every_pattern_is_read_and_rounded() -> None:
    for format, width in ((F8_E4M3, 8), (F8_E5M2, 8), (F16, 16), (BF16, 16)):
        data = np.arange(2**width).astype(f"u{width // 8}")
        tile = Tile(format, len(data), 0, data)
        for target in (F32, BF16, F16):
            written("convert", target, len(data), 0, tile.view)
        measured("count_nonfinite", tile.view)
    rng = np.random.default_rng(SEED)
    words = rng.integers(0, 2**32, 1 << 15, dtype=np.uint32)
    ties = (rng.integers(0, 2**16, 1 << 14).astype(np.uint32) << 16) | 0x8000
    halves = (rng.integers(0x3300, 0x4780, 1 << 14).astype(np.uint32) << 16) | 0x1000
    data = np.concatenate([words, ties, halves & 0xFFFFF000]).view(np.float32)
    tile = Tile(F32, len(data), 0, data)
    for target in (BF16, F16, F64, F32):
        written("convert", target, len(data), 0, tile.view)
    with np.errstate(all="ignore"):
        data = data.astype(np.float64)
    wide = np.concatenate([data * (1 + 2.0**-25), [1e300, -1e-300, 5e-324]])
    tile = Tile(F64, len(wide), 0, wide)
    for target in (F32, BF16, F64):
        written("convert", target, len(wide), 0, tile.view)
    measured("count_nonfinite", tile.view)


@triton.jit
def elementary_kernel(out, x, num, OP: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(x.to(tl.pointer_type(tl.float32)) + index, mask=index < num, other=0.0)
    if OP == 0:
        value = own_elementary.exp(value)
    elif OP == 1:
        value = own_elementary.log(value)
    else:
        value = own_elementary.tanh(value)
    tl.store(out.to(tl.pointer_type(tl.float32)) + index, value, mask=index < num)


@check
def elementary_functions_repeat_every_step() -> None:
    rng = np.random.default_rng(SEED)
    x = rng.integers(0, 2**32, 1 << 15, dtype=np.uint32).view(np.float32)
    near = (rng.standard_normal(1 << 14) * 8).astype(np.float32)
    edges = np.array([88.72284, -87.33654, 0.625, 9.0, 1.17549435e-38, 0.0, np.inf], np.float32)
    edges = np.concatenate([edges, -edges, np.nextafter(edges, 1), np.nextafter(edges, -1)])
    x = np.concatenate([x, near, edges])
    for op, name in enumerate(("exp", "log", "tanh")):
        out = np.empty_like(x)
        launch.launch(
            elementary_kernel, (1,), out.ctypes.data, x.ctypes.data, len(x), OP=op, BLOCK=1 << 16
        )
        expected = getattr(elementary, name)(x)
        nan = np.isnan(expected)
        same(np.isnan(out), nan, name)
        same(out[~nan], expected[~nan], name)


@check
def any_size_alignment_and_number_of_models() -> None:
    in_small_blocks(4096)
    sizes = (0, 1, 15, 16, 17, 4095, 4096, 4097, 8191)
    mixed = [BF16, F32, F16, F64, F8_E4M3, F8_E5M2]
    for i, num in enumerate(sizes):
        count = (1, 3, 17)[i % 3]
        formats = [BF16] * count if i % 2 else (mixed * 3)[:count]
        for offset in (0, 1) if num in (17, 4096) else (2 * (i % 3),):
            inputs = tiles(formats, num, offset)
            (base,) = tiles([BF16], num, offset)
            weights = [0.3, -1.7, 1e-40, 3.0, 0.0][: len(inputs)] * 4
            weights = weights[: len(inputs)]
            target = (BF16, F32, F16, F64)[i % 4]
            written("axpy_n", target, num, offset, inputs, weights, base=base, divisor=3.0)
            written("axpy_n", target, num, offset, inputs, weights, scale=0.7)
            keeps = [Keep(0x3C000000 + 4096 * k, num // 2, seed=k) for k in range(len(inputs))]
            written("disjoint_merge", target, num, offset, base, inputs, weights, keeps, 0)


def tied_key(base: View, model: View, start: int, nth: int) -> tuple[int, int]:
    """A key that many elements have, and the index of the nth of them: not kept, not cut."""
    keys = reference.magnitude_sample(base, [model], start, group=1, stride=1)[0]
    found, counts = np.unique(keys[(keys > 0) & (keys < 0x7F800000)], return_counts=True)
    key = int(found[counts == counts.max()][-1])
    return key, start + int(np.flatnonzero(keys == key)[min(nth, counts.max() - 1)])


@check
def every_way_to_merge() -> None:
    num = 700
    formats = [BF16, F32, BF16]
    for special in (False, True):
        models = tiles(formats, num, 0, special=special)
        base, score = tiles([BF16, F32], num, 0, special=special)
        weights = [0.5, -0.25, 2.0]
        start = 2**33 + (1 if special else 4)
        (low, at_low), (high, at_high) = (
            tied_key(base, models[i], start, where) for i, where in ((0, 3), (1, 5))
        )
        keeps = [
            Keep(low, at_low, 0x3D800000, start + 500, 3 << 30, 2**63 + 5),
            Keep(-1, 0, high, at_high),
            Keep(draws=1 << 31, seed=9),
        ]
        merges = itertools.product(
            ("weighted", "plain", "none"), ("mean", "count", "sum", "max"), (-1, 0, 1)
        )
        for i, (elect, combine, zero_sign) in enumerate(merges):
            if (i + special) % 2:
                continue
            options: dict[str, Any] = {"elect": elect, "combine": combine, "zero_sign": zero_sign}
            if i % 3 == 0:
                options |= {"factors": [1.5, 0.5, -2.0], "divisor": 3.0}
            if i % 4 == 0:
                options |= {"score": score, "scale": 0.3}
            if i % 5 == 0:
                options["deltas"] = True
            own = None if i % 7 == 0 else base
            written("disjoint_merge", BF16, num, 0, own, models, weights, keeps, start, **options)
        measured("count_votes", base, models, weights, keeps, start, elect="plain")
        measured("count_votes", None, models, weights, keeps, start, factors=[1.0, 2.0, 3.0])


@check
def many_models_in_groups_are_as_all_at_once() -> None:
    num, count = 160, 35
    models = tiles([BF16, F32, F16, BF16, F8_E4M3] * 7, num, 0)
    (base,) = tiles([BF16], num, 0)
    weights = [0.1 * (i % 5 - 1.5) for i in range(count)]
    written("axpy_n", F32, num, 0, models, weights, base=base, divisor=7.0)
    keeps = [Keep(0x3C000000, i, draws=3 << 30, seed=i) for i in range(count)]
    for elect, combine in (("weighted", "mean"), ("none", "mean"), ("plain", "max")):
        options = {"elect": elect, "combine": combine, "factors": weights[::-1]}
        written("disjoint_merge", F32, num, 0, base, models, weights, keeps, 4, **options)
    measured("count_votes", base, models, weights, keeps, 4)
    measured("gram_n", base, models[:9], span=64)


@check
def selection_over_many_blocks() -> None:
    in_small_blocks(128)
    num = 900
    models = tiles([BF16, F32, F8_E5M2], num, 2)
    (base,) = tiles([BF16], num, 2)
    keys = reference.magnitude_sample(base, models[:1], 0, group=1, stride=1)[0]
    key = int(np.sort(keys[keys > 2000])[len(keys) // 3])
    zero = 0
    assert np.count_nonzero(keys == zero) > 50
    for own in (base, None):
        for low, high in ((key - 1000, key), (key, key), (-1, 0x7FFFFFFF), (0, 0x7FC00000)):
            for capacity in (5, num):
                measured("bracket_count", own, models, [low] * 3, [high] * 3, capacity)
        for wanted, nth in ((key, 0), (zero, 0), (zero, 1), (zero, 49), (zero, 10**6)):
            measured("locate_equal", own, models[0], wanted, nth)
    for group, stride, start in ((1, 1, 0), (64, 3, 100), (7, 2, 2**40 + 3), (10**6, 2, 10**6)):
        measured("magnitude_sample", base, models, start, group=group, stride=stride)
    selection.BLOCKS = 3
    for shift, top in ((20, None), (15, None), (0, 4), (3, 3)):
        prefix = None if top is None else [key >> top, 0, -1]
        bins = 2 ** ((31 if top is None else top) - shift)
        found = [np.full((3, bins), 3, np.uint64) for _ in range(2)]
        options = {"shift": shift, "prefix": prefix, "prefix_shift": top}
        ours.magnitude_histogram(base, models, found[0], **options)
        reference.magnitude_histogram(base, models, found[1], **options)
        same(found[0], found[1], f"histogram {shift} {top}")


@check
def sums_of_spans_keep_their_order() -> None:
    spans.SPANS["interpreter"] = 4
    for num, span in ((1, 1), (130, 64), (200, 63), (600, 65), (1000, 500)):
        models = tiles([BF16, F32], num, 2, special=span == 63)
        base, score = tiles([BF16, F32], num, 2, special=span == 63)
        measured("gram_n", base, models, span=span)
        keeps = [Keep(0x3C000000, 50, draws=1 << 31, seed=3), Keep(ceiling=0x3C800000)]
        start = 2**32 + (1 if span % 8 else 8)
        measured("kept_sums", base, models, keeps, start, span=span)
        measured("kept_sums", None, models[:1], keeps[1:], 0, span=span, score=score)
        rng = np.random.default_rng(span)
        bits = [np.frombuffer(rng.bytes(-(-num // 8)), np.uint8) for _ in range(2)]
        measured("masked_sums", models[1], [b.ctypes.data for b in bits], span=span)


@check
def ranks_across_tiles() -> None:
    rows.RANKED["interpreter"], rows.COMPARED["interpreter"] = 8, 128
    for columns, num_rows in ((1, 9), (2, 7), (3, 5), (16, 3), (17, 3), (70, 2)):
        num = columns * num_rows
        for special in (False, True):
            (model,) = tiles([BF16], num, 0, special=special)
            (base,) = tiles([BF16], num, 2, special=special)
            for own in (None, base):
                options: dict[str, Any] = {"columns": columns}
                written("row_sparsify", F32, num, 0, own, model, 0, first=columns // 2, **options)
                options |= {"draws_low": 1 << 28, "draws_span": 1 << 32, "seed": 2**64 - 3}
                options["rescale"] = special
                written("row_sparsify", BF16, num, 0, own, model, 2**35 + 1, **options)


@check
def rows_and_columns() -> None:
    in_small_blocks(256)
    for columns, num_rows in ((1, 300), (5, 40), (64, 9), (600, 2)):
        num = columns * num_rows
        models = tiles([BF16, F32], num, 0)
        (base,) = tiles([BF16], num, 0)
        rng = np.random.default_rng(columns)
        for along, length in (("rows", num_rows), ("columns", columns)):
            weights = rng.standard_normal((2, length)).astype(np.float32)
            options = {"columns": columns, "along": along, "base": base}
            written("axpy_grid", F32, num, 0, models, weights, **options)
        factors = rng.random(num_rows).astype(np.float32)
        written("row_scores", F32, num, 0, base, models[0], factors, columns=columns)
        written("select_by_score", BF16, num, 0, base, models[0], factors, 0.004, columns=columns)
        left = rng.standard_normal((num_rows + 2, 3)).astype(np.float32)
        right = rng.standard_normal((3, columns)).astype(np.float32)
        scaled = rng.random(num_rows + 2).astype(np.float32)
        for start, given in ((0, None), (columns + columns // 2, scaled)):
            options = {"columns": columns, "scale": 0.7, "factors": given}
            written("lora_add", BF16, num, 0, base, left, right, start, **options)
        sums = [np.ones((3, columns)) for _ in range(2)]
        ours.gram_columns(base, models, sums[0], columns=columns)
        reference.gram_columns(base, models, sums[1], columns=columns)
        same(sums[0], sums[1], f"gram_columns {columns}")
        plain, other = tiles([BF16, F32], num, 0, special=False)
        measured("row_divergence", plain, other, columns=columns)
        measured("row_divergence", base, models[1], columns=columns)


@check
def maps_of_methods() -> None:
    in_small_blocks(256)
    for num, special in ((513, True), (300, False)):
        models = tiles([BF16, F32, BF16], num, 0, special=special)
        (base,) = tiles([BF16], num, 0, special=special)
        written("nearswap", BF16, num, 0, base, models[0], t=0.004)
        written("variance_score", F32, num, 0, base, models)
        written("variance_score", F32, num, 0, None, models)
        measured("overlap_counts", base, models, epsilon=0.01)
        written("overlap_merge", BF16, num, 0, base, models, [0.5, 1.0, 2.0], epsilon=0.01)
        written("magmax_merge", BF16, num, 0, base, models, scale=0.7)
        diagonals = tiles([F32, F32, F16], num, 0, special=special)
        numbers = ([1.0, 0.5, 2.0], [1e-3, 0.0, 0.5])
        for mode in ("add", "max"):
            written("weighted_mean", BF16, num, 0, models, diagonals, *numbers, mode=mode)
            written("weighted_mean", F32, num, 0, models, models[::-1], *numbers, mode=mode)
        limits = [0.4, 0.9, 0.0]
        for minimum in (2, 3):
            options = {"minimum": minimum, "scale": 0.7}
            written("consensus_merge", F16, num, 0, base, models, limits, **options)
        written("elect_max", F32, num, 0, base, models)
        found = []
        for backend in (ours, reference):
            masks = [np.full(-(-num // 8) + 1, 0xA5, np.uint8) for _ in range(6)]
            where = [mask.ctypes.data for mask in masks]
            backend.tall_masks(where[:3], base, models, limits)
            backend.elect_masks(where[3:], base, models)
            found.append([mask.tobytes() for mask in masks])
        same(found[0], found[1], "masks")
        written("apply_task", BF16, num, 0, base, models[1], where[0], scale=0.5)
        lows, highs = [0.001, 0.002, 0.01], [0.02, 0.03, 0.01]
        cuts, tops, weights = [0.0, 0.1, -0.5], [1.0, 0.9, 2.0], [1.0, 0.5, -0.25]
        for mode in ("raw", "normalized", "pairwise"):
            written("pcb_score", F32, num, 0, base, models, 1, lows, highs, mode=mode, part=-1)
            numbers = (lows, highs, cuts, tops, weights)
            written("pcb_merge", BF16, num, 0, base, models, *numbers, mode=mode, scale=0.7)


@check
def steps_of_adam() -> None:
    in_small_blocks(256)
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    for num, special, offset in ((513, True, 0), (512, False, 0), (300, False, 1)):
        results = []
        for backend in (ours, reference):
            data = [patterns(F32, num, salt, special=special) for salt in range(4)]
            state = [Tile(F32, num, offset, each) for each in data]
            counts = [
                backend.adam_step(*(tile.view for tile in state), step=step, **options)
                for step in (1, 2)
            ]
            results.append((*(tile.bytes() for tile in state), counts))
        same(results[0], results[1], f"adam_step [{num}] + {offset}")


def main(names: list[str]) -> int:
    defaults = (dict(launch.BLOCK), dict(spans.SPANS), dict(rows.RANKED), dict(rows.COMPARED))
    for name in names or CHECKS:
        begin = time.process_time()
        problem = None
        try:
            CHECKS[name]()
        except Exception:
            problem = traceback.format_exc()
        settings = (launch.BLOCK, spans.SPANS, rows.RANKED, rows.COMPARED)
        for setting, default in zip(settings, defaults, strict=True):
            setting.update(default)
        _alive.clear()
        seconds = round(time.process_time() - begin, 1)
        print(json.dumps({"check": name, "problem": problem, "cpu_seconds": seconds}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Times each CPU op on one core for each instruction set, on bfloat16 tiles.

Prints nanoseconds per element and model, GB/s of the bytes the op must move, and the share of the
copy bandwidth measured on the same core in the same run. Times are medians of CPU time of the
thread, with wall time beside them. Run: ``python bench/ops_cpu.py [op ...]``.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymerge import ops
from pymerge.formats import BF16
from pymerge.ops import view

NUM_ELEMENTS = 4 << 20
NUM_MODELS = 4
# Tiles of 48 MiB that take turns, so that the caches hold little of the next one.
NUM_TILES = 8
ROUNDS = 3
WEIGHTS = [0.4, 0.3, 0.2, 0.1]
SAMPLE_STRIDE = 8


class Tile:
    """A base, its fine-tunes and an output, with differences as between real checkpoints."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.arrays = [np.zeros(NUM_ELEMENTS, np.uint16) for _ in range(NUM_MODELS + 2)]
        self.out, self.base, *self.models = (view(array, BF16) for array in self.arrays)
        base = 0.02 * rng.standard_normal(NUM_ELEMENTS, np.float32)
        ops.convert(self.base, view(base))
        for model in self.models:
            fine_tune = base + np.float32(1e-3) * rng.standard_normal(NUM_ELEMENTS, np.float32)
            ops.convert(model, view(fine_tune))


@dataclass(frozen=True)
class Case:
    """A call to time: the op, the models and bytes per element it must touch, the call itself."""

    name: str
    num_models: int
    bytes_per_element: float
    call: Callable[[Tile], Any]


def cases(tile: Tile) -> list[Case]:
    """The calls, for a density of 20 % with thresholds taken from one tile."""
    sample = ops.magnitude_sample(tile.base, tile.models, 0, group=64, stride=64)
    ordered = np.sort(sample, axis=1)
    middle = ordered.shape[1] * 4 // 5
    low, threshold, high = (
        ordered[:, middle + step] for step in (-ordered.shape[1] // 80, 0, ordered.shape[1] // 80)
    )
    cutoffs = [NUM_ELEMENTS // 2] * NUM_MODELS
    bins = np.zeros((NUM_MODELS, 2**16), np.uint64)

    def traffic(op: str, base: bool, num_models: int) -> int:
        return ops.TRAFFIC[op](2 if base else 0, 2, num_models, 2)

    def sampled(t: Tile) -> Any:
        return ops.magnitude_sample(t.base, t.models, 0, group=64, stride=SAMPLE_STRIDE)

    def disjoint(t: Tile) -> Any:
        return ops.disjoint_merge(
            t.out, t.base, t.models, WEIGHTS, threshold, cutoffs, 0, normalize=True
        )

    n = NUM_MODELS
    return [
        Case(
            "axpy_n",
            n,
            traffic("axpy_n", False, n),
            lambda t: ops.axpy_n(t.out, t.models, WEIGHTS),
        ),
        Case(
            "axpy_n with base",
            n,
            traffic("axpy_n", True, n),
            lambda t: ops.axpy_n(t.out, t.models, WEIGHTS, base=t.base),
        ),
        Case(
            "magnitude_sample",
            n,
            traffic("magnitude_sample", True, n) / SAMPLE_STRIDE,
            sampled,
        ),
        Case(
            "bracket_count",
            n,
            traffic("bracket_count", True, n),
            lambda t: ops.bracket_count(t.base, t.models, low, high, NUM_ELEMENTS // 8),
        ),
        Case(
            "magnitude_histogram",
            n,
            traffic("magnitude_histogram", True, n),
            lambda t: ops.magnitude_histogram(t.base, t.models, bins, shift=15),
        ),
        Case(
            "locate_equal",
            1,
            traffic("locate_equal", True, 1),
            lambda t: ops.locate_equal(t.base, t.models[0], 2**31 - 1, 0),
        ),
        Case("disjoint_merge", n, traffic("disjoint_merge", True, n), disjoint),
        Case(
            "convert",
            1,
            traffic("convert", False, 1),
            lambda t: ops.convert(t.out, t.models[0]),
        ),
        Case(
            "count_nonfinite",
            1,
            traffic("count_nonfinite", False, 1),
            lambda t: ops.count_nonfinite(t.models[0]),
        ),
    ]


def median_seconds(call: Callable[[Tile], Any], tiles: Sequence[Tile]) -> tuple[float, float]:
    """Median thread CPU seconds and wall seconds of one call, the tiles taking turns."""
    call(tiles[0])
    cpu_times, wall_times = [], []
    for _ in range(ROUNDS):
        for tile in tiles:
            cpu, wall = time.thread_time(), time.perf_counter()
            call(tile)
            cpu_times.append(time.thread_time() - cpu)
            wall_times.append(time.perf_counter() - wall)
    return statistics.median(cpu_times), statistics.median(wall_times)


def run(names: Sequence[str] = (), isas: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Times the named ops (all by default) on each instruction set; one dict per op and set."""
    affinity = os.sched_getaffinity(0)
    before = ops.isa()
    os.sched_setaffinity(0, {min(affinity)})
    try:
        tiles = [Tile(seed) for seed in range(NUM_TILES)]
        copy_cpu, _ = median_seconds(lambda t: np.copyto(t.arrays[0], t.arrays[1]), tiles)
        copy_rate = 4 * NUM_ELEMENTS / copy_cpu
        results = []
        for case in cases(tiles[0]):
            if names and case.name.split()[0] not in names:
                continue
            for isa in isas or ops.available_isas():
                ops.use_isa(isa)
                cpu, wall = median_seconds(case.call, tiles)
                rate = case.bytes_per_element * NUM_ELEMENTS / cpu
                results.append(
                    {
                        "op": case.name,
                        "isa": isa,
                        "num_elements": NUM_ELEMENTS,
                        "num_models": case.num_models,
                        "ns_per_element_and_model": cpu * 1e9 / NUM_ELEMENTS / case.num_models,
                        "wall_ns_per_element_and_model": wall
                        * 1e9
                        / NUM_ELEMENTS
                        / case.num_models,
                        "gb_per_s": rate / 1e9,
                        "copy_gb_per_s": copy_rate / 1e9,
                        "share_of_copy": rate / copy_rate,
                    }
                )
        return results
    finally:
        ops.use_isa(before)
        os.sched_setaffinity(0, affinity)


def main() -> None:
    results = run(sys.argv[1:])
    if not results:
        raise SystemExit(f"no such op; the ops are {', '.join(ops.OPS)}")
    print(f"copy {results[0]['copy_gb_per_s']:.1f} GB/s (read and written)")
    print(f"{'op':<20} {'isa':<8} {'ns':>6} {'wall ns':>8} {'GB/s':>6} {'of copy':>8}")
    for r in results:
        print(
            f"{r['op']:<20} {r['isa']:<8} {r['ns_per_element_and_model']:6.2f} "
            f"{r['wall_ns_per_element_and_model']:8.2f} {r['gb_per_s']:6.1f} "
            f"{r['share_of_copy']:8.0%}"
        )


if __name__ == "__main__":
    main()

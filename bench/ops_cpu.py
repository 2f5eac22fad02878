"""Times each CPU op on one core for each instruction set, on bfloat16 tiles.

Prints nanoseconds per element and model, GB/s of the bytes the op must move, and the share of the
copy bandwidth measured on the same core in the same run. Times are medians of CPU time of the
thread, with wall time beside them. Run: ``python bench/ops_cpu.py [op ...]``; PYMERGE_BENCH_SIZE
sets the elements of a tile, to try whether everything runs.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymerge.formats import BF16
from pymerge.ops import OPS, TRAFFIC, cpu, view
from pymerge.ops.selection import Keep

NUM_ELEMENTS = int(os.environ.get("PYMERGE_BENCH_SIZE", 4 << 20))
NUM_MODELS = 4
COLUMNS = 4096
RANK = 16
SPAN = 4096
# Tiles of 48 MiB that take turns, so that the caches hold little of the next one.
NUM_TILES = 8
ROUNDS = 3
WEIGHTS = [0.4, 0.3, 0.2, 0.1]
SAMPLE_STRIDE = 8
#: A density of one half for masks at random.
HALF_OF_DRAWS = 1 << 31


class Tile:
    """A base, its fine-tunes and an output, with differences as between real checkpoints."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.arrays = [np.zeros(NUM_ELEMENTS, np.uint16) for _ in range(NUM_MODELS + 2)]
        self.out, self.base, *self.models = (view(array, BF16) for array in self.arrays)
        base = 0.02 * rng.standard_normal(NUM_ELEMENTS, np.float32)
        cpu.convert(self.base, view(base))
        for model in self.models:
            fine_tune = base + np.float32(1e-3) * rng.standard_normal(NUM_ELEMENTS, np.float32)
            cpu.convert(model, view(fine_tune))
        self.bits = [rng.integers(0, 256, -(-NUM_ELEMENTS // 8), np.uint8) for _ in self.models]
        self.masks = [int(bits.ctypes.data) for bits in self.bits]
        steps = rng.random((4, NUM_ELEMENTS // 4), np.float32)
        self.state = [view(array) for array in steps]
        self._steps = steps


@dataclass(frozen=True)
class Case:
    """A call to time: its op with the variant, the models it reads, the call, the share of the
    op's traffic that this call has, the bytes of an element of base, model and output, and the
    elements it works on."""

    name: str
    num_models: int
    call: Callable[[Tile], Any]
    base: bool = True
    share: float = 1.0
    widths: tuple[int, int, int] = (2, 2, 2)
    elements: int = NUM_ELEMENTS

    @property
    def op(self) -> str:
        return self.name.split()[0]

    @property
    def bytes_per_element(self) -> float:
        base, model, out = self.widths
        return TRAFFIC[self.op](base * self.base, model, self.num_models, out) * self.share


def cases(tile: Tile) -> list[Case]:
    """One case or more for every op."""
    found = [*_selection(tile), *_merges(tile), *_sums(), *_rows(), *_maps()]
    missing = set(OPS) - {case.op for case in found}
    if missing:
        raise SystemExit(f"no benchmark of {', '.join(sorted(missing))}")
    return found


def _brackets(tile: Tile) -> tuple[Any, Any, Any]:
    """Below, at and above the threshold of a density of 20 %, from a sample of one tile."""
    sample = cpu.magnitude_sample(tile.base, tile.models, 0, group=64, stride=64)
    ordered = np.sort(sample, axis=1)
    num = ordered.shape[1]
    low, at, high = (ordered[:, num * 4 // 5 + step] for step in (-num // 80, 0, num // 80))
    return low, at, high


def _selection(tile: Tile) -> list[Case]:
    low, _, high = _brackets(tile)
    bins = np.zeros((NUM_MODELS, 2**16), np.uint64)
    n = NUM_MODELS

    def sample(t: Tile) -> Any:
        return cpu.magnitude_sample(t.base, t.models, 0, group=64, stride=SAMPLE_STRIDE)

    def count(t: Tile) -> Any:
        return cpu.bracket_count(t.base, t.models, low, high, NUM_ELEMENTS // 8)

    def histogram(t: Tile) -> Any:
        return cpu.magnitude_histogram(t.base, t.models, bins, shift=15)

    def locate(t: Tile) -> Any:
        return cpu.locate_equal(t.base, t.models[0], 2**31 - 1, 0)

    return [
        Case("magnitude_sample", n, sample, share=1 / SAMPLE_STRIDE),
        Case("bracket_count", n, count),
        Case("magnitude_histogram", n, histogram),
        Case("locate_equal", 1, locate),
    ]


def _merges(tile: Tile) -> list[Case]:
    trims = [Keep(int(key), NUM_ELEMENTS // 2) for key in _brackets(tile)[1]]
    random = [Keep(draws=HALF_OF_DRAWS, seed=seed) for seed in range(NUM_MODELS)]
    grid = np.full((NUM_MODELS, COLUMNS), 0.25, np.float32)
    by_row = np.full((NUM_MODELS, NUM_ELEMENTS // COLUMNS), 0.25, np.float32)
    n = NUM_MODELS

    def disjoint(keeps: Sequence[Keep], **options: Any) -> Callable[[Tile], Any]:
        return lambda t: cpu.disjoint_merge(t.out, t.base, t.models, WEIGHTS, keeps, 0, **options)

    def along(direction: str, weights: Any) -> Callable[[Tile], Any]:
        return lambda t: cpu.axpy_grid(
            t.out, t.models, weights, columns=COLUMNS, along=direction, base=t.base
        )

    return [
        Case("axpy_n", n, lambda t: cpu.axpy_n(t.out, t.models, WEIGHTS), base=False),
        Case("axpy_n base", n, lambda t: cpu.axpy_n(t.out, t.models, WEIGHTS, base=t.base)),
        Case("axpy_grid rows", n, along("rows", by_row)),
        Case("axpy_grid columns", n, along("columns", grid)),
        Case("disjoint_merge trim", n, disjoint(trims)),
        Case("disjoint_merge plain", n, disjoint(trims, elect="plain", combine="count")),
        Case("disjoint_merge draws", n, disjoint(random, elect="none", combine="sum")),
        Case("disjoint_merge draws+sign", n, disjoint(random)),
        Case("count_votes", n, lambda t: cpu.count_votes(t.base, t.models, WEIGHTS, trims, 0)),
        Case("kept_sums", n, lambda t: cpu.kept_sums(t.base, t.models, trims, 0, span=SPAN)),
        Case("convert", 1, lambda t: cpu.convert(t.out, t.models[0]), base=False),
        Case("count_nonfinite", 1, lambda t: cpu.count_nonfinite(t.models[0]), base=False),
    ]


def _sums() -> list[Case]:
    n = NUM_MODELS
    sums = np.zeros((n * (n + 1) // 2, COLUMNS))

    def by_column(t: Tile) -> Any:
        return cpu.gram_columns(t.base, t.models, sums, columns=COLUMNS)

    def masked(t: Tile) -> Any:
        return cpu.masked_sums(t.models[0], t.masks, span=SPAN)

    return [
        Case("gram_n", n, lambda t: cpu.gram_n(t.base, t.models, span=SPAN)),
        Case("gram_n two", 2, lambda t: cpu.gram_n(t.base, t.models[:2], span=SPAN)),
        Case("gram_columns", n, by_column),
        Case("masked_sums", n, masked, base=False),
    ]


def _rows() -> list[Case]:
    num_rows = NUM_ELEMENTS // COLUMNS
    factors = np.full(num_rows, 1.5, np.float32)
    left = np.full((num_rows, RANK), 0.01, np.float32)
    right = np.full((RANK, COLUMNS), 0.01, np.float32)

    def sparsify(**options: Any) -> Callable[[Tile], Any]:
        return lambda t: cpu.row_sparsify(
            t.out, t.base, t.models[0], 0, columns=COLUMNS, seed=7, **options
        )

    def divergence(t: Tile) -> Any:
        return cpu.row_divergence(t.base, t.models[0], columns=COLUMNS)

    def scores(t: Tile) -> Any:
        return cpu.row_scores(t.out, t.base, t.models[0], factors, columns=COLUMNS)

    def select(t: Tile) -> Any:
        return cpu.select_by_score(t.out, t.base, t.models[0], factors, 1e-3, columns=COLUMNS)

    def lora(t: Tile) -> Any:
        return cpu.lora_add(t.out, t.models[0], left, right, 0, columns=COLUMNS, scale=2.0)

    della = sparsify(draws_low=HALF_OF_DRAWS // 2, draws_span=HALF_OF_DRAWS, rescale=True)
    return [
        Case("row_sparsify della", 1, della),
        Case("row_sparsify ranks", 1, sparsify(first=COLUMNS // 10, last=COLUMNS // 2)),
        Case("row_divergence", 1, divergence),
        Case("row_scores", 1, scores),
        Case("select_by_score", 1, select),
        Case(f"lora_add rank {RANK}", 1, lora, base=False),
    ]


def _maps() -> list[Case]:
    n = NUM_MODELS
    limits, highs = [1e-4] * n, [2e-3] * n
    cuts, tops = [0.0] * n, [1e-3] * n

    def overlap(t: Tile) -> Any:
        return cpu.overlap_merge(t.out, t.base, t.models, WEIGHTS, epsilon=1e-3)

    def consensus(t: Tile) -> Any:
        return cpu.consensus_merge(t.out, t.base, t.models, limits, minimum=2, scale=0.5)

    def task(t: Tile) -> Any:
        return cpu.apply_task(t.out, t.base, t.models[0], t.masks[0], scale=0.5)

    def score(t: Tile) -> Any:
        return cpu.pcb_score(t.out, t.base, t.models, 0, limits, highs, mode="normalized", part=1)

    def pcb(mode: str) -> Callable[[Tile], Any]:
        return lambda t: cpu.pcb_merge(
            t.out, t.base, t.models, limits, highs, cuts, tops, WEIGHTS, mode=mode, scale=1.0
        )

    def adam(t: Tile) -> Any:
        return cpu.adam_step(*t.state, lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, step=1)

    def mean(t: Tile) -> Any:
        out, *models = (v.part(0, quarter) for v in (t.out, *t.models))
        return cpu.weighted_mean(out, models, t.state, WEIGHTS, [1e-6] * n, mode="add")

    quarter = NUM_ELEMENTS // 4
    return [
        Case("adam_step", 1, adam, widths=(12, 4, 12), elements=quarter),
        Case("weighted_mean", n, mean, widths=(0, 6, 2), elements=quarter),
        Case("nearswap", 1, lambda t: cpu.nearswap(t.out, t.base, t.models[0], t=1e-3)),
        Case("variance_score", n, lambda t: cpu.variance_score(t.out, t.base, t.models)),
        Case("overlap_counts", n, lambda t: cpu.overlap_counts(t.base, t.models, epsilon=1e-3)),
        Case("overlap_merge", n, overlap),
        Case("magmax_merge", n, lambda t: cpu.magmax_merge(t.out, t.base, t.models, scale=0.5)),
        Case("consensus_merge", n, consensus),
        Case("tall_masks", n, lambda t: cpu.tall_masks(t.masks, t.base, t.models, limits)),
        Case("elect_max", n, lambda t: cpu.elect_max(t.out, t.base, t.models)),
        Case("elect_masks", n, lambda t: cpu.elect_masks(t.masks, t.base, t.models)),
        Case("apply_task", 1, task),
        Case("pcb_score", n, score),
        Case("pcb_merge", n, pcb("normalized")),
        Case("pcb_merge pairwise", n, pcb("pairwise")),
    ]


def median_seconds(call: Callable[[Tile], Any], tiles: Sequence[Tile]) -> tuple[float, float]:
    """Median thread CPU seconds and wall seconds of one call, the tiles taking turns."""
    call(tiles[0])
    cpu_times, wall_times = [], []
    for _ in range(ROUNDS):
        for tile in tiles:
            thread, wall = time.thread_time(), time.perf_counter()
            call(tile)
            cpu_times.append(time.thread_time() - thread)
            wall_times.append(time.perf_counter() - wall)
    return statistics.median(cpu_times), statistics.median(wall_times)


def seconds_on_all_cores(call: Callable[[Tile], Any], tiles: Sequence[Tile]) -> float:
    """Wall seconds of one call where every core makes calls at once, each on tiles of its own."""
    cores = sorted(os.sched_getaffinity(0))
    start = threading.Barrier(len(cores) + 1)

    def work(number: int) -> None:
        os.sched_setaffinity(0, {cores[number]})  # of this thread
        own = tiles[number :: len(cores)]
        call(own[0])
        start.wait()
        for tile in own:
            call(tile)

    found = []
    for _ in range(2 * ROUNDS):
        with ThreadPoolExecutor(len(cores)) as pool:
            done = [pool.submit(work, number) for number in range(len(cores))]
            start.wait()
            begin = time.perf_counter()
            for each in done:
                each.result()
            found.append(time.perf_counter() - begin)
    return statistics.median(found) / len(tiles)


#: Timed on all cores at once too: what a whole merge does.
ON_ALL_CORES = ("axpy_n", "axpy_n base", "disjoint_merge trim", "disjoint_merge draws+sign")


def run_on_all_cores(names: Sequence[str], tiles: Sequence[Tile]) -> list[dict[str, Any]]:
    """The rate of all cores together against that of a copy by all cores."""
    copy = seconds_on_all_cores(lambda t: np.copyto(t.arrays[0], t.arrays[1]), tiles)
    num_cores = len(os.sched_getaffinity(0))
    results = []
    for case in cases(tiles[0]):
        if case.name not in ON_ALL_CORES or (names and case.op not in names):
            continue
        seconds = seconds_on_all_cores(case.call, tiles)
        rate, copy_rate = (
            size * NUM_ELEMENTS / taken
            for size, taken in ((case.bytes_per_element, seconds), (4, copy))
        )
        each = seconds * num_cores * 1e9 / NUM_ELEMENTS / case.num_models
        results.append(
            {
                "op": f"{case.name}, {num_cores} cores",
                "isa": cpu.isa(),
                "num_elements": NUM_ELEMENTS,
                "num_models": case.num_models,
                "ns_per_element_and_model": each,
                "wall_ns_per_element_and_model": each / num_cores,
                "gb_per_s": rate / 1e9,
                "copy_gb_per_s": copy_rate / 1e9,
                "share_of_copy": rate / copy_rate,
            }
        )
    return results


def run(names: Sequence[str] = (), isas: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Times the named ops (all by default) on each instruction set; one dict per op and set."""
    affinity = os.sched_getaffinity(0)
    before = cpu.isa()
    os.sched_setaffinity(0, {min(affinity)})
    try:
        tiles = [Tile(seed) for seed in range(NUM_TILES)]
        copy_cpu, _ = median_seconds(lambda t: np.copyto(t.arrays[0], t.arrays[1]), tiles)
        copy_rate = 4 * NUM_ELEMENTS / copy_cpu
        results = []
        for case in cases(tiles[0]):
            if names and case.op not in names:
                continue
            for isa in isas or cpu.available_isas():
                cpu.use_isa(isa)
                seconds, wall = median_seconds(case.call, tiles)
                rate = case.bytes_per_element * case.elements / seconds
                each = 1e9 / case.elements / case.num_models
                results.append(
                    {
                        "op": case.name,
                        "isa": isa,
                        "num_elements": case.elements,
                        "num_models": case.num_models,
                        "ns_per_element_and_model": seconds * each,
                        "wall_ns_per_element_and_model": wall * each,
                        "gb_per_s": rate / 1e9,
                        "copy_gb_per_s": copy_rate / 1e9,
                        "share_of_copy": rate / copy_rate,
                    }
                )
    finally:
        cpu.use_isa(before)
        os.sched_setaffinity(0, affinity)
    return results + run_on_all_cores(names, tiles)


def main() -> None:
    results = run(sys.argv[1:])
    if not results:
        raise SystemExit(f"no such op; the ops are {', '.join(OPS)}")
    print(f"copy {results[0]['copy_gb_per_s']:.1f} GB/s (read and written)")
    print(f"{'op':<26} {'isa':<8} {'ns':>6} {'wall ns':>8} {'GB/s':>6} {'of copy':>8}")
    for r in results:
        print(
            f"{r['op']:<26} {r['isa']:<8} {r['ns_per_element_and_model']:6.2f} "
            f"{r['wall_ns_per_element_and_model']:8.2f} {r['gb_per_s']:6.1f} "
            f"{r['share_of_copy']:8.0%}"
        )


if __name__ == "__main__":
    main()

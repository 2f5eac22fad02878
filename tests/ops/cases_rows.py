"""How each op on rows runs on a tile, and what it gives; see cases_selection.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases_selection import Results, Run, some_of
from tiles import Array, Memory

from pymerge.formats import F32
from pymerge.ops import reference


def some(memory: Memory, shape: tuple[int, ...], which: int) -> Array:
    """float32 numbers around 0.5, of which some are 0."""
    rng = np.random.default_rng([memory.tile.num, which])
    values = rng.normal(0.5, 1, shape).astype(np.float32)
    values[rng.random(shape) < 0.1] = 0
    return values


def run_axpy_grid(backend: Any, memory: Memory) -> Results:
    tile = memory.tile
    num_rows = tile.num // tile.columns
    for along, length in (("rows", num_rows), ("columns", tile.columns)):
        weights = some(memory, (len(tile.models), length), 1)
        for base in (memory.base.view, None):
            out = memory.output()
            name = f"{along} {base is not None}"
            yield (
                f"{name} count",
                backend.axpy_grid(
                    out.view, memory.views, weights, columns=tile.columns, along=along, base=base
                ),
            )
            yield name, out.payload


def run_gram_columns(backend: Any, memory: Memory) -> Results:
    views = memory.views[:5]
    num_pairs = len(views) * (len(views) + 1) // 2
    for base in (memory.base.view, None):
        sums = some(memory, (num_pairs, memory.tile.columns), 2).astype(np.float64)
        backend.gram_columns(base, views, sums, columns=memory.tile.columns)
        yield f"base {base is not None}", sums


def run_row_sparsify(backend: Any, memory: Memory) -> Results:
    tile = memory.tile
    columns, base = tile.columns, memory.base.view
    half, seed = columns // 2, 0xFEDCBA9876543210
    low, span = int(0.3 * 2**32), int(0.4 * 2**32)
    calls = (
        ("everything", base, {}),
        ("nothing", base, {"draws_low": 0}),
        ("upper half", base, {"first": half}),
        ("middle", None, {"first": columns // 5, "last": columns - columns // 7}),
        ("empty ranks", base, {"first": half, "last": half // 2}),
        ("one draw", base, {"draws_low": 1 << 31, "seed": 1}),
        ("ranked draws", base, {"draws_low": low, "draws_span": span, "seed": seed}),
        (
            "ranked draws rescaled",
            None,
            {"draws_low": low, "draws_span": span, "seed": seed, "rescale": True},
        ),
        (
            "sure at the top",
            base,
            {"draws_low": 2**31, "draws_span": 2**31, "seed": 2**64 - 1, "rescale": True},
        ),
        (
            "beyond sure",
            base,
            {"draws_low": 2**32, "draws_span": 2**32, "first": half, "rescale": True},
        ),
    )
    for name, given, options in some_of(calls, tile):
        out = memory.output()
        yield (
            f"{name} count",
            backend.row_sparsify(
                out.view, given, memory.views[-1], tile.start, columns=columns, **options
            ),
        )
        yield name, out.payload


def run_row_divergence(backend: Any, memory: Memory) -> Results:
    for i, model in enumerate(memory.views[:3]):
        found = backend.row_divergence(memory.base.view, model, columns=memory.tile.columns)
        yield f"model {i}", found


def factors_of(memory: Memory) -> Array:
    return some(memory, (memory.tile.num // memory.tile.columns,), 3)


def run_row_scores(backend: Any, memory: Memory) -> Results:
    for i, model in enumerate(memory.views[:3]):
        out = memory.output()
        yield (
            f"{i} count",
            backend.row_scores(
                out.view,
                memory.base.view,
                model,
                factors_of(memory),
                columns=memory.tile.columns,
            ),
        )
        yield str(i), out.payload


def run_select_by_score(backend: Any, memory: Memory) -> Results:
    tile, factors = memory.tile, factors_of(memory)
    here, scores = Memory(tile), Memory(tile).output(F32)
    reference.row_scores(scores.view, here.base.view, here.views[0], factors, columns=tile.columns)
    ordered = np.sort(scores.payload.view(np.float32))
    middle = float(ordered[len(ordered) // 2]) if len(ordered) else 0.5
    for threshold in some_of((middle, 0.0, 1e-3, -1.0, 1e300, float("nan")), tile):
        out = memory.output()
        yield (
            f"{threshold} count",
            backend.select_by_score(
                out.view,
                memory.base.view,
                memory.views[0],
                factors,
                threshold,
                columns=tile.columns,
            ),
        )
        yield str(threshold), out.payload


def run_lora_add(backend: Any, memory: Memory) -> Results:
    tile = memory.tile
    num_rows = -(-(tile.start + tile.num) // tile.columns) + 1
    for rank, scale, scaled in ((1, 2.0, False), (3, -0.25, True), (8, 1.0, False)):
        if rank == 8 and tile.columns > 5000:
            continue
        left = some(memory, (num_rows, rank), 4)
        right = some(memory, (rank, tile.columns), 5)
        out = memory.output()
        yield (
            f"rank {rank} count",
            backend.lora_add(
                out.view,
                memory.views[0],
                left,
                right,
                tile.start,
                columns=tile.columns,
                scale=scale,
                factors=some(memory, (num_rows,), 6) if scaled else None,
            ),
        )
        yield f"rank {rank}", out.payload


ROW_RUNS: dict[str, Run] = {
    "axpy_grid": run_axpy_grid,
    "gram_columns": run_gram_columns,
    "row_sparsify": run_row_sparsify,
    "row_divergence": run_row_divergence,
    "row_scores": run_row_scores,
    "select_by_score": run_select_by_score,
}
LORA_RUNS: dict[str, Run] = {"lora_add": run_lora_add}

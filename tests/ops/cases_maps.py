"""How each map of single elements runs on a tile, and what it gives; see cases_selection.py."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from cases_selection import Results, Run, keys_at, some_of, weights_of
from tiles import Memory, Tile, masks_at

from pymerge.formats import F32


def run_nearswap(backend: Any, memory: Memory) -> Results:
    calls = itertools.product((5e-4, 0.0, 1e-9, -1.0, 1e30), enumerate(memory.views[:2]))
    for t, (i, model) in some_of(calls, memory.tile):
        out = memory.output()
        yield f"{t} {i} count", backend.nearswap(out.view, memory.base.view, model, t=t)
        yield f"{t} {i}", out.payload


def run_variance_score(backend: Any, memory: Memory) -> Results:
    for base in (memory.base.view, None):
        out = memory.output()
        name = f"base {base is not None}"
        yield f"{name} count", backend.variance_score(out.view, base, memory.views)
        yield name, out.payload


EPSILONS = (0.0, 1e-5, 1e-3, 2e-3, 0.5, -1.0)


def run_overlap_counts(backend: Any, memory: Memory) -> Results:
    for epsilon in some_of(EPSILONS, memory.tile):
        found = backend.overlap_counts(memory.base.view, memory.views, epsilon=epsilon)
        yield str(epsilon), found


def run_overlap_merge(backend: Any, memory: Memory) -> Results:
    factors = [1.0 + 0.1 * i for i in range(len(memory.views))]
    for epsilon in some_of(EPSILONS, memory.tile):
        out = memory.output()
        yield (
            f"{epsilon} count",
            backend.overlap_merge(
                out.view, memory.base.view, memory.views, factors, epsilon=epsilon
            ),
        )
        yield str(epsilon), out.payload


def run_magmax_merge(backend: Any, memory: Memory) -> Results:
    for scale in (1.0, -0.3):
        out = memory.output()
        yield (
            f"{scale} count",
            backend.magmax_merge(out.view, memory.base.view, memory.views, scale=scale),
        )
        yield str(scale), out.payload


def thresholds_of(tile: Tile) -> list[list[float]]:
    count = len(tile.models)
    return [[0.2 + 0.1 * i for i in range(count)], [0.0] * count, [0.5, 1e30, -1.0] * count]


def run_consensus_merge(backend: Any, memory: Memory) -> Results:
    count = len(memory.views)
    kinds = ((0, 1.0), (1, 0.3), (2, 1.0), (count, -1.0), (count + 1, 1.0))
    calls = itertools.product(enumerate(thresholds_of(memory.tile)), kinds)
    for (number, thresholds), (minimum, scale) in some_of(calls, memory.tile):
        out = memory.output()
        name = f"thresholds {number} minimum {minimum} scale {scale}"
        yield (
            f"{name} count",
            backend.consensus_merge(
                out.view,
                memory.base.view,
                memory.views,
                thresholds[:count],
                minimum=minimum,
                scale=scale,
            ),
        )
        yield name, out.payload


def run_tall_masks(backend: Any, memory: Memory) -> Results:
    count = len(memory.views)
    for number, thresholds in some_of(enumerate(thresholds_of(memory.tile)), memory.tile):
        masks = memory.poisoned_bits()
        backend.tall_masks(masks_at(masks), memory.base.view, memory.views, thresholds[:count])
        for i, mask in enumerate(masks):
            yield f"thresholds {number} mask {i}", mask.payload


def run_elect_max(backend: Any, memory: Memory) -> Results:
    out = memory.output()
    yield "count", backend.elect_max(out.view, memory.base.view, memory.views)
    yield "out", out.payload


def run_elect_masks(backend: Any, memory: Memory) -> Results:
    masks = memory.poisoned_bits()
    backend.elect_masks(masks_at(masks), memory.base.view, memory.views)
    for i, mask in enumerate(masks):
        yield f"mask {i}", mask.payload


def run_masked_sums(backend: Any, memory: Memory) -> Results:
    masks = masks_at(memory.bits(5))
    for number, span in some_of(enumerate((4096, 64, 100, 10**12)), memory.tile):
        vector = memory.views[number % len(memory.views)]
        yield f"span {span}", backend.masked_sums(vector, masks[: 1 + number], span=span)


def run_apply_task(backend: Any, memory: Memory) -> Results:
    for mask, scale in zip(masks_at(memory.bits(3)), (1.0, 0.7, -2.0), strict=True):
        out = memory.output()
        yield (
            f"{scale} count",
            backend.apply_task(out.view, memory.base.view, memory.views[-1], mask, scale=scale),
        )
        yield str(scale), out.payload


def magnitudes_at(tile: Tile, rank: float) -> list[float]:
    """Finite magnitudes at a share of each model's sorted keys."""
    keys = np.array([max(key, 0) for key in keys_at(tile, rank)], np.int32)
    return [float(x) for x in np.minimum(keys, 0x7F7FFFFF).view(np.float32)]


def pcb_limits(tile: Tile) -> dict[str, tuple[list[float], list[float]]]:
    count = len(tile.models)
    low, high = magnitudes_at(tile, 0.01), magnitudes_at(tile, 0.97)
    return {
        "quantiles": (low, high),
        "all the same": (high, high),
        "wide": ([0.0] * count, [float("inf"), 1e-3] * (count // 2) + [1.0] * (count % 2)),
    }


MODES = ("raw", "normalized", "pairwise")


def run_pcb_score(backend: Any, memory: Memory) -> Results:
    tile = memory.tile
    views = memory.views[:17]
    calls = itertools.product(enumerate(pcb_limits(tile).items()), enumerate(MODES), (1, -1))
    for (number, (name, (lows, highs))), (i, mode), part in some_of(calls, tile):
        index = (number + i + part) % len(views)
        out = memory.output()
        label = f"{name} {mode} {part} of {index}"
        yield (
            f"{label} count",
            backend.pcb_score(
                out.view,
                memory.base.view,
                views,
                index,
                lows[:17],
                highs[:17],
                mode=mode,
                part=part,
            ),
        )
        yield label, out.payload


def run_pcb_merge(backend: Any, memory: Memory) -> Results:
    tile = memory.tile
    views = memory.views[:17]
    count = len(views)
    kinds = (
        ("raw", 1e-7, 1e-3, 1.0),
        ("normalized", 1e-4, 0.5, 0.7),
        ("pairwise", 0.1, 5.0, -1.2),
        ("pairwise", 0.3, 0.3, 1.0),
    )
    calls = itertools.product(pcb_limits(tile).items(), kinds)
    for (name, (lows, highs)), (mode, cut, top, scale) in some_of(calls, tile):
        out = memory.output()
        label = f"{name} {mode} {cut}"
        yield (
            f"{label} count",
            backend.pcb_merge(
                out.view,
                memory.base.view,
                views,
                lows[:17],
                highs[:17],
                [cut * (1 + 0.1 * i) for i in range(count)],
                [top * (1 + 0.1 * i) for i in range(count)],
                weights_of(tile)[:17],
                mode=mode,
                scale=scale,
            ),
        )
        yield label, out.payload


def run_adam_step(backend: Any, memory: Memory) -> Results:
    """The first step and a late one; second moments that are negative, as none should be, too."""
    kinds = ((1, 1e-5, 0.9, 0.999, 1e-8), (200, 1e-3, 0.0, 0.5, 0.0), (2, 1e30, 0.99, 0.9, 1.0))
    offset = memory.tile.offset
    theta, first, second, gradient = (memory.numbers(i) for i in range(-1, 3))
    for step, lr, beta1, beta2, eps in kinds:
        contents = (theta, first, second if beta1 == 0 else np.abs(second), gradient)
        arrays = [
            memory.guarded(F32, values.astype(np.float32).tobytes(), (offset * (i + 1)) % 64)
            for i, values in enumerate(contents)
        ]
        views = [array.view for array in arrays]
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "step": step}
        yield f"{step} count", backend.adam_step(*views, **options)
        arrays[3].check_untouched()
        for name, array in zip(("theta", "first", "second"), arrays, strict=False):
            yield f"{step} {name}", array.payload


def run_weighted_mean(backend: Any, memory: Memory) -> Results:
    """Weights of either sign, and none at all, so that denominators vanish."""
    models, count = memory.views, len(memory.views)
    by_model = [abs(x) for x in weights_of(memory.tile)]
    zeros = memory.guarded(F32, np.zeros(memory.tile.num, np.float32).tobytes(), 4)
    kinds = (
        ("models", models[::-1], by_model, [1e-6] * count),
        ("base", [memory.base.view] * count, [1.0] * count, [0.01, *[0.0] * (count - 1)]),
        ("zeros", [zeros.view] * count, by_model, [0.0] * count),
    )
    for (name, weights, coefficients, floors), mode in some_of(
        itertools.product(kinds, ("add", "max")), memory.tile
    ):
        out = memory.output()
        label = f"{name} {mode}"
        yield (
            f"{label} count",
            backend.weighted_mean(out.view, models, weights, coefficients, floors, mode=mode),
        )
        yield label, out.payload


MAP_RUNS: dict[str, Run] = {
    "nearswap": run_nearswap,
    "variance_score": run_variance_score,
    "overlap_counts": run_overlap_counts,
    "overlap_merge": run_overlap_merge,
    "magmax_merge": run_magmax_merge,
    "consensus_merge": run_consensus_merge,
    "tall_masks": run_tall_masks,
    "elect_max": run_elect_max,
    "elect_masks": run_elect_masks,
    "masked_sums": run_masked_sums,
    "apply_task": run_apply_task,
    "pcb_score": run_pcb_score,
    "pcb_merge": run_pcb_merge,
    "adam_step": run_adam_step,
    "weighted_mean": run_weighted_mean,
}

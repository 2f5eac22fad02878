"""The ops on the CPU: arguments are checked here, the work is done by ``pymerge._C``.

The extension is loaded at the first use, so that this module imports on a machine where it is
missing; the error then carries the reason. The ops are documented in
pymerge/ops/table.py.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.errors import BackendError
from pymerge.ops import arguments
from pymerge.ops.selection import ALL_DRAWS, Keep
from pymerge.ops.view import View

#: Words as the extension numbers them.
_ELECT = {"none": 0, "weighted": 1, "plain": 2}
_COMBINE = {"mean": 0, "count": 1, "sum": 2, "max": 3}
_MODE = {"raw": 0, "normalized": 1, "pairwise": 2}

_extension: Any = None
_reason: ImportError | None = None


def _load() -> Any:
    """The extension module, or None with the reason kept."""
    global _extension, _reason
    if _extension is None and _reason is None:
        try:
            _extension = importlib.import_module("pymerge._C")
        except ImportError as error:
            _reason = error
    return _extension


def _kernels() -> Any:
    problem = why_not()
    if problem is not None:
        raise BackendError(problem) from _reason
    return _extension


def why_not(op: str | None = None) -> str | None:
    """Why this backend cannot run ``op`` here, or None. It offers every op of the table.

    Raises BackendError where PYMERGE_ISA names an instruction set that is missing: what is asked
    for by name is never replaced in silence.
    """
    extension = _load()
    if extension is None:
        return (
            f"the extension pymerge._C cannot be imported: {_reason}; "
            "build it with `make native`, or install pymerge again"
        )
    if not extension.isa():
        raise BackendError(
            f"PYMERGE_ISA asks for {os.environ.get('PYMERGE_ISA', '')!r}; "
            f"this machine and build have {', '.join(extension.available_isas())}"
        )
    return None


def isa() -> str:
    """The instruction set in use: "scalar", "avx2" or "avx512"."""
    name: str = _kernels().isa()
    return name


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this processor, operating system and build have, worst first."""
    extension = _load()
    if extension is None:
        _kernels()
    return tuple(extension.available_isas())


def use_isa(name: str) -> None:
    """Makes all following calls, in every thread, use an instruction set.

    Raises BackendError, which names those there are, if it is missing.
    """
    names = available_isas()
    if not _extension.use_isa(name):
        raise BackendError(
            f"instruction set {name!r} cannot be used; "
            f"this machine and build have {', '.join(names)}"
        )


def axpy_n(
    out: View,
    inputs: Sequence[View],
    weights: Sequence[float],
    *,
    base: View | None = None,
    divisor: float = 1.0,
    scale: float = 1.0,
    add_base: bool = True,
) -> int:
    _, rounded, divisor, scale = arguments.axpy_n(
        out, inputs, weights, base=base, divisor=divisor, scale=scale, add_base=add_base
    )
    count: int = _kernels().axpy_n(out, base, inputs, rounded, divisor, scale, add_base)
    return count


def axpy_grid(
    out: View,
    inputs: Sequence[View],
    weights: ArrayLike,
    *,
    columns: int,
    along: str,
    base: View | None = None,
) -> int:
    _, grid = arguments.axpy_grid(out, inputs, weights, columns=columns, along=along, base=base)
    count: int = _kernels().axpy_grid(out, base, inputs, grid.ctypes.data, columns, along == "rows")
    return count


def magnitude_sample(
    base: View | None, models: Sequence[View], start: int, *, group: int, stride: int
) -> NDArray[np.int32]:
    num, num_sampled = arguments.magnitude_sample(base, models, start, group=group, stride=stride)
    keys = np.empty((len(models), num_sampled), np.int32)
    _kernels().magnitude_sample(
        base, models, num, start, group, stride, keys.ctypes.data, num_sampled
    )
    return keys


def bracket_count(
    base: View | None, models: Sequence[View], low: ArrayLike, high: ArrayLike, capacity: int
) -> tuple[NDArray[np.int64], list[NDArray[np.int32]]]:
    num, lows, highs, capacity = arguments.bracket_count(base, models, low, high, capacity)
    counts = np.zeros((len(models), 4), np.int64)
    candidates = np.empty((len(models), capacity), np.int32)
    _kernels().bracket_count(
        base, models, num, lows, highs, counts.ctypes.data, candidates.ctypes.data, capacity
    )
    return counts, [row[: count[3]] for row, count in zip(candidates, counts, strict=True)]


def magnitude_histogram(
    base: View | None,
    models: Sequence[View],
    counts: NDArray[np.uint64],
    *,
    shift: int,
    prefix: ArrayLike | None = None,
    prefix_shift: int | None = None,
) -> None:
    num, prefixes, top = arguments.magnitude_histogram(
        base, models, counts, shift=shift, prefix=prefix, prefix_shift=prefix_shift
    )
    _kernels().magnitude_histogram(
        base, models, num, shift, prefixes, top, counts.ctypes.data, counts.shape[1]
    )


def locate_equal(base: View | None, model: View, key: int, nth: int) -> tuple[int, int]:
    _, key, nth = arguments.locate_equal(base, model, key, nth)
    index, count = _kernels().locate_equal(base, model, key, nth)
    return index, count


def disjoint_merge(
    out: View,
    base: View | None,
    models: Sequence[View],
    weights: Sequence[float],
    keeps: Sequence[Keep],
    start: int,
    *,
    elect: str = "weighted",
    zero_sign: int = 1,
    combine: str = "mean",
    factors: Sequence[float] | None = None,
    divisor: float = 1.0,
    scale: float = 1.0,
    score: View | None = None,
    deltas: bool = False,
) -> int:
    checked = arguments.disjoint_merge(
        out,
        base,
        models,
        weights,
        keeps,
        start,
        elect=elect,
        zero_sign=zero_sign,
        combine=combine,
        factors=factors,
        divisor=divisor,
        scale=scale,
        score=score,
        deltas=deltas,
    )
    count: int = _kernels().disjoint_merge(
        out,
        base,
        models,
        checked.weights,
        checked.keeps,
        checked.start,
        _ELECT[elect],
        _COMBINE[combine],
        zero_sign,
        checked.factors,
        checked.divisor,
        checked.scale,
        score,
        deltas,
    )
    return count


def count_votes(
    base: View | None,
    models: Sequence[View],
    weights: Sequence[float],
    keeps: Sequence[Keep],
    start: int,
    *,
    elect: str = "weighted",
    factors: Sequence[float] | None = None,
) -> tuple[int, int]:
    num, rounded, checked, start, ratios = arguments.count_votes(
        base, models, weights, keeps, start, elect=elect, factors=factors
    )
    plus, minus = _kernels().count_votes(
        base, models, num, rounded, checked, start, _ELECT[elect], ratios
    )
    return plus, minus


def kept_sums(
    base: View | None,
    models: Sequence[View],
    keeps: Sequence[Keep],
    start: int,
    *,
    span: int,
    score: View | None = None,
) -> NDArray[np.float64]:
    num, checked, start, num_spans = arguments.kept_sums(
        base, models, keeps, start, span=span, score=score
    )
    sums = np.empty((num_spans, len(models), 3))
    _kernels().kept_sums(base, models, num, checked, start, span, score, sums.ctypes.data)
    return sums


def convert(out: View, input: View) -> int:
    arguments.convert(out, input)
    count: int = _kernels().convert(out, input)
    return count


def count_nonfinite(input: View) -> int:
    arguments.count_nonfinite(input)
    count: int = _kernels().count_nonfinite(input)
    return count


def gram_n(base: View | None, inputs: Sequence[View], *, span: int) -> NDArray[np.float64]:
    num, num_spans = arguments.gram_n(base, inputs, span=span)
    sums = np.empty((num_spans, len(inputs) * (len(inputs) + 1) // 2))
    _kernels().gram_n(base, inputs, num, span, sums.ctypes.data)
    return sums


def gram_columns(
    base: View | None, inputs: Sequence[View], sums: NDArray[np.float64], *, columns: int
) -> None:
    num, _ = arguments.gram_columns(base, inputs, sums, columns=columns)
    _kernels().gram_columns(base, inputs, num, columns, sums.ctypes.data)


def row_sparsify(
    out: View,
    base: View | None,
    model: View,
    start: int,
    *,
    columns: int,
    first: int = 0,
    last: int | None = None,
    draws_low: int = ALL_DRAWS,
    draws_span: int = 0,
    seed: int = 0,
    rescale: bool = False,
) -> int:
    checked = arguments.row_sparsify(
        out,
        base,
        model,
        start,
        columns=columns,
        first=first,
        last=last,
        draws_low=draws_low,
        draws_span=draws_span,
        seed=seed,
        rescale=rescale,
    )
    if not checked.num:
        return 0
    count: int = _kernels().row_sparsify(
        out,
        base,
        model,
        checked.start,
        columns,
        checked.first,
        checked.last,
        checked.draws_low,
        checked.draws_span,
        checked.seed,
        rescale,
    )
    return count


def row_divergence(base: View, model: View, *, columns: int) -> NDArray[np.float32]:
    _, num_rows = arguments.row_divergence(base, model, columns=columns)
    divergences = np.empty(num_rows, np.float32)
    _kernels().row_divergence(base, model, columns, divergences.ctypes.data)
    return divergences


def row_scores(out: View, base: View, model: View, factors: ArrayLike, *, columns: int) -> int:
    _, rows = arguments.row_scores(out, base, model, factors, columns=columns)
    count: int = _kernels().row_scores(out, base, model, rows.ctypes.data, columns)
    return count


def select_by_score(
    out: View, base: View, model: View, factors: ArrayLike, threshold: float, *, columns: int
) -> int:
    _, rows, threshold = arguments.select_by_score(
        out, base, model, factors, threshold, columns=columns
    )
    count: int = _kernels().select_by_score(out, base, model, rows.ctypes.data, columns, threshold)
    return count


def lora_add(
    out: View,
    weight: View,
    left: ArrayLike,
    right: ArrayLike,
    start: int,
    *,
    columns: int,
    scale: float,
    factors: ArrayLike | None = None,
) -> int:
    checked = arguments.lora_add(
        out, weight, left, right, start, columns=columns, scale=scale, factors=factors
    )
    count: int = _kernels().lora_add(
        out,
        weight,
        checked.left.ctypes.data,
        checked.right.ctypes.data,
        checked.start,
        checked.left.shape[1],
        columns,
        checked.scale,
        0 if checked.factors is None else checked.factors.ctypes.data,
    )
    return count


def nearswap(out: View, base: View, model: View, *, t: float) -> int:
    _, t = arguments.nearswap(out, base, model, t=t)
    count: int = _kernels().nearswap(out, base, model, t)
    return count


def variance_score(out: View, base: View | None, models: Sequence[View]) -> int:
    arguments.variance_score(out, base, models)
    count: int = _kernels().variance_score(out, base, models)
    return count


def overlap_counts(base: View, models: Sequence[View], *, epsilon: float) -> NDArray[np.int64]:
    _, epsilon = arguments.overlap_counts(base, models, epsilon=epsilon)
    counts = np.zeros((len(models), 2), np.int64)
    _kernels().overlap_counts(base, models, epsilon, counts.ctypes.data)
    return counts


def overlap_merge(
    out: View, base: View, models: Sequence[View], factors: Sequence[float], *, epsilon: float
) -> int:
    _, ratios, epsilon = arguments.overlap_merge(out, base, models, factors, epsilon=epsilon)
    count: int = _kernels().overlap_merge(out, base, models, ratios, epsilon)
    return count


def magmax_merge(out: View, base: View, models: Sequence[View], *, scale: float) -> int:
    _, scale = arguments.magmax_merge(out, base, models, scale=scale)
    count: int = _kernels().magmax_merge(out, base, models, scale)
    return count


def consensus_merge(
    out: View,
    base: View,
    models: Sequence[View],
    thresholds: Sequence[float],
    *,
    minimum: int,
    scale: float,
) -> int:
    _, limits, minimum, scale = arguments.consensus_merge(
        out, base, models, thresholds, minimum=minimum, scale=scale
    )
    count: int = _kernels().consensus_merge(out, base, models, limits, minimum, scale)
    return count


def tall_masks(
    masks: Sequence[int], base: View, models: Sequence[View], thresholds: Sequence[float]
) -> None:
    _, limits = arguments.tall_masks(masks, base, models, thresholds)
    _kernels().tall_masks(masks, base, models, limits)


def elect_max(out: View, base: View, models: Sequence[View]) -> int:
    arguments.elect_max(out, base, models)
    count: int = _kernels().elect_max(out, base, models)
    return count


def elect_masks(masks: Sequence[int], base: View, models: Sequence[View]) -> None:
    arguments.elect_masks(masks, base, models)
    _kernels().elect_masks(masks, base, models)


def masked_sums(vector: View, masks: Sequence[int], *, span: int) -> NDArray[np.float64]:
    _, num_spans = arguments.masked_sums(vector, masks, span=span)
    sums = np.empty((num_spans, len(masks)))
    _kernels().masked_sums(vector, masks, span, sums.ctypes.data)
    return sums


def apply_task(out: View, base: View, vector: View, mask: int, *, scale: float) -> int:
    _, scale = arguments.apply_task(out, base, vector, mask, scale=scale)
    count: int = _kernels().apply_task(out, base, vector, mask, scale)
    return count


def pcb_score(
    out: View,
    base: View,
    models: Sequence[View],
    index: int,
    lows: Sequence[float],
    highs: Sequence[float],
    *,
    mode: str,
    part: int,
) -> int:
    _, index, low, high = arguments.pcb_score(
        out, base, models, index, lows, highs, mode=mode, part=part
    )
    count: int = _kernels().pcb_score(out, base, models, index, low, high, _MODE[mode], part)
    return count


def pcb_merge(
    out: View,
    base: View,
    models: Sequence[View],
    lows: Sequence[float],
    highs: Sequence[float],
    cuts: Sequence[float],
    tops: Sequence[float],
    weights: Sequence[float],
    *,
    mode: str,
    scale: float,
) -> int:
    checked = arguments.pcb_merge(
        out, base, models, lows, highs, cuts, tops, weights, mode=mode, scale=scale
    )
    count: int = _kernels().pcb_merge(
        out,
        base,
        models,
        checked.lows,
        checked.highs,
        checked.cuts,
        checked.tops,
        checked.weights,
        _MODE[mode],
        checked.scale,
    )
    return count


def adam_step(
    theta: View,
    first: View,
    second: View,
    gradient: View,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> int:
    _, numbers = arguments.adam_step(
        theta, first, second, gradient, lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step
    )
    count: int = _kernels().adam_step(theta, first, second, gradient, numbers)
    return count


def weighted_mean(
    out: View,
    models: Sequence[View],
    weights: Sequence[View],
    coefficients: Sequence[float],
    floors: Sequence[float],
    *,
    mode: str,
) -> int:
    _, factors, floors = arguments.weighted_mean(
        out, models, weights, coefficients, floors, mode=mode
    )
    count: int = _kernels().weighted_mean(out, models, weights, factors, floors, mode == "add")
    return count

"""The ops on CUDA devices: arguments are checked here, the work is done by ``pymerge._cuda``.

Views are addresses in device memory. Ops run on the calling thread's current stream, see
pymerge/ops/device.py, and have finished there when they return. With PYMERGE_CUDA_EMULATE=1 the
same kernels run on host memory, in ``pymerge._cuda_emulated``, a block at a time: to test them
without a GPU, not to work with.

The extension is loaded at the first use, so that this module imports where it is missing. The ops
are documented in pymerge/ops/table.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.errors import BackendError
from pymerge.ops import arguments
from pymerge.ops.device import Place, current_place, emulates_cuda, may_have_gpu
from pymerge.ops.selection import ALL_DRAWS, Keep
from pymerge.ops.view import View

Doubles = NDArray[np.float64]

_modules: dict[str, Any] = {}
_reasons: dict[str, str] = {}


def _load() -> tuple[Any, str]:
    """The extension, and why it cannot run; the extension is None where there is none."""
    name = "pymerge._cuda_emulated" if emulates_cuda() else "pymerge._cuda"
    if name == "pymerge._cuda" and not may_have_gpu():
        return None, "this machine has no NVIDIA driver: there is no /dev/nvidiactl"
    if name not in _modules:
        try:
            _modules[name] = importlib.import_module(name)
            _reasons[name] = _modules[name].why_not()
        except ImportError as error:
            _modules[name] = None
            _reasons[name] = (
                f"the extension {name} cannot be imported: {error}; it is built where CMake finds "
                "a CUDA compiler"
                if name == "pymerge._cuda"
                else f"the extension {name} cannot be imported: {error}; build it with "
                "`make native`"
            )
    return _modules[name], _reasons[name]


def why_not(op: str | None = None) -> str | None:
    """Why this backend cannot run ``op`` here, or None. It offers every op of the table."""
    return _load()[1] or None


def emulated() -> bool:
    """Whether the ops would run in the emulator."""
    return emulates_cuda()


def runtime() -> Any:
    """The extension, for what pymerge/ops/device.py needs of it.

    :raises BackendError: it is missing, or no device can be used.
    """
    extension, reason = _load()
    if reason:
        raise BackendError(f"cuda: {reason}")
    return extension


def _kernels() -> Any:
    """The extension, told where the calling thread's ops run."""
    extension = runtime()
    if not emulates_cuda():
        extension.use(current_place() or Place(0, 0))
    return extension


def _array(values: NDArray[np.float32] | None) -> tuple[int, int]:
    return (0, 0) if values is None else (values.ctypes.data, values.size)


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
    _, w, divisor, scale = arguments.axpy_n(
        out, inputs, weights, base=base, divisor=divisor, scale=scale, add_base=add_base
    )
    count: int = _kernels().axpy_n(out, base, inputs, w, divisor, scale, bool(add_base))
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
    count: int = _kernels().axpy_grid(out, base, inputs, _array(grid), columns, along == "rows")
    return count


def magnitude_sample(
    base: View | None, models: Sequence[View], start: int, *, group: int, stride: int
) -> NDArray[np.int32]:
    _, num_sampled = arguments.magnitude_sample(base, models, start, group=group, stride=stride)
    keys = np.empty((len(models), num_sampled), np.int32)
    _kernels().magnitude_sample(base, models, start, group, stride, num_sampled, keys.ctypes.data)
    return keys


def bracket_count(
    base: View | None, models: Sequence[View], low: ArrayLike, high: ArrayLike, capacity: int
) -> tuple[NDArray[np.int64], list[NDArray[np.int32]]]:
    _, lows, highs, room = arguments.bracket_count(base, models, low, high, capacity)
    counts = np.zeros((len(models), 4), np.int64)
    found = _kernels().bracket_count(base, models, lows, highs, room, counts.ctypes.data)
    return counts, [np.frombuffer(keys, np.int32) for keys in found]


def magnitude_histogram(
    base: View | None,
    models: Sequence[View],
    counts: NDArray[np.uint64],
    *,
    shift: int,
    prefix: ArrayLike | None = None,
    prefix_shift: int | None = None,
) -> None:
    _, prefixes, top = arguments.magnitude_histogram(
        base, models, counts, shift=shift, prefix=prefix, prefix_shift=prefix_shift
    )
    _kernels().magnitude_histogram(
        base, models, shift, prefixes, top, counts.ctypes.data, counts.shape[1]
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
        zero_sign,
        arguments.COMBINE.index(combine),
        checked.factors or [],
        checked.divisor,
        checked.scale,
        score,
        bool(deltas),
    )
    return count


#: The numbers of the words in csrc/include/pymerge/parameters.h.
_ELECT = {"none": 0, "weighted": 1, "plain": 2}


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
    _, w, checked, start, r = arguments.count_votes(
        base, models, weights, keeps, start, elect=elect, factors=factors
    )
    plus, minus = _kernels().count_votes(base, models, w, checked, start, _ELECT[elect], r or [])
    return plus, minus


def kept_sums(
    base: View | None,
    models: Sequence[View],
    keeps: Sequence[Keep],
    start: int,
    *,
    span: int,
    score: View | None = None,
) -> Doubles:
    _, checked, start, num_spans = arguments.kept_sums(
        base, models, keeps, start, span=span, score=score
    )
    sums = np.zeros((num_spans, len(models), 3))
    _kernels().kept_sums(base, models, checked, start, span, score, sums.ctypes.data)
    return sums


def convert(out: View, input: View) -> int:
    arguments.convert(out, input)
    count: int = _kernels().convert(out, input)
    return count


def count_nonfinite(input: View) -> int:
    arguments.count_nonfinite(input)
    count: int = _kernels().count_nonfinite(input)
    return count


def gram_n(base: View | None, inputs: Sequence[View], *, span: int) -> Doubles:
    _, num_spans = arguments.gram_n(base, inputs, span=span)
    sums = np.zeros((num_spans, len(inputs) * (len(inputs) + 1) // 2))
    _kernels().gram_n(base, inputs, span, sums.ctypes.data)
    return sums


def gram_columns(base: View | None, inputs: Sequence[View], sums: Doubles, *, columns: int) -> None:
    arguments.gram_columns(base, inputs, sums, columns=columns)
    _kernels().gram_columns(base, inputs, columns, sums.ctypes.data)


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
        bool(rescale),
    )
    return count


def row_divergence(base: View, model: View, *, columns: int) -> NDArray[np.float32]:
    _, num_rows = arguments.row_divergence(base, model, columns=columns)
    divergences = np.empty(num_rows, np.float32)
    _kernels().row_divergence(base, model, columns, divergences.ctypes.data)
    return divergences


def row_scores(out: View, base: View, model: View, factors: ArrayLike, *, columns: int) -> int:
    _, checked = arguments.row_scores(out, base, model, factors, columns=columns)
    count: int = _kernels().row_scores(out, base, model, _array(checked), columns)
    return count


def select_by_score(
    out: View, base: View, model: View, factors: ArrayLike, threshold: float, *, columns: int
) -> int:
    _, checked, limit = arguments.select_by_score(
        out, base, model, factors, threshold, columns=columns
    )
    count: int = _kernels().select_by_score(out, base, model, _array(checked), limit, columns)
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
        _array(checked.left),
        _array(checked.right),
        checked.start,
        columns,
        checked.left.shape[1],
        checked.scale,
        _array(checked.factors),
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
    counts = _kernels().overlap_counts(base, models, epsilon)
    return np.asarray(counts, np.int64).reshape(len(models), 2)


def overlap_merge(
    out: View, base: View, models: Sequence[View], factors: Sequence[float], *, epsilon: float
) -> int:
    _, r, epsilon = arguments.overlap_merge(out, base, models, factors, epsilon=epsilon)
    count: int = _kernels().overlap_merge(out, base, models, r, epsilon)
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


def masked_sums(vector: View, masks: Sequence[int], *, span: int) -> Doubles:
    _, num_spans = arguments.masked_sums(vector, masks, span=span)
    sums = np.zeros((num_spans, len(masks)))
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
    count: int = _kernels().pcb_score(
        out, base, models, index, low, high, arguments.MODE.index(mode), part
    )
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
        arguments.MODE.index(mode),
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

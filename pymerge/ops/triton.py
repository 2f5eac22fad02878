"""The ops on the triton backend: arguments are checked here, the work is done by pymerge/kernels.

Triton and torch are loaded at the first use. On a machine with a CUDA driver the memory is that of
a device; with TRITON_INTERPRET=1 kernels run in Triton's interpreter on host memory. Ops run on the
calling thread's current stream, see pymerge/ops/device.py, and have finished there when they
return. They are documented in pymerge/ops/table.py.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymerge.errors import BackendError
from pymerge.ops import arguments
from pymerge.ops.device import current_place, interprets_triton, may_have_gpu
from pymerge.ops.selection import ALL_DRAWS, Keep
from pymerge.ops.view import View

_problem: list[str | None] = []


def emulated() -> bool:
    """Whether kernels would run in Triton's interpreter, on host memory."""
    return interprets_triton()


def why_not(op: str | None = None) -> str | None:
    """Why this backend cannot run ``op`` here, or None. It offers every op of the table."""
    if emulated():
        return None if importlib.util.find_spec("triton") else _NO_TRITON
    if not _problem:
        _problem.append(_find_problem())
    return _problem[0]


_NO_TRITON = "triton is not installed; install it with `pip install triton`"


def _find_problem() -> str | None:
    if not may_have_gpu():
        return "there is no NVIDIA driver here, and TRITON_INTERPRET=1 is not set"
    if importlib.util.find_spec("triton") is None:
        return _NO_TRITON
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; install a torch with CUDA"
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        build = "has no CUDA" if torch.version.cuda is None else "finds no device or driver"
        return f"torch {torch.__version__} {build}"
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            return f"{name} has compute capability {major}.{minor}; the kernels need 8.0"
    return None


def _kernels(name: str) -> ModuleType:
    """A module of kernels, made for the interpreter or for devices when it is first asked for."""
    problem = why_not()
    if problem is not None:
        raise BackendError(f"triton: {problem}")
    launch: Any = importlib.import_module("pymerge.kernels.launch")
    if emulated() != launch.INTERPRETED:
        state = "interpreted" if launch.INTERPRETED else "compiled"
        raise BackendError(
            f"triton: kernels were loaded to be {state} and TRITON_INTERPRET has changed since; "
            "set it before the first op of a process"
        )
    launch.entered_place = current_place
    return importlib.import_module(f"pymerge.kernels.{name}")


def gram_acc(total: Any, x: Any, side: str, base: Any = None) -> None:
    """Adds a Gram matrix to ``total`` by kernels/gram.py, for pymerge/ops/matrix/gram.py.

    Unlike the others it takes torch tensors, and has not finished when it returns: what torch does
    next on the same stream comes after.
    """
    _kernels("gram").gram_acc(total, x, side, base)


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
    num, rounded, divisor, scale = arguments.axpy_n(
        out, inputs, weights, base=base, divisor=divisor, scale=scale, add_base=add_base
    )
    kernels = _kernels("axpy")
    if not num:
        return 0
    count: int = kernels.axpy_n(out, inputs, rounded, base, divisor, scale, add_base)
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
    num, table = arguments.axpy_grid(out, inputs, weights, columns=columns, along=along, base=base)
    kernels = _kernels("axpy")
    if not num:
        return 0
    count: int = kernels.axpy_grid(out, inputs, table, base, columns, along)
    return count


def magnitude_sample(
    base: View | None, models: Sequence[View], start: int, *, group: int, stride: int
) -> NDArray[np.int32]:
    _, num_sampled = arguments.magnitude_sample(base, models, start, group=group, stride=stride)
    kernels = _kernels("selection")
    if not num_sampled:
        return np.empty((len(models), 0), np.int32)
    keys: NDArray[np.int32] = kernels.magnitude_sample(
        base, models, start, group, stride, num_sampled
    )
    return keys


def bracket_count(
    base: View | None, models: Sequence[View], low: ArrayLike, high: ArrayLike, capacity: int
) -> tuple[NDArray[np.int64], list[NDArray[np.int32]]]:
    num, lows, highs, capacity = arguments.bracket_count(base, models, low, high, capacity)
    kernels = _kernels("selection")
    if not num:
        return np.zeros((len(models), 4), np.int64), [np.empty(0, np.int32) for _ in models]
    counts, candidates = kernels.bracket_count(base, models, lows, highs, capacity)
    return counts, candidates


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
    kernels = _kernels("selection")
    if num:
        kernels.magnitude_histogram(base, models, counts, shift, prefixes, top)


def locate_equal(base: View | None, model: View, key: int, nth: int) -> tuple[int, int]:
    num, key, nth = arguments.locate_equal(base, model, key, nth)
    kernels = _kernels("selection")
    if not num:
        return -1, 0
    index, count = kernels.locate_equal(base, model, key, nth)
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
    kernels = _kernels("merge")
    if not checked.num:
        return 0
    counts = kernels.disjoint_merge(
        out,
        base,
        models,
        checked.weights,
        checked.keeps,
        checked.start,
        elect=elect,
        zero_sign=zero_sign,
        combine=combine,
        factors=checked.factors,
        divisor=checked.divisor,
        scale=checked.scale,
        score=score,
        deltas=deltas,
    )
    return int(counts[0])


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
    num, rounded, checked, start, multipliers = arguments.count_votes(
        base, models, weights, keeps, start, elect=elect, factors=factors
    )
    kernels = _kernels("merge")
    if not num:
        return 0, 0
    counts = kernels.disjoint_merge(
        None,
        base,
        models,
        rounded,
        checked,
        start,
        elect=elect,
        zero_sign=1,
        combine="sum",
        factors=multipliers,
        divisor=1.0,
        scale=1.0,
        score=None,
        deltas=False,
    )
    return int(counts[0]), int(counts[1])


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
    kernels = _kernels("spans")
    if not num:
        return np.zeros((0, len(models), 3))
    sums: NDArray[np.float64] = kernels.kept_sums(
        base, models, checked, start, score, min(span, num), num_spans
    )
    return sums


def convert(out: View, input: View) -> int:
    num = arguments.convert(out, input)
    kernels = _kernels("convert")
    if not num:
        return 0
    count: int = kernels.convert(out, input)
    return count


def count_nonfinite(input: View) -> int:
    num = arguments.count_nonfinite(input)
    kernels = _kernels("convert")
    if not num:
        return 0
    count: int = kernels.count_nonfinite(input)
    return count


def gram_n(base: View | None, inputs: Sequence[View], *, span: int) -> NDArray[np.float64]:
    num, num_spans = arguments.gram_n(base, inputs, span=span)
    kernels = _kernels("spans")
    if not num:
        return np.zeros((0, len(inputs) * (len(inputs) + 1) // 2))
    sums: NDArray[np.float64] = kernels.gram_n(base, inputs, min(span, num), num_spans)
    return sums


def gram_columns(
    base: View | None, inputs: Sequence[View], sums: NDArray[np.float64], *, columns: int
) -> None:
    num, num_rows = arguments.gram_columns(base, inputs, sums, columns=columns)
    kernels = _kernels("spans")
    if num:
        kernels.gram_columns(base, inputs, sums, columns, num_rows)


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
    kernels = _kernels("rows")
    if not checked.num:
        return 0
    count: int = kernels.row_sparsify(
        out,
        base,
        model,
        checked.start,
        columns=columns,
        num_rows=checked.num_rows,
        first=checked.first,
        last=checked.last,
        draws_low=checked.draws_low,
        draws_span=checked.draws_span,
        seed=checked.seed,
        rescale=rescale,
    )
    return count


def row_divergence(base: View, model: View, *, columns: int) -> NDArray[np.float32]:
    num, num_rows = arguments.row_divergence(base, model, columns=columns)
    kernels = _kernels("rows")
    if not num:
        return np.zeros(0, np.float32)
    result: NDArray[np.float32] = kernels.row_divergence(base, model, columns, num_rows)
    return result


def row_scores(out: View, base: View, model: View, factors: ArrayLike, *, columns: int) -> int:
    num, table = arguments.row_scores(out, base, model, factors, columns=columns)
    kernels = _kernels("rows")
    if not num:
        return 0
    count: int = kernels.row_scores(out, base, model, table, columns, None)
    return count


def select_by_score(
    out: View, base: View, model: View, factors: ArrayLike, threshold: float, *, columns: int
) -> int:
    num, table, threshold = arguments.select_by_score(
        out, base, model, factors, threshold, columns=columns
    )
    kernels = _kernels("rows")
    if not num:
        return 0
    count: int = kernels.row_scores(out, base, model, table, columns, threshold)
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
    kernels = _kernels("rows")
    if not checked.num:
        return 0
    count: int = kernels.lora_add(
        out,
        weight,
        checked.left,
        checked.right,
        checked.start,
        columns=columns,
        scale=checked.scale,
        factors=checked.factors,
    )
    return count


def nearswap(out: View, base: View, model: View, *, t: float) -> int:
    num, t = arguments.nearswap(out, base, model, t=t)
    kernels = _kernels("elementwise")
    if not num:
        return 0
    count: int = kernels.map_models(kernels.NEARSWAP, out, base, [model], [t])
    return count


def variance_score(out: View, base: View | None, models: Sequence[View]) -> int:
    num = arguments.variance_score(out, base, models)
    kernels = _kernels("elementwise")
    if not num:
        return 0
    count: int = kernels.map_models(kernels.VARIANCE, out, base, models)
    return count


def overlap_counts(base: View, models: Sequence[View], *, epsilon: float) -> NDArray[np.int64]:
    num, epsilon = arguments.overlap_counts(base, models, epsilon=epsilon)
    kernels = _kernels("elementwise")
    if not num:
        return np.zeros((len(models), 2), np.int64)
    counts: NDArray[np.int64] = kernels.overlap_counts(base, models, epsilon)
    return counts


def overlap_merge(
    out: View, base: View, models: Sequence[View], factors: Sequence[float], *, epsilon: float
) -> int:
    num, rounded, epsilon = arguments.overlap_merge(out, base, models, factors, epsilon=epsilon)
    kernels = _kernels("elementwise")
    if not num:
        return 0
    count: int = kernels.map_models(kernels.OVERLAP, out, base, models, [*rounded, epsilon])
    return count


def magmax_merge(out: View, base: View, models: Sequence[View], *, scale: float) -> int:
    num, scale = arguments.magmax_merge(out, base, models, scale=scale)
    kernels = _kernels("elementwise")
    if not num:
        return 0
    count: int = kernels.map_models(kernels.MAGMAX, out, base, models, [scale])
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
    num, limits, minimum, scale = arguments.consensus_merge(
        out, base, models, thresholds, minimum=minimum, scale=scale
    )
    kernels = _kernels("elementwise")
    if not num:
        return 0
    count: int = kernels.map_models(
        kernels.CONSENSUS, out, base, models, [*limits, scale], minimum=minimum
    )
    return count


def tall_masks(
    masks: Sequence[int], base: View, models: Sequence[View], thresholds: Sequence[float]
) -> None:
    num, limits = arguments.tall_masks(masks, base, models, thresholds)
    kernels = _kernels("elementwise")
    if num:
        kernels.write_masks(kernels.TALL, masks, base, models, limits)


def elect_max(out: View, base: View, models: Sequence[View]) -> int:
    num = arguments.elect_max(out, base, models)
    kernels = _kernels("elementwise")
    if not num:
        return 0
    count: int = kernels.map_models(kernels.ELECT_MAX, out, base, models)
    return count


def elect_masks(masks: Sequence[int], base: View, models: Sequence[View]) -> None:
    num = arguments.elect_masks(masks, base, models)
    kernels = _kernels("elementwise")
    if num:
        kernels.write_masks(kernels.ELECT, masks, base, models)


def masked_sums(vector: View, masks: Sequence[int], *, span: int) -> NDArray[np.float64]:
    num, num_spans = arguments.masked_sums(vector, masks, span=span)
    kernels = _kernels("spans")
    if not num:
        return np.zeros((0, len(masks)))
    sums: NDArray[np.float64] = kernels.masked_sums(vector, masks, min(span, num), num_spans)
    return sums


def apply_task(out: View, base: View, vector: View, mask: int, *, scale: float) -> int:
    num, scale = arguments.apply_task(out, base, vector, mask, scale=scale)
    kernels = _kernels("elementwise")
    if not num:
        return 0
    count: int = kernels.map_models(kernels.APPLY_TASK, out, base, [vector], [scale], mask=mask)
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
    num, index, low, high = arguments.pcb_score(
        out, base, models, index, lows, highs, mode=mode, part=part
    )
    kernels = _kernels("pcb")
    if not num:
        return 0
    count: int = kernels.pcb_score(out, base, models, index, low, high, mode, part)
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
    kernels = _kernels("pcb")
    if not checked.num:
        return 0
    count: int = kernels.pcb_merge(
        out,
        base,
        models,
        checked.lows,
        checked.highs,
        checked.cuts,
        checked.tops,
        checked.weights,
        mode,
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
    num, numbers = arguments.adam_step(
        theta, first, second, gradient, lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step
    )
    kernels = _kernels("adam")
    if not num:
        return 0
    count: int = kernels.adam_step(theta, first, second, gradient, numbers)
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
    num, factors, floors = arguments.weighted_mean(
        out, models, weights, coefficients, floors, mode=mode
    )
    kernels = _kernels("weighted_mean")
    if not num:
        return 0
    count: int = kernels.weighted_mean(out, models, weights, factors, floors, mode == "add")
    return count

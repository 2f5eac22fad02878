"""Arguments of the maps of single elements that methods of their own need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from pymerge.errors import PymergeError
from pymerge.formats import BY_CODE, F32
from pymerge.ops import checks
from pymerge.ops.view import View

MODE = ("raw", "normalized", "pairwise")
FLOOR = ("add", "max")


def nearswap(out: View, base: View, model: View, *, t: float) -> tuple[int, float]:
    """num, t."""
    return _map("nearswap", out, base, (model,)), checks.finite("nearswap", "t", t)


def variance_score(out: View, base: View | None, models: Sequence[View]) -> int:
    """num."""
    num = checks.check_views("variance_score", base, models, out)
    checks.check_writable("variance_score", out)
    return num


def overlap_counts(base: View, models: Sequence[View], *, epsilon: float) -> tuple[int, float]:
    """num, epsilon."""
    op = "overlap_counts"
    checks.check_base(op, base)
    return checks.check_views(op, base, models), checks.finite(op, "epsilon", epsilon)


def overlap_merge(
    out: View, base: View, models: Sequence[View], factors: Sequence[float], *, epsilon: float
) -> tuple[int, list[float], float]:
    """num, factors, epsilon."""
    op = "overlap_merge"
    num = _map(op, out, base, models)
    checked = checks.floats(op, "factors", factors, len(models))
    return num, checked, checks.finite(op, "epsilon", epsilon)


def magmax_merge(
    out: View, base: View, models: Sequence[View], *, scale: float
) -> tuple[int, float]:
    """num, scale."""
    return _map("magmax_merge", out, base, models), checks.number("magmax_merge", "scale", scale)


def consensus_merge(
    out: View,
    base: View,
    models: Sequence[View],
    thresholds: Sequence[float],
    *,
    minimum: int,
    scale: float,
) -> tuple[int, list[float], int, float]:
    """num, thresholds, minimum, scale."""
    op = "consensus_merge"
    num = _map(op, out, base, models)
    limits = _finite_list(op, "thresholds", thresholds, len(models))
    minimum = checks.check_range(op, "minimum", minimum, 0, checks.INT32_MAX)
    return num, limits, minimum, checks.number(op, "scale", scale)


def tall_masks(
    masks: Sequence[int], base: View, models: Sequence[View], thresholds: Sequence[float]
) -> tuple[int, list[float]]:
    """num, thresholds."""
    op = "tall_masks"
    num = _written_masks(op, masks, base, models)
    return num, _finite_list(op, "thresholds", thresholds, len(models))


def elect_max(out: View, base: View, models: Sequence[View]) -> int:
    """num."""
    return _map("elect_max", out, base, models)


def elect_masks(masks: Sequence[int], base: View, models: Sequence[View]) -> int:
    """num."""
    return _written_masks("elect_masks", masks, base, models)


def masked_sums(vector: View, masks: Sequence[int], *, span: int) -> tuple[int, int]:
    """num, the number of spans."""
    op = "masked_sums"
    if not masks:
        raise PymergeError(f"{op}: expected at least one mask, found none")
    num = checks.check_views(op, None, (vector,), masks=masks)
    return num, checks.check_spans(op, num, span)


def apply_task(
    out: View, base: View, vector: View, mask: int, *, scale: float
) -> tuple[int, float]:
    """num, scale."""
    op = "apply_task"
    checks.check_base(op, base)
    num = checks.check_views(op, base, (vector,), out, masks=(mask,))
    checks.check_writable(op, out)
    return num, checks.number(op, "scale", scale)


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
) -> tuple[int, int, list[float], list[float]]:
    """num, index, lows, highs."""
    op = "pcb_score"
    num = _map(op, out, base, models)
    index = checks.check_range(op, "index", index, 0, len(models) - 1)
    checks.check_word(op, "mode", mode, MODE)
    if part not in (1, -1):
        raise PymergeError(f"{op}: part is {part!r}, expected 1 or -1")
    return num, index, *_limits(op, "lows", lows, "highs", highs, len(models))


class Pcb(NamedTuple):
    """Checked arguments of pcb_merge, a number per model each."""

    num: int
    lows: list[float]
    highs: list[float]
    cuts: list[float]
    tops: list[float]
    weights: list[float]
    scale: float


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
) -> Pcb:
    op = "pcb_merge"
    num = _map(op, out, base, models)
    checks.check_word(op, "mode", mode, MODE)
    count = len(models)
    return Pcb(
        num,
        *_limits(op, "lows", lows, "highs", highs, count),
        *_limits(op, "cuts", cuts, "tops", tops, count),
        checks.floats(op, "weights", weights, count),
        checks.number(op, "scale", scale),
    )


class AdamStep(NamedTuple):
    """Checked arguments of adam_step: the count, and gain1, decay2, gain2, rate and floor."""

    num: int
    numbers: list[float]


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
) -> AdamStep:
    op = "adam_step"
    named = {"theta": theta, "first": first, "second": second, "gradient": gradient}
    for name, view in named.items():
        if view.code != F32.code:
            format = BY_CODE.get(view.code)
            found = f"format code {view.code}" if format is None else format.name
            raise PymergeError(f"{op}: {name} is {found}, expected F32")
    num = checks.check_views(op, None, (gradient,), theta)
    checks.check_views(op, None, (gradient, theta), first)
    checks.check_views(op, None, (gradient, theta, first), second)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= checks.finite(op, name, beta) < 1:
            raise PymergeError(f"{op}: {name} is {beta}, expected 0 <= {name} < 1")
    for name, value in (("lr", lr), ("eps", eps)):
        if checks.finite(op, name, value) < 0:
            raise PymergeError(f"{op}: {name} is {value}, expected zero or more")
    step = checks.check_range(op, "step", step, 1, checks.INT32_MAX)
    root = math.sqrt(1 - beta2**step)
    rate = lr * root / (1 - beta1**step)
    numbers = [1 - beta1, beta2, 1 - beta2, rate, eps * root]
    return AdamStep(num, checks.floats(op, "numbers", numbers, len(numbers)))


def weighted_mean(
    out: View,
    models: Sequence[View],
    weights: Sequence[View],
    coefficients: Sequence[float],
    floors: Sequence[float],
    *,
    mode: str,
) -> tuple[int, list[float], list[float]]:
    """num, coefficients, floors."""
    op, count = "weighted_mean", len(models)
    if len(weights) != count:
        raise PymergeError(f"{op}: expected {count} weights, one per model, found {len(weights)}")
    num = checks.check_views(op, None, (*models, *weights), out)
    checks.check_writable(op, out)
    checks.check_word(op, "mode", mode, FLOOR)
    factors = checks.floats(op, "coefficients", coefficients, count)
    return num, factors, checks.floats(op, "floors", floors, count)


def _map(op: str, out: View, base: View, models: Sequence[View]) -> int:
    checks.check_base(op, base)
    num = checks.check_views(op, base, models, out)
    checks.check_writable(op, out)
    return num


def _written_masks(op: str, masks: Sequence[int], base: View, models: Sequence[View]) -> int:
    checks.check_base(op, base)
    if len(masks) != len(models):
        raise PymergeError(f"{op}: expected {len(models)} masks, one per model, found {len(masks)}")
    return checks.check_views(op, base, models, masks=masks, writes_masks=True)


def _finite_list(op: str, name: str, values: Sequence[float], count: int) -> list[float]:
    rounded = checks.floats(op, name, values, count)
    for i, value in enumerate(rounded):
        checks.finite(op, f"{name}[{i}]", value)
    return rounded


def _limits(
    op: str,
    low_name: str,
    lows: Sequence[float],
    high_name: str,
    highs: Sequence[float],
    count: int,
) -> tuple[list[float], list[float]]:
    """Two ends per model; what bad inputs made NaN passes, so that the merge shows it."""
    low, high = checks.floats(op, low_name, lows, count), checks.floats(op, high_name, highs, count)
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        if a > b:
            raise PymergeError(
                f"{op}: {low_name}[{i}] is {a} and above {high_name}[{i}], which is {b}"
            )
    return low, high

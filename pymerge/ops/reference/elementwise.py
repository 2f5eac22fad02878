"""Maps of one element of the base and of every model, one for each method that needs its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pymerge.ops import arguments
from pymerge.ops.reference import elementary
from pymerge.ops.reference.elements import (
    Doubles,
    Floats,
    delta_of,
    key_of,
    memory_of,
    span_sums,
    store,
    value,
    widened,
)
from pymerge.ops.reference.merge import in_order
from pymerge.ops.view import View

Mask = NDArray[np.bool_]


def nearswap(out: View, base: View, model: View, *, t: float) -> int:
    """w = min(max(t / max(|b - a|, 1e-6), 0), 1); out = w b + (1 - w) a."""
    _, t = arguments.nearswap(out, base, model, t=t)
    a, b = value(base), value(model)
    one, zero = np.float32(1), np.float32(0)
    with np.errstate(all="ignore"):
        size = np.abs(b - a)
        size = np.where(size < np.float32(1e-6), np.float32(1e-6), size)
        w = np.float32(t) / size
        w = np.where(w < zero, zero, w)
        w = np.where(w > one, one, w)
        return store(out, w * b + (one - w) * a)


def variance_score(out: View, base: View | None, models: Sequence[View]) -> int:
    """The biased variance of the deltas over the models."""
    arguments.variance_score(out, base, models)
    count = np.float32(len(models))
    with np.errstate(all="ignore"):
        deltas = [delta_of(base, x) for x in models]
        mean = in_order(deltas) / count
        return store(out, in_order([(d - mean) * (d - mean) for d in deltas]) / count)


def overlap_counts(base: View, models: Sequence[View], *, epsilon: float) -> NDArray[np.int64]:
    """int64 [num_models, 2]: elements with |delta| > epsilon, and those where no other model has
    one."""
    _, epsilon = arguments.overlap_counts(base, models, epsilon=epsilon)
    _, active, count = _active(base, models, epsilon)
    return np.array(
        [[np.count_nonzero(a), np.count_nonzero(a & (count == 1))] for a in active], np.int64
    )


def overlap_merge(
    out: View, base: View, models: Sequence[View], factors: Sequence[float], *, epsilon: float
) -> int:
    """The sum over active models (|delta| > epsilon) of delta * factor where one is active, else of
    delta / (number active), added to the base. A NaN delta is active."""
    _, factors, epsilon = arguments.overlap_merge(out, base, models, factors, epsilon=epsilon)
    r = np.asarray(factors, np.float32)
    deltas, active, count = _active(base, models, epsilon)
    num: Floats = np.zeros(out.num, np.float32)
    with np.errstate(all="ignore"):
        for i, (delta, is_active) in enumerate(zip(deltas, active, strict=True)):
            term = np.where(count == 1, delta * r[i], delta / count.astype(np.float32))
            num = np.where(is_active, num + term, num)
        return store(out, value(base) + num)


def _active(
    base: View, models: Sequence[View], epsilon: float
) -> tuple[list[Floats], list[Mask], NDArray[np.int64]]:
    deltas = [delta_of(base, x) for x in models]
    with np.errstate(all="ignore"):
        active = [~(np.abs(d) <= np.float32(epsilon)) for d in deltas]
    return deltas, active, np.sum(active, axis=0)


def magmax_merge(out: View, base: View, models: Sequence[View], *, scale: float) -> int:
    """The delta of largest magnitude, the last model's of equals; base + scale * it."""
    _, scale = arguments.magmax_merge(out, base, models, scale=scale)
    with np.errstate(all="ignore"):
        best = delta_of(base, models[0])
        for x in models[1:]:
            delta = delta_of(base, x)
            best = np.where(key_of(delta) >= key_of(best), delta, best)
        return store(out, value(base) + np.float32(scale) * best)


def consensus_merge(
    out: View,
    base: View,
    models: Sequence[View],
    thresholds: Sequence[float],
    *,
    minimum: int,
    scale: float,
) -> int:
    """total = delta_0 + delta_1 + ...; model i uses an element where |delta_i| > thresholds[i] *
    |total - delta_i|. base + scale * total where at least ``minimum`` models use it, else base +
    scale * 0. A total that is not finite stays."""
    _, thresholds, minimum, scale = arguments.consensus_merge(
        out, base, models, thresholds, minimum=minimum, scale=scale
    )
    total, used = _used(base, models, thresholds)
    with np.errstate(all="ignore"):
        stays = (np.sum(used, axis=0) >= minimum) | ~np.isfinite(total)
        merged = np.where(stays, total, np.float32(0))
        return store(out, value(base) + np.float32(scale) * merged)


def tall_masks(
    masks: Sequence[int], base: View, models: Sequence[View], thresholds: Sequence[float]
) -> None:
    """For each model the address of ceil(num / 8) bytes: bit j % 8 of byte j // 8 is whether the
    model uses element j, as in consensus_merge; bits past the last element are 0."""
    _, thresholds = arguments.tall_masks(masks, base, models, thresholds)
    _, used = _used(base, models, thresholds)
    _pack(masks, used)


def _used(
    base: View, models: Sequence[View], thresholds: Sequence[float]
) -> tuple[Floats, list[Mask]]:
    limits = np.asarray(thresholds, np.float32)
    with np.errstate(all="ignore"):
        deltas = [delta_of(base, x) for x in models]
        total = in_order(deltas)
        used = [np.abs(d) > limits[i] * np.abs(total - d) for i, d in enumerate(deltas)]
    return total, used


def elect_max(out: View, base: View, models: Sequence[View]) -> int:
    """The delta of largest magnitude among those of the elected sign, 0 if there is none; plus is
    elected where delta_0 + delta_1 + ... > 0, else minus. Nothing is added."""
    arguments.elect_max(out, base, models)
    deltas, agrees = _agrees(base, models)
    best: Floats = np.zeros(out.num, np.float32)
    with np.errstate(all="ignore"):
        for delta, mask in zip(deltas, agrees, strict=True):
            best = np.where(mask & (np.abs(delta) > np.abs(best)), delta, best)
        best = np.where(np.isnan(in_order(deltas)), np.float32(np.nan), best).astype(np.float32)
    return store(out, best)


def elect_masks(masks: Sequence[int], base: View, models: Sequence[View]) -> None:
    """Bits as in tall_masks: whether the model's delta is not zero and has the elected sign."""
    arguments.elect_masks(masks, base, models)
    _pack(masks, _agrees(base, models)[1])


def _agrees(base: View, models: Sequence[View]) -> tuple[list[Floats], list[Mask]]:
    with np.errstate(all="ignore"):
        deltas = [delta_of(base, x) for x in models]
        plus = in_order(deltas) > 0
        return deltas, [np.where(plus, d > 0, d < 0) for d in deltas]


def masked_sums(vector: View, masks: Sequence[int], *, span: int) -> Doubles:
    """float64 [num_spans, num_masks]: the sum of |value| where the bit is set."""
    arguments.masked_sums(vector, masks, span=span)
    wide = np.abs(widened(value(vector)))
    sums = [span_sums(np.where(_unpack(m, vector.num), wide, 0.0), span) for m in masks]
    return np.stack(sums, axis=-1)


def apply_task(out: View, base: View, vector: View, mask: int, *, scale: float) -> int:
    """base + scale * (the vector where the bit is set, else 0)."""
    _, scale = arguments.apply_task(out, base, vector, mask, scale=scale)
    with np.errstate(all="ignore"):
        kept = np.where(_unpack(mask, out.num), value(vector), np.float32(0))
        return store(out, value(base) + np.float32(scale) * kept)


def _pack(masks: Sequence[int], bits: Sequence[Mask]) -> None:
    for address, mask in zip(masks, bits, strict=True):
        packed = np.packbits(mask, bitorder="little")
        memory_of(View(address, _BYTES, len(packed)))[:] = packed


def _unpack(address: int, num: int) -> Mask:
    packed = memory_of(View(address, _BYTES, -(-num // 8)))
    result: Mask = np.unpackbits(packed, count=num, bitorder="little").astype(bool)
    return result


#: A format of one byte, to look at plain bytes.
_BYTES = 4


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
    """max(part * score, 0) of model ``index``, part +1 or -1; the score is that of pcb_merge."""
    _, index, lows, highs = arguments.pcb_score(
        out, base, models, index, lows, highs, mode=mode, part=part
    )
    scores = _pcb_scores(base, models, lows, highs, mode)[1][index]
    with np.errstate(all="ignore"):
        signed = np.float32(part) * scores
        return store(out, np.where(signed < 0, np.float32(0), signed).astype(np.float32))


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
    """The mean of the clipped deltas by their scores.

    a_i = min(max(|delta_i|, low_i), high_i), n_i = (a_i - low_i) / (high_i - low_i), or 0 where
    low_i == high_i; t_i = a_i with the sign of delta_i, 0 where it is 0; s_i = n_i likewise.
    score_i = exp(N (n_i n_i)) * inter_i with inter_i = tanh(delta_i * (delta_0 + ...)) in mode raw,
    tanh(delta_i * (s_0 + ...)) in mode normalized, and the sum over j of tanh(s_i s_j) in mode
    pairwise. k_i = (min(max(score_i, cut_i), top_i) - cut_i) / (top_i - cut_i), 0 where they are
    equal; num = w_0 (k_0 t_0) + ..., den = max(k_0 + ..., 1e-12); out = base + scale * (num / den).
    """
    _, lows, highs, cuts, tops, weights, scale = arguments.pcb_merge(
        out, base, models, lows, highs, cuts, tops, weights, mode=mode, scale=scale
    )
    w = np.asarray(weights, np.float32)
    clipped, scores = _pcb_scores(base, models, lows, highs, mode)
    with np.errstate(all="ignore"):
        shares = []
        for i, score in enumerate(scores):
            cut, top = np.float32(cuts[i]), np.float32(tops[i])
            limited = np.where(score < cut, cut, score)
            limited = np.where(limited > top, top, limited)
            width = top - cut
            shares.append((limited - cut) / width if width != 0 else limited * np.float32(0))
        num = in_order(
            [w[i] * (k * t) for i, (k, t) in enumerate(zip(shares, clipped, strict=True))]
        )
        den = in_order(shares)
        den = np.where(den < np.float32(1e-12), np.float32(1e-12), den)
        return store(out, value(base) + np.float32(scale) * (num / den))


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
    """A step of Adam in place: first = first + gain1 (gradient - first), second = decay2 second +
    gain2 gradient gradient, theta = theta - rate first / (sqrt(second) + floor); the corrections of
    the bias are in the rate and the floor."""
    checked = arguments.adam_step(
        theta, first, second, gradient, lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step
    )
    gain1, decay2, gain2, rate, floor = (np.float32(x) for x in checked.numbers)
    g, m, v = value(gradient), value(first), value(second)
    with np.errstate(all="ignore"):
        m = m + gain1 * (g - m)
        v = decay2 * v + gain2 * (g * g)
        moved = value(theta) - (rate * m) / (np.sqrt(v) + floor)
    store(first, m)
    store(second, v)
    return store(theta, moved)


def weighted_mean(
    out: View,
    models: Sequence[View],
    weights: Sequence[View],
    coefficients: Sequence[float],
    floors: Sequence[float],
    *,
    mode: str,
) -> int:
    """num / den with num = w_0 x_0 + ..., den = w_0 + ...; w_i is coefficients[i] times the sum of
    weight and floor, or the larger of both, and coefficients[i] alone where den is 0."""
    _, coefficients, floors = arguments.weighted_mean(
        out, models, weights, coefficients, floors, mode=mode
    )
    values, scaled, plain = [value(x) for x in models], [], []
    with np.errstate(all="ignore"):
        for weight, c, floor in zip(weights, coefficients, floors, strict=True):
            least, found = np.float32(floor), value(weight)
            found = found + least if mode == "add" else np.where(found < least, least, found)
            scaled.append(np.float32(c) * found)
            plain.append(np.full(out.num, c, np.float32))
        den = in_order(scaled)
        none = den == 0
        num = in_order([w * x for w, x in zip(scaled, values, strict=True)])
        num = np.where(none, in_order([c * x for c, x in zip(plain, values, strict=True)]), num)
        den = np.where(none, in_order(plain), den)
        return store(out, (num / den).astype(np.float32))


def _pcb_scores(
    base: View, models: Sequence[View], lows: Sequence[float], highs: Sequence[float], mode: str
) -> tuple[list[Floats], list[Floats]]:
    """The clipped deltas and the scores of every model."""
    count = np.float32(len(models))
    zero = np.float32(0)
    deltas, clipped, normal, signed = [], [], [], []
    with np.errstate(all="ignore"):
        for i, x in enumerate(models):
            delta = delta_of(base, x)
            low, high = np.float32(lows[i]), np.float32(highs[i])
            a = np.where(np.abs(delta) < low, low, np.abs(delta))
            a = np.where(a > high, high, a)
            width = high - low
            n = (a - low) / width if width != 0 else a * zero
            deltas.append(delta)
            clipped.append(np.where(delta == 0, zero, np.copysign(a, delta)))
            signed.append(np.where(delta == 0, zero, np.copysign(n, delta)))
            normal.append(n)
        scores = []
        for i in range(len(models)):
            if mode == "pairwise":
                inter = in_order([elementary.tanh(signed[i] * s) for s in signed])
            else:
                total = in_order(deltas if mode == "raw" else signed)
                inter = elementary.tanh(deltas[i] * total)
            scores.append(elementary.exp(count * (normal[i] * normal[i])) * inter)
    return clipped, scores

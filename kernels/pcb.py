"""Parameter competition balancing: scores of the models, and their mean by them.

    score_i = exp(N (n_i n_i)) inter_i; out = base + scale * (sum of w_i k_i t_i) / (sum of k_i)

The full definition is that of pcb_merge in the reference. Scores take launches of their own, one
for each model, and are float32 in scratch until the merge: a slice of SLICE elements at a time.
Bytes per element: for N models N times those of the base and of every model, 4 N written and read
for the scores, base and models once more, the output. Bitwise: float32 in model order without
contraction, exp and tanh step by step. Other backends: cpu, cuda, reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from pymerge import formats
from pymerge.kernels.elementary import exp, tanh
from pymerge.kernels.elements import add_count, block_of, copy_sign, load, load_delta
from pymerge.kernels.launch import (
    Elements,
    Piece,
    Room,
    access_of,
    addresses,
    block_size,
    ceil_div,
    codes,
    launch,
    piece_of,
)
from pymerge.kernels.rounding import store, store_raw

RAW, NORMALIZED, PAIRWISE = range(3)
_MODE = {"raw": RAW, "normalized": NORMALIZED, "pairwise": PAIRWISE}
IS_RAW = tl.constexpr(RAW)
IS_PAIRWISE = tl.constexpr(PAIRWISE)
F32 = tl.constexpr(formats.F32.code)

#: Elements whose scores are in scratch at a time. Not measured on a GPU.
SLICE = 1 << 22


@triton.jit
def clip(delta, low, high):
    """|delta| between two ends."""
    a = tl.abs(delta)
    a = tl.where(a < low, low, a)
    return tl.where(a > high, high, a)


@triton.jit
def share(a, low, high):
    """How far ``a`` is from ``low`` to ``high``, 0 where they are equal."""
    width = tl.full(a.shape, high - low, tl.float32)
    inside = tl.div_rn(a - low, width)
    return tl.where(width != 0, inside, a * 0.0)


@triton.jit
def signed(size, delta):
    return tl.where(delta == 0, 0.0, copy_sign(size, delta))


@triton.jit(do_not_specialize=["out", "base", "own", "models", "counter", "numbers", "num"])
def pcb_score_kernel(
    out,
    base,
    own,
    models,
    counter,
    numbers,
    num,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    OWN: tl.constexpr,
    CODES: tl.constexpr,
    N: tl.constexpr,
    MODE: tl.constexpr,
    PART: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The score of the model ``own``, its PART of either sign, or all of it where PART is 0.

    numbers: N lows, N highs, those of ``own``.
    """
    index, inside = block_of(num, ACCESS, BLOCK)
    start = load(base, index, inside, BASE, ACCESS)
    delta = load_delta(own, start, index, inside, OWN, BASE, ACCESS)
    low = numbers[2 * N]
    high = numbers[2 * N + 1]
    normal = share(clip(delta, low, high), low, high)
    total = tl.full([BLOCK], 0, tl.float32)
    for i in tl.static_range(N):
        term = load_delta(models[i] >> 1, start, index, inside, CODES[i], BASE, ACCESS)
        if MODE != IS_RAW:
            size = share(clip(term, numbers[i], numbers[N + i]), numbers[i], numbers[N + i])
            term = signed(size, term)
        if MODE == IS_PAIRWISE:
            term = tanh(signed(normal, delta) * term)
        if i == 0:
            total = term
        else:
            total = total + term
    inter = total
    if MODE != IS_PAIRWISE:
        inter = tanh(delta * total)
    score = exp((normal * normal) * N) * inter
    if PART == 0:
        bits = score.to(tl.uint32, bitcast=True)
        store_raw(out, index, inside, bits, tl.uint32, 4, ACCESS)
    else:
        score = score * PART
        score = tl.where(score < 0, 0.0, score)
        add_count(counter, 0, store(out, index, inside, score, OUT, ACCESS))


@triton.jit(do_not_specialize=["out", "base", "models", "scores", "counter", "numbers", "num"])
def pcb_merge_kernel(
    out,
    base,
    models,
    scores,
    counter,
    numbers,
    num,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    CODES: tl.constexpr,
    N: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scores: an address of float32 for each model. numbers: N lows, N highs, N cuts, N tops,
    N weights, the scale."""
    index, inside = block_of(num, ACCESS, BLOCK)
    start = load(base, index, inside, BASE, ACCESS)
    merged = tl.full([BLOCK], 0, tl.float32)
    weight = tl.full([BLOCK], 0, tl.float32)
    for i in tl.static_range(N):
        delta = load_delta(models[i] >> 1, start, index, inside, CODES[i], BASE, ACCESS)
        score = load(scores[i] >> 1, index, inside, F32, ACCESS)
        cut = numbers[2 * N + i]
        top = numbers[3 * N + i]
        limited = tl.where(score < cut, cut, score)
        limited = tl.where(limited > top, top, limited)
        k = share(limited, cut, top)
        t = signed(clip(delta, numbers[i], numbers[N + i]), delta)
        term = numbers[4 * N + i] * (k * t)
        if i == 0:
            merged = term
            weight = k
        else:
            merged = merged + term
            weight = weight + k
    weight = tl.where(weight < 1e-12, 1e-12, weight)
    result = start + numbers[5 * N] * tl.div_rn(merged, weight)
    add_count(counter, 0, store(out, index, inside, result, OUT, ACCESS))


def _score(
    out: Elements,
    base: Elements,
    models: Sequence[Elements],
    index: int,
    lows: Sequence[float],
    highs: Sequence[float],
    counter: int,
    mode: str,
    part: int,
) -> None:
    block = block_size(out.num)
    launch(
        pcb_score_kernel,
        (ceil_div(out.num, block),),
        out.ptr,
        base.ptr,
        models[index].ptr,
        addresses(models),
        counter,
        (*lows, *highs, lows[index], highs[index]),
        out.num,
        OUT=out.code,
        BASE=base.code,
        OWN=models[index].code,
        CODES=codes(models),
        N=len(models),
        MODE=_MODE[mode],
        PART=part,
        ACCESS=access_of(out, base, *models),
        BLOCK=block,
    )


def pcb_score(
    out: Elements,
    base: Elements,
    models: Sequence[Elements],
    index: int,
    lows: Sequence[float],
    highs: Sequence[float],
    mode: str,
    part: int,
) -> int:
    with Room(out.ptr) as room:
        counter = room.zeros(1, "int64")
        _score(out, base, models, index, lows, highs, counter.address, mode, part)
        return int(counter.numpy()[0])


def pcb_merge(
    out: Elements,
    base: Elements,
    models: Sequence[Elements],
    lows: Sequence[float],
    highs: Sequence[float],
    cuts: Sequence[float],
    tops: Sequence[float],
    weights: Sequence[float],
    mode: str,
    scale: float,
) -> int:
    numbers = (*lows, *highs, *cuts, *tops, *weights, scale)
    with Room(out.ptr) as room:
        counter = room.zeros(1, "int64")
        scratch = [room.zeros(min(out.num, SLICE), "float32") for _ in models]
        for first in range(0, out.num, SLICE):
            num = min(SLICE, out.num - first)
            own_out, own_base = piece_of(out, first, num), piece_of(base, first, num)
            own = [piece_of(model, first, num) for model in models]
            scores = [Piece(s.address, formats.F32.code or 0, num) for s in scratch]
            for index, score in enumerate(scores):
                _score(score, own_base, own, index, lows, highs, counter.address, mode, 0)
            block = block_size(num)
            launch(
                pcb_merge_kernel,
                (ceil_div(num, block),),
                own_out.ptr,
                own_base.ptr,
                addresses(own),
                addresses(scores),
                counter.address,
                numbers,
                num,
                OUT=out.code,
                BASE=base.code,
                CODES=codes(models),
                N=len(models),
                ACCESS=access_of(own_out, own_base, *own),
                BLOCK=block,
            )
        return int(counter.numpy()[0])

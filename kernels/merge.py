"""The disjoint merge: sign election, and the mean of the models that agree with it.

    out = base + scale * combined(w_i r_i delta_i of the kept and elected) / divisor

The full definition is that of disjoint_merge in pymerge/ops/table.py; count_votes is its begin.
Bytes per element: those of the base and of every model read, those of the output written; beyond
GROUP models the models are read twice, and float32 sums go through memory between groups. Bitwise:
float32 in model order without contraction. Other backends: cpu, cuda, reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from pymerge import formats
from pymerge.kernels.elements import (
    add_count,
    block_of,
    is_nan,
    key_of,
    load,
    load_base,
    load_delta,
)
from pymerge.kernels.keeping import keeping_of, kept_mask, table_of
from pymerge.kernels.launch import (
    Elements,
    Room,
    access_of,
    address_or_none,
    addresses,
    block_size,
    ceil_div,
    code_or_none,
    codes,
    launch,
)
from pymerge.kernels.rounding import store

#: Models of one launch, and those where more than thresholds say what is kept; more go in groups.
#: Above, registers spill.
GROUP, SMALL_GROUP = 16, 8
#: Models whose ballots stay in registers between the election and the sum; those of more are made
#: again, from raw elements that take half of the registers. Not measured on a GPU: 8 models of 8
#: elements a thread are 64 registers.
HELD = 8

ALL_STEPS, TOTALS, SUMS = 0, 1, 2
ONLY_TOTALS = tl.constexpr(TOTALS)
ONLY_SUMS = tl.constexpr(SUMS)
WEIGHTED, PLAIN, NOBODY = 0, 1, 2
_ELECT = {"weighted": WEIGHTED, "plain": PLAIN, "none": NOBODY}
MEAN, COUNT, SUM, MAX = 0, 1, 2, 3
_COMBINE = {"mean": MEAN, "count": COUNT, "sum": SUM, "max": MAX}
BY_PLAIN = tl.constexpr(PLAIN)
BY_NOBODY = tl.constexpr(NOBODY)
TO_MEAN = tl.constexpr(MEAN)
TO_COUNT = tl.constexpr(COUNT)
TO_MAX = tl.constexpr(MAX)
F32 = tl.constexpr(formats.F32.code)


@triton.jit
def ballot_of(
    models,
    base,
    index,
    inside,
    key,
    element,
    quarter,
    keeps,
    numbers,
    i: tl.constexpr,
    CODE: tl.constexpr,
    BASE: tl.constexpr,
    N: tl.constexpr,
    ELECT: tl.constexpr,
    FACTORS: tl.constexpr,
    SCORED: tl.constexpr,
    SELECT: tl.constexpr,
    CEILING: tl.constexpr,
    DRAWS: tl.constexpr,
    ACCESS: tl.constexpr,
):
    """What model ``i`` casts, 0 where it is not kept, and where it is."""
    tau = load_delta(models[i] >> 1, base, index, inside, CODE, BASE, ACCESS)
    if not SCORED:
        key = key_of(tau)
    kept = kept_mask(key, element, quarter, keeps, i, SELECT, CEILING, DRAWS)
    if FACTORS:
        tau = numbers[N + i] * tau
    if ELECT != BY_PLAIN:
        tau = numbers[i] * tau
    return tl.where(kept, tau, 0.0), kept


@triton.jit(
    do_not_specialize=[
        "out",
        "base",
        "models",
        "score",
        "counter",
        "carry",
        "keeps",
        "numbers",
        "num",
        "start",
    ]
)
def disjoint_merge_kernel(
    out,
    base,
    models,
    score,
    counter,
    carry,
    keeps,
    numbers,
    num,
    start,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    CODES: tl.constexpr,
    SCORE: tl.constexpr,
    N: tl.constexpr,
    ELECT: tl.constexpr,
    ZERO_SIGN: tl.constexpr,
    COMBINE: tl.constexpr,
    FACTORS: tl.constexpr,
    DELTAS: tl.constexpr,
    DIVIDE: tl.constexpr,
    SELECT: tl.constexpr,
    CEILING: tl.constexpr,
    DRAWS: tl.constexpr,
    HOLD: tl.constexpr,
    STEP: tl.constexpr,
    RESUMES: tl.constexpr,
    LAST: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """numbers: N weights, N factors where FACTORS, divisor, scale.

    STEP: the whole merge, only the totals, only the sums that follow them. Over several launches
    ``carry``, float32 [3, num], keeps the totals, the sums and the weights; a launch that RESUMES
    goes on from there. Without an output the totals above and below 0 are counted.
    """
    index, inside = block_of(num, ACCESS, BLOCK)
    first = start.to(tl.int64) + tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    quarter = (first >> 2) + tl.arange(0, BLOCK // 4)
    own = load_base(base, index, inside, BASE, ACCESS)
    TAKEN: tl.constexpr = -1 if DELTAS else BASE
    SCORED: tl.constexpr = SCORE >= 0
    key = tl.full([BLOCK], 0, tl.int32)
    if SCORED:
        key = key_of(load(score, index, inside, SCORE, ACCESS))
    total = tl.full([BLOCK], 0, tl.float32)
    merged = tl.full([BLOCK], 0, tl.float32)
    weight = tl.full([BLOCK], 0, tl.float32)
    num = num.to(tl.int64)
    if RESUMES or STEP == ONLY_SUMS:
        total = load(carry, index, inside, F32, ACCESS)
    if RESUMES and STEP == ONLY_SUMS:
        merged = load(carry + 4 * num, index, inside, F32, ACCESS)
        weight = load(carry + 8 * num, index, inside, F32, ACCESS)
    ballots = ()
    if STEP != ONLY_SUMS:
        for i in tl.static_range(N):
            ballot, _ = ballot_of(
                models,
                own,
                index,
                inside,
                key,
                element,
                quarter,
                keeps,
                numbers,
                i,
                CODES[i],
                TAKEN,
                N,
                ELECT,
                FACTORS,
                SCORED,
                SELECT,
                CEILING,
                DRAWS,
                ACCESS,
            )
            total = total + ballot
            if HOLD and ELECT != BY_NOBODY:
                ballots = ballots + (ballot,)
    if STEP == ONLY_TOTALS:
        if OUT < 0 and LAST:
            add_count(counter, 0, inside & (total > 0))
            add_count(counter, 1, inside & (total < 0))
        else:
            store(carry, index, inside, total, F32, ACCESS)
    else:
        plus = total > 0
        minus = total < 0
        if ZERO_SIGN > 0:
            plus = total >= 0
        if ZERO_SIGN < 0:
            minus = total <= 0
        for i in tl.static_range(N):
            if HOLD and ELECT != BY_NOBODY:
                vote = ballots[i]
                chosen = vote != 0
            else:
                vote, chosen = ballot_of(
                    models,
                    own,
                    index,
                    inside,
                    key,
                    element,
                    quarter,
                    keeps,
                    numbers,
                    i,
                    CODES[i],
                    TAKEN,
                    N,
                    ELECT,
                    FACTORS,
                    SCORED,
                    SELECT,
                    CEILING,
                    DRAWS,
                    ACCESS,
                )
            if ELECT != BY_NOBODY:
                chosen = (plus & (vote > 0)) | (minus & (vote < 0))
            if ELECT == BY_PLAIN:
                vote = numbers[i] * vote
            merged, weight = add_vote(merged, weight, chosen, vote, numbers[i], COMBINE)
        if LAST:
            if COMBINE == TO_MEAN or COMBINE == TO_COUNT:
                merged = tl.div_rn(merged, tl.where(weight == 0, 1.0, weight))
            merged = tl.where(is_nan(total), float("nan"), merged)
            AFTER: tl.constexpr = 2 * N if FACTORS else N
            if DIVIDE:
                merged = tl.div_rn(merged, tl.full([BLOCK], numbers[AFTER], tl.float32))
            merged = merged * numbers[AFTER + 1]
            if BASE >= 0:
                merged = own + merged
            add_count(counter, 0, store(out, index, inside, merged, OUT, ACCESS))
        else:
            store(carry + 4 * num, index, inside, merged, F32, ACCESS)
            store(carry + 8 * num, index, inside, weight, F32, ACCESS)


@triton.jit
def add_vote(merged, weight, chosen, vote, own_weight, COMBINE: tl.constexpr):
    """The sums after a model, or the largest vote, the first of equals."""
    if COMBINE == TO_MAX:
        merged = tl.where(chosen & (tl.abs(vote) > tl.abs(merged)), vote, merged)
    else:
        merged = tl.where(chosen, merged + vote, merged)
    if COMBINE == TO_MEAN:
        weight = tl.where(chosen, weight + own_weight, weight)
    if COMBINE == TO_COUNT:
        weight = tl.where(chosen, weight + 1.0, weight)
    return merged, weight


def disjoint_merge(
    out: Elements | None,
    base: Elements | None,
    models: Sequence[Elements],
    weights: Sequence[float],
    keeps: Sequence[Any],
    start: int,
    *,
    elect: str,
    zero_sign: int,
    combine: str,
    factors: Sequence[float] | None,
    divisor: float,
    scale: float,
    score: Elements | None,
    deltas: bool,
) -> NDArray[np.int64]:
    """The number of non-finite outputs, or without ``out`` the votes above and below 0."""
    num, count = models[0].num, len(models)
    keeping = keeping_of(keeps, start)
    group_size = SMALL_GROUP if keeping.ceiling or keeping.draws else GROUP
    block = block_size(num)
    if out is None:
        steps = [TOTALS]
    else:
        steps = [ALL_STEPS] if count <= group_size else [TOTALS, SUMS]
    with Room(models[0].ptr) as room:
        counter = room.zeros(2, "int64")
        carry = room.zeros((3, num) if count > group_size else 1, "float32")
        for step in steps:
            for begin in range(0, count, group_size):
                part = slice(begin, begin + group_size)
                table = room.upload(table_of(keeps[part]))
                own_factors = () if factors is None else factors[part]
                launch(
                    disjoint_merge_kernel,
                    (ceil_div(num, block),),
                    address_or_none(out),
                    address_or_none(base),
                    addresses(models[part]),
                    address_or_none(score),
                    counter.address,
                    carry.address,
                    table.address,
                    (*weights[part], *own_factors, divisor, scale),
                    num,
                    start,
                    OUT=code_or_none(out),
                    BASE=code_or_none(base),
                    CODES=codes(models[part]),
                    SCORE=code_or_none(score),
                    N=len(models[part]),
                    ELECT=_ELECT[elect],
                    ZERO_SIGN=zero_sign,
                    COMBINE=_COMBINE[combine],
                    FACTORS=factors is not None,
                    DELTAS=deltas,
                    DIVIDE=divisor != 1,
                    SELECT=keeping.select,
                    CEILING=keeping.ceiling,
                    DRAWS=keeping.draws,
                    HOLD=count <= HELD,
                    STEP=step,
                    RESUMES=begin > 0,
                    LAST=begin + group_size >= count,
                    ACCESS=access_of(out, base, score, *models),
                    BLOCK=block,
                )
        result: NDArray[np.int64] = counter.numpy()
        return result

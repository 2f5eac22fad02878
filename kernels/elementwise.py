"""Maps of one element of the base and of every model, one for each method that needs its own.

    nearswap, variance_score, overlap_counts, overlap_merge, magmax_merge, consensus_merge,
    tall_masks, elect_max, elect_masks, apply_task: pymerge/ops/reference/elementwise.py

Bytes per element: those of the base and of every model read, those of the output written; a mask is
one bit an element and model; variance_score, overlap_merge, consensus_merge and elect_max use the
models twice and keep them in registers in between, best below 16. Bitwise: float32 in model order
without contraction. Other backends: cpu, cuda, reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from pymerge.kernels.elements import (
    add_count,
    block_of,
    is_nan,
    key_of,
    load_base,
    load_delta,
)
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
    shifted,
)
from pymerge.kernels.rounding import store
from pymerge.kernels.spans import bits_of

NEARSWAP, VARIANCE, OVERLAP, MAGMAX, CONSENSUS, ELECT_MAX, APPLY_TASK = range(7)
IS_NEARSWAP = tl.constexpr(NEARSWAP)
IS_VARIANCE = tl.constexpr(VARIANCE)
IS_OVERLAP = tl.constexpr(OVERLAP)
IS_MAGMAX = tl.constexpr(MAGMAX)
IS_CONSENSUS = tl.constexpr(CONSENSUS)
IS_ELECT_MAX = tl.constexpr(ELECT_MAX)
IS_APPLY_TASK = tl.constexpr(APPLY_TASK)

TALL, ELECT = range(2)
IS_TALL = tl.constexpr(TALL)


@triton.jit
def sum_of(deltas, N: tl.constexpr):
    """delta_0 + delta_1 + ..."""
    total = deltas[0]
    for i in tl.static_range(1, N):
        total = total + deltas[i]
    return total


@triton.jit
def active(delta, epsilon):
    """Whether |delta| > epsilon or it is NaN."""
    return (tl.abs(delta) <= epsilon) == 0


@triton.jit
def nearswap(a, b, t, BLOCK: tl.constexpr):
    size = tl.abs(b - a)
    size = tl.where(size < 1e-6, 1e-6, size)
    w = tl.div_rn(tl.full([BLOCK], t, tl.float32), size)
    w = tl.where(w < 0.0, 0.0, w)
    w = tl.where(w > 1.0, 1.0, w)
    return w * b + (1.0 - w) * a


@triton.jit
def variance(deltas, N: tl.constexpr, BLOCK: tl.constexpr):
    count = tl.full([BLOCK], N, tl.float32)
    mean = tl.div_rn(sum_of(deltas, N), count)
    total = (deltas[0] - mean) * (deltas[0] - mean)
    for i in tl.static_range(1, N):
        total = total + (deltas[i] - mean) * (deltas[i] - mean)
    return tl.div_rn(total, count)


@triton.jit
def overlap(deltas, numbers, N: tl.constexpr, BLOCK: tl.constexpr):
    """numbers: N factors, epsilon."""
    count = tl.full([BLOCK], 0, tl.int32)
    for i in tl.static_range(N):
        count = count + active(deltas[i], numbers[N]).to(tl.int32)
    merged = tl.full([BLOCK], 0, tl.float32)
    for i in tl.static_range(N):
        shared = tl.div_rn(deltas[i], count.to(tl.float32))
        term = tl.where(count == 1, deltas[i] * numbers[i], shared)
        merged = tl.where(active(deltas[i], numbers[N]), merged + term, merged)
    return merged


@triton.jit
def magmax(deltas, N: tl.constexpr):
    best = deltas[0]
    for i in tl.static_range(1, N):
        best = tl.where(key_of(deltas[i]) >= key_of(best), deltas[i], best)
    return best


@triton.jit
def uses(delta, total, limit):
    return tl.abs(delta) > limit * tl.abs(total - delta)


@triton.jit
def consensus(deltas, numbers, minimum, N: tl.constexpr, BLOCK: tl.constexpr):
    """numbers: N thresholds."""
    total = sum_of(deltas, N)
    count = tl.full([BLOCK], 0, tl.int32)
    for i in tl.static_range(N):
        count = count + uses(deltas[i], total, numbers[i]).to(tl.int32)
    return tl.where((count >= minimum) | is_nan(total - total), total, 0.0)


@triton.jit
def agrees(delta, plus):
    return (plus & (delta > 0)) | ((plus == 0) & (delta < 0))


@triton.jit
def elect_max(deltas, N: tl.constexpr, BLOCK: tl.constexpr):
    total = sum_of(deltas, N)
    plus = total > 0
    best = tl.full([BLOCK], 0, tl.float32)
    for i in tl.static_range(N):
        larger = agrees(deltas[i], plus) & (tl.abs(deltas[i]) > tl.abs(best))
        best = tl.where(larger, deltas[i], best)
    return tl.where(is_nan(total), float("nan"), best)


@triton.jit(
    do_not_specialize=["out", "base", "models", "mask", "counter", "numbers", "minimum", "num"]
)
def map_kernel(
    out,
    base,
    models,
    mask,
    counter,
    numbers,
    minimum,
    num,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    CODES: tl.constexpr,
    N: tl.constexpr,
    OP: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """numbers: what OP says, the last is the scale of those that have one."""
    index, inside = block_of(num, ACCESS, BLOCK)
    own = load_base(base, index, inside, BASE, ACCESS)
    PLAIN: tl.constexpr = OP == IS_NEARSWAP or OP == IS_APPLY_TASK
    TAKEN: tl.constexpr = -1 if PLAIN else BASE
    deltas = ()
    for i in tl.static_range(N):
        delta = load_delta(models[i] >> 1, own, index, inside, CODES[i], TAKEN, ACCESS)
        deltas = deltas + (delta,)
    if OP == IS_NEARSWAP:
        result = nearswap(own, deltas[0], numbers[0], BLOCK)
    elif OP == IS_VARIANCE:
        result = variance(deltas, N, BLOCK)
    elif OP == IS_OVERLAP:
        result = own + overlap(deltas, numbers, N, BLOCK)
    elif OP == IS_MAGMAX:
        result = own + numbers[0] * magmax(deltas, N)
    elif OP == IS_CONSENSUS:
        result = own + numbers[N] * consensus(deltas, numbers, minimum, N, BLOCK)
    elif OP == IS_ELECT_MAX:
        result = elect_max(deltas, N, BLOCK)
    else:
        tl.static_assert(OP == IS_APPLY_TASK)
        kept = tl.where(bits_of(mask, index, inside), deltas[0], 0.0)
        result = own + numbers[0] * kept
    add_count(counter, 0, store(out, index, inside, result, OUT, ACCESS))


@triton.jit(do_not_specialize=["base", "models", "masks", "numbers", "num"])
def masks_kernel(
    base,
    models,
    masks,
    numbers,
    num,
    BASE: tl.constexpr,
    CODES: tl.constexpr,
    N: tl.constexpr,
    OP: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """masks: one address for each model; numbers: N thresholds where OP needs them."""
    index, inside = block_of(num, ACCESS, BLOCK)
    own = load_base(base, index, inside, BASE, ACCESS)
    deltas = ()
    for i in tl.static_range(N):
        delta = load_delta(models[i] >> 1, own, index, inside, CODES[i], BASE, ACCESS)
        deltas = deltas + (delta,)
    total = sum_of(deltas, N)
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    for i in tl.static_range(N):
        if OP == IS_TALL:
            flags = uses(deltas[i], total, numbers[i])
        else:
            flags = agrees(deltas[i], total > 0)
        bits = tl.reshape((inside & flags).to(tl.int32), (BLOCK // 8, 8))
        packed = tl.sum(bits << tl.arange(0, 8)[None, :], axis=1)
        pointer = (masks[i] >> 1).to(tl.pointer_type(tl.uint8)) + byte
        tl.store(pointer, packed.to(tl.uint8), mask=byte * 8 < num)


@triton.jit(do_not_specialize=["base", "models", "counts", "numbers", "num"])
def overlap_counts_kernel(
    base,
    models,
    counts,
    numbers,
    num,
    BASE: tl.constexpr,
    CODES: tl.constexpr,
    N: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts: int64 [N, 2]; numbers: epsilon."""
    index, inside = block_of(num, ACCESS, BLOCK)
    own = load_base(base, index, inside, BASE, ACCESS)
    count = tl.full([BLOCK], 0, tl.int32)
    flags = ()
    for i in tl.static_range(N):
        delta = load_delta(models[i] >> 1, own, index, inside, CODES[i], BASE, ACCESS)
        flag = inside & active(delta, numbers[0])
        count = count + flag.to(tl.int32)
        flags = flags + (flag,)
    for i in tl.static_range(N):
        add_count(counts, 2 * i, flags[i])
        add_count(counts, 2 * i + 1, flags[i] & (count == 1))


def map_models(
    op: int,
    out: Elements,
    base: Elements | None,
    models: Sequence[Elements],
    numbers: Sequence[float] = (),
    *,
    minimum: int = 0,
    mask: int = 0,
) -> int:
    """Runs one of the maps above; ``numbers`` are those that it names."""
    block = block_size(out.num)
    with Room(out.ptr) as room:
        counter = room.zeros(1, "int64")
        launch(
            map_kernel,
            (ceil_div(out.num, block),),
            out.ptr,
            address_or_none(base),
            addresses(models),
            mask,
            counter.address,
            (*numbers, 0.0),
            minimum,
            out.num,
            OUT=out.code,
            BASE=code_or_none(base),
            CODES=codes(models),
            N=len(models),
            OP=op,
            ACCESS=access_of(out, base, *models),
            BLOCK=block,
        )
        return int(counter.numpy()[0])


def write_masks(
    op: int,
    masks: Sequence[int],
    base: Elements,
    models: Sequence[Elements],
    numbers: Sequence[float] = (),
) -> None:
    num = base.num
    block = block_size(num)
    with Room(base.ptr) as room:
        launch(
            masks_kernel,
            (ceil_div(num, block),),
            base.ptr,
            addresses(models),
            shifted(masks),
            (*numbers, 0.0),
            num,
            BASE=base.code,
            CODES=codes(models),
            N=len(models),
            OP=op,
            ACCESS=access_of(base, *models),
            BLOCK=block,
        )
        room.finish()


def overlap_counts(base: Elements, models: Sequence[Elements], epsilon: float) -> NDArray[np.int64]:
    """int64 [num_models, 2]."""
    num = base.num
    block = block_size(num)
    with Room(base.ptr) as room:
        counts = room.zeros((len(models), 2), "int64")
        launch(
            overlap_counts_kernel,
            (ceil_div(num, block),),
            base.ptr,
            addresses(models),
            counts.address,
            (epsilon,),
            num,
            BASE=base.code,
            CODES=codes(models),
            N=len(models),
            ACCESS=access_of(base, *models),
            BLOCK=block,
        )
        result: Any = counts.numpy()
        return np.asarray(result, np.int64)

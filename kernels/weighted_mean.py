"""The mean of the models by weights for each element, as Fisher merging needs it.

    num / den with num = w_0 x_0 + ..., den = w_0 + ...; w_i = coefficient_i * (weight_i + floor_i),
    or coefficient_i * max(weight_i, floor_i); the coefficients alone where den is 0

Bytes per element: those of every model and of every weight read, those of the output written.
Bitwise: float32 in model order without contraction, the quotient rounded to nearest. Other
backends: cpu, cuda, reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from pymerge.kernels.elements import add_count, block_of, load
from pymerge.kernels.launch import (
    Elements,
    Room,
    access_of,
    addresses,
    block_size,
    ceil_div,
    codes,
    launch,
)
from pymerge.kernels.rounding import store


@triton.jit(do_not_specialize=["out", "inputs", "counter", "numbers", "num"])
def weighted_mean_kernel(
    out,
    inputs,
    counter,
    numbers,
    num,
    OUT: tl.constexpr,
    CODES: tl.constexpr,
    N: tl.constexpr,
    ADDS: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """inputs: N models, then their N weights; numbers: N coefficients, N floors."""
    index, inside = block_of(num, ACCESS, BLOCK)
    total = tl.full([BLOCK], 0, tl.float32)
    share = tl.full([BLOCK], 0, tl.float32)
    plain_total = tl.full([BLOCK], 0, tl.float32)
    plain_share = tl.full([BLOCK], 0, tl.float32)
    for i in tl.static_range(N):
        x = load(inputs[i] >> 1, index, inside, CODES[i], ACCESS)
        weight = load(inputs[N + i] >> 1, index, inside, CODES[N + i], ACCESS)
        floor = numbers[N + i]
        if ADDS:
            weight = weight + floor
        else:
            weight = tl.where(weight < floor, floor, weight)
        weight = numbers[i] * weight
        if i == 0:
            total = weight * x
            share = weight
            plain_total = numbers[i] * x
            plain_share = plain_share + numbers[i]
        else:
            total = total + weight * x
            share = share + weight
            plain_total = plain_total + numbers[i] * x
            plain_share = plain_share + numbers[i]
    none = share == 0
    mean = tl.div_rn(tl.where(none, plain_total, total), tl.where(none, plain_share, share))
    add_count(counter, 0, store(out, index, inside, mean, OUT, ACCESS))


def weighted_mean(
    out: Elements,
    models: Sequence[Elements],
    weights: Sequence[Elements],
    coefficients: Sequence[float],
    floors: Sequence[float],
    adds_floor: bool,
) -> int:
    inputs = (*models, *weights)
    block = block_size(out.num)
    with Room(out.ptr) as room:
        counter = room.zeros(1, "int64")
        launch(
            weighted_mean_kernel,
            (ceil_div(out.num, block),),
            out.ptr,
            addresses(inputs),
            counter.address,
            (*coefficients, *floors),
            out.num,
            OUT=out.code,
            CODES=codes(inputs),
            N=len(models),
            ADDS=adds_floor,
            ACCESS=access_of(out, *inputs),
            BLOCK=block,
        )
        return int(counter.numpy()[0])

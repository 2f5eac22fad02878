"""Ops that look at whole rows: ranks of magnitudes, divergence of softmaxes, scores scaled by row,
low-rank additions.

    row_sparsify: delta (/ p) where first <= rank < last and draw < T(rank)
    row_divergence: the sum over a row of p log(p / q), p and q softmaxes + 1e-8
    row_scores: |delta| factors[row]; select_by_score: the base where that is below a threshold
    lora_add: (x + scale (left right)) factors[row]

Bytes per element: those of the base and the model read, those of the output written; row_sparsify
also writes a key of 4 bytes and reads the keys of a row once for each of its tiles; row_divergence
reads a row three times. Ranks are counted, each element against its row: columns comparisons an
element. Bitwise: integers, float32 without contraction, sums in the order of kernels/spans.py.
Other backends: cpu, cuda, reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from pymerge.kernels.axpy import matrix_tile
from pymerge.kernels.elementary import exp, log
from pymerge.kernels.elements import add_count, load, load_base, load_delta
from pymerge.kernels.keeping import signed
from pymerge.kernels.launch import (
    INTERPRETED,
    Elements,
    Room,
    access_of,
    address_or_none,
    block_size,
    ceil_div,
    code_or_none,
    launch,
    power_of_two,
)
from pymerge.kernels.philox import draws_of
from pymerge.kernels.rounding import store
from pymerge.kernels.selection import keys_kernel
from pymerge.kernels.spans import SPAN_WARPS, add_lanes, plain_nan, rows_of_program

#: Elements that a program ranks at a time, and comparisons of one step. Not measured on a GPU: 4096
#: comparisons are 32 a thread.
RANKED = {"cuda": 64, "interpreter": 512}
COMPARED = {"cuda": 4096, "interpreter": 1 << 19}
RANK_WARPS = 4
MOST_ROWS = 1024


@triton.jit(
    do_not_specialize=[
        "out",
        "base",
        "model",
        "keys",
        "counter",
        "num_rows",
        "start",
        "first",
        "last",
        "draws_low",
        "draws_span",
        "seed",
    ]
)
def row_sparsify_kernel(
    out,
    base,
    model,
    keys,
    counter,
    num_rows,
    columns,
    start,
    first,
    last,
    draws_low,
    draws_span,
    seed,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    CODE: tl.constexpr,
    ALL_DRAWN: tl.constexpr,
    RESCALE: tl.constexpr,
    ACCESS: tl.constexpr,
    ROWS: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """keys: int32 [num_rows, columns]. A program ranks OWN elements of each of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1).to(tl.int64)
    column = tile * OWN + tl.arange(0, OWN)
    table = keys.to(tl.pointer_type(tl.int32)) + row[:, None] * columns
    inside = (row[:, None] < num_rows) & (column[None, :] < columns)
    key = tl.load(table + column[None, :], mask=inside, other=0)
    # Smaller keys rank lower, and of equal keys the later ones: before the tile count those below
    # the key, behind it those not above, in it both by their places.
    lower = tl.full([ROWS, OWN, OTHERS], 0, tl.int32)
    begin = tl.full([], 0, tl.int64)
    while begin < columns:
        place = begin + tl.arange(0, OTHERS)
        there = (row[:, None] < num_rows) & (place[None, :] < columns)
        other = tl.load(table + place[None, :], mask=there, other=0x7FFFFFFF)
        behind = (begin >= (tile + 1) * OWN).to(tl.int32)
        lower += (other[:, None, :] < (key + behind)[:, :, None]).to(tl.int32)
        begin += OTHERS
    tl.static_assert(OTHERS % OWN == 0)
    begin = tile * OWN // OTHERS * OTHERS
    place = begin + tl.arange(0, OTHERS)
    there = (row[:, None] < num_rows) & (place[None, :] < columns)
    other = tl.load(table + place[None, :], mask=there, other=0x7FFFFFFF)
    equal = (other[:, None, :] == key[:, :, None]) & (place[None, None, :] > column[None, :, None])
    rank = tl.sum(lower + equal.to(tl.int32), axis=2)
    index = row[:, None] * columns + column[None, :]
    own = load_base(base, index, inside, BASE, ACCESS)
    delta = load_delta(model, own, index, inside, CODE, BASE, ACCESS)
    bad = delta != delta
    kept = inside & (rank >= first) & (rank < last)
    if not ALL_DRAWN:
        # Ranks are below 2**31 and draws_span is at most 2**32: their product does not overflow.
        steps = rank.to(tl.int64) * draws_span.to(tl.int64) // tl.maximum(columns - 1, 1)
        limit = draws_low.to(tl.int64) + steps
        drawn = draws_of(start.to(tl.int64) + index, seed.to(tl.int64))
        kept = kept & (drawn.to(tl.int64) < limit)
        if RESCALE:
            p = tl.where(limit < 0x100000000, limit.to(tl.float32) * 2.3283064365386963e-10, 1.0)
            delta = tl.div_rn(delta, p)
    infinite = store(out, index, inside, tl.where(kept | bad, delta, 0.0), OUT, ACCESS)
    add_count(counter, 0, tl.reshape(infinite, (ROWS * OWN,)))


@triton.jit
def top_of(
    address, row, num_rows, columns, CODE: tl.constexpr, ACCESS: tl.constexpr, ROWS: tl.constexpr
):
    """The largest number of each row, minus infinity where there is none; float32 [ROWS, 1]."""
    lane = tl.arange(0, 64)[None, :]
    top = tl.full([ROWS, 64], float("-inf"), tl.float32)
    step = tl.full([], 0, tl.int64)
    while step < columns:
        column = step + lane
        inside = (column < columns) & (row < num_rows)
        x = load(address, row * columns + column, inside, CODE, ACCESS)
        top = tl.where(inside & (x > top), x, top)
        step += 64
    return tl.max(top, axis=1, keep_dims=True)


@triton.jit
def total_of(
    address,
    top,
    row,
    num_rows,
    columns,
    CODE: tl.constexpr,
    ACCESS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sum of exp(x - top) of each row; float32 [ROWS, 1]."""
    lane = tl.arange(0, 64)[None, :]
    lanes = tl.full([ROWS, 64], 0, tl.float64)
    step = tl.full([], 0, tl.int64)
    while step < columns:
        column = step + lane
        inside = (column < columns) & (row < num_rows)
        x = load(address, row * columns + column, inside, CODE, ACCESS)
        lanes += tl.where(inside, exp(x - top), 0.0).to(tl.float64)
        step += 64
    return add_lanes(lanes, ROWS).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["base", "model", "sums", "num_rows"])
def row_divergence_kernel(
    base,
    model,
    sums,
    num_rows,
    columns,
    BASE: tl.constexpr,
    CODE: tl.constexpr,
    ACCESS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """sums: float32 [num_rows]."""
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = own[:, None]
    top_p = top_of(model, row, num_rows, columns, CODE, ACCESS, ROWS)
    top_q = top_of(base, row, num_rows, columns, BASE, ACCESS, ROWS)
    total_p = total_of(model, top_p, row, num_rows, columns, CODE, ACCESS, ROWS)
    total_q = total_of(base, top_q, row, num_rows, columns, BASE, ACCESS, ROWS)
    lane = tl.arange(0, 64)[None, :]
    lanes = tl.full([ROWS, 64], 0, tl.float64)
    ones = tl.full([ROWS, 64], 1.0, tl.float32)
    step = tl.full([], 0, tl.int64)
    while step < columns:
        column = step + lane
        inside = (column < columns) & (row < num_rows)
        index = row * columns + column
        e_p = exp(load(model, index, inside, CODE, ACCESS) - top_p)
        e_q = exp(load(base, index, inside, BASE, ACCESS) - top_q)
        p = tl.div_rn(e_p, total_p * ones) + 1e-8
        q = tl.div_rn(e_q, total_q * ones) + 1e-8
        terms = p * log(tl.div_rn(p, q))
        lanes += tl.where(inside, terms, 0.0).to(tl.float64)
        step += 64
    result = add_lanes(lanes, ROWS).to(tl.float32)
    tl.store(sums.to(tl.pointer_type(tl.float32)) + own, result, mask=own < num_rows)


@triton.jit(
    do_not_specialize=["out", "base", "model", "factors", "counter", "num_rows", "threshold"]
)
def row_scores_kernel(
    out,
    base,
    model,
    factors,
    counter,
    num_rows,
    columns,
    threshold,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    CODE: tl.constexpr,
    CHOOSE: tl.constexpr,
    ACCESS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """factors: float32 [num_rows]. CHOOSE: writes the base or the model instead of the score."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < columns)
    index = row * columns + column
    own = load(base, index, inside, BASE, ACCESS)
    x = load(model, index, inside, CODE, ACCESS)
    factor = tl.load(factors.to(tl.pointer_type(tl.float32)) + row, mask=row < num_rows, other=0.0)
    result = tl.abs(x - own) * factor
    if CHOOSE:
        result = tl.where(result < threshold[0], own, x)
    infinite = store(out, index, inside, result, OUT, ACCESS)
    add_count(counter, 0, tl.reshape(infinite, (ROWS * COLUMNS,)))


@triton.jit(
    do_not_specialize=[
        "out",
        "weight",
        "left",
        "right",
        "factors",
        "counter",
        "numbers",
        "num",
        "offset",
        "num_rows",
        "rank",
    ]
)
def lora_add_kernel(
    out,
    weight,
    left,
    right,
    factors,
    counter,
    numbers,
    num,
    offset,
    num_rows,
    rank,
    columns,
    OUT: tl.constexpr,
    CODE: tl.constexpr,
    FACTORS: tl.constexpr,
    ACCESS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """left: float32 [num_rows, rank] of the rows at hand, the first of which begins ``offset``
    elements before the tile; right: float32 [rank, columns]; numbers: the scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    index = row * columns + column - offset
    inside = (row < num_rows) & (column < columns) & (index >= 0) & (index < num)
    a = left.to(tl.pointer_type(tl.float32)) + row * rank
    b = right.to(tl.pointer_type(tl.float32)) + column
    there = row < num_rows
    here = column < columns
    acc = tl.load(a, mask=there, other=0.0) * tl.load(b, mask=here, other=0.0)
    k = tl.full([], 1, tl.int64)
    while k < rank:
        factor = tl.load(a + k, mask=there, other=0.0)
        acc = acc + factor * tl.load(b + k * columns, mask=here, other=0.0)
        k += 1
    x = load(weight, index, inside, CODE, ACCESS) + numbers[0] * acc
    if FACTORS:
        x = x * tl.load(factors.to(tl.pointer_type(tl.float32)) + row, mask=there, other=0.0)
    infinite = store(out, index, inside, x, OUT, ACCESS)
    add_count(counter, 0, tl.reshape(infinite, (ROWS * COLUMNS,)))


def rank_tile(columns: int, num_rows: int) -> tuple[int, int, int]:
    """Rows, own elements and others of a program of row_sparsify."""
    kind = "interpreter" if INTERPRETED else "cuda"
    width = power_of_two(columns)
    own = min(width, RANKED[kind])
    others = min(width, COMPARED[kind] // own)
    rows = max(1, COMPARED[kind] // (own * others))
    return min(power_of_two(num_rows), rows, MOST_ROWS), own, others


def row_sparsify(
    out: Elements,
    base: Elements | None,
    model: Elements,
    start: int,
    *,
    columns: int,
    num_rows: int,
    first: int,
    last: int,
    draws_low: int,
    draws_span: int,
    seed: int,
    rescale: bool,
) -> int:
    if columns == 1:
        draws_low, draws_span = draws_low + draws_span // 2, 0
    rows, own, others = rank_tile(columns, num_rows)
    block = block_size(out.num)
    with Room(out.ptr) as room:
        counter, keys = room.zeros(1, "int64"), room.zeros(out.num, "int32")
        launch(
            keys_kernel,
            (ceil_div(out.num, block),),
            address_or_none(base),
            model.ptr,
            keys.address,
            out.num,
            BASE=code_or_none(base),
            CODE=model.code,
            ACCESS=access_of(base, model),
            BLOCK=block,
        )
        launch(
            row_sparsify_kernel,
            (ceil_div(num_rows, rows), ceil_div(columns, own)),
            out.ptr,
            address_or_none(base),
            model.ptr,
            keys.address,
            counter.address,
            num_rows,
            columns,
            start,
            first,
            last,
            draws_low,
            draws_span,
            signed(seed),
            num_warps=RANK_WARPS,
            OUT=out.code,
            BASE=code_or_none(base),
            CODE=model.code,
            ALL_DRAWN=draws_low >= 1 << 32,
            RESCALE=rescale,
            ACCESS=access_of(out, base, model, period=columns),
            ROWS=rows,
            OWN=own,
            OTHERS=others,
        )
        return int(counter.numpy()[0])


def row_divergence(
    base: Elements, model: Elements, columns: int, num_rows: int
) -> NDArray[np.float32]:
    """float32 [num_rows]."""
    rows = rows_of_program(num_rows)
    with Room(model.ptr) as room:
        sums = room.zeros(num_rows, "float32")
        launch(
            row_divergence_kernel,
            (ceil_div(num_rows, rows),),
            base.ptr,
            model.ptr,
            sums.address,
            num_rows,
            columns,
            num_warps=SPAN_WARPS,
            BASE=base.code,
            CODE=model.code,
            ACCESS=access_of(base, model, period=columns),
            ROWS=rows,
        )
        return plain_nan(sums.numpy())


def row_scores(
    out: Elements,
    base: Elements,
    model: Elements,
    factors: NDArray[np.float32],
    columns: int,
    threshold: float | None,
) -> int:
    """The scores, or with a threshold what select_by_score chooses by them."""
    num_rows = out.num // columns
    rows, width = matrix_tile(columns, num_rows, block_size(out.num))
    with Room(out.ptr) as room:
        counter, table = room.zeros(1, "int64"), room.upload(factors)
        launch(
            row_scores_kernel,
            (ceil_div(num_rows, rows), ceil_div(columns, width)),
            out.ptr,
            base.ptr,
            model.ptr,
            table.address,
            counter.address,
            num_rows,
            columns,
            (0.0 if threshold is None else threshold,),
            OUT=out.code,
            BASE=base.code,
            CODE=model.code,
            CHOOSE=threshold is not None,
            ACCESS=access_of(out, base, model, period=columns),
            ROWS=rows,
            COLUMNS=width,
        )
        return int(counter.numpy()[0])


def lora_add(
    out: Elements,
    weight: Elements,
    left: NDArray[np.float32],
    right: NDArray[np.float32],
    start: int,
    *,
    columns: int,
    scale: float,
    factors: NDArray[np.float32] | None,
) -> int:
    first, end = start // columns, ceil_div(start + out.num, columns)
    offset = start - first * columns
    rows, width = matrix_tile(columns, end - first, block_size(out.num))
    nothing: Any = np.zeros(1, np.float32)
    with Room(out.ptr) as room:
        counter = room.zeros(1, "int64")
        a, b = room.upload(left[first:end]), room.upload(right)
        c = room.upload(nothing if factors is None else factors[first:end])
        launch(
            lora_add_kernel,
            (ceil_div(end - first, rows), ceil_div(columns, width)),
            out.ptr,
            weight.ptr,
            a.address,
            b.address,
            c.address,
            counter.address,
            (scale,),
            out.num,
            offset,
            end - first,
            left.shape[1],
            columns,
            OUT=out.code,
            CODE=weight.code,
            FACTORS=factors is not None,
            ACCESS=min(1, access_of(out, weight)),
            ROWS=rows,
            COLUMNS=width,
        )
        return int(counter.numpy()[0])

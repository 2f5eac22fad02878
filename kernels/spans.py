"""Sums of float64 over spans of elements, in an order of their own.

    lane l of 64 adds elements l, l + 64, ... of its span from +0; then lane l adds lane l + 32,
    then lane l + 16, 8, 4, 2, 1

gram_n sums products of two inputs' deltas, kept_sums |delta|, |delta| kept and delta² kept,
masked_sums |value| where a bit is set; gram_columns adds products row after row for each column.
Bytes per element: those of the base and of the inputs read, once for each group of GROUP inputs
(gram: for each pair of groups). Bitwise: products of float32 are exact in float64, so contraction
changes nothing, and the order of the sums is fixed. Other backends: cpu, cuda, reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from pymerge.kernels.elements import key_of, load, load_base, load_delta
from pymerge.kernels.keeping import keeping_of, kept_mask, table_of
from pymerge.kernels.launch import (
    INTERPRETED,
    Elements,
    Room,
    access_of,
    address_or_none,
    addresses,
    ceil_div,
    code_or_none,
    codes,
    launch,
    power_of_two,
    shifted,
)

#: Inputs of one launch: 16 pairs of them are 16 float64 sums a lane.
GROUP = 4
#: Spans of a program, and its warps: a warp has two lanes of a span a thread. Not measured on a
#: GPU.
SPANS = {"cuda": 1, "interpreter": 64}
SPAN_WARPS = 1
#: Columns of a program of gram_columns. Not measured on a GPU.
COLUMN_BLOCK = {"cuda": 128, "interpreter": 4096}
COLUMN_WARPS = 4
#: Steps of 64 lanes whose loads are in flight together.
STEPS = tl.constexpr(1 if INTERPRETED else 4)


@triton.jit
def add_lanes(lanes, ROWS: tl.constexpr):
    """The sum of 64 lanes in their order: [ROWS, 64] to [ROWS]."""
    for step in tl.static_range(6):
        low, high = tl.split(tl.permute(tl.reshape(lanes, (ROWS, 2, 32 >> step)), (0, 2, 1)))
        lanes = low + high
    return tl.reshape(lanes, (ROWS,))


@triton.jit
def store_sums(sums, row, num_rows, stride, place, lanes, ROWS: tl.constexpr):
    """The sums of lanes to entry ``place`` of float64 rows."""
    pointer = sums.to(tl.pointer_type(tl.float64)) + row * stride + place
    tl.store(pointer, add_lanes(lanes, ROWS), mask=row < num_rows)


@triton.jit
def wide_delta(
    address, base, index, inside, CODE: tl.constexpr, BASE: tl.constexpr, ACCESS: tl.constexpr
):
    return load_delta(address, base, index, inside, CODE, BASE, ACCESS).to(tl.float64)


@triton.jit(do_not_specialize=["base", "lefts", "rights", "sums", "num", "num_spans"])
def gram_n_kernel(
    base,
    lefts,
    rights,
    sums,
    num,
    num_spans,
    span,
    BASE: tl.constexpr,
    LEFTS: tl.constexpr,
    RIGHTS: tl.constexpr,
    SAME: tl.constexpr,
    ACCESS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """sums: float64 [num_spans, pairs], lefts by rights; of SAME lists those with i <= j."""
    L: tl.constexpr = len(LEFTS)
    R: tl.constexpr = len(RIGHTS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, 64)[None, :]
    if ACCESS == 16:
        num = num // 16 * 16
    lanes = ()
    for i in tl.static_range(L):
        for _ in tl.static_range(i if SAME else 0, R):
            lanes = lanes + (tl.full([ROWS, 64], 0, tl.float64),)
    step = tl.full([], 0, tl.int64)
    while step < span:
        for part in tl.static_range(STEPS):
            offset = step + part * 64 + lane
            index = row[:, None] * span + offset
            inside = (offset < span) & (index < num)
            start = load_base(base, index, inside, BASE, ACCESS)
            left = ()
            for i in tl.static_range(L):
                x = wide_delta(lefts[i] >> 1, start, index, inside, LEFTS[i], BASE, ACCESS)
                left = left + (x,)
            right = left
            if not SAME:
                right = ()
                for j in tl.static_range(R):
                    x = wide_delta(rights[j] >> 1, start, index, inside, RIGHTS[j], BASE, ACCESS)
                    right = right + (x,)
            added = ()
            for i in tl.static_range(L):
                for j in tl.static_range(i if SAME else 0, R):
                    pair = lanes[i * R + j - (i * (i + 1) // 2 if SAME else 0)]
                    added = added + (pair + left[i] * right[j],)
            lanes = added
        step = step + 64 * STEPS
    PAIRS: tl.constexpr = L * (L + 1) // 2 if SAME else L * R
    for place in tl.static_range(PAIRS):
        store_sums(sums, row, num_spans, PAIRS, place, lanes[place], ROWS)


@triton.jit(do_not_specialize=["base", "lefts", "rights", "sums", "num_rows"])
def gram_columns_kernel(
    base,
    lefts,
    rights,
    sums,
    num_rows,
    columns,
    BASE: tl.constexpr,
    LEFTS: tl.constexpr,
    RIGHTS: tl.constexpr,
    SAME: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds to sums, float64 [pairs, columns], the products of each row in turn."""
    L: tl.constexpr = len(LEFTS)
    R: tl.constexpr = len(RIGHTS)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    table = sums.to(tl.pointer_type(tl.float64)) + column
    PAIRS: tl.constexpr = L * (L + 1) // 2 if SAME else L * R
    totals = ()
    for place in tl.static_range(PAIRS):
        totals = totals + (tl.load(table + place * columns, mask=inside, other=0.0),)
    row = tl.full([], 0, tl.int64)
    while row < num_rows:
        index = row * columns + column
        start = load_base(base, index, inside, BASE, ACCESS)
        left = ()
        for i in tl.static_range(L):
            x = wide_delta(lefts[i] >> 1, start, index, inside, LEFTS[i], BASE, ACCESS)
            left = left + (x,)
        right = left
        if not SAME:
            right = ()
            for j in tl.static_range(R):
                x = wide_delta(rights[j] >> 1, start, index, inside, RIGHTS[j], BASE, ACCESS)
                right = right + (x,)
        added = ()
        for i in tl.static_range(L):
            for j in tl.static_range(i if SAME else 0, R):
                pair = totals[i * R + j - (i * (i + 1) // 2 if SAME else 0)]
                added = added + (pair + left[i] * right[j],)
        totals = added
        row = row + 1
    for place in tl.static_range(PAIRS):
        tl.store(table + place * columns, totals[place], mask=inside)


@triton.jit(
    do_not_specialize=["base", "models", "score", "keeps", "sums", "num", "num_spans", "start"]
)
def kept_sums_kernel(
    base,
    models,
    score,
    keeps,
    sums,
    num,
    num_spans,
    start,
    span,
    BASE: tl.constexpr,
    CODES: tl.constexpr,
    SCORE: tl.constexpr,
    SELECT: tl.constexpr,
    CEILING: tl.constexpr,
    DRAWS: tl.constexpr,
    ACCESS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """sums: float64 [num_spans, len(CODES), 3]."""
    N: tl.constexpr = len(CODES)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = row[:, None] * span
    lane = tl.arange(0, 64)[None, :]
    group = tl.arange(0, 16)[None, :]
    if ACCESS == 16:
        num = num // 16 * 16
    lanes = ()
    for _ in tl.static_range(3 * N):
        lanes = lanes + (tl.full([ROWS, 64], 0, tl.float64),)
    step = tl.full([], 0, tl.int64)
    while step < span:
        offset = step + lane
        index = begin + offset
        inside = (offset < span) & (index < num)
        element = start.to(tl.int64) + index
        quarter = ((start.to(tl.int64) + begin + step) >> 2) + group
        own = load_base(base, index, inside, BASE, ACCESS)
        key = tl.full([ROWS, 64], 0, tl.int32)
        if SCORE >= 0:
            key = key_of(load(score, index, inside, SCORE, ACCESS))
        added = ()
        for i in tl.static_range(N):
            delta = load_delta(models[i] >> 1, own, index, inside, CODES[i], BASE, ACCESS)
            if SCORE < 0:
                key = key_of(delta)
            kept = kept_mask(key, element, quarter, keeps, i, SELECT, CEILING, DRAWS)
            size = tl.abs(delta).to(tl.float64)
            stays = tl.where(kept, size, 0.0)
            added = added + (
                lanes[3 * i] + size,
                lanes[3 * i + 1] + stays,
                lanes[3 * i + 2] + stays * stays,
            )
        lanes = added
        step = step + 64
    for place in tl.static_range(3 * N):
        store_sums(sums, row, num_spans, 3 * N, place, lanes[place], ROWS)


@triton.jit
def bits_of(mask, index, inside):
    """Bit ``index`` of the bytes at an address, least significant first."""
    byte = tl.load(mask.to(tl.pointer_type(tl.uint8)) + (index >> 3), mask=inside, other=0)
    return ((byte.to(tl.int32) >> (index & 7).to(tl.int32)) & 1) != 0


@triton.jit(do_not_specialize=["vector", "masks", "sums", "num", "num_spans"])
def masked_sums_kernel(
    vector,
    masks,
    sums,
    num,
    num_spans,
    span,
    CODE: tl.constexpr,
    N: tl.constexpr,
    ACCESS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """sums: float64 [num_spans, N]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, 64)[None, :]
    if ACCESS == 16:
        num = num // 16 * 16
    lanes = ()
    for _ in tl.static_range(N):
        lanes = lanes + (tl.full([ROWS, 64], 0, tl.float64),)
    step = tl.full([], 0, tl.int64)
    while step < span:
        offset = step + lane
        index = row[:, None] * span + offset
        inside = (offset < span) & (index < num)
        size = tl.abs(load(vector, index, inside, CODE, ACCESS)).to(tl.float64)
        added = ()
        for i in tl.static_range(N):
            stays = tl.where(bits_of(masks[i] >> 1, index, inside), size, 0.0)
            added = added + (lanes[i] + stays,)
        lanes = added
        step = step + 64
    for i in tl.static_range(N):
        store_sums(sums, row, num_spans, N, i, lanes[i], ROWS)


def plain_nan(sums: NDArray[Any]) -> NDArray[Any]:
    """The sums with every NaN as the positive quiet one."""
    return np.where(np.isnan(sums), sums.dtype.type(np.nan), sums)


def rows_of_program(num_rows: int) -> int:
    """Spans, or rows, that one program sums."""
    if not INTERPRETED:
        return SPANS["cuda"]
    return min(SPANS["interpreter"], power_of_two(num_rows))


def pairs_of(count: int) -> list[tuple[int, int]]:
    """(i, j) with i <= j, row by row."""
    return [(i, j) for i in range(count) for j in range(i, count)]


def _groups(inputs: Sequence[Elements]) -> list[tuple[int, int]]:
    """The first inputs of each pair of groups."""
    begins = range(0, len(inputs), GROUP)
    return [(i, j) for i in begins for j in begins if i <= j]


def _pairs_of_groups(i: int, j: int, count: int) -> list[tuple[int, int]]:
    """The pairs that a launch for the groups from ``i`` and ``j`` on sums, in its order."""
    rights = range(j, min(j + GROUP, count))
    return [(a, b) for a in range(i, min(i + GROUP, count)) for b in rights if i < j or a <= b]


def gram_n(
    base: Elements | None, inputs: Sequence[Elements], span: int, num_spans: int
) -> NDArray[np.float64]:
    """float64 [num_spans, num_pairs]."""
    count = len(inputs)
    place = {pair: number for number, pair in enumerate(pairs_of(count))}
    result = np.empty((num_spans, len(place)))
    rows = rows_of_program(num_spans)
    with Room(inputs[0].ptr) as room:
        for i, j in _groups(inputs):
            left, right = inputs[i : i + GROUP], inputs[j : j + GROUP]
            pairs = _pairs_of_groups(i, j, count)
            sums = room.zeros((num_spans, len(pairs)), "float64")
            launch(
                gram_n_kernel,
                (ceil_div(num_spans, rows),),
                address_or_none(base),
                addresses(left),
                addresses(right),
                sums.address,
                inputs[0].num,
                num_spans,
                span,
                num_warps=SPAN_WARPS,
                BASE=code_or_none(base),
                LEFTS=codes(left),
                RIGHTS=codes(right),
                SAME=i == j,
                ACCESS=access_of(base, *inputs, period=span),
                ROWS=rows,
            )
            result[:, [place[pair] for pair in pairs]] = sums.numpy()
    return plain_nan(result)


def gram_columns(
    base: Elements | None,
    inputs: Sequence[Elements],
    sums: NDArray[np.float64],
    columns: int,
    num_rows: int,
) -> None:
    count = len(inputs)
    place = {pair: number for number, pair in enumerate(pairs_of(count))}
    block = COLUMN_BLOCK["cuda"]
    if INTERPRETED:
        block = min(COLUMN_BLOCK["interpreter"], power_of_two(columns))
    with Room(inputs[0].ptr) as room:
        for i, j in _groups(inputs):
            left, right = inputs[i : i + GROUP], inputs[j : j + GROUP]
            own = [place[pair] for pair in _pairs_of_groups(i, j, count)]
            totals = room.copy(sums[own])
            launch(
                gram_columns_kernel,
                (ceil_div(columns, block),),
                address_or_none(base),
                addresses(left),
                addresses(right),
                totals.address,
                num_rows,
                columns,
                num_warps=COLUMN_WARPS,
                BASE=code_or_none(base),
                LEFTS=codes(left),
                RIGHTS=codes(right),
                SAME=i == j,
                ACCESS=access_of(base, *inputs, period=columns),
                BLOCK=block,
            )
            sums[own] = plain_nan(totals.numpy())


def kept_sums(
    base: Elements | None,
    models: Sequence[Elements],
    keeps: Sequence[Any],
    start: int,
    score: Elements | None,
    span: int,
    num_spans: int,
) -> NDArray[np.float64]:
    """float64 [num_spans, num_models, 3]."""
    rows = rows_of_program(num_spans)
    # Draws of four elements at once need spans that begin at multiples of 4.
    keeping = keeping_of(keeps, start if span % 4 == 0 else 1)
    parts = []
    with Room(models[0].ptr) as room:
        for begin in range(0, len(models), GROUP):
            group = models[begin : begin + GROUP]
            table = room.upload(table_of(keeps[begin : begin + GROUP]))
            sums = room.zeros((num_spans, len(group), 3), "float64")
            launch(
                kept_sums_kernel,
                (ceil_div(num_spans, rows),),
                address_or_none(base),
                addresses(group),
                address_or_none(score),
                table.address,
                sums.address,
                models[0].num,
                num_spans,
                start,
                span,
                num_warps=SPAN_WARPS,
                BASE=code_or_none(base),
                CODES=codes(group),
                SCORE=code_or_none(score),
                SELECT=keeping.select,
                CEILING=keeping.ceiling,
                DRAWS=keeping.draws,
                ACCESS=access_of(base, score, *models, period=span),
                ROWS=rows,
            )
            parts.append(sums.numpy())
    return plain_nan(np.concatenate(parts, axis=1))


def masked_sums(
    vector: Elements, masks: Sequence[int], span: int, num_spans: int
) -> NDArray[np.float64]:
    """float64 [num_spans, num_masks]."""
    rows = rows_of_program(num_spans)
    parts = []
    with Room(vector.ptr) as room:
        for begin in range(0, len(masks), GROUP):
            group = shifted(masks[begin : begin + GROUP])
            sums = room.zeros((num_spans, len(group)), "float64")
            launch(
                masked_sums_kernel,
                (ceil_div(num_spans, rows),),
                vector.ptr,
                group,
                sums.address,
                vector.num,
                num_spans,
                span,
                num_warps=SPAN_WARPS,
                CODE=vector.code,
                N=len(group),
                ACCESS=access_of(vector, period=span),
                ROWS=rows,
            )
            parts.append(sums.numpy())
    return plain_nan(np.concatenate(parts, axis=1))

"""Weighted sums over the models, with one weight for each or one for each row or column.

    axpy_n: base + scale * (w_0 delta_0 + w_1 delta_1 + ...) / divisor
    axpy_grid: base + (w_0[place] delta_0 + w_1[place] delta_1 + ...)

Bytes per element: those of the base and of every model read, those of the output written; beyond
GROUP models a float32 sum goes through memory between groups. Bitwise: float32 in model order
without contraction. Other backends: cpu, cuda, reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from pymerge import formats
from pymerge.kernels.elements import add_count, block_of, load, load_base, load_delta
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
    power_of_two,
)
from pymerge.kernels.rounding import store

#: Models of one launch; more go in groups, with float32 sums in scratch in between.
GROUP = 16
F32 = tl.constexpr(formats.F32.code)


@triton.jit(do_not_specialize=["out", "base", "inputs", "counter", "carry", "numbers", "num"])
def axpy_n_kernel(
    out,
    base,
    inputs,
    counter,
    carry,
    numbers,
    num,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    CODES: tl.constexpr,
    N: tl.constexpr,
    RESUMES: tl.constexpr,
    LAST: tl.constexpr,
    DIVIDE: tl.constexpr,
    ADD_BASE: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """numbers: N weights, divisor, scale. RESUMES: the sum goes on from ``carry``, float32; it is
    left there unless LAST."""
    index, inside = block_of(num, ACCESS, BLOCK)
    start = load_base(base, index, inside, BASE, ACCESS)
    acc = numbers[0] * load_delta(inputs[0] >> 1, start, index, inside, CODES[0], BASE, ACCESS)
    if RESUMES:
        acc = load(carry, index, inside, F32, ACCESS) + acc
    for i in tl.static_range(1, N):
        delta = load_delta(inputs[i] >> 1, start, index, inside, CODES[i], BASE, ACCESS)
        acc = acc + numbers[i] * delta
    if LAST:
        if DIVIDE:
            acc = tl.div_rn(acc, tl.full([BLOCK], numbers[N], tl.float32))
        acc = acc * numbers[N + 1]
        if ADD_BASE:
            acc = start + acc
        add_count(counter, 0, store(out, index, inside, acc, OUT, ACCESS))
    else:
        store(carry, index, inside, acc, F32, ACCESS)


@triton.jit(do_not_specialize=["out", "base", "inputs", "counter", "weights", "num", "num_rows"])
def axpy_grid_kernel(
    out,
    base,
    inputs,
    counter,
    weights,
    num_rows,
    columns,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    CODES: tl.constexpr,
    N: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    ACCESS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile [ROWS, COLUMNS] of a matrix; weights: float32 [N, num_rows or columns]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < columns)
    index = row * columns + column
    table = tl.multiple_of(weights.to(tl.pointer_type(tl.float32)), 16)
    start = load_base(base, index, inside, BASE, ACCESS)
    acc = tl.full([ROWS, COLUMNS], 0, tl.float32)
    for i in tl.static_range(N):
        delta = load_delta(inputs[i] >> 1, start, index, inside, CODES[i], BASE, ACCESS)
        if ALONG_ROWS:
            w = tl.load(table + (i * num_rows + row), mask=row < num_rows, other=0.0)
        else:
            w = tl.load(table + (i * columns + column), mask=column < columns, other=0.0)
        if i == 0:
            acc = w * delta
        else:
            acc = acc + w * delta
    if BASE >= 0:
        acc = start + acc
    infinite = store(out, index, inside, acc, OUT, ACCESS)
    add_count(counter, 0, tl.reshape(infinite, (ROWS * COLUMNS,)))


def axpy_n(
    out: Elements,
    inputs: Sequence[Elements],
    weights: Sequence[float],
    base: Elements | None,
    divisor: float,
    scale: float,
    add_base: bool,
) -> int:
    """Returns the number of non-finite outputs, as all launchers that write do."""
    with Room(out.ptr) as room:
        counter = room.zeros(1, "int64")
        carry = room.zeros(out.num if len(inputs) > GROUP else 1, "float32")
        block = block_size(out.num)
        for begin in range(0, len(inputs), GROUP):
            group = inputs[begin : begin + GROUP]
            launch(
                axpy_n_kernel,
                (ceil_div(out.num, block),),
                out.ptr,
                address_or_none(base),
                addresses(group),
                counter.address,
                carry.address,
                (*weights[begin : begin + GROUP], divisor, scale),
                out.num,
                OUT=out.code,
                BASE=code_or_none(base),
                CODES=codes(group),
                N=len(group),
                RESUMES=begin > 0,
                LAST=begin + GROUP >= len(inputs),
                DIVIDE=divisor != 1,
                ADD_BASE=base is not None and add_base,
                ACCESS=access_of(out, base, *inputs),
                BLOCK=block,
            )
        return int(counter.numpy()[0])


def matrix_tile(columns: int, num_rows: int, block: int) -> tuple[int, int]:
    """Rows and columns of a program's tile of about ``block`` elements."""
    width = min(power_of_two(columns), block)
    return min(max(1, block // width), power_of_two(num_rows)), width


def axpy_grid(
    out: Elements,
    inputs: Sequence[Elements],
    weights: NDArray[np.float32],
    base: Elements | None,
    columns: int,
    along: str,
) -> int:
    with Room(out.ptr) as room:
        counter, table = room.zeros(1, "int64"), room.upload(weights)
        num_rows = out.num // columns
        rows, width = matrix_tile(columns, num_rows, block_size(out.num))
        launch(
            axpy_grid_kernel,
            (ceil_div(num_rows, rows), ceil_div(columns, width)),
            out.ptr,
            address_or_none(base),
            addresses(inputs),
            counter.address,
            table.address,
            num_rows,
            columns,
            OUT=out.code,
            BASE=code_or_none(base),
            CODES=codes(inputs),
            N=len(inputs),
            ALONG_ROWS=along == "rows",
            ACCESS=access_of(out, base, *inputs, period=columns),
            ROWS=rows,
            COLUMNS=width,
        )
        return int(counter.numpy()[0])

"""Conversion between formats, and the count of elements that are not finite.

    convert: out = round(value(x)), or the same bytes where the formats are equal

Bytes per element: those of the input read, those of the output written. Bitwise: one rounding.
Other backends: cpu, cuda, reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymerge.formats import BY_CODE, F64
from pymerge.kernels.elements import add_count, block_of, load, load_raw
from pymerge.kernels.launch import (
    Elements,
    Room,
    access_of,
    address_or_none,
    block_size,
    ceil_div,
    launch,
)
from pymerge.kernels.rounding import store, store_raw


@triton.jit(do_not_specialize=["out", "input", "counter", "num"])
def convert_kernel(
    out,
    input,
    counter,
    num,
    OUT: tl.constexpr,
    CODE: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, inside = block_of(num, ACCESS, BLOCK)
    x = load(input, index, inside, CODE, ACCESS)
    add_count(counter, 0, store(out, index, inside, x, OUT, ACCESS))


@triton.jit(do_not_specialize=["out", "input", "counter", "num"])
def count_nonfinite_kernel(
    out,
    input,
    counter,
    num,
    CODE: tl.constexpr,
    TYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    COPY: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts in the input's own format; COPY: also copies the bits."""
    index, inside = block_of(num, ACCESS, BLOCK)
    bits = load_raw(input, index, inside, TYPE, SIZE, ACCESS)
    if COPY:
        store_raw(out, index, inside, bits, TYPE, SIZE, ACCESS)
    if WIDE:
        high = (bits >> 32).to(tl.int32)
        infinite = (high & 0x7FF00000) == 0x7FF00000
    else:
        x = load(input, index, inside, CODE, ACCESS)
        infinite = (x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000
    add_count(counter, 0, inside & infinite)


def convert(out: Elements, input: Elements) -> int:
    if out.code == input.code:
        return count_nonfinite(input, out)
    with Room(out.ptr) as room:
        counter = room.zeros(1, "int64")
        block = block_size(out.num)
        launch(
            convert_kernel,
            (ceil_div(out.num, block),),
            out.ptr,
            input.ptr,
            counter.address,
            out.num,
            OUT=out.code,
            CODE=input.code,
            ACCESS=access_of(out, input),
            BLOCK=block,
        )
        return int(counter.numpy()[0])


_UNSIGNED = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


def count_nonfinite(input: Elements, copy_to: Elements | None = None) -> int:
    """Also copies the elements to ``copy_to``, of the same format, where it is given."""
    with Room(input.ptr) as room:
        counter = room.zeros(1, "int64")
        block, size = block_size(input.num), BY_CODE[input.code].num_bytes
        launch(
            count_nonfinite_kernel,
            (ceil_div(input.num, block),),
            address_or_none(copy_to),
            input.ptr,
            counter.address,
            input.num,
            CODE=input.code,
            TYPE=_UNSIGNED[size],
            SIZE=size,
            WIDE=input.code == F64.code,
            COPY=copy_to is not None,
            ACCESS=access_of(input, copy_to),
            BLOCK=block,
        )
        return int(counter.numpy()[0])

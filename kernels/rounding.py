"""Rounding of float32 to the writable formats, to nearest even, NaN as the positive quiet one.

    out = round(x)

Writes the bytes of one element, reads none. Bitwise: bfloat16 is rounded by its integer bits, since
the interpreter's own cast truncates; the other casts are exact or round to nearest even everywhere.
Other backends: csrc/include/pymerge (cpu, cuda), pymerge/ops/reference/elements.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymerge import formats
from pymerge.kernels import launch

F64 = tl.constexpr(formats.F64.code)
F32 = tl.constexpr(formats.F32.code)
F16 = tl.constexpr(formats.F16.code)
BF16 = tl.constexpr(formats.BF16.code)
BYTES = tl.constexpr(launch.BYTES)
ELEMENTS = tl.constexpr(launch.ELEMENTS)
VECTORS = tl.constexpr(launch.VECTORS)


@triton.jit
def round_to_bf16(x):
    """The uint16 patterns of float32 numbers."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def store_raw(
    address, index, inside, bits, TYPE: tl.constexpr, SIZE: tl.constexpr, ACCESS: tl.constexpr
):
    """Unsigned ``bits`` of SIZE bytes to element ``index``, where ``inside``."""
    if ACCESS == BYTES:
        pointer = address.to(tl.pointer_type(tl.uint8)) + index * SIZE
        for byte in tl.static_range(SIZE):
            tl.store(pointer + byte, ((bits >> (8 * byte)) & 0xFF).to(tl.uint8), mask=inside)
    else:
        pointer = address.to(tl.pointer_type(TYPE))
        if ACCESS == VECTORS:
            pointer = tl.multiple_of(pointer, 16)
        tl.store(pointer + index, bits, mask=inside)


@triton.jit
def store(address, index, inside, x, CODE: tl.constexpr, ACCESS: tl.constexpr):
    """Rounds float32 ``x`` to elements; returns which are not finite, false outside."""
    if CODE == BF16:
        half = round_to_bf16(x)
        store_raw(address, index, inside, half, tl.uint16, 2, ACCESS)
        infinite = (half & 0x7F80) == 0x7F80
    elif CODE == F16:
        short = x.to(tl.float16).to(tl.uint16, bitcast=True)
        short = tl.where(x != x, 0x7E00, short).to(tl.uint16)
        store_raw(address, index, inside, short, tl.uint16, 2, ACCESS)
        infinite = (short & 0x7C00) == 0x7C00
    else:
        bits = x.to(tl.uint32, bitcast=True)
        infinite = (bits & 0x7F800000) == 0x7F800000
        if CODE == F32:
            word = tl.where(x != x, 0x7FC00000, bits).to(tl.uint32)
            store_raw(address, index, inside, word, tl.uint32, 4, ACCESS)
        else:
            tl.static_assert(CODE == F64)
            wide = x.to(tl.float64).to(tl.uint64, bitcast=True)
            wide = tl.where(x != x, 0x7FF8000000000000, wide).to(tl.uint64)
            store_raw(address, index, inside, wide, tl.uint64, 8, ACCESS)
    return infinite & inside

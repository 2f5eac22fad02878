"""Elements as numbers: formats to float32, deltas, keys, numbers of a launch.

    value(x), delta = value(x) - value(base), key = bits of |delta|, of NaN 0x7fc00000

Reads the bytes of one element. Bitwise: every format but float64 is exact in float32, float64 is
rounded to nearest even. Other backends: csrc/include/pymerge (cpu, cuda),
pymerge/ops/reference/elements.py.
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
F8_E4M3 = tl.constexpr(formats.F8_E4M3.code)
F8_E5M2 = tl.constexpr(formats.F8_E5M2.code)
BYTES = tl.constexpr(launch.BYTES)
VECTORS = tl.constexpr(launch.VECTORS)


@triton.jit
def block_of(num, ACCESS: tl.constexpr, BLOCK: tl.constexpr):
    """The indices of a program's elements, int64 [BLOCK], and which are below ``num``."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if ACCESS == VECTORS:
        num = num // 16 * 16  # changes nothing, and tells that vectors are inside or outside whole
    return index, index < num


@triton.jit
def load_raw(
    address,
    index,
    inside,
    TYPE: tl.constexpr,
    SIZE: tl.constexpr,
    ACCESS: tl.constexpr,
):
    """The unsigned bits of elements, 0 where not ``inside``."""
    if ACCESS == BYTES and SIZE > 1:
        pointer = address.to(tl.pointer_type(tl.uint8)) + index * SIZE
        bits = tl.load(pointer, mask=inside, other=0).to(TYPE)
        for byte in tl.static_range(1, SIZE):
            part = tl.load(pointer + byte, mask=inside, other=0).to(TYPE)
            bits = (bits | (part << (8 * byte))).to(TYPE)
    else:
        start = address.to(tl.pointer_type(TYPE))
        if ACCESS == VECTORS:
            start = tl.multiple_of(start, 16)
        bits = tl.load(start + index, mask=inside, other=0)
    return bits


@triton.jit
def load(
    address,
    index,
    inside,
    CODE: tl.constexpr,
    ACCESS: tl.constexpr,
):
    """value(x) in float32, +0 where not ``inside``."""
    if CODE == BF16:
        half = load_raw(address, index, inside, tl.uint16, 2, ACCESS)
        x = (half.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif CODE == F16:
        short = load_raw(address, index, inside, tl.uint16, 2, ACCESS)
        x = short.to(tl.float16, bitcast=True).to(tl.float32)
    elif CODE == F32:
        word = load_raw(address, index, inside, tl.uint32, 4, ACCESS)
        x = word.to(tl.float32, bitcast=True)
    elif CODE == F64:
        wide = load_raw(address, index, inside, tl.uint64, 8, ACCESS)
        x = wide.to(tl.float64, bitcast=True).to(tl.float32)
    elif CODE == F8_E5M2:
        byte = load_raw(address, index, inside, tl.uint8, 1, ACCESS)
        x = (byte.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        tl.static_assert(CODE == F8_E4M3)
        byte = load_raw(address, index, inside, tl.uint8, 1, ACCESS)
        word = byte.to(tl.uint32)
        # Exponent and mantissa in float32's place are 2**-120 of the value, subnormals included.
        size = ((word & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        bits = size.to(tl.uint32, bitcast=True)
        bits = tl.where((word & 0x7F) == 0x7F, 0x7FC00000, bits).to(tl.uint32)
        x = (bits | ((word & 0x80) << 24)).to(tl.float32, bitcast=True)
    return x


@triton.jit
def load_base(address, index, inside, CODE: tl.constexpr, ACCESS: tl.constexpr):
    """value(base), or +0 where there is none (CODE below 0)."""
    if CODE < 0:
        x = tl.zeros_like(index).to(tl.float32)
    else:
        x = load(address, index, inside, CODE, ACCESS)
    return x


@triton.jit
def load_delta(
    address,
    base,
    index,
    inside,
    CODE: tl.constexpr,
    BASE: tl.constexpr,
    ACCESS: tl.constexpr,
):
    """The delta to the values ``base``, or the value itself where BASE is below 0."""
    x = load(address, index, inside, CODE, ACCESS)
    if BASE >= 0:
        x = x - base
    return x


@triton.jit
def key_of(delta):
    """The int32 key of float32 deltas."""
    magnitude = delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(magnitude > 0x7F800000, 0x7FC00000, magnitude)


@triton.jit
def is_nan(x):
    return x != x


@triton.jit
def copy_sign(size, x):
    """The magnitude of ``size`` with the sign of ``x``."""
    magnitude = size.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (magnitude | sign).to(tl.float32, bitcast=True)


@triton.jit
def integer(table, i):
    """Entry ``i`` of an int64 table at an address."""
    return tl.load(table.to(tl.pointer_type(tl.int64)) + i)


@triton.jit
def add_count(counter, i, flags):
    """Adds the number of true flags to entry ``i`` of int64 counters at an address."""
    count = tl.sum(flags.to(tl.int32), axis=0).to(tl.int64)
    pointer = counter.to(tl.pointer_type(tl.int64)) + i
    tl.atomic_add(pointer, count, mask=count > 0, sem="relaxed")

"""Philox4x32-10 (Salmon et al., SC 2011): the draw of each element of a tensor.

    draw(e) = word e % 4 of philox(counter (low 32 bits of e // 4, high 32 bits, 0, 0), key seed)

Moves nothing. Bitwise: integers only. Other backends: csrc/include/pymerge (cpu, cuda),
pymerge/ops/reference/philox.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(quarter, seed):
    """The four words, uint32, of counters int64 and an int64 seed."""
    c0 = quarter.to(tl.uint32)
    c1 = (quarter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        first_high = tl.umulhi(c0, 0xD2511F53)
        first_low = c0 * 0xD2511F53
        second_high = tl.umulhi(c2, 0xCD9E8D57)
        second_low = c2 * 0xCD9E8D57
        c0 = second_high ^ c1 ^ k0
        c2 = first_high ^ c3 ^ k1
        c1 = second_low
        c3 = first_low
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def draws_of_quarters(quarter, seed):
    """The draws of the elements 4 q to 4 q + 3 of each quarter, along the last axis."""
    w0, w1, w2, w3 = philox(quarter, seed)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def draws_of(element, seed):
    """The draw of each element; for elements that do not begin at a multiple of 4."""
    w0, w1, w2, w3 = philox(element >> 2, seed)
    word = (element & 3).to(tl.int32)
    low = tl.where(word == 0, w0, w1)
    high = tl.where(word == 2, w2, w3)
    return tl.where(word < 2, low, high)

"""exp, log and tanh of float32 as fixed sequences of rounded operations.

    pymerge/ops/reference/elementary.py, step by step

Moves nothing. Bitwise: every step is one float32 operation to nearest even, and launches do not
contract. Other backends: csrc/include/pymerge (cpu, cuda), the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymerge.kernels.elements import copy_sign


@triton.jit
def power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    inside = tl.where((x >= -87.33654) & (x <= 88.72284), x, 0.0)
    n = (inside * 1.44269504 + 12582912.0) - 12582912.0
    r = (inside - n * 0.693359375) - n * -2.12194440e-4
    y = 1.9875691500e-4 * r + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = (y * (r * r) + r) + 1.0
    whole = n.to(tl.int32)
    half = whole >> 1
    y = (y * power_of_two(half)) * power_of_two(whole - half)
    y = tl.where(x > 88.72284, float("inf"), tl.where(x < -87.33654, 0.0, y))
    return tl.where(x != x, float("nan"), y)


@triton.jit
def log(x):
    bits = x.to(tl.int32, bitcast=True)
    valid = (bits >= 0x00800000) & (bits < 0x7F800000)
    bits = tl.where(valid, bits, 0x3F800000)
    exponent = (bits >> 23) - 126
    m = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    small = m < 0.70710678
    exponent = tl.where(small, exponent - 1, exponent)
    m = tl.where(small, (m + m) - 1.0, m - 1.0)
    e = exponent.to(tl.float32)
    z = m * m
    y = 7.0376836292e-2 * m + -1.1514610310e-1
    y = y * m + 1.1676998740e-1
    y = y * m + -1.2420140846e-1
    y = y * m + 1.4249322787e-1
    y = y * m + -1.6668057665e-1
    y = y * m + 2.0000714765e-1
    y = y * m + -2.4999993993e-1
    y = y * m + 3.3333331174e-1
    y = (y * m) * z
    y = y + e * -2.12194440e-4
    y = y + -0.5 * z
    y = (m + y) + e * 0.693359375
    return tl.where(valid, y, tl.where(x == float("inf"), x, float("nan")))


@triton.jit
def tanh(x):
    size = tl.abs(x)
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z + -5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z + -3.33332819422e-1
    near = (near * z) * x + x
    t = exp(tl.where(size > 9.0, 0.0, size + size))
    far = 1.0 - tl.div_rn(tl.full(t.shape, 2.0, tl.float32), t + 1.0)
    far = tl.where(size > 9.0, 1.0, far)
    y = tl.where(size < 0.625, near, copy_sign(far, x))
    return tl.where(x != x, float("nan"), y)

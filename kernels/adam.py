"""A step of Adam in place.

    first = first + gain1 (gradient - first), second = decay2 second + gain2 gradient gradient,
    theta = theta - rate first / (sqrt(second) + floor)

Reads four float32 of an element and writes three. Bitwise: float32 without contraction, the root
and the quotient rounded to nearest. Other backends: cpu, cuda, reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from pymerge import formats
from pymerge.kernels.elements import add_count, block_of, load
from pymerge.kernels.launch import Elements, Room, access_of, block_size, ceil_div, launch
from pymerge.kernels.rounding import store

F32 = tl.constexpr(formats.F32.code)


@triton.jit(do_not_specialize=["theta", "first", "second", "gradient", "counter", "numbers", "num"])
def adam_kernel(
    theta,
    first,
    second,
    gradient,
    counter,
    numbers,
    num,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """numbers: gain1, decay2, gain2, rate, floor."""
    index, inside = block_of(num, ACCESS, BLOCK)
    g = load(gradient, index, inside, F32, ACCESS)
    m = load(first, index, inside, F32, ACCESS)
    v = load(second, index, inside, F32, ACCESS)
    x = load(theta, index, inside, F32, ACCESS)
    m = m + numbers[0] * (g - m)
    v = numbers[1] * v + numbers[2] * (g * g)
    x = x - tl.div_rn(numbers[3] * m, tl.sqrt_rn(v) + numbers[4])
    store(first, index, inside, m, F32, ACCESS)
    store(second, index, inside, v, F32, ACCESS)
    add_count(counter, 0, store(theta, index, inside, x, F32, ACCESS))


def adam_step(
    theta: Elements,
    first: Elements,
    second: Elements,
    gradient: Elements,
    numbers: Sequence[float],
) -> int:
    num = theta.num
    block = block_size(num)
    with Room(theta.ptr) as room:
        counter = room.zeros(1, "int64")
        launch(
            adam_kernel,
            (ceil_div(num, block),),
            theta.ptr,
            first.ptr,
            second.ptr,
            gradient.ptr,
            counter.address,
            tuple(numbers),
            num,
            ACCESS=access_of(theta, first, second, gradient),
            BLOCK=block,
        )
        return int(counter.numpy()[0])

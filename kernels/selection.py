"""Selection by magnitude: samples, counts around a bracket, histograms and the place of a tie.

    key_i = bits of |delta_i|; looks at keys never change their order

Bytes per element: those of the base and of every model read, for bracket_count with candidates and
locate_equal twice at most. Bitwise: integers only; counts are added by atomic operations, whose
order changes nothing, and candidates find their places by counts of the blocks before theirs.
Other backends: cpu, cuda, reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from pymerge.kernels.elements import block_of, key_of, load_base, load_delta
from pymerge.kernels.launch import (
    INTERPRETED,
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
)
from pymerge.kernels.rounding import ELEMENTS, VECTORS, store_raw

#: Bins up to which a program counts in shared memory before it adds to the histogram, at 4 bytes a
#: bin. More bins are added to one by one. Not measured on a GPU.
SHARED_BINS = 4096
#: Blocks of elements that a program counts. Not measured on a GPU.
BLOCKS = 1 if INTERPRETED else 8


@triton.jit(
    do_not_specialize=[
        "base",
        "model",
        "keys",
        "num_sampled",
        "first_sample",
        "start",
        "group",
        "stride",
    ]
)
def magnitude_sample_kernel(
    base,
    model,
    keys,
    num_sampled,
    first_sample,
    start,
    group,
    stride,
    BASE: tl.constexpr,
    CODE: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """keys: int32 [num_sampled]; sample s of the tensor is element s % group of every stride-th
    group, ``first_sample`` is that of the tile."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_sampled
    sample = first_sample + place
    element = sample // group * (group.to(tl.int64) * stride) + sample % group
    index = element - start
    own = load_base(base, index, inside, BASE, ACCESS)
    delta = load_delta(model, own, index, inside, CODE, BASE, ACCESS)
    tl.store(keys.to(tl.pointer_type(tl.int32)) + place, key_of(delta), mask=inside)


@triton.jit(do_not_specialize=["base", "model", "keys", "num"])
def keys_kernel(
    base,
    model,
    keys,
    num,
    BASE: tl.constexpr,
    CODE: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """keys: int32 [num]."""
    index, inside = block_of(num, ACCESS, BLOCK)
    own = load_base(base, index, inside, BASE, ACCESS)
    delta = load_delta(model, own, index, inside, CODE, BASE, ACCESS)
    key = key_of(delta).to(tl.uint32, bitcast=True)
    store_raw(keys, index, inside, key, tl.uint32, 4, VECTORS if ACCESS == VECTORS else ELEMENTS)


@triton.jit(do_not_specialize=["base", "models", "ends", "counts", "num"])
def bracket_count_kernel(
    base,
    models,
    ends,
    counts,
    num,
    BASE: tl.constexpr,
    CODES: tl.constexpr,
    N: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ends: int32 [N, 2]; counts: int32 [num_blocks, N, 4]: above, at high, at low, between."""
    index, inside = block_of(num, ACCESS, BLOCK)
    own = load_base(base, index, inside, BASE, ACCESS)
    table = ends.to(tl.pointer_type(tl.int32))
    place = counts.to(tl.pointer_type(tl.int32)) + tl.program_id(0).to(tl.int64) * (4 * N)
    for i in tl.static_range(N):
        key = key_of(load_delta(models[i] >> 1, own, index, inside, CODES[i], BASE, ACCESS))
        low = tl.load(table + 2 * i)
        high = tl.load(table + 2 * i + 1)
        at_low = (key == low) & (low != high)
        between = (key > low) & (key < high)
        tl.store(place + 4 * i, tl.sum((inside & (key > high)).to(tl.int32), axis=0))
        tl.store(place + 4 * i + 1, tl.sum((inside & (key == high)).to(tl.int32), axis=0))
        tl.store(place + 4 * i + 2, tl.sum((inside & at_low).to(tl.int32), axis=0))
        tl.store(place + 4 * i + 3, tl.sum((inside & between).to(tl.int32), axis=0))


@triton.jit(
    do_not_specialize=["base", "model", "offsets", "keys", "num", "capacity", "low", "high"]
)
def bracket_keys_kernel(
    base,
    model,
    offsets,
    keys,
    num,
    capacity,
    low,
    high,
    BASE: tl.constexpr,
    CODE: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """offsets: int64 [num_blocks], the candidates before each block; keys: int32 [capacity]."""
    index, inside = block_of(num, ACCESS, BLOCK)
    offset = tl.load(offsets.to(tl.pointer_type(tl.int64)) + tl.program_id(0))
    own = load_base(base, index, inside, BASE, ACCESS)
    key = key_of(load_delta(model, own, index, inside, CODE, BASE, ACCESS))
    found = inside & (key > low) & (key < high)
    place = offset + tl.cumsum(found.to(tl.int32), axis=0) - 1
    target = keys.to(tl.pointer_type(tl.int32)) + place
    tl.store(target, key, mask=found & (place < capacity))


@triton.jit(do_not_specialize=["base", "models", "prefixes", "counts", "num"])
def magnitude_histogram_kernel(
    base,
    models,
    prefixes,
    counts,
    num,
    BASE: tl.constexpr,
    CODES: tl.constexpr,
    N: tl.constexpr,
    SHIFT: tl.constexpr,
    TOP: tl.constexpr,
    PREFIXED: tl.constexpr,
    SHARED: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """prefixes: int32 [N]; counts: int64 [N, bins]."""
    BINS: tl.constexpr = 1 << (TOP - SHIFT)
    table = counts.to(tl.pointer_type(tl.int64))
    WIDTH: tl.constexpr = BINS if BINS > 64 else 64
    bin_index = tl.arange(0, WIDTH)
    if ACCESS == 16:
        num = num // 16 * 16
    for i in tl.static_range(N):
        if PREFIXED:
            prefix = tl.load(prefixes.to(tl.pointer_type(tl.int32)) + i)
        total = tl.full([WIDTH if SHARED else 1], 0, tl.int32)
        zeros = tl.full([], 0, tl.int32)
        block = tl.full([], 0, tl.int32)
        while block < BLOCKS:
            first = (tl.program_id(0).to(tl.int64) * BLOCKS + block) * BLOCK
            index = first + tl.arange(0, BLOCK)
            inside = index < num
            own = load_base(base, index, inside, BASE, ACCESS)
            key = key_of(load_delta(models[i] >> 1, own, index, inside, CODES[i], BASE, ACCESS))
            counted = inside
            if PREFIXED:
                counted = counted & ((key >> TOP) == prefix)
            # Equal checkpoints differ nowhere: zeros would all meet in one bin.
            zeros += tl.sum((counted & (key == 0)).to(tl.int32), axis=0)
            counted = counted & (key != 0)
            bins = (key >> SHIFT) & (BINS - 1)
            if SHARED:
                total += tl.histogram(bins, WIDTH, mask=counted)
            else:
                tl.atomic_add(
                    table + i * BINS + bins,
                    tl.full([BLOCK], 1, tl.int64),
                    mask=counted,
                    sem="relaxed",
                )
            block += 1
        if SHARED:
            target = table + i * BINS + bin_index
            tl.atomic_add(target, total.to(tl.int64), mask=total > 0, sem="relaxed")
        tl.atomic_add(table + i * BINS, zeros.to(tl.int64), mask=zeros > 0, sem="relaxed")


@triton.jit(do_not_specialize=["base", "model", "counts", "num", "key"])
def count_equal_kernel(
    base,
    model,
    counts,
    num,
    key,
    BASE: tl.constexpr,
    CODE: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts: int32 [num_blocks]."""
    index, inside = block_of(num, ACCESS, BLOCK)
    own = load_base(base, index, inside, BASE, ACCESS)
    found = key_of(load_delta(model, own, index, inside, CODE, BASE, ACCESS)) == key
    count = tl.sum((inside & found).to(tl.int32), axis=0)
    tl.store(counts.to(tl.pointer_type(tl.int32)) + tl.program_id(0), count)


@triton.jit(do_not_specialize=["base", "model", "result", "num", "key", "first", "nth"])
def locate_equal_kernel(
    base,
    model,
    result,
    num,
    key,
    first,
    nth,
    BASE: tl.constexpr,
    CODE: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result: int64, the index of the nth equal of the block that begins at ``first``."""
    index = first.to(tl.int64) + tl.arange(0, BLOCK)
    inside = index < num
    own = load_base(base, index, inside, BASE, ACCESS)
    found = inside & (key_of(load_delta(model, own, index, inside, CODE, BASE, ACCESS)) == key)
    here = found & (tl.cumsum(found.to(tl.int32), axis=0) == nth + 1)
    tl.store(result.to(tl.pointer_type(tl.int64)), tl.sum(tl.where(here, index, 0), axis=0))


def magnitude_sample(
    base: Elements | None,
    models: Sequence[Elements],
    start: int,
    group: int,
    stride: int,
    num_sampled: int,
) -> NDArray[np.int32]:
    period = group * stride
    first_sample = start // period * group + min(start % period, group)
    block = block_size(num_sampled)
    with Room(models[0].ptr) as room:
        keys = [room.zeros(num_sampled, "int32") for _ in models]
        for model, own in zip(models, keys, strict=True):
            launch(
                magnitude_sample_kernel,
                (ceil_div(num_sampled, block),),
                address_or_none(base),
                model.ptr,
                own.address,
                num_sampled,
                first_sample,
                start,
                group,
                stride,
                BASE=code_or_none(base),
                CODE=model.code,
                ACCESS=min(1, access_of(base, model)),
                BLOCK=block,
            )
        return np.stack([own.numpy() for own in keys])


def bracket_count(
    base: Elements | None,
    models: Sequence[Elements],
    low: Sequence[int],
    high: Sequence[int],
    capacity: int,
) -> tuple[NDArray[np.int64], list[NDArray[np.int32]]]:
    num, count = models[0].num, len(models)
    block = block_size(num)
    num_blocks = ceil_div(num, block)
    access = access_of(base, *models)
    with Room(models[0].ptr) as room:
        ends = room.upload(np.array([low, high], np.int32).T)
        found = room.zeros((num_blocks, count, 4), "int32")
        launch(
            bracket_count_kernel,
            (num_blocks,),
            address_or_none(base),
            addresses(models),
            ends.address,
            found.address,
            num,
            BASE=code_or_none(base),
            CODES=codes(models),
            N=count,
            ACCESS=access,
            BLOCK=block,
        )
        of_blocks = found.numpy().astype(np.int64)
        counts: NDArray[np.int64] = of_blocks.sum(axis=0)
        before = of_blocks[:, :, 3].cumsum(axis=0) - of_blocks[:, :, 3]
        candidates = []
        for i, model in enumerate(models):
            length = min(capacity, int(counts[i, 3]))
            if not length:
                candidates.append(np.empty(0, np.int32))
                continue
            offsets, keys = room.upload(before[:, i]), room.zeros(length, "int32")
            launch(
                bracket_keys_kernel,
                (num_blocks,),
                address_or_none(base),
                model.ptr,
                offsets.address,
                keys.address,
                num,
                length,
                low[i],
                high[i],
                BASE=code_or_none(base),
                CODE=model.code,
                ACCESS=access,
                BLOCK=block,
            )
            candidates.append(keys.numpy())
        return counts, candidates


def magnitude_histogram(
    base: Elements | None,
    models: Sequence[Elements],
    counts: NDArray[np.uint64],
    shift: int,
    prefix: Sequence[int] | None,
    top: int,
) -> None:
    num, count = models[0].num, len(models)
    block = block_size(num)
    with Room(models[0].ptr) as room:
        prefixes = room.upload(np.array(prefix or [0], np.int32))
        bins = room.zeros(counts.shape, "int64")
        launch(
            magnitude_histogram_kernel,
            (ceil_div(num, block * BLOCKS),),
            address_or_none(base),
            addresses(models),
            prefixes.address,
            bins.address,
            num,
            BASE=code_or_none(base),
            CODES=codes(models),
            N=count,
            SHIFT=shift,
            TOP=top,
            PREFIXED=prefix is not None,
            SHARED=counts.shape[1] <= SHARED_BINS,
            ACCESS=access_of(base, *models),
            BLOCKS=BLOCKS,
            BLOCK=block,
        )
        counts += bins.numpy().astype(np.uint64)


def locate_equal(base: Elements | None, model: Elements, key: int, nth: int) -> tuple[int, int]:
    block = block_size(model.num)
    num_blocks = ceil_div(model.num, block)
    constants = {
        "BASE": code_or_none(base),
        "CODE": model.code,
        "ACCESS": access_of(base, model),
        "BLOCK": block,
    }
    with Room(model.ptr) as room:
        found = room.zeros(num_blocks, "int32")
        launch(
            count_equal_kernel,
            (num_blocks,),
            address_or_none(base),
            model.ptr,
            found.address,
            model.num,
            key,
            **constants,
        )
        until = found.numpy().astype(np.int64).cumsum()
        if nth >= until[-1]:
            return -1, int(until[-1])
        own = int(np.searchsorted(until, nth, side="right"))
        before = int(until[own - 1]) if own else 0
        result = room.zeros(1, "int64")
        launch(
            locate_equal_kernel,
            (1,),
            address_or_none(base),
            model.ptr,
            result.address,
            model.num,
            key,
            own * block,
            nth - before,
            **{**constants, "ACCESS": min(1, constants["ACCESS"])},
        )
        return int(result.numpy()[0]), nth + 1

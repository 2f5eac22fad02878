from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from pymerge import _C

MIB = 1 << 20


def mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 2 * MIB, 5 * MIB + 3])
def test_memory_is_zero_aligned_and_writable_to_the_last_byte(num_bytes: int) -> None:
    arena = _C.Arena(num_bytes)
    assert arena.num_bytes == num_bytes
    assert arena.address % (2 * MIB if num_bytes >= 2 * MIB else 4096) == 0
    values = np.frombuffer(arena, np.uint8)
    assert values.size == num_bytes
    assert values.ctypes.data == arena.address
    assert not values.any()
    values[:] = 7
    assert values[-1] == 7


def test_a_large_arena_takes_no_memory_until_touched() -> None:
    before = resident_bytes()
    arena = _C.Arena(64 << 30)
    assert resident_bytes() - before < 64 * MIB
    np.frombuffer(arena, np.uint8, 1, 60 << 30)[0] = 1


def test_memory_goes_with_the_last_reference() -> None:
    arena = _C.Arena(512 * MIB)
    address = arena.address
    view = np.frombuffer(arena, np.uint8)
    del arena
    gc.collect()
    assert mapped(address)
    assert view[-1] == 0
    del view
    gc.collect()
    assert not mapped(address)


def test_release_gives_whole_pages_back_and_keeps_the_rest() -> None:
    arena = _C.Arena(16 * MIB)
    values = np.frombuffer(arena, np.uint8)
    values[:] = 1
    before = resident_bytes()
    arena.release_pages(4 * MIB + 1, 8 * MIB)
    assert before - resident_bytes() > 6 * MIB
    first, last = 4 * MIB + 4096, 12 * MIB
    assert values[:first].all()
    assert not values[first:last].any()
    assert values[last:].all()


def test_release_within_one_page_and_of_an_odd_end() -> None:
    arena = _C.Arena(3 * 4096 + 5)
    values = np.frombuffer(arena, np.uint8)
    values[:] = 1
    arena.release_pages(10, 4000)
    arena.release_pages(4096, 4095)
    arena.release_pages(0, 0)
    assert values.all()
    arena.release_pages(3 * 4096, 5)
    assert not values[3 * 4096 :].any()


@pytest.mark.parametrize(("offset", "num_bytes"), [(0, 4097), (4097, 0), (4096, 1), (2**63, 2**63)])
def test_release_outside_is_refused(offset: int, num_bytes: int) -> None:
    with pytest.raises(ValueError, match="of an arena of 4096 bytes"):
        _C.Arena(4096).release_pages(offset, num_bytes)


def test_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        _C.Arena(0)
    with pytest.raises(OSError, match="reserving 4611686018427387904 bytes of memory"):
        _C.Arena(1 << 62)


def test_copy_of_overlapping_ranges() -> None:
    arena = _C.Arena(100)
    values = np.frombuffer(arena, np.uint8)
    values[:] = np.arange(100)
    _C.copy(arena.address + 10, arena.address, 50)
    assert values.tolist() == [*range(10), *range(50), *range(60, 100)]

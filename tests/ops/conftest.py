"""Shared by the tests of this room: forced instruction sets, guarded memory, byte comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pymerge import ops
from pymerge.formats import Format
from pymerge.ops import View

GUARD_BYTES = 64
POISON = 0xA5


class Guarded:
    """Elements at a chosen misalignment, between two guard regions, poisoned until written."""

    def __init__(self, format: Format, num: int, offset: int, payload: bytes | None = None) -> None:
        begin = GUARD_BYTES + offset
        self.format = format
        self.memory = np.full(begin + num * format.num_bytes + GUARD_BYTES, POISON, np.uint8)
        self._payload = slice(begin, begin + num * format.num_bytes)
        if payload is not None:
            self.memory[self._payload] = np.frombuffer(payload, np.uint8)
        self._at_first = self.memory.copy()
        assert format.code is not None
        self.view = View(self.memory.ctypes.data + begin, format.code, num)

    @property
    def payload(self) -> np.ndarray[Any, Any]:
        carrier = np.dtype(f"u{self.format.num_bytes}")
        return self.memory[self._payload].copy().view(carrier)

    def check_guards(self) -> None:
        found, expected = self.memory.copy(), self._at_first.copy()
        found[self._payload] = expected[self._payload] = 0
        assert_same_bytes(found, expected, "guard region")

    def check_untouched(self) -> None:
        assert_same_bytes(self.memory, self._at_first, "input")


def assert_same_bytes(found: Any, expected: Any, what: str) -> None:
    """Bitwise equality of two arrays or numbers; reports the first byte that differs."""
    found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    assert found.dtype == expected.dtype, f"{what}: dtype {found.dtype}, expected {expected.dtype}"
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    different = np.flatnonzero(
        found.reshape(-1).view(np.uint8) != expected.reshape(-1).view(np.uint8)
    )
    if len(different):
        element = int(different[0]) // found.itemsize
        index = np.unravel_index(element, found.shape)
        digits = 2 * found.itemsize
        pytest.fail(
            f"{what}: {len(different)} bytes differ, first byte {different[0]} at index "
            f"{tuple(int(i) for i in index)}: found {found.flat[element]} "
            f"(0x{int.from_bytes(found.flat[element].tobytes(), 'little'):0{digits}x}), "
            f"expected {expected.flat[element]} "
            f"(0x{int.from_bytes(expected.flat[element].tobytes(), 'little'):0{digits}x})",
            pytrace=False,
        )


@pytest.fixture(params=ops.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, forced while the test runs."""
    before = ops.isa()
    ops.use_isa(request.param)
    yield request.param
    ops.use_isa(before)


@pytest.fixture(scope="session")
def guarded() -> type[Guarded]:
    return Guarded


@pytest.fixture(scope="session")
def same_bytes() -> Callable[[Any, Any, str], None]:
    return assert_same_bytes

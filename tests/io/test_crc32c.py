from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymerge import _C

CHECKSUMS = [_C.crc32c, _C.crc32c_tables]


def naive(data: bytes, crc: int = 0) -> int:
    """CRC-32C bit by bit, from its definition."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def crc32c(data: bytes, crc: int = 0) -> int:
    values = np.frombuffer(data or b"\0", np.uint8)
    return _C.crc32c(values.ctypes.data, len(data), crc)


# RFC 3720, appendix B.4, and the check value of the catalogue of CRCs.
KNOWN = [
    (b"\0" * 32, 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(reversed(range(32))), 0x113FDB5C),
    (
        bytes.fromhex(
            "01c00000 00000000 00000000 00000000 14000000 00000400"
            "00000014 00000018 28000000 00000000 02000000 00000000"
        ),
        0xD9963A56,
    ),
    (b"123456789", 0xE3069283),
    (b"", 0),
]


@pytest.mark.parametrize("checksum", CHECKSUMS)
@pytest.mark.parametrize(("data", "expected"), KNOWN)
def test_known_answers(checksum: object, data: bytes, expected: int) -> None:
    values = np.frombuffer(data or b"\0", np.uint8)
    assert checksum(values.ctypes.data, len(data)) == expected  # type: ignore[operator]
    assert naive(data) == expected


@pytest.mark.parametrize("checksum", CHECKSUMS)
@pytest.mark.parametrize("start", [0, 1, 7])
@pytest.mark.parametrize(
    "num_bytes", [1, 7, 8, 9, 767, 768, 769, 1535, 1536, 12287, 12288, 12289, 13057, 25001]
)
def test_sizes_around_the_interleaved_pieces(checksum: object, start: int, num_bytes: int) -> None:
    data = np.random.default_rng(num_bytes).integers(0, 256, start + num_bytes, np.uint8)
    expected = naive(data[start:].tobytes())
    assert checksum(data.ctypes.data + start, num_bytes) == expected  # type: ignore[operator]


@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_going_on_and_combining_equal_the_whole(a: bytes, b: bytes) -> None:
    whole = naive(a + b)
    assert crc32c(b, crc32c(a)) == whole
    assert _C.crc32c_combine(crc32c(a), crc32c(b), len(b)) == whole


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**50),
    st.integers(0, 2**50),
)
def test_combining_is_associative(a: int, b: int, c: int, num_b: int, num_c: int) -> None:
    combine = _C.crc32c_combine
    left = combine(combine(a, b, num_b), c, num_c)
    right = combine(a, combine(b, c, num_c), num_b + num_c)
    assert left == right


def test_combining_over_many_gigabytes_of_zeros() -> None:
    half = crc32c(bytes(1 << 20))
    for doubling in range(20, 42):
        half = _C.crc32c_combine(half, half, 1 << doubling)
    # 2**42 zero bytes, by moving the register of one byte over the others.
    assert half == _C.crc32c_combine(crc32c(b"\0"), _zeros(2**42 - 1), 2**42 - 1)


def _zeros(num_bytes: int) -> int:
    """The checksum of zero bytes, built bit by bit of their number."""
    crc, piece, length = 0, crc32c(b"\0"), 1
    while num_bytes:
        if num_bytes & 1:
            crc = _C.crc32c_combine(crc, piece, length)
        piece, length, num_bytes = (
            _C.crc32c_combine(piece, piece, length),
            2 * length,
            num_bytes >> 1,
        )
    return crc


def test_runs_without_the_gil() -> None:
    arena = _C.Arena(256 << 20)
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = ticks
        _C.crc32c_tables(arena.address, arena.num_bytes)
        during = ticks - before
    finally:
        done.set()
        thread.join()
    assert during >= 10


def test_the_implementation_is_named() -> None:
    assert _C.crc32c_implementation() in ("sse4.2", "armv8", "tables")

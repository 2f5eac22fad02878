from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pymerge import _C

METHODS = ["dontcache", "direct", "buffered", "plain"]
SPARE = 8192
MIB = 1 << 20

MakeFile = Callable[[int], tuple[Path, bytes]]
Drop = Callable[[Path], None]


def open_source(path: Path, method: str) -> _C.SourceFile:
    if method == "direct":
        alignment = _C.direct_alignment(path)
        if alignment is not None and alignment[1] == 0:
            pytest.skip(f"{_C.filesystem(path)} does not support direct reads")
    try:
        return _C.SourceFile(path, method)
    except OSError as error:
        if method == "direct" and error.errno == errno.EINVAL:
            pytest.skip(f"{_C.filesystem(path)} refuses O_DIRECT")
        raise


def read(source: _C.SourceFile, offset: int, length: int, shift: int = 0) -> bytes:
    """Read into a poisoned block ``shift`` bytes past a page, and check what lies around it."""
    arena = _C.Arena(length + SPARE + 4096 + 64)
    memory = np.frombuffer(arena, np.uint8)
    memory[:] = 0xA5
    block_bytes = length + SPARE
    address = source.read(offset, length, arena.address + shift, block_bytes)
    begin = address - arena.address
    assert shift <= begin
    assert begin + length <= shift + block_bytes
    assert (memory[:shift] == 0xA5).all()
    assert (memory[shift + block_bytes :] == 0xA5).all()
    if source.method != "direct":
        assert begin == shift
        assert (memory[shift + length :] == 0xA5).all()
    return memory[begin : begin + length].tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_ranges_equal_what_python_reads(random_file: MakeFile, method: str) -> None:
    num_bytes = 3 * MIB + 777
    path, content = random_file(num_bytes)
    source = open_source(path, method)
    ranges = [
        (0, num_bytes),
        (0, 1),
        (0, 4096),
        (1, 4095),
        (511, 2),
        (511, 513),
        (512, 512),
        (4095, 4098),
        (12345, 1_000_003),
        (num_bytes - 1, 1),
        (num_bytes - 777, 777),
        (num_bytes - 5000, 5000),
        (num_bytes, 0),
    ]
    for offset, length in ranges:
        assert read(source, offset, length) == content[offset : offset + length], (offset, length)
    source.close()


@pytest.mark.parametrize("method", METHODS)
def test_blocks_that_begin_anywhere(random_file: MakeFile, method: str) -> None:
    path, content = random_file(40_000)
    source = open_source(path, method)
    shifts = [0, 1, 63] if _C.direct_alignment(path) in (None, (4096, 4096)) else [0, 1, 511, 512]
    for shift in [0] if method == "direct" and shifts[-1] == 63 else shifts:
        assert read(source, 1001, 30_003, shift) == content[1001:31_004]
    source.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 10_001), (9_000, 1_001), (9_999, 2), (10_000, 1), (50_000, 10)]
)
def test_a_file_that_ends_too_early(
    random_file: MakeFile, method: str, offset: int, length: int
) -> None:
    path, _ = random_file(10_000)
    source = open_source(path, method)
    with pytest.raises(OSError, match="ends too early") as caught:
        read(source, offset, length)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(path)
    text = str(caught.value)
    found = max(0, 10_000 - offset)
    assert f"expected {length} bytes at offset {offset}, found {found}" in text
    assert "the file has 10000 bytes" in text
    source.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_file_cut_short_after_it_was_opened(random_file: MakeFile, method: str) -> None:
    path, content = random_file(100_000)
    source = open_source(path, method)
    assert read(source, 0, 100_000) == content
    os.truncate(path, 60_000)
    with pytest.raises(OSError, match="the file has 60000 bytes"):
        read(source, 0, 100_000)
    source.close()


@pytest.mark.parametrize("method", METHODS)
def test_offsets_past_four_gigabytes(tmp_path: Path, method: str) -> None:
    path = tmp_path / "sparse"
    marks = {(2 << 30) - 3: b"around 2 GiB", (4 << 30) - 5: b"around 4 GiB", (5 << 30) + 1: b"end"}
    with path.open("wb") as file:
        for offset, mark in marks.items():
            file.seek(offset)
            file.write(mark)
        os.fsync(file.fileno())
    source = open_source(path, method)
    for offset, mark in marks.items():
        assert read(source, offset, len(mark)) == mark
        assert read(source, offset - 1000, 1000 + len(mark)) == bytes(1000) + mark
    source.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_read_of_more_than_a_request(tmp_path: Path, method: str) -> None:
    path = tmp_path / "sparse"
    num_bytes = (1 << 30) + 12_345
    marks = [100, (512 << 20) - 1, 512 << 20, (1 << 30) - 1, 1 << 30, num_bytes - 1]
    with path.open("wb") as file:
        for offset in marks:
            file.seek(offset)
            file.write(b"x")
        os.fsync(file.fileno())
    source = open_source(path, method)
    arena = _C.Arena(num_bytes + SPARE)
    address = source.read(1, num_bytes - 1, arena.address, arena.num_bytes)
    begin = address - arena.address
    memory = np.frombuffer(arena, np.uint8)[begin : begin + num_bytes - 1]
    assert np.flatnonzero(memory).tolist() == [mark - 1 for mark in marks]
    source.close()


@pytest.mark.parametrize("method", ["dontcache", "direct", "buffered"])
def test_pages_that_were_cached_stay_and_no_others(
    disk_path: Path, random_file: MakeFile, drop_from_cache: Drop, method: str
) -> None:
    num_bytes = 16 * MIB
    path, content = random_file(num_bytes)
    if method == "dontcache" and _C.probe_read_method(path)[0] != "dontcache":
        pytest.skip("this kernel or filesystem has no RWF_DONTCACHE")
    drop_from_cache(path)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    assert os.pread(fd, 4 * MIB, 6 * MIB) == content[6 * MIB : 10 * MIB]
    os.close(fd)
    before = _C.cached_fraction(path)
    assert 0.2 < before < 0.35

    source = open_source(path, method)
    pieces = [read(source, at, min(MIB + 1, num_bytes - at)) for at in range(0, num_bytes, MIB)]
    source.close()
    assert b"".join(piece[:MIB] for piece in pieces) == content
    after = _C.cached_fraction(path)
    assert abs(after - before) < 0.02
    # The right ones, not just as many.
    assert _cached(path, 6 * MIB, 4 * MIB)


def _cached(path: Path, offset: int, length: int) -> bool:
    """Whether a range is wholly in the page cache: a read that may not wait gets all of it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        got = os.preadv(fd, [bytearray(length)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return got == length


def test_plain_reads_fill_the_cache(
    disk_path: Path, random_file: MakeFile, drop_from_cache: Drop
) -> None:
    path, content = random_file(4 * MIB)
    drop_from_cache(path)
    source = _C.SourceFile(path, "plain")
    assert read(source, 0, 4 * MIB) == content
    source.close()
    assert _C.cached_fraction(path) == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_many_threads_one_file(random_file: MakeFile, method: str) -> None:
    path, content = random_file(4 * MIB + 99)
    source = open_source(path, method)
    ranges = [(offset, 60_001) for offset in range(0, 4 * MIB, 50_000)]
    ranges = [(offset, min(length, len(content) - offset)) for offset, length in ranges]
    with ThreadPoolExecutor(6) as pool:
        for (offset, length), got in zip(
            ranges, pool.map(lambda at: read(source, *at), ranges), strict=True
        ):
            assert got == content[offset : offset + length]
    source.close()


def test_signals_during_reads(random_file: MakeFile) -> None:
    path, content = random_file(8 * MIB)
    seen = 0

    def count(number: int, frame: object) -> None:
        nonlocal seen
        seen += 1

    previous = signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        source = _C.SourceFile(path, "plain")
        for _ in range(5):
            assert read(source, 0, 8 * MIB) == content
        source.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert seen > 0


def test_direct_reads_ask_for_spare_bytes(random_file: MakeFile) -> None:
    path, _ = random_file(8192)
    source = open_source(path, "direct")
    arena = _C.Arena(4096 + SPARE)
    with pytest.raises(ValueError, match="needs a block of 12288 bytes, this one has 12287"):
        source.read(0, 4096, arena.address, 4096 + SPARE - 1)
    source.close()


def test_arguments_that_no_file_satisfies(random_file: MakeFile) -> None:
    path, _ = random_file(100)
    arena = _C.Arena(100)
    source = _C.SourceFile(path, "plain")
    with pytest.raises(ValueError, match="101 bytes at offset 0 into a block of 100"):
        source.read(0, 101, arena.address, 100)
    with pytest.raises(ValueError, match="past the largest possible file"):
        source.read(2**63, 1, arena.address, 100)
    with pytest.raises(OSError, match="reading 1 bytes at offset 0") as caught:
        source.read(0, 1, 8, 1)
    assert caught.value.errno == errno.EFAULT
    source.close()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.read(0, 1, arena.address, 100)
    with pytest.raises(ValueError, match='found "mmap"'):
        _C.SourceFile(path, "mmap")


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        _C.SourceFile(tmp_path / "none", "plain")
    assert caught.value.filename == str(tmp_path / "none")
    with pytest.raises(OSError, match="expected a regular file") as refused:
        _C.SourceFile(tmp_path, "plain")
    assert refused.value.errno == errno.EINVAL
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="expected a regular file"):
        _C.SourceFile(tmp_path / "pipe", "plain")


def test_a_file_name_that_is_not_unicode(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    with open(path, "wb") as file:
        file.write(b"abc")
    source = _C.SourceFile(Path(os.fsdecode(path)), "plain")
    assert read(source, 0, 3) == b"abc"
    assert os.fsencode(source.path) == path
    with pytest.raises(OSError, match="ends too early") as caught:
        read(source, 0, 4)
    assert caught.value.filename == os.fsdecode(path)
    source.close()


def test_closing_waits_for_reads_under_way(random_file: MakeFile) -> None:
    path, content = random_file(16 * MIB)
    for _ in range(3):
        source = _C.SourceFile(path, "plain")
        results: list[bytes] = []

        def go(source: _C.SourceFile = source, results: list[bytes] = results) -> None:
            try:
                while True:
                    results.append(read(source, 0, 16 * MIB))
            except ValueError:
                return

        thread = threading.Thread(target=go)
        thread.start()
        while not results:
            pass
        source.close()
        thread.join()
        assert all(result == content for result in results)


def test_an_object_that_is_dropped_closes_its_file(random_file: MakeFile) -> None:
    path, _ = random_file(10)
    before = len(os.listdir("/proc/self/fd"))
    for method in METHODS:
        for _ in range(5):
            open_source(path, method)
    for _ in range(5):
        with pytest.raises(FileNotFoundError):
            _C.SourceFile(path.with_name("none"), "direct")
    assert len(os.listdir("/proc/self/fd")) == before

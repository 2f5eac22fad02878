from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pymerge import _C

MakeFile = Callable[[int], tuple[Path, bytes]]
Drop = Callable[[Path], None]


def mounted_type(path: Path) -> str:
    """The type of the longest mount point above the path, from the kernel's own list."""
    best, name = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        inside = path.is_relative_to(point)
        if inside and len(point) >= len(best):
            best, name = point, kind
    return name


@pytest.mark.parametrize("folder", ["/proc", "/dev/shm", None])
def test_filesystem_names(tmp_path: Path, folder: str | None) -> None:
    path = tmp_path.resolve() if folder is None else Path(folder)
    expected = mounted_type(path)
    name = _C.filesystem(path)
    if expected in ("ext2", "ext3"):
        expected = "ext4"
    if name.startswith("0x"):
        assert int(name, 16) == 0x9FA0 or folder is None  # the magic number of proc
    else:
        assert name == expected.split(".")[0]


def test_free_bytes(tmp_path: Path) -> None:
    free = _C.free_bytes(tmp_path)
    assert abs(free - shutil.disk_usage(tmp_path).free) < max(1 << 30, free // 20)


def test_questions_about_nothing(tmp_path: Path) -> None:
    path = tmp_path / "none"
    for ask in (
        _C.filesystem,
        _C.free_bytes,
        _C.cached_fraction,
        _C.probe_read_method,
        _C.direct_alignment,
        _C.fsync_directory,
    ):
        with pytest.raises(FileNotFoundError) as caught:
            ask(path)
        assert caught.value.filename == str(path)


def test_fsync_directory_wants_a_folder(tmp_path: Path) -> None:
    _C.fsync_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        _C.fsync_directory(tmp_path / "file")


def test_cached_fraction(disk_path: Path, random_file: MakeFile, drop_from_cache: Drop) -> None:
    path, _ = random_file(8 << 20)
    path.read_bytes()
    assert _C.cached_fraction(path) == 1.0
    drop_from_cache(path)
    assert _C.cached_fraction(path) == 0.0
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 2 << 20, 0)
    os.close(fd)
    assert 0.2 < _C.cached_fraction(path) < 0.35
    empty = path.with_name("empty")
    empty.touch()
    assert _C.cached_fraction(empty) == 0.0


def test_the_probe_names_a_method_that_reads(random_file: MakeFile, drop_from_cache: Drop) -> None:
    path, content = random_file(5_000)
    drop_from_cache(path)
    method, reason = _C.probe_read_method(path)
    assert reason
    source = _C.SourceFile(path, method)
    arena = _C.Arena(5_000 + 8192)
    begin = source.read(0, 5_000, arena.address, arena.num_bytes) - arena.address
    assert bytes(memoryview(arena)[begin : begin + 5_000]) == content
    assert source.method == method
    source.close()


def test_the_probe_of_files_in_memory() -> None:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or _C.filesystem(shm) != "tmpfs":
        pytest.skip("there is no writable tmpfs at /dev/shm")
    path = shm / f"pymerge-test-{os.getpid()}"
    path.write_bytes(b"x")
    try:
        method, reason = _C.probe_read_method(path)
    finally:
        path.unlink()
    assert method == "plain"
    assert "memory" in reason


def test_the_probe_of_empty_and_odd_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert _C.probe_read_method(tmp_path / "empty")[0] in (
        "dontcache",
        "direct",
        "buffered",
        "plain",
    )
    with pytest.raises(OSError, match="expected a regular file") as caught:
        _C.probe_read_method(tmp_path)
    assert caught.value.errno == errno.EINVAL

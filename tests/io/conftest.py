from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pymerge import _C


@pytest.fixture
def disk_path(tmp_path: Path) -> Path:
    """A folder whose files are not in memory, for tests of the page cache."""
    name = _C.filesystem(tmp_path)
    if name in ("tmpfs", "ramfs"):
        pytest.skip(f"the temporary folder is on {name}, which is the page cache itself")
    return tmp_path


@pytest.fixture
def random_file(tmp_path: Path) -> Callable[[int], tuple[Path, bytes]]:
    """Makes files of random bytes that are on the device: path and content."""

    def make(num_bytes: int, name: str = "source") -> tuple[Path, bytes]:
        content = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, np.uint8).tobytes()
        path = tmp_path / name
        path.write_bytes(content)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        return path, content

    return make


@pytest.fixture(autouse=True)
def _no_descriptor_leaks() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    leaked = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in set(os.listdir("/proc/self/fd")) - before
        if os.path.lexists(f"/proc/self/fd/{fd}")
    }
    assert not {name for name in leaked if name.startswith("/") and "/pytest-" in name}


@pytest.fixture
def drop_from_cache() -> Callable[[Path], None]:
    """Empties the page cache of one file."""

    def drop(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    return drop

"""The ways around what older kernels and other filesystems lack.

A small library loaded before the C library refuses the newer calls, as such a kernel would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from pymerge import _C

SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

static int refused(const char* name) {
    const char* names = getenv("REFUSED");
    if (names == NULL || strstr(names, name) == NULL) return 0;
    errno = strcmp(name, "fallocate") == 0 ? EOPNOTSUPP : ENOSYS;
    return 1;
}

long syscall(long number, ...) {
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; ++i) a[i] = va_arg(list, long);
    va_end(list);
    if ((number == SYS_preadv2 || number == SYS_pwritev2) && refused("dontcache")) return -1;
    if (number == SYS_statx && refused("statx")) return -1;
    if (number == 451 && refused("cachestat")) return -1;
    static long (*next)(long, ...);
    if (next == NULL) next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int fallocate(int fd, int mode, off_t offset, off_t num_bytes) {
    if (refused("fallocate")) return -1;
    static int (*next)(int, int, off_t, off_t);
    if (next == NULL) next = (int (*)(int, int, off_t, off_t))dlsym(RTLD_NEXT, "fallocate");
    return next(fd, mode, offset, num_bytes);
}
"""

PRELUDE = """
import os, sys
import numpy as np
from pymerge import _C

path = sys.argv[1]
content = np.random.default_rng(1).integers(0, 256, (4 << 20) + 99, np.uint8)

def drop(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)

def read(method):
    source = _C.SourceFile(path, method)
    arena = _C.Arena(content.size + 8192)
    for offset in (0, 1, 5000):
        length = content.size - offset
        begin = source.read(offset, length, arena.address, arena.num_bytes) - arena.address
        assert (np.frombuffer(arena, np.uint8)[begin : begin + length] == content[offset:]).all()
    source.close()
    return source.method

content.tofile(path)
drop(path)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a stand-in for an older kernel")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", "shim.so", "shim.c", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "shim.so"


def run(shim: Path, refused: str, path: Path, script: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(path)],
        env={**os.environ, "LD_PRELOAD": str(shim), "REFUSED": refused},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("refused", ["dontcache", "dontcache,statx,cachestat"])
def test_the_ladder_below_dontcache(disk_path: Path, shim: Path, refused: str) -> None:
    run(
        shim,
        refused,
        disk_path / "source",
        """
        method, reason = _C.probe_read_method(path)
        assert "no RWF_DONTCACHE" in reason, reason
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            assert method == "buffered", (method, reason)
        else:
            assert method == "direct", (method, reason)
        assert read(method) == method
        assert _C.cached_fraction(path) < 0.02
        open(path, "rb").read()
        method, reason = _C.probe_read_method(path)
        assert method == "buffered", (method, reason)
        assert "already in the page cache" in reason or "O_DIRECT" in reason, reason
        assert read(method) == method
        assert _C.cached_fraction(path) == 1.0
        """,
    )


def test_a_refused_method_falls_back_to_plain_reads(tmp_path: Path, shim: Path) -> None:
    run(shim, "dontcache", tmp_path / "source", 'assert read("dontcache") == "plain"')


def test_cached_fraction_by_mincore(disk_path: Path, shim: Path) -> None:
    run(
        shim,
        "cachestat",
        disk_path / "source",
        """
        assert _C.cached_fraction(path) == 0.0
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(fd, 1 << 20, 1 << 20)
        assert 0.2 < _C.cached_fraction(path) < 0.3
        open(path, "rb").read()
        assert _C.cached_fraction(path) == 1.0
        """,
    )


@pytest.mark.parametrize("refused", ["", "dontcache", "dontcache,fallocate"])
def test_shards(disk_path: Path, shim: Path, refused: str) -> None:
    run(
        shim,
        refused,
        disk_path / "source",
        f"""
        target = path + "-copy"
        for drop_cache in (False, True):
            shard = _C.ShardFile(target, content.size, drop_cache)
            assert shard.preallocated == ({refused!r}.find("fallocate") < 0)
            assert os.stat(target).st_size == content.size
            step = 999_999
            for at in range(0, content.size, step):
                length = min(step, content.size - at)
                shard.write(at, content.ctypes.data + at, length)
            shard.sync()
            if drop_cache and "dontcache" in {refused!r}:
                assert _C.cached_fraction(target) < 0.05
            shard.close()
            assert (np.fromfile(target, np.uint8) == content).all()
            resumed = _C.ShardFile(target, content.size, drop_cache, resume=True)
            resumed.close()
            assert (np.fromfile(target, np.uint8) == content).all()
        """,
    )


def test_files_in_memory_take_the_same_ways() -> None:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or _C.filesystem(shm) != "tmpfs":
        pytest.skip("there is no writable tmpfs at /dev/shm")
    path = shm / f"pymerge-test-shard-{os.getpid()}"
    content = np.random.default_rng(2).integers(0, 256, 100_001, np.uint8)
    try:
        shard = _C.ShardFile(path, content.size, drop_cache=True)
        shard.write(0, content.ctypes.data, content.size)
        shard.sync()
        shard.close()
        arena = _C.Arena(content.size + 8192)
        source = _C.SourceFile(path, "dontcache")
        assert source.read(0, content.size, arena.address, arena.num_bytes) == arena.address
        source.close()
    finally:
        path.unlink(missing_ok=True)
    assert (np.frombuffer(arena, np.uint8)[: content.size] == content).all()

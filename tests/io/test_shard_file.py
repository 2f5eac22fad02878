from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pymerge import _C

MIB = 1 << 20

both_cache_modes = pytest.mark.parametrize("drop_cache", [False, True])


def random_bytes(num_bytes: int) -> np.ndarray:
    return np.random.default_rng(num_bytes).integers(0, 256, num_bytes, np.uint8)


@both_cache_modes
def test_pieces_of_any_size_in_any_order(tmp_path: Path, drop_cache: bool) -> None:
    data = random_bytes(40 * MIB + 123)
    shard = _C.ShardFile(tmp_path / "shard", data.size, drop_cache)
    assert (shard.num_bytes, shard.path) == (data.size, tmp_path / "shard")
    cuts = [0, 1, 4095, 4096, 10_000, MIB + 1, 9 * MIB, 30 * MIB + 7, data.size]
    pieces = list(itertools.pairwise(cuts))
    for begin, end in pieces[::-1]:
        shard.write(begin, data.ctypes.data + begin, end - begin)
    shard.sync()
    shard.close()
    assert (tmp_path / "shard").read_bytes() == data.tobytes()


@both_cache_modes
def test_many_threads_one_shard(tmp_path: Path, drop_cache: bool) -> None:
    data = random_bytes(24 * MIB + 5)
    shard = _C.ShardFile(tmp_path / "shard", data.size, drop_cache)
    step = 700_001
    with ThreadPoolExecutor(4) as pool:
        for result in [
            pool.submit(shard.write, at, data.ctypes.data + at, min(step, data.size - at))
            for at in range(0, data.size, step)
        ]:
            result.result()
    shard.sync()
    shard.close()
    assert (tmp_path / "shard").read_bytes() == data.tobytes()


def test_the_file_has_its_length_and_blocks_at_once(tmp_path: Path) -> None:
    shard = _C.ShardFile(tmp_path / "shard", 8 * MIB + 1)
    info = (tmp_path / "shard").stat()
    assert info.st_size == 8 * MIB + 1
    if shard.preallocated:
        assert info.st_blocks * 512 >= 8 * MIB + 1
    shard.close()
    assert not any((tmp_path / "shard").read_bytes())


def test_an_empty_shard(tmp_path: Path) -> None:
    shard = _C.ShardFile(tmp_path / "shard", 0)
    shard.write(0, 0, 0)
    shard.sync()
    shard.close()
    assert (tmp_path / "shard").stat().st_size == 0


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o000])
def test_the_mode_follows_the_umask(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        _C.ShardFile(tmp_path / "shard", 10).close()
    finally:
        os.umask(previous)
    assert (tmp_path / "shard").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_new_shard_empties_an_old_file(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"x" * 10_000)
    _C.ShardFile(tmp_path / "shard", 5_000).close()
    assert (tmp_path / "shard").read_bytes() == bytes(5_000)


@both_cache_modes
def test_resume_changes_only_what_is_written(tmp_path: Path, drop_cache: bool) -> None:
    old, new = random_bytes(100_000), random_bytes(1_000)
    (tmp_path / "shard").write_bytes(old.tobytes())
    shard = _C.ShardFile(tmp_path / "shard", 100_000, drop_cache, resume=True)
    shard.write(50_000, new.ctypes.data, new.size)
    shard.sync()
    shard.close()
    old[50_000:51_000] = new
    assert (tmp_path / "shard").read_bytes() == old.tobytes()


@pytest.mark.parametrize("found", [0, 9_999, 10_001])
def test_resume_of_a_wrong_length_is_refused(tmp_path: Path, found: int) -> None:
    (tmp_path / "shard").write_bytes(b"x" * found)
    with pytest.raises(OSError, match=f"expected a file of 10000 bytes, found {found}") as caught:
        _C.ShardFile(tmp_path / "shard", 10_000, resume=True)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.filename == str(tmp_path / "shard")
    assert (tmp_path / "shard").read_bytes() == b"x" * found


def test_resume_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="opening to go on writing"):
        _C.ShardFile(tmp_path / "shard", 10, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_created(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="creating"):
        _C.ShardFile(tmp_path / "none" / "shard", 10)
    with pytest.raises(IsADirectoryError):
        _C.ShardFile(tmp_path, 10)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="creating"):
        _C.ShardFile(tmp_path / "pipe", 10)
    with pytest.raises(OSError, match="expected a regular file"):
        _C.ShardFile("/dev/null", 10)
    assert Path("/dev/null").exists()


def test_a_write_outside_is_refused(tmp_path: Path) -> None:
    data = random_bytes(100)
    shard = _C.ShardFile(tmp_path / "shard", 50)
    for offset, length in [(0, 51), (50, 1), (51, 0), (2**64 - 1, 2)]:
        with pytest.raises(ValueError, match=f"cannot write {length} bytes at offset {offset}"):
            shard.write(offset, data.ctypes.data, length)
    with pytest.raises(OSError, match="writing 10 bytes at offset 3") as caught:
        shard.write(3, 8, 10)
    assert caught.value.errno == errno.EFAULT
    shard.close()
    shard.close()
    for call in (lambda: shard.write(0, data.ctypes.data, 1), shard.sync):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert (tmp_path / "shard").read_bytes() == bytes(50)


def test_drop_leaves_nothing_in_the_cache(disk_path: Path) -> None:
    data = random_bytes(32 * MIB)
    fractions = {}
    for drop_cache in (False, True):
        path = disk_path / f"shard-{drop_cache}"
        shard = _C.ShardFile(path, data.size, drop_cache)
        for begin in range(0, data.size, MIB):
            shard.write(begin, data.ctypes.data + begin, MIB)
        shard.sync()
        shard.close()
        # The kernel frees pages shortly after their write-back has ended.
        deadline = time.monotonic() + 3
        while drop_cache and _C.cached_fraction(path) > 0.05 and time.monotonic() < deadline:
            time.sleep(0.05)
        fractions[drop_cache] = _C.cached_fraction(path)
    assert fractions[False] > 0.95
    assert fractions[True] < 0.05


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        _C.ShardFile(tmp_path / "shard", 100)
        with pytest.raises(OSError, match="cannot go on writing"):
            _C.ShardFile(tmp_path / "shard", 101, resume=True)
        with pytest.raises(OSError, match="creating"):
            _C.ShardFile(tmp_path / "none" / "shard", 100)
    assert len(os.listdir("/proc/self/fd")) == before


def run_on_small_disk(folder: Path, script: str) -> None:
    """Runs Python with an 8 MiB filesystem at ``folder``, in a mount namespace of its own."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare command to mount a small filesystem with")
    command = [unshare, "--mount"] if os.geteuid() == 0 else [unshare, "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    trial = subprocess.run([*command, *mount], capture_output=True, text=True, check=False)
    if trial.returncode != 0:
        pytest.skip(f"this process may not mount a filesystem: {trial.stderr.strip()}")
    body = (
        f"import subprocess; subprocess.run({mount!r}, check=True)\n"
        "import errno, os\nfrom pymerge import _C\n"
        f"folder = {str(folder)!r}\n" + textwrap.dedent(script)
    )
    result = subprocess.run(
        [*command, sys.executable, "-c", body], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_full_disk_is_told_at_creation_and_nothing_stays(tmp_path: Path) -> None:
    run_on_small_disk(
        tmp_path,
        """
        free = _C.free_bytes(folder)
        try:
            _C.ShardFile(folder + "/shard", 100 << 20)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            assert "reserving 104857600 bytes" in str(error), error
            assert "bytes are free" in str(error), error
            assert error.filename == folder + "/shard", error
        else:
            raise SystemExit("no error")
        assert os.listdir(folder) == [], os.listdir(folder)
        assert _C.free_bytes(folder) == free
        """,
    )


def test_a_full_disk_leaves_a_resumed_file_alone(tmp_path: Path) -> None:
    run_on_small_disk(
        tmp_path,
        """
        path = folder + "/shard"
        with open(path, "wb") as file:
            file.write(b"kept")
            file.truncate(100 << 20)
        try:
            _C.ShardFile(path, 100 << 20, resume=True)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
        else:
            raise SystemExit("no error")
        assert os.stat(path).st_size == 100 << 20
        assert open(path, "rb").read(4) == b"kept"
        """,
    )


def test_a_file_size_limit_is_an_error_and_nothing_stays(tmp_path: Path) -> None:
    script = f"""
import errno, resource
from pymerge import _C
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    _C.ShardFile({str(tmp_path / "shard")!r}, 2 << 20)
except OSError as error:
    assert error.errno == errno.EFBIG, error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert list(tmp_path.iterdir()) == []

"""No space and failing devices: an early error with numbers, nothing half done, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pymerge import _C, api
from pymerge.engine import context
from pymerge.engine import output as output_module
from pymerge.engine.journal import Journal
from pymerge.errors import StorageError
from pymerge.plan import memory

JOURNAL = ".pymerge-journal"
TMPFS_BYTES = 1 << 20


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_too_small_from_the_beginning(many: Any, tiny_disk: Path) -> None:
    plan = api.plan(many.recipe("linear"))
    begin = time.monotonic()
    with pytest.raises(StorageError, match="not enough space") as raised:
        api.merge(plan, tiny_disk / "out")
    assert time.monotonic() - begin < 1
    needed, free, missing = (
        int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", str(raised.value))[-3:]
    )
    assert plan.bytes_written <= needed <= plan.bytes_written * 1.01
    assert 0 < free <= TMPFS_BYTES
    assert missing == needed - free
    assert list(tiny_disk.iterdir()) == []


def test_the_command_exits_with_3(
    many: Any, tiny_disk: Path, tmp_path: Path, write_recipe: Any, command: Any
) -> None:
    recipe = write_recipe(tmp_path / "linear.yml", many.recipe("linear"))
    code, printed = command("merge", recipe, tiny_disk / "out")
    assert code == 3
    assert "are missing; free that much" in printed
    assert "Traceback" not in printed
    assert list(tiny_disk.iterdir()) == []


def test_a_folder_that_existed_stays(many: Any, tiny_disk: Path) -> None:
    (tiny_disk / "out").mkdir()
    (tiny_disk / "out" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="not enough space"):
        api.merge(many.recipe("linear"), tiny_disk / "out")
    assert [path.name for path in (tiny_disk / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("shard_size", ["1GB", "400KB"], ids=["single", "multi"])
def test_reservation_fails_although_space_looked_enough(
    many: Any, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str
) -> None:
    """With several shards the first ones fit."""
    monkeypatch.setattr(_C, "free_bytes", lambda path: 1 << 40)
    with pytest.raises(StorageError, match=r"no space left.*still to be written") as raised:
        api.merge(many.recipe("linear"), tiny_disk / "out", shard_size=shard_size)
    assert raised.value.exit_code == 3
    assert list(tiny_disk.iterdir()) == []


def test_resume_finds_the_space_it_holds(small: Any, tiny_disk: Path, digests: Any) -> None:
    """A disk that the unfinished output fills up is large enough to finish it."""
    plan = api.plan(small.recipe("linear"))
    with failing_write(3), pytest.raises(StorageError):
        api.merge(plan, tiny_disk / "out")
    filler = tiny_disk / "filler"
    beside = 12 * 4096  # room for the files beside the weights
    filler.write_bytes(bytes(_C.free_bytes(str(tiny_disk)) - beside))
    api.merge(plan, tiny_disk / "out")
    api.merge(plan, tiny_disk.parent / "whole")
    assert digests(tiny_disk / "out") == digests(tiny_disk.parent / "whole")


@contextmanager
def failing_write(nth: int) -> Iterator[None]:
    """While it lasts, the n-th write to a shard and all later ones find the disk full; there is a
    write for each tensor, or for ``nth`` 1 one for many."""
    left = [nth]

    class Shard(_C.ShardFile):  # type: ignore[misc]
        def write(self, offset: int, address: int, length: int) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            super().write(offset, address, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "ShardFile", Shard)
        if nth > 1:
            patch.setattr(context, "SMALL_BYTES", -1)
        yield


@pytest.mark.parametrize("method", ["linear", "ties", "passthrough"])
@pytest.mark.parametrize("nth", [1, 4, 9, 10])
def test_disk_filled_in_the_middle(
    small: Any, tmp_path: Path, digests: Any, method: str, nth: int
) -> None:
    """The tenth write is that of the shard's header."""
    plan = api.plan(small.recipe(method), threads=2)
    with failing_write(nth), pytest.raises(StorageError, match="no space left") as raised:
        api.merge(plan, tmp_path / "out")
    numbers = r"up to [\d,]+ bytes are still to be written, [\d,]+ are free"
    assert re.search(numbers, str(raised.value))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    report = api.merge(plan, tmp_path / "out")
    assert report.num_resumed >= nth - 4  # three other lanes may be a write ahead of their record
    api.merge(plan, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_failure_ends_the_reading(
    large: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor whose first tile fails is not streamed to its end."""
    monkeypatch.setattr(memory, "LARGEST_BLOCK", (16 << 10) + 8192)
    plan = api.plan(large.recipe("linear"), memory="128MiB", threads=1)
    num_tiles = plan.tiling.num_tiles(plan.jobs[0])
    writes = []

    class Shard(_C.ShardFile):  # type: ignore[misc]
        def write(self, *args: Any) -> None:
            writes.append(args)
            time.sleep(0.01)
            raise OSError(errno.EIO, "broken", str(self.path))

    monkeypatch.setattr(_C, "ShardFile", Shard)
    with pytest.raises(StorageError, match="broken"):
        api.merge(plan, tmp_path / "out")
    assert len(writes) < num_tiles


def test_journal_cannot_grow(
    small: Any, tmp_path: Path, digests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards are reserved, the journal is not: it meets the full disk first."""
    plan = api.plan(small.recipe("linear"), threads=2)
    real, left = os.write, [5]
    monkeypatch.setattr(context, "SMALL_BYTES", -1)  # a line for each tensor

    def write(fd: int, data: bytes) -> int:
        left[0] -= b'"tensor"' in data
        if left[0] > 0:
            return real(fd, data)
        if data.startswith(b"{"):
            return real(fd, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(StorageError, match="no space left"):
            api.merge(plan, tmp_path / "out")
    assert api.merge(plan, tmp_path / "out").num_resumed == 4
    api.merge(plan, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_journal_cannot_begin(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(StorageError, match="no space left"):
        api.merge(small.recipe("linear"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def failing_sync(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Path]]:
    """Arranges that the n-th sync fails, once, as the system reports a lost write."""

    def arrange(nth: int) -> list[Path]:
        synced: list[Path] = []

        class Shard(_C.ShardFile):  # type: ignore[misc]
            def sync(self) -> None:
                synced.append(self.path)
                if len(synced) == nth:
                    raise OSError(errno.EIO, "lost write", str(self.path))
                super().sync()

        monkeypatch.setattr(_C, "ShardFile", Shard)
        return synced

    return arrange


@pytest.mark.parametrize("nth", [1, 2, 3, 6])
def test_failed_sync_is_not_tried_again_and_not_trusted(
    small: Any,
    tmp_path: Path,
    digests: Any,
    failing_sync: Any,
    monkeypatch: pytest.MonkeyPatch,
    nth: int,
) -> None:
    """What was written since the last good sync may be lost, whatever the journal said before."""
    plan = api.plan(small.recipe("linear"), threads=1, shard_size="60KB")
    out = tmp_path / "out"
    monkeypatch.setattr(output_module, "SYNC_SECONDS", 0.0)
    synced = failing_sync(nth)
    with pytest.raises(StorageError, match="lost write"):
        api.merge(plan, out)
    assert len(synced) == nth
    monkeypatch.undo()
    entries = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    durable = max([entry["durable"] for entry in entries if "durable" in entry], default=0)
    trusted = [entry["tensor"] for entry in entries if "tensor" in entry][:durable]
    for job in plan.jobs:
        partial = out / (plan.shards[job.shard].file_name + ".partial")
        if job.name not in trusted and partial.exists():
            with open(partial, "r+b") as shard:
                shard.seek(job.offset)
                shard.write(b"\xee" * job.num_bytes)
    assert api.merge(plan, out).num_resumed == len(trusted)
    api.merge(plan, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_failed_sync_during_an_interruption(
    small: Any, tmp_path: Path, failing_sync: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, left = Journal.add, [3]

    def interrupting(self: Journal, *args: Any) -> None:
        add(self, *args)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    monkeypatch.setattr(Journal, "add", interrupting)
    failing_sync(1)
    with pytest.raises(StorageError, match="lost write"):
        api.merge(small.recipe("linear"), tmp_path / "out")


def test_shard_closed_while_another_lane_syncs(
    small: Any, tmp_path: Path, digests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow sync of every tensor, while other shards complete."""
    plan = api.plan(small.recipe("linear"), threads=2, shard_size="20KB")

    class Shard(_C.ShardFile):  # type: ignore[misc]
        def sync(self) -> None:
            time.sleep(0.002)
            super().sync()

    api.merge(plan, tmp_path / "whole")
    monkeypatch.setattr(_C, "ShardFile", Shard)
    monkeypatch.setattr(output_module, "SYNC_SECONDS", 0.0)
    for attempt in range(3):
        api.merge(plan, tmp_path / f"out{attempt}")
        assert digests(tmp_path / f"out{attempt}") == digests(tmp_path / "whole")


def refusing(*args: Any, **names: Any) -> Any:
    raise OSError(errno.EIO, "broken")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(_C, "free_bytes"), (os, "listdir"), (os, "fsync"), (_C, "fsync_directory")],
    ids=["free", "list", "journal", "folder"],
)
def test_folder_that_cannot_be_opened(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refusing)
        with pytest.raises(StorageError, match="broken"):
            api.merge(small.recipe("linear"), tmp_path / "out" / "below")
    assert not (tmp_path / "out").exists()


def test_old_output_that_cannot_be_removed(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.merge(small.recipe("linear"), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refusing)
        with pytest.raises(StorageError, match="broken"):
            api.merge(small.recipe("ties"), tmp_path / "out", overwrite=True)


def test_error_whose_handling_fails_too(
    small: Any, tmp_path: Path, failing_sync: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told is the first cause."""
    monkeypatch.setattr(Journal, "distrust", refusing)
    failing_sync(1)
    with pytest.raises(StorageError, match=r"lost write.*begin again with --overwrite"):
        api.merge(small.recipe("linear"), tmp_path / "out")
    free_bytes, asked = _C.free_bytes, []

    def first_only(path: str) -> int:
        asked.append(path)
        if len(asked) > 1:
            raise OSError(errno.EIO, "broken")
        return free_bytes(path)

    monkeypatch.setattr(_C, "free_bytes", first_only)
    with failing_write(2), pytest.raises(StorageError, match=r"no space left.*unknown are free"):
        api.merge(small.recipe("linear"), tmp_path / "full")
    assert len(asked) > 1


def test_bytes_lost_at_the_closing_of_a_shard(
    small: Any, tmp_path: Path, digests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cause is told, and what was not synced is not taken for written."""
    plan = api.plan(small.recipe("linear"), threads=1)
    monkeypatch.setattr(context, "SMALL_BYTES", -1)  # a write for each tensor
    left = [5]

    class Shard(_C.ShardFile):  # type: ignore[misc]
        def write(self, offset: int, address: int, length: int) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, "full")
            super().write(offset, address, length)

        def close(self) -> None:
            super().close()
            raise OSError(errno.EIO, "lost write")

    with monkeypatch.context() as patch:
        patch.setattr(_C, "ShardFile", Shard)
        with pytest.raises(StorageError, match="no space left"):
            api.merge(plan, tmp_path / "out")
    assert api.merge(plan, tmp_path / "out").num_resumed == 0
    api.merge(plan, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")

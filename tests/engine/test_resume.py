"""What a stopped merge leaves, what the next run makes of it, and which folders are refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pymerge import _C, api
from pymerge.engine import journal as journal_module
from pymerge.engine.journal import Journal, Record
from pymerge.errors import PlanError, StorageError

JOURNAL = ".pymerge-journal"
MIB = 1 << 20


def source_bytes(plan: Any, names: set[str]) -> int:
    return sum(job.source_bytes for job in plan.jobs if job.name in names)


def test_done_tensors_are_not_read_again(stopped: Any, digests: Any) -> None:
    plan, out, whole = stopped
    lines = map(json.loads, (out / JOURNAL).read_text().splitlines())
    done = {line["tensor"] for line in lines if "tensor" in line}
    report = api.merge(plan, out)
    assert report.num_resumed == 5
    assert report.bytes_read == source_bytes(plan, {job.name for job in plan.jobs} - done)
    assert digests(out) == whole


@pytest.mark.parametrize(
    ("damage", "resumed"),
    [
        (lambda text: text[:-20], 4),
        (lambda text: text + b'{"tensor":"model.norm.wei', 5),
        (lambda text: text + b'{"tensor":"model.norm.weight"}\n', 5),
        (lambda text: text + b"\0" * 4096, 5),
        (lambda text: text + b"[[7]]\n5\nnull\n", 5),
        (lambda text: text.replace(b"crc32c", b"\xff\xfe\0", 3), 0),
        (lambda text: b"\n".join([*text.split(b"\n")[:3], b"7", *text.split(b"\n")[3:]]), 2),
        (lambda text: text + b"[" * 100_000 + b"\n", 5),
    ],
    ids=["torn", "torn-extra", "no-crc", "zeros", "no-object", "binary", "middle", "deep"],
)
def test_damaged_journal(stopped: Any, digests: Any, damage: Any, resumed: int) -> None:
    plan, out, whole = stopped
    (out / JOURNAL).write_bytes(damage((out / JOURNAL).read_bytes()))
    assert api.merge(plan, out).num_resumed == resumed
    assert digests(out) == whole


@pytest.mark.parametrize("text", [b"", b"garbage\n", b"5\n", b'{"plan":', b"[]\n"])
def test_journal_without_an_opening(stopped: Any, digests: Any, text: bytes) -> None:
    plan, out, whole = stopped
    (out / JOURNAL).write_bytes(text)
    assert api.merge(plan, out).num_resumed == 0
    assert digests(out) == whole


def test_after_a_power_loss_only_durable_tensors_count(
    stopped: Any, digests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, whole = stopped
    lines = (out / JOURNAL).read_text().splitlines(keepends=True)
    tensors = [line for line in lines[1:] if "tensor" in line]
    (out / JOURNAL).write_text(
        lines[0] + "".join(tensors[:3]) + '{"durable":2}\n' + "".join(tensors[3:])
    )
    with open(out / "model.safetensors.partial", "r+b") as shard:
        for job in plan.jobs:  # what was not synced is gone
            if job.name not in {json.loads(line)["tensor"] for line in tensors[:2]}:
                shard.seek(job.offset)
                shard.write(b"\0" * job.num_bytes)
    monkeypatch.setattr(journal_module, "_boot_id", lambda: "another boot")
    assert api.merge(plan, out).num_resumed == 2
    assert digests(out) == whole


def test_resume_with_other_memory_and_threads(stopped: Any, small: Any, digests: Any) -> None:
    _, out, whole = stopped
    report = api.merge(small.recipe("ties"), out, memory="2GiB", threads=5)
    assert report.num_resumed == 5
    assert digests(out) == whole


def test_other_shard_size_is_another_merge(stopped: Any, small: Any, digests: Any) -> None:
    plan, out, whole = stopped
    with pytest.raises(PlanError, match=r"unfinished merge of another recipe.*--overwrite"):
        api.merge(small.recipe("ties"), out, shard_size="60KB")
    assert api.merge(plan, out).num_resumed == 5
    assert digests(out) == whole


def test_other_recipe_needs_overwrite(
    stopped: Any, small: Any, tmp_path: Path, digests: Any
) -> None:
    _, out, _ = stopped
    with pytest.raises(PlanError, match="unfinished merge of another recipe"):
        api.merge(small.recipe("linear"), out)
    api.merge(small.recipe("linear"), out, overwrite=True)
    api.merge(small.recipe("linear"), tmp_path / "fresh")
    assert digests(out) == digests(tmp_path / "fresh")


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def lengthen(path: Path) -> None:
    """One byte more, the modification time as before."""
    status = path.stat()
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" "
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rename_metadata(path: Path) -> None:
    """Another header of equal length and time."""
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"pt"', b'"np"', 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, lengthen, rename_metadata])
def test_changed_source_is_no_resume(
    stop_after: Any, copied: dict[str, Any], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    with stop_after(4):
        api.merge(copied, out)
    change(Path(copied["models"][1]["model"]) / "model-00002-of-00002.safetensors")
    with pytest.raises(PlanError, match="inputs that changed since"):
        api.merge(copied, out)
    assert api.merge(copied, out, overwrite=True).num_resumed == 0


def test_locked_by_another_process(stopped: Any, command: Any) -> None:
    plan, out, _ = stopped
    fd = os.open(out / JOURNAL, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(StorageError, match="another pymerge is writing"):
            api.merge(plan, out)
        with pytest.raises(StorageError, match="another pymerge is writing"):
            api.merge(plan, out, overwrite=True)
    finally:
        os.close(fd)
    assert api.merge(plan, out).num_resumed == 5


def test_lock_on_a_journal_that_was_replaced(tmp_path: Path) -> None:
    """Whoever waits with the old file open does not take a lock that nobody else sees."""
    first = Journal(tmp_path)
    old = os.open(tmp_path / JOURNAL, os.O_RDWR)
    first.begin("plan", {})
    fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free, and worth nothing
    with pytest.raises(StorageError, match="another pymerge"):
        Journal(tmp_path)
    first.close()
    second = Journal(tmp_path)
    assert second.read() == ("plan", {}, frozenset())
    second.close()
    os.close(old)


def test_journal_removed_while_another_run_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that opened the journal just before its owner finished sees a fresh folder."""
    first = Journal(tmp_path)
    first.begin("plan", {})
    real = fcntl.flock
    calls = []

    def finish_first(fd: int, operation: int) -> None:
        if not calls:
            calls.append(fd)
            first.remove()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    second = Journal(tmp_path)
    assert second.read() == (None, {}, frozenset())
    assert os.path.samestat(os.fstat(second._fd), (tmp_path / JOURNAL).stat())
    second.remove()


def test_missing_partial_is_computed_again(small: Any, tmp_path: Path, digests: Any) -> None:
    """The journal names tensors of a shard that somebody deleted."""
    plan = api.plan(small.recipe("linear"), shard_size="60KB")
    api.merge(plan, tmp_path / "whole")
    out = tmp_path / "out"

    shutil.copytree(tmp_path / "whole", out)
    (out / "model.safetensors.index.json").unlink()
    journal = Journal(out)
    records = {job.name: Record(0, 0) for job in plan.jobs}
    journal.begin(plan.hash, records)
    journal.close()
    lost = plan.shards[1]
    (out / lost.file_name).unlink()
    report = api.merge(plan, out)
    assert report.num_resumed == len(plan.jobs) - len(lost.tensors)
    found, whole = digests(out), digests(tmp_path / "whole")
    del found["pymerge_manifest.json"], whole["pymerge_manifest.json"]
    assert found == whole


def test_progress_of_a_resumed_merge_reaches_its_totals(stopped: Any) -> None:
    plan, out, _ = stopped
    shown: list[Any] = []
    api.merge(plan, out, progress=shown.append)
    last = shown[-1]
    assert last.bytes_read == last.bytes_read_total > 0
    assert last.bytes_written == last.bytes_written_total > 0
    assert last.tensors_done == last.tensors_total == len(plan.jobs)


def test_durable_tensors_stay_durable_over_a_resume(
    stop_after: Any, stopped: Any, digests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark does not fall with the journal that held it: a power loss after a resume."""
    plan, out, whole = stopped
    lines = (out / JOURNAL).read_text().splitlines(keepends=True)
    tensors = [line for line in lines[1:] if "tensor" in line]
    (out / JOURNAL).write_text(
        lines[0] + "".join(tensors[:3]) + '{"durable":3}\n' + "".join(tensors[3:])
    )
    durable = {json.loads(line)["tensor"] for line in tensors[:3]}
    with stop_after(6):
        api.merge(plan, out)
    journal = Journal(out)
    assert journal.read().durable == durable
    journal.close()
    monkeypatch.setattr(journal_module, "_boot_id", lambda: "another boot")
    assert api.merge(plan, out).num_resumed == 3
    assert digests(out) == whole


def test_durable_tensors_come_first_in_a_new_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    records = {name: Record(0, 0) for name in "abcd"}
    journal.begin("plan", records, {"b", "d"})
    journal.close()
    again = Journal(tmp_path)
    assert again.read() == ("plan", records, {"b", "d"})
    again.close()


def test_a_new_journal_is_on_the_device_before_it_replaces_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        calls.append(("fsync", os.fstat(fd).st_size))
        fsync(fd)

    def replaced(old: Path, new: Path) -> None:
        calls.append(("replace", os.stat(old).st_size))
        replace(old, new)

    journal = Journal(tmp_path)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    journal.begin("plan", {"a": Record(1, 0)})
    journal.remove()
    assert [name for name, _ in calls] == ["fsync", "replace"]
    assert calls[0][1] == calls[1][1] > 0


def test_shards_of_a_run_without_syncs_are_synced(
    unfinished_commit: Any, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = api.plan(small.recipe("linear"), threads=1, shard_size="60KB")
    out = tmp_path / "out"
    with unfinished_commit():
        api.merge(plan, out, sync=False)
    synced = []

    class Shard(_C.ShardFile):  # type: ignore[misc]
        def sync(self) -> None:
            synced.append(self.path)
            super().sync()

    monkeypatch.setattr(_C, "ShardFile", Shard)
    assert api.merge(plan, out).num_resumed == 9
    assert synced == [out / shard.file_name for shard in plan.shards]

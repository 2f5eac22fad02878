"""What a stopped merge leaves, what the next run makes of it, and which folders are refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pymerge import _C, api
from pymerge.engine import journal as journal_module
from pymerge.engine import make_manifest, run_plan
from pymerge.engine.journal import Journal, Record
from pymerge.engine.output import Output
from pymerge.errors import PlanError, StorageError

JOURNAL = ".pymerge-journal"
MIB = 1 << 20


class Unplugged(Exception):
    """The interruption of these tests."""


@contextmanager
def stop_after(num_tensors: int) -> Iterator[None]:
    """Let the merge inside fail once so many tensors are in the journal."""
    add, left = Journal.add, [num_tensors]

    def counted(self: Journal, name: str, record: Record) -> None:
        if left[0] == 0:
            raise Unplugged
        left[0] -= 1
        add(self, name, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", counted)
        with pytest.raises(Unplugged):
            yield


@pytest.fixture
def stopped(small: Any, tmp_path: Path, digests: Any) -> Any:
    """A merge stopped after five tensors: (plan, folder, digests of the whole)."""
    plan = api.plan(small.recipe("ties"), memory=160 * MIB, threads=1)
    api.merge(plan, tmp_path / "whole")
    with stop_after(5):
        api.merge(plan, tmp_path / "out")
    lines = (tmp_path / "out" / JOURNAL).read_text().splitlines()
    assert len([line for line in lines if "tensor" in line]) == 5
    return plan, tmp_path / "out", digests(tmp_path / "whole")


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


@pytest.fixture
def copied(small: Any, tmp_path: Path) -> dict[str, Any]:
    """A recipe over private copies of the models, which a test may change."""
    folders = []
    for path in (small.base, *small.tuned):
        shutil.copytree(path, tmp_path / "models" / path.name)
        folders.append(str(tmp_path / "models" / path.name))
    models = [{"model": folder, "parameters": {"weight": 1.0}} for folder in folders]
    return {"merge_method": "linear", "models": models}


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
    copied: dict[str, Any], tmp_path: Path, change: Callable[[Path], None]
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


def test_finished_model_is_refused(small: Any, tmp_path: Path, digests: Any) -> None:
    out = tmp_path / "out"
    api.merge(small.recipe("linear"), out)
    before = digests(out)
    with pytest.raises(PlanError, match=r"holds a model already .*--overwrite"):
        api.merge(small.recipe("ties"), out)
    with pytest.raises(PlanError, match=r"holds a model already .*--overwrite"):
        api.merge(small.recipe("linear"), out, shard_size="60KB")
    assert digests(out) == before


def test_finished_merge_is_left_as_it_is(small: Any, tmp_path: Path, digests: Any) -> None:
    out = tmp_path / "out"
    api.merge(small.recipe("linear"), out)
    before, times = digests(out), {path: path.stat().st_mtime_ns for path in out.iterdir()}
    report = api.merge(small.recipe("linear"), out)
    assert (report.bytes_read, report.bytes_written, report.num_resumed) == (0, 0, 9)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with open(out / "model.safetensors", "ab") as file:
        file.write(b"?")
    with pytest.raises(PlanError, match="holds a model already"):
        api.merge(small.recipe("linear"), out)
    api.merge(small.recipe("linear"), out, overwrite=True)
    assert digests(out) == before


def test_overwrite_removes_the_old_output_and_nothing_else(
    small: Any, tmp_path: Path, digests: Any
) -> None:
    out = tmp_path / "out"
    api.merge(small.recipe("linear"), out, shard_size="60KB")
    strangers = {
        "notes.txt": "mine",
        "training_args.bin": "mine",
        "adapter_model.safetensors": "mine",
        "download.partial": "mine",
        "checkpoints/model.safetensors": "mine",
    }
    for name, text in strangers.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    api.merge(small.recipe("task_arithmetic"), out, overwrite=True)
    api.merge(small.recipe("task_arithmetic"), tmp_path / "fresh")
    found = digests(out)
    for name, text in strangers.items():
        assert (out / name).read_text() == text
        del found[name]
    assert found == digests(tmp_path / "fresh")


def test_overwrite_removes_side_files_that_the_new_model_lacks(
    small: Any, tmp_path: Path, copied: dict[str, Any], digests: Any
) -> None:
    """A tokenizer of the previous model must not stay beside the weights of another."""
    out = tmp_path / "out"
    api.merge(small.recipe("linear"), out)
    assert (out / "tokenizer.json").exists()
    for entry in copied["models"]:
        (Path(entry["model"]) / "tokenizer.json").unlink()
    api.merge(copied, out, overwrite=True)
    assert not (out / "tokenizer.json").exists()
    assert not api.verify(out).problems


def test_overwrite_keeps_the_old_model_where_space_is_missing(
    small: Any, tmp_path: Path, digests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    api.merge(small.recipe("linear"), out)
    before = digests(out)
    monkeypatch.setattr(_C, "free_bytes", lambda path: 0)
    with pytest.raises(StorageError, match="are missing"):
        api.merge(
            {**small.recipe("linear"), "dtype": "float64"}, out, overwrite=True, shard_size="1GB"
        )
    assert digests(out) == before


def test_unfinished_merge_survives_an_overwrite_without_space(
    stopped: Any, small: Any, digests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, whole = stopped
    with monkeypatch.context() as patch:
        patch.setattr(_C, "free_bytes", lambda path: 0)
        with pytest.raises(StorageError, match="are missing"):
            api.merge({**small.recipe("linear"), "dtype": "float64"}, out, overwrite=True)
    assert api.merge(plan, out).num_resumed == 5
    assert digests(out) == whole


def test_output_over_an_input_is_refused(copied: dict[str, Any], digests: Any) -> None:
    folder = Path(copied["models"][0]["model"])
    before = digests(folder)
    for place in (folder, folder / ".." / folder.name):
        with pytest.raises(PlanError, match="holds the input model"):
            api.merge(copied, place, overwrite=True)
    assert digests(folder) == before


def test_output_over_an_input_named_by_its_file_is_refused(
    copied: dict[str, Any], tmp_path: Path, digests: Any
) -> None:
    """A bare weights file has no model folder, but lies in one."""
    folder = tmp_path / "bare"
    folder.mkdir()
    source = Path(copied["models"][0]["model"]) / "model-00001-of-00002.safetensors"
    shutil.copy(source, folder / "model.safetensors")
    recipe = {"merge_method": "linear", "models": [{"model": str(folder / "model.safetensors")}]}
    recipe["models"][0]["parameters"] = {"weight": 1.0}
    before = digests(folder)
    with pytest.raises(PlanError, match="holds the input model"):
        api.merge(recipe, folder, overwrite=True)
    assert digests(folder) == before


def test_output_over_the_target_of_linked_inputs_is_refused(
    copied: dict[str, Any], tmp_path: Path, digests: Any
) -> None:
    """As in a hub cache: the folder holds links, the bytes lie elsewhere."""
    real = Path(copied["models"][0]["model"])
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in real.iterdir():
        (linked / path.name).symlink_to(path)
    copied["models"][0]["model"] = str(linked)
    before = digests(real)
    with pytest.raises(PlanError, match="holds the input model"):
        api.merge(copied, real, overwrite=True)
    assert digests(real) == before


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


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model-final.safetensors", "config.json", "model.safetensors"]
)
def test_files_put_there_after_a_journal_without_records(
    small: Any, tmp_path: Path, digests: Any, name: str
) -> None:
    """A run that was killed before its first tensor gives no right to what came later."""
    out = tmp_path / "out"
    with stop_after(0):
        api.merge(small.recipe("linear"), out)
    (out / name).write_text("mine")
    before = digests(out)
    with pytest.raises(PlanError, match=rf"holds a model already \({name}\)"):
        api.merge(small.recipe("ties"), out)
    assert digests(out) == before
    with pytest.raises(PlanError, match=rf"holds a model already \({name}\)"):
        api.merge(small.recipe("linear"), out)
    assert (out / name).read_text() == "mine"


def test_partial_files_of_others_stay(small: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "pytorch_model.bin.partial").write_text("a download")
    api.merge(small.recipe("linear"), out)
    assert (out / "pytorch_model.bin.partial").read_text() == "a download"


def other_size(plan: Any, whole: Path, path: Path) -> None:
    path.write_text("mine")


def other_header(plan: Any, whole: Path, path: Path) -> None:
    content = bytearray((whole / "model.safetensors").read_bytes())
    content[9] ^= 1
    path.write_bytes(content)


def same_header(plan: Any, whole: Path, path: Path) -> None:
    """A model of the same shapes: the shard of this merge is still unfinished beside it."""
    shutil.copy(whole / "model.safetensors", path)


@pytest.mark.parametrize("num_tensors", [5, 9])
@pytest.mark.parametrize("put", [other_size, other_header, same_header])
def test_a_model_put_there_meanwhile_is_not_replaced(
    small: Any, tmp_path: Path, digests: Any, num_tensors: int, put: Callable[..., None]
) -> None:
    plan = api.plan(small.recipe("linear"), threads=1)
    whole, out = tmp_path / "whole", tmp_path / "out"
    api.merge(plan, whole)
    with stop_after(num_tensors) if num_tensors < 9 else unfinished_commit():
        api.merge(plan, out)
    put(plan, whole, out / "model.safetensors")
    before = digests(out)
    with pytest.raises(PlanError, match=r"files of another model \(model.safetensors\).*overwrite"):
        api.merge(plan, out)
    assert digests(out) == before
    assert api.merge(plan, out, overwrite=True).num_resumed == num_tensors
    assert digests(out) == digests(whole)


@contextmanager
def unfinished_commit() -> Iterator[None]:
    """Let the merge inside fail once all tensors are written."""

    def fail(self: Output, *args: Any) -> None:
        raise Unplugged

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "commit", fail)
        with pytest.raises(Unplugged):
            yield


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json"])
def test_other_files_put_there_meanwhile_are_told(stopped: Any, digests: Any, name: str) -> None:
    plan, out, whole = stopped
    (out / name).write_text("mine")
    with pytest.raises(PlanError, match=rf"files of another model \({name}\)"):
        api.merge(plan, out)
    assert (out / name).read_text() == "mine"
    (out / name).unlink()
    assert api.merge(plan, out).num_resumed == 5
    assert digests(out) == whole


def test_durable_tensors_stay_durable_over_a_resume(
    stopped: Any, digests: Any, monkeypatch: pytest.MonkeyPatch
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
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"], ids=["single", "multi"])
def test_every_name_is_durable_before_the_commit_mark(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str
) -> None:
    """New folders in their parents, sub-folders, and the files beside the weights."""
    plan = api.plan(small.recipe("linear"), threads=1, shard_size=shard_size)
    out = tmp_path / "new" / "folders" / "out"
    calls: list[tuple[str, Path]] = []
    sync_folder, replace = _C.fsync_directory, os.replace

    def synced(path: str) -> None:
        calls.append(("sync", Path(path)))
        sync_folder(path)

    def replaced(old: Path, new: Path) -> None:
        calls.append(("replace", Path(new)))
        replace(old, new)

    monkeypatch.setattr(_C, "fsync_directory", synced)
    monkeypatch.setattr(os, "replace", replaced)
    files = {"config.json": b"{}", "1_Pooling/config.json": b"{}"}
    run_plan(
        plan,
        out,
        side_files=files,
        make_manifest=lambda output: make_manifest(plan, output.records, files),
    )
    parents = [tmp_path, tmp_path / "new", tmp_path / "new" / "folders"]
    assert calls[:3] == [("sync", parent) for parent in parents]
    mark = "model.safetensors" if len(plan.shards) == 1 else "model.safetensors.index.json"
    committed = calls.index(("replace", out / mark))
    for name in (*files, "pymerge_manifest.json"):
        written = calls.index(("replace", out / name))
        assert ("sync", (out / name).parent) in calls[written:committed], name
        assert ("sync", out) in calls[written:committed], name
    assert ("sync", out) in calls[committed:]


def test_changed_side_file_of_a_donor_is_another_output(
    small: Any, tmp_path: Path, copied: dict[str, Any]
) -> None:
    """The weights would be the same, the tokenizer not; its length does not tell."""
    out = tmp_path / "out"
    api.merge(copied, out)
    assert api.merge(copied, out).done_before
    for entry in copied["models"]:
        path = Path(entry["model"]) / "tokenizer.json"
        path.write_text(path.read_text().replace('"of"', '"by"'))
    with pytest.raises(PlanError, match="holds a model already"):
        api.merge(copied, out)
    api.merge(copied, out, overwrite=True)
    assert '"by"' in (out / "tokenizer.json").read_text()
    (out / "README.md").write_text((out / "README.md").read_text().swapcase())
    with pytest.raises(PlanError, match="holds a model already"):
        api.merge(copied, out)


def test_overwrite_continues_and_removes_a_model_put_there_meanwhile(
    small: Any, tmp_path: Path, digests: Any
) -> None:
    """A loader would take the single file for the model, not the shards."""
    plan = api.plan(small.recipe("linear"), threads=1, shard_size="60KB")
    whole, out = tmp_path / "whole", tmp_path / "out"
    api.merge(plan, whole)
    with stop_after(5):
        api.merge(plan, out)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (out / name).write_text("another model")
    assert api.merge(plan, out, overwrite=True).num_resumed == 5
    assert digests(out) == digests(whole)

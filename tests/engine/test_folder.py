"""What lies in an output folder, whose it is, and when it may be replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pymerge import _C, api
from pymerge.engine import run_plan
from pymerge.errors import PlanError, StorageError

JOURNAL = ".pymerge-journal"
MIB = 1 << 20


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


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model-final.safetensors", "config.json", "model.safetensors"]
)
def test_files_put_there_after_a_journal_without_records(
    stop_after: Any, small: Any, tmp_path: Path, digests: Any, name: str
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
    unfinished_commit: Any,
    stop_after: Any,
    small: Any,
    tmp_path: Path,
    digests: Any,
    num_tensors: int,
    put: Callable[..., None],
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
    run_plan(plan, out, side_files=files)
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
    stop_after: Any, small: Any, tmp_path: Path, digests: Any
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

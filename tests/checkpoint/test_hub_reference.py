"""Hub models: what is asked of the hub client, and what is said when it has nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest

from pymerge.checkpoint import open_checkpoint
from pymerge.errors import CheckpointError


@pytest.fixture
def calls(monkeypatch):
    """Replaces the hub client; answers[cached_only] is a folder or an exception."""
    seen = []

    class Client:
        answers: ClassVar[dict[bool, Path | Exception]] = {}

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns, local_files_only):
        seen.append((repo_id, revision, local_files_only, tuple(allow_patterns)))
        answer = Client.answers[local_files_only]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    Client.seen = seen
    return Client


@pytest.fixture
def snapshot(save, packed_tensors):
    return save("snapshot/model.safetensors", packed_tensors({"a": ("U8", [1])})).parent


def test_the_cache_answers_without_network(calls, snapshot):
    calls.answers = {True: snapshot}
    checkpoint = open_checkpoint("owner/name@v1")
    assert [call[:3] for call in calls.seen] == [("owner/name", "v1", True)]
    assert checkpoint.hub_id == checkpoint.reference == "owner/name@v1"
    assert checkpoint.folder == snapshot


def test_an_incomplete_cache_leads_to_the_network(calls, snapshot, save):
    cached = save("cached/config.json", {}).parent
    save("cached/model.safetensors.index.json", {"weight_map": {"a": "model-1.safetensors"}})
    calls.answers = {True: cached, False: snapshot}
    assert open_checkpoint("gpt2").folder == snapshot
    assert [call[:3] for call in calls.seen] == [("gpt2", None, True), ("gpt2", None, False)]
    assert {"*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"} <= set(calls.seen[0][3])
    assert "*.bin" not in calls.seen[0][3]


def test_says_why_neither_worked(calls):
    calls.answers = {
        True: FileNotFoundError("not cached"),
        False: OSError("no route to host\nmore"),
    }
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("owner/name")
    for word in (
        "'owner/name'",
        "no such path",
        "not there",
        "no route to host",
        "HF_HUB_OFFLINE",
    ):
        assert word in str(caught.value)


def test_pickles_are_asked_for_only_when_allowed(calls, save):
    folder = save("bare/config.json", {}).parent
    calls.answers = {True: folder, False: folder}
    with pytest.raises(CheckpointError, match="no complete weights"):
        open_checkpoint("owner/name", allow_pickle=True)
    assert ["*.bin" in call[3] for call in calls.seen] == [False, True, False, True]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("owner/base+owner/adapter+owner/other", ["several '+'", "lora: {path"]),
        ("./nowhere", ["no such path"]),
        ("/nowhere/at/all", ["no such path"]),
        ("a/b/c", ["cannot be a hub id"]),
        ("owner/model.safetensors", ["cannot be a hub id"]),
        ("", ["hub id"]),
        ("a\0b", ["hub id"]),
        ("owner/name@", ["revision"]),
        ("owner/" + "x" * 5000 + "/y", ["hub id"]),
    ],
)
def test_what_can_be_no_hub_id_asks_nobody(calls, reference, words):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(reference)
    assert not calls.seen
    for word in words:
        assert word in str(caught.value)


def test_a_local_path_has_no_revision(calls, snapshot):
    with pytest.raises(CheckpointError, match="local path, which has no revisions"):
        open_checkpoint(f"{snapshot}@main")
    assert not calls.seen


def test_a_real_cache_offline(tmp_path, monkeypatch, packed_tensors):
    folder = tmp_path / "models--owner--name"
    files = folder / "snapshots" / ("0" * 40)
    files.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    blob = folder / "blob"
    blob.write_bytes(packed_tensors({"a": ("F32", [2])}))
    (files / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert list(open_checkpoint("owner/name").tensors) == ["a"]
    with pytest.raises(CheckpointError, match="neither"):
        open_checkpoint("owner/other")

"""What arrives at a hub is the folder, byte by byte; the hub is a program of this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fake_hub import FORBIDDEN, TOKEN, FakeHub

import pymerge
from pymerge.checkpoint import push as push_module
from pymerge.errors import CheckpointError


@pytest.fixture
def hub():
    with FakeHub() as server:
        yield server


@pytest.fixture(scope="module")
def merged(tiny_models, tmp_path_factory) -> Path:
    """A merge in two shards."""
    out = tmp_path_factory.mktemp("push") / "out"
    models = [{"model": str(tiny_models / n)} for n in ("llama", "llama-finance")]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}
    pymerge.merge(recipe, out, shard_size=1500)
    assert len(list(out.glob("*.safetensors"))) > 1
    return out


@pytest.fixture
def folder(merged, tmp_path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "out"))


@pytest.fixture
def push(run_pymerge, tmp_path, hub):
    """Runs the command against the hub of this test; the client's own protocol is left out, which
    would need a storage server, too."""

    def run(*args, **env):
        home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", **home, **env}
        return run_pymerge("push", *map(str, args), cwd=tmp_path, env=env)

    return run


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_byte_arrives(folder, push, hub):
    done = push(folder, "me/merged")
    assert done.returncode == 0, done.stderr
    ((repo, revision, query, header, files),) = hub.commits
    assert (repo, revision, query) == ("me/merged", "main", {})
    assert files == contents(folder)
    assert max(map(len, files.values())) > 3000  # one came in parts
    assert header["summary"] == "Upload a model merged by pymerge"
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "merged")
    assert not {"private", "visibility"} & created.keys()
    assert f"{hub.url}/me/merged/commit/1" in done.stdout


def test_what_does_not_belong_stays(folder, push, hub):
    whole = contents(folder)
    (folder / ".pymerge-journal.old").write_text("journal")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "note").write_text("hidden")
    (folder / "LICENSE").write_text("added by its owner")
    (folder / "README.md").write_text("a card that was written by hand")
    done = push(folder, "me/merged", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    edited = {"LICENSE": b"added by its owner", "README.md": b"a card that was written by hand"}
    assert hub.commits[0][4] == whole | edited


def test_options(folder, push, hub):
    done = push(folder, "me/merged", "--private", "--branch", "try", "--message", "One more")
    assert done.returncode == 0, done.stderr
    assert hub.branches == [("me/merged", "try")]
    repo, revision, _, header, _ = hub.commits[0]
    assert (repo, revision, header["summary"]) == ("me/merged", "try", "One more")
    (created,) = hub.created
    assert created.get("private") is True or created.get("visibility") == "private"


def test_a_pull_request(folder, push, hub):
    done = push(folder, "me/merged", "--create-pr")
    assert done.returncode == 0, done.stderr
    assert hub.commits[0][2] == {"create_pr": ["1"]}
    assert f"{hub.url}/me/merged/discussions/1" in done.stdout


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "partial", "stray", "config"])
def test_a_folder_that_is_not_whole_is_not_sent(folder, monkeypatch, damage):
    sent = []
    monkeypatch.setattr(push_module, "_upload", lambda *args: sent.append(args))
    shard = sorted(folder.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[:-8])
    elif damage == "missing":
        shard.unlink()
    elif damage == "partial":
        shard.rename(f"{shard}.partial")
    elif damage == "stray":
        (folder / "other.safetensors").write_bytes(data)
    else:
        (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not uploaded"):
        pymerge.push(folder, "me/merged")
    assert not sent


def test_a_folder_of_another_origin_is_not_sent(tmp_path, push, hub):
    (tmp_path / "other").mkdir()
    done = push(tmp_path / "other", "me/merged")
    assert done.returncode == 2
    assert "pymerge_manifest.json" in done.stderr
    assert hub.requests == []


@pytest.mark.parametrize(
    ("env", "repo", "code", "sentence"),
    [
        ({"HF_TOKEN": ""}, "me/merged", 2, "expected a token"),
        ({"HF_TOKEN": "hf_wrong"}, "me/merged", 2, "the token is not valid"),
        ({}, f"{FORBIDDEN}/merged", 2, "the token may not write there"),
        ({"HF_HUB_OFFLINE": "1"}, "me/merged", 2, "HF_HUB_OFFLINE is set"),
        ({}, "merged", 2, "expected owner/name"),
        ({}, "me/a b", 2, "expected owner/name"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "me/merged", 3, "check the network"),
    ],
)
def test_errors_are_sentences(folder, push, hub, env, repo, code, sentence):
    done = push(folder, repo, **env)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
    assert hub.commits == []


def test_a_card_that_the_hub_will_not_take(folder, push, hub):
    (folder / "README.md").write_text("---\ntags: [1, 2]\n---\n# Edited\n")
    done = push(folder, "me/merged")
    assert done.returncode == 2
    assert '"tags" must be a list of texts' in done.stderr
    assert hub.commits == []


def test_a_hub_that_fails(folder, push, hub):
    hub.broken = True
    done = push(folder, "me/merged")
    assert done.returncode == 3
    assert "answered 500" in done.stderr
    assert "Traceback" not in done.stderr

"""The manifest, and that verification finds every kind of damage it should."""

from __future__ import annotations

import hashlib
import json

import pytest

from pymerge._version import __version__
from pymerge.checkpoint import (
    MANIFEST_NAME,
    FileRecord,
    OutputTensor,
    index_json,
    manifest_json,
    open_checkpoint,
    plan_shards,
    read_manifest,
    verify_folder,
)
from pymerge.errors import CheckpointError
from pymerge.formats import FORMATS

pytest.importorskip("pymerge._C", reason="the extension is not built")


def slow_crc32c(data: bytes) -> int:
    """CRC-32C bit by bit from its polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


DATA = {"a": b"123456789", "b": bytes(range(256)) * 8, "none": b"", "c": b"\xff" * 100}


def test_the_slow_checksum_knows_the_published_answer():
    assert slow_crc32c(b"123456789") == 0xE3069283


def build(folder, recipe="merge: it"):
    folder.mkdir(parents=True, exist_ok=True)
    source = folder.parent / "input"
    source.mkdir(exist_ok=True)
    shards = plan_shards([OutputTensor(n, FORMATS["U8"], (len(d),)) for n, d in DATA.items()], 2060)
    assert len(shards) == 2
    for shard in shards:
        content = shard.header + b"".join(DATA[name] for name in shard.tensors)
        (folder / shard.file_name).write_bytes(content)
        (source / shard.file_name).write_bytes(content)
    files = {"config.json": b"{}", "1_Pooling/config.json": b"{}"}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_bytes(index_json(shards))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    text = manifest_json(
        recipe=recipe,
        method="linear",
        plan_hash="p",
        inputs=[open_checkpoint(str(source))],
        backends={"axpy_n": "cpu"},
        shards=shards,
        checksums={name: slow_crc32c(data) for name, data in DATA.items()},
        nonfinite={"b": 2, "a": 0},
        files={name: FileRecord.of_file(folder / name) for name in files},
    )
    (folder / MANIFEST_NAME).write_bytes(text)
    return shards


@pytest.fixture
def folder(tmp_path):
    build(tmp_path / "out")
    return tmp_path / "out"


def test_content(folder, tmp_path):
    content = json.loads((folder / MANIFEST_NAME).read_bytes())
    shard = "model-00001-of-00002.safetensors"
    assert content["schema"] == 1
    assert content["pymerge"] == __version__
    assert content["recipe"] == "merge: it"
    assert content["nonfinite"] == {"b": 2}
    assert content["backends"] == {"axpy_n": "cpu"}
    assert content["shards"][shard]["tensors"]["a"] == {"crc32c": "e3069283", "bytes": 9}
    raw = (tmp_path / "input" / shard).read_bytes()
    head = hashlib.sha256(raw[: 8 + int.from_bytes(raw[:8], "little")]).hexdigest()
    assert content["inputs"][0]["reference"] == str(tmp_path / "input")
    assert content["inputs"][0]["files"][0] == {
        "name": shard,
        "bytes": len(raw),
        "header_sha256": head,
    }
    assert content["files"]["config.json"] == {
        "bytes": 2,
        "sha256": hashlib.sha256(b"{}").hexdigest(),
    }


def test_same_merge_same_bytes(folder):
    first = (folder / MANIFEST_NAME).read_bytes()
    build(folder)
    assert (folder / MANIFEST_NAME).read_bytes() == first


def test_read_back(folder):
    manifest = read_manifest(folder)
    assert list(manifest.shards) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    tensors = {n: t for shard in manifest.shards.values() for n, t in shard.tensors.items()}
    assert tensors == {name: (slow_crc32c(data), len(data)) for name, data in DATA.items()}
    assert manifest.files["config.json"] == FileRecord.of_bytes(b"{}")


def test_a_whole_folder_verifies(folder):
    seen = []
    report = verify_folder(folder, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert report.problems == ()
    assert report.files_checked == 5
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert report.num_bytes == total - (folder / MANIFEST_NAME).stat().st_size
    assert seen[-1] == (report.num_bytes, report.num_bytes)
    assert seen == sorted(seen)


def test_every_flipped_payload_byte_is_found(folder):
    path = folder / "model-00001-of-00002.safetensors"
    content = path.read_bytes()
    for place in (len(content) - 1, len(content) - len(DATA["b"]), 4096):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        (problem,) = verify_folder(folder).problems
        assert "checksum" in problem
        assert path.name in problem


def damage_flip_padding(folder):
    path = folder / "model-00002-of-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"pt"', b'"pT"'))


def damage_cut(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_swap(folder):
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    first.write_bytes(second.read_bytes())


DAMAGE = {
    "header": (damage_flip_padding, ["header is not the one"]),
    "cut": (damage_cut, ["cut short"]),
    "other tensors": (damage_swap, ["'a'", "'c'", "bytes"]),
    "shard gone": (lambda f: (f / "model-00001-of-00002.safetensors").unlink(), ["found none"]),
    "index gone": (lambda f: (f / "model.safetensors.index.json").unlink(), ["index.json"]),
    "config changed": (
        lambda f: (f / "config.json").write_bytes(b"[]"),
        ["config.json", "content"],
    ),
    "config longer": (lambda f: (f / "config.json").write_bytes(b"{} "), ["expected 2 bytes", "3"]),
    "stray shard": (lambda f: (f / "old.safetensors").write_bytes(b""), ["old.safetensors"]),
    "partial": (lambda f: (f / "x.safetensors.partial").write_bytes(b""), ["unfinished"]),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_reported(folder, damage, words):
    damage(folder)
    report = verify_folder(folder)
    assert not report.ok
    text = "\n".join(report.problems)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(schema=2), "schema"),
        (lambda m: m.update(shards=[]), "shards"),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "in the folder"),
        (lambda m: m["files"]["config.json"].update(bytes="2"), "bytes"),
        (lambda m: m["files"]["config.json"].update(bytes=True), "bytes"),
        (lambda m: m["files"].update({"x": 3}), "an object"),
        (
            lambda m: next(iter(m["shards"].values()))["tensors"]["a"].update(crc32c="xyz"),
            "hexadecimal",
        ),
    ],
)
def test_malformed_manifest(folder, change, words):
    content = json.loads((folder / MANIFEST_NAME).read_bytes())
    change(content)
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        verify_folder(folder)


def test_no_manifest(tmp_path):
    with pytest.raises(CheckpointError, match="found none"):
        verify_folder(tmp_path)

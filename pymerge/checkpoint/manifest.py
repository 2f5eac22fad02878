"""pymerge_manifest.json: what was merged, how, and the checksums of every byte written.

The same merge gives the same manifest: it holds no times, no host and no path but the references
and the recipe as the user wrote them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pymerge._version import __version__
from pymerge.checkpoint.config import read_json_object
from pymerge.checkpoint.index import INDEX_NAME
from pymerge.checkpoint.layout import ShardLayout, index_json
from pymerge.checkpoint.paths import stays_inside
from pymerge.checkpoint.source import Checkpoint
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError

MANIFEST_NAME = "pymerge_manifest.json"
SCHEMA = 1
READ_BYTES = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file other than a shard."""

    num_bytes: int
    sha256: str

    @staticmethod
    def of_bytes(data: bytes) -> FileRecord:
        return FileRecord(len(data), hashlib.sha256(data).hexdigest())

    @staticmethod
    def of_file(path: Path) -> FileRecord:
        """Raises OSError."""
        digest, num_bytes = hashlib.sha256(), 0
        with path.open("rb") as file:
            while part := file.read(READ_BYTES):
                digest.update(part)
                num_bytes += len(part)
        return FileRecord(num_bytes, digest.hexdigest())


@dataclass(frozen=True)
class ShardRecord:
    """A shard: its size, the SHA-256 of its length and header, and name -> (CRC-32C, bytes)."""

    num_bytes: int
    header_sha256: str
    tensors: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Manifest:
    """What a merge wrote; ``content`` is the whole JSON object."""

    shards: dict[str, ShardRecord]
    files: dict[str, FileRecord]
    content: dict[str, Any]


def manifest_json(
    *,
    recipe: str,
    method: str,
    plan_hash: str,
    inputs: Sequence[Checkpoint],
    backends: Mapping[str, str],
    shards: Sequence[ShardLayout],
    checksums: Mapping[str, int],
    nonfinite: Mapping[str, int],
    files: Mapping[str, FileRecord],
    task_shards: Sequence[ShardLayout] = (),
    task_checksums: Mapping[str, int] = MappingProxyType({}),
) -> bytes:
    """The text of the manifest.

    ``backends`` maps ops to the backend that ran them, ``checksums`` tensors to the CRC-32C of
    their bytes, ``nonfinite`` tensors to the number of their non-finite elements (zeros are left
    out) and ``files`` the other files of the output, by their name below its folder; the index of
    several shards is added to them. ``task_shards`` are the shards beside the model's.
    """
    files = dict(files)
    if len(shards) > 1:
        files[INDEX_NAME] = FileRecord.of_bytes(index_json(shards))
    content = {
        "schema": SCHEMA,
        "pymerge": __version__,
        "recipe": recipe,
        "method": method,
        "plan": plan_hash,
        "inputs": [_input_record(checkpoint) for checkpoint in inputs],
        "backends": dict(backends),
        "shards": _shard_records(shards, checksums) | _shard_records(task_shards, task_checksums),
        "nonfinite": {name: count for name, count in nonfinite.items() if count},
        "files": {
            name: {"bytes": record.num_bytes, "sha256": record.sha256}
            for name, record in files.items()
        },
    }
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _shard_records(
    shards: Sequence[ShardLayout], checksums: Mapping[str, int]
) -> dict[str, object]:
    return {
        shard.file_name: {
            "bytes": shard.num_bytes,
            "header_sha256": hashlib.sha256(shard.header).hexdigest(),
            "tensors": {
                name: {"crc32c": f"{checksums[name]:08x}", "bytes": num_bytes}
                for name, (_, num_bytes) in shard.tensors.items()
            },
        }
        for shard in shards
    }


def _instead(folder: Path) -> str:
    """What there is where a manifest was expected, and what to do."""
    if not folder.exists():
        return "no such folder; check the path"
    if any(folder.glob("*.partial")):
        return "an unfinished merge; run the same merge again to continue it"
    return "none; the folder is not the output of a merge by pymerge"


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of an output folder. Raises CheckpointError where it is missing or malformed."""
    path = Path(folder) / MANIFEST_NAME
    if path.parent.is_file():
        raise CheckpointError(
            f"{folder}: expected a folder with {MANIFEST_NAME}, found a file; name the folder that "
            "a merge wrote (single files of weights have no manifest)"
        )
    content = read_json_object(path)
    if content is None:
        raise CheckpointError(f"{folder}: expected {MANIFEST_NAME}, found {_instead(path.parent)}")
    if content.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path}, field schema: expected {SCHEMA}, found {shown(content.get('schema'))}; "
            "verify it with the version of pymerge that wrote it"
        )
    shards, files = {}, {}
    for name, fields in _named_objects(path, content, "shards"):
        tensors = {}
        for tensor, record in _named_objects(path, fields, "tensors", inside=False):
            crc = _field(path, record, "crc32c", str)
            try:
                tensors[tensor] = (int(crc, 16), _field(path, record, "bytes", int))
            except ValueError:
                raise _malformed(path, "crc32c", "hexadecimal digits", crc) from None
        shards[name] = ShardRecord(
            _field(path, fields, "bytes", int), _field(path, fields, "header_sha256", str), tensors
        )
    for name, fields in _named_objects(path, content, "files"):
        files[name] = FileRecord(
            _field(path, fields, "bytes", int), _field(path, fields, "sha256", str)
        )
    return Manifest(shards, files, content)


def _input_record(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "reference": checkpoint.reference,
        "files": [
            {
                "name": header.path.name,
                "bytes": header.file_bytes,
                "header_sha256": header.sha256,
            }
            for header in checkpoint.headers
        ],
    }


def _named_objects(
    path: Path, content: Mapping[str, Any], key: str, *, inside: bool = True
) -> list[tuple[str, dict[str, Any]]]:
    """The members of an object of objects, whose names are file names where ``inside``."""
    members = _field(path, content, key, dict)
    for name, value in members.items():
        if not isinstance(value, dict):
            raise _malformed(path, f"{key}, {shown(name)}", "an object", value)
        if inside and not stays_inside(name):
            raise _malformed(path, key, "names of files in the folder", name)
    return list(members.items())


def _field(path: Path, content: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _malformed(path, key, f"a value of type {kind.__name__}", value)
    return value


def _malformed(path: Path, key: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"{path}, field {key}: expected {expected}, found {shown(found)}; "
        "the manifest was edited or damaged: copy the folder again"
    )

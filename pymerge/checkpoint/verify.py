"""Reading an output folder again and comparing every byte with its manifest, and the tensors, the
configuration and the tokenizer with one another."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pymerge.checkpoint.config import CONFIG_NAME, read_json_object
from pymerge.checkpoint.header import TensorEntry, read_header
from pymerge.checkpoint.manifest import FileRecord, Manifest, ShardRecord, read_manifest
from pymerge.checkpoint.strict_json import shown, shown_names
from pymerge.checkpoint.tokenizer import TOKENIZER_NAME, read_tokenizer
from pymerge.checkpoint.vocabulary import disagreements
from pymerge.errors import BackendError, CheckpointError

BUFFER_BYTES = 8 << 20

#: Called with the bytes checked so far and the bytes to check in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found; ``problems`` are sentences, empty where the folder is whole."""

    files_checked: int
    num_bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_folder(folder: Path | str, *, progress: Progress | None = None) -> VerifyReport:
    """Compare all files of a merge's output with its manifest.

    Beside that the size of the vocabulary that config.json gives must be that of the embedding and
    the head, and every id of tokenizer.json must have a row in them.

    Raises CheckpointError where there is no readable manifest; everything else that is wrong is a
    problem in the report.
    """
    folder = Path(folder)
    return _Verification(folder, read_manifest(folder), progress).run()


class _Verification:
    def __init__(self, folder: Path, manifest: Manifest, progress: Progress | None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.progress = progress
        self.problems: list[str] = []
        self.files_checked = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.bytes_done = 0
        self.bytes_total = sum(shard.num_bytes for shard in manifest.shards.values())
        self.bytes_total += sum(file.num_bytes for file in manifest.files.values())
        self.crc32c = _load_crc32c()
        self.buffer = np.empty(BUFFER_BYTES, dtype=np.uint8)

    def run(self) -> VerifyReport:
        for name, shard in self.manifest.shards.items():
            self._check(name, partial(self._check_shard, name, shard))
        for name, file in self.manifest.files.items():
            self._check(name, partial(self._check_file, name, file))
        self._check_unexpected()
        self._check_vocabulary()
        return VerifyReport(self.files_checked, self.bytes_done, tuple(self.problems))

    def _check(self, name: str, check: Callable[[], None]) -> None:
        if not (self.folder / name).is_file():
            self.problems.append(f"{name}: expected this file, found none; copy the folder again")
            return
        try:
            check()
        except CheckpointError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{name}: reading failed: {error.strerror}")
        self.files_checked += 1

    def _advance(self, num_bytes: int) -> None:
        self.bytes_done += num_bytes
        if self.progress is not None:
            self.progress(self.bytes_done, self.bytes_total)

    def _check_shard(self, name: str, record: ShardRecord) -> None:
        path = self.folder / name
        num_bytes = path.stat().st_size
        if num_bytes != record.num_bytes:
            self.problems.append(f"{name}: expected {record.num_bytes} bytes, found {num_bytes}")
        header = read_header(path)
        if header.sha256 != record.header_sha256:
            self.problems.append(f"{name}: the header is not the one that was written")
        self.shapes |= {entry.name: entry.shape for entry in header.tensors.values()}
        missing = sorted(record.tensors.keys() - header.tensors.keys())
        extra = sorted(header.tensors.keys() - record.tensors.keys())
        if missing:
            self.problems.append(f"{name}: expected tensor {shown_names(missing)}, found none")
        if extra:
            self.problems.append(
                f"{name}: found tensor {shown_names(extra)}, which was not written"
            )
        self._advance(header.file_bytes - sum(e.num_bytes for e in header.tensors.values()))
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for entry in header.tensors.values():
                if entry.name in record.tensors:
                    self._check_tensor(descriptor, name, entry, *record.tensors[entry.name])
        finally:
            os.close(descriptor)

    def _check_tensor(
        self, descriptor: int, name: str, entry: TensorEntry, crc: int, num_bytes: int
    ) -> None:
        where = f"{name}, tensor {shown(entry.name)}"
        if entry.num_bytes != num_bytes:
            self.problems.append(f"{where}: expected {num_bytes} bytes, found {entry.num_bytes}")
            return
        found, position, end = 0, entry.offset, entry.offset + num_bytes
        while position < end:
            part = self.buffer[: min(BUFFER_BYTES, end - position)].data
            count = os.preadv(descriptor, [part], position)
            if not count:
                self.problems.append(f"{where}: expected {end - position} more bytes, found none")
                return
            found = self.crc32c(self.buffer.ctypes.data, count, found)
            position += count
            self._advance(count)
        if found != crc:
            self.problems.append(
                f"{where}: expected checksum {crc:08x}, found {found:08x}; the data changed after "
                "it was written: copy the file again or repeat the merge"
            )

    def _check_file(self, name: str, record: FileRecord) -> None:
        found = FileRecord.of_file(self.folder / name)
        self._advance(found.num_bytes)
        if found.num_bytes != record.num_bytes:
            self.problems.append(
                f"{name}: expected {record.num_bytes} bytes, found {found.num_bytes}"
            )
        elif found.sha256 != record.sha256:
            self.problems.append(f"{name}: the content is not what was written")

    def _check_vocabulary(self) -> None:
        """Only tokenizer.json says for certain which tokens there are."""
        try:
            config = read_json_object(self.folder / CONFIG_NAME)
            document = read_json_object(self.folder / TOKENIZER_NAME)
            has_tokens = document is not None and "model" in document
            tokenizer = read_tokenizer(self.folder) if has_tokens else None
        except CheckpointError as error:
            self.problems.append(str(error))
            return
        self.problems += disagreements(self.shapes, config, tokenizer)

    def _check_unexpected(self) -> None:
        known = self.manifest.shards.keys() | self.manifest.files.keys()
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith(".partial"):
                self.problems.append(f"{path.name}: left over from an unfinished merge; remove it")
            elif path.suffix == ".safetensors" and path.name not in known:
                self.problems.append(
                    f"{path.name}: not part of this merge; a loader may read it, remove it"
                )


def _load_crc32c() -> Callable[[int, int, int], int]:
    try:
        extension = importlib.import_module("pymerge._C")
    except ImportError as error:
        raise BackendError(
            f"checksums: expected the compiled extension pymerge._C, found none ({error}); "
            "build it with 'make native'"
        ) from None
    checksum: Callable[[int, int, int], int] = extension.crc32c
    return checksum

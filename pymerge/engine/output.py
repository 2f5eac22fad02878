"""The output folder: preallocated shards written in place, and a commit that is all or nothing.

1. The folder is locked by its journal. An unfinished merge with the same plan is continued; a
   finished model is refused or, with ``overwrite``, removed once the space for the new one is known
   to be there.
2. Every shard is created as ``NAME.partial`` at its full length with its space reserved; the first
   eight bytes stay zero, which no reader accepts. No space: everything is removed and the error
   names the missing bytes.
3. Tensors are written in place and journalled when all their bytes are written; every few seconds
   the shards are synced and the journal marks what is durable.
4. A shard whose tensors are all written gets its header, a sync, then the eight length bytes, a
   sync. Where there are several shards it is renamed then: without the index no loader takes the
   folder for a model.
5. All shards complete: configuration, tokenizer, card and manifest, each by temporary file and
   rename; then the commit mark, which is the index or, for a single shard, its rename; then the
   journal is removed.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pymerge import _C
from pymerge.checkpoint import (
    INDEX_NAME,
    MANIFEST_NAME,
    FileRecord,
    ShardLayout,
    index_json,
    read_manifest,
)
from pymerge.engine.journal import Journal, Record
from pymerge.errors import CheckpointError, PlanError, StorageError
from pymerge.plan import Job, Plan

PARTIAL = ".partial"
SYNC_SECONDS = 10.0
SYNC_BYTES = 2 << 30
#: Weight files of any tool: a folder that holds one is somebody's model.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: What a loader would take for a part of the model of a folder, and an overwriting merge removes.
_MODEL_FILE = re.compile(r"(pytorch_)?model([-.].+)?\.(safetensors|bin)(\.index\.json)?")


class Output:
    """The output of one plan, open for writing."""

    def __init__(self, plan: Plan, folder: Path, *, overwrite: bool, sync: bool, drop_cache: bool):
        self.plan = plan
        self.folder = folder
        self.sync = sync
        self.records: dict[str, Record] = {}
        self._drop_cache = drop_cache
        self._created_folder = not folder.exists()
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._sync_failed = False
        self._unsynced = 0
        self._last_sync = time.monotonic()
        self._refuse_sources()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create the output folder {folder}: {error}") from error
        self._journal = Journal(folder)
        self._shards: list[_C.ShardFile | None] = [None] * len(plan.shards)
        try:
            self._open(overwrite)
        except BaseException:
            self.close()
            raise
        self.resumed = frozenset(self.records)
        self._left = [0] * len(plan.shards)
        for job in plan.jobs:
            self._left[job.shard] += job.name not in self.records

    def write(self, job: Job, first_byte: int, address: int, num_bytes: int) -> None:
        """Write bytes of a tensor to their final place.

        :raises StorageError: the device is full or failed; what was written so far can be resumed.
        """
        shard = self._shards[job.shard]
        if shard is None:
            raise RuntimeError(f"shard {job.shard} of tensor {job.name!r} is complete already")
        try:
            shard.write(job.offset + first_byte, address, num_bytes)
        except OSError as error:
            raise self._write_error(error) from error

    def finish(self, job: Job, record: Record) -> None:
        """Journal a tensor whose bytes are all written; complete its shard if it was the last.

        :raises StorageError: the device is full or failed; what was written so far can be resumed.
        """
        with self._lock:
            try:
                self._journal.add(job.name, record)
            except OSError as error:
                raise self._write_error(error) from error
            self.records[job.name] = record
            self._left[job.shard] -= 1
            last = self._left[job.shard] == 0
            self._unsynced += job.num_bytes
            now = time.monotonic()
            due = self._unsynced >= SYNC_BYTES or now - self._last_sync >= SYNC_SECONDS
            if due:
                self._unsynced, self._last_sync = 0, now
        if last:
            self._complete(job.shard)
        elif due:
            self.make_durable()

    def make_durable(self) -> None:
        """Sync the open shards, then mark the journal.

        :raises StorageError: the device failed; what was marked durable before can be resumed.
        """
        if not self.sync:
            return
        with self._syncing:
            if self._sync_failed:
                raise StorageError(f"writing to {self.folder} failed: an earlier sync failed")
            with self._lock:
                num_records = self._journal.num_records
                shards = [shard for shard in self._shards if shard is not None]
            try:
                for shard in shards:
                    shard.sync()
                with self._lock:
                    self._journal.mark_durable(num_records)
            except OSError as error:
                self._sync_failed = True
                self._journal.distrust()
                raise self._write_error(error) from error

    def complete_resumed(self) -> None:
        """Complete shards whose tensors were all written before the run was interrupted."""
        for number, left in enumerate(self._left):
            if left == 0 and self._shards[number] is not None:
                self._complete(number)

    def commit(self, files: Mapping[str, bytes], manifest: bytes) -> None:
        """Write everything beside the weights, then the commit mark."""
        try:
            for name, content in files.items():
                self._replace(name, content)
            self._replace(MANIFEST_NAME, manifest)
            if len(self.plan.shards) == 1:
                name = self.plan.shards[0].file_name
                if (self.folder / (name + PARTIAL)).exists():
                    os.replace(self.folder / (name + PARTIAL), self.folder / name)
            else:
                self._replace(INDEX_NAME, index_json(self.plan.shards))
            self._sync_folder()
            self._journal.remove()
            self._sync_folder()
        except OSError as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Release files and lock; an unfinished state stays resumable."""
        for number, shard in enumerate(self._shards):
            if shard is not None:
                shard.close()
                self._shards[number] = None
        self._journal.close()

    def _refuse_sources(self) -> None:
        here = self.folder.resolve()
        for reference, checkpoint in self.plan.checkpoints.items():
            folders = {header.path.parent.resolve() for header in checkpoint.headers}
            folders |= {header.path.resolve().parent for header in checkpoint.headers}
            if checkpoint.folder is not None:
                folders.add(checkpoint.folder.resolve())
            if here in folders:
                raise PlanError(
                    f"the output folder {self.folder} holds the input model {reference!r}; "
                    "choose another output folder"
                )

    def _refuse_model(self, overwrite: bool) -> None:
        found = sorted(
            name
            for name in os.listdir(self.folder)
            if name.endswith(_WEIGHTS) or name in (INDEX_NAME, "config.json", MANIFEST_NAME)
        )
        if found and not overwrite:
            raise PlanError(
                f"the output folder {self.folder} holds a model already ({', '.join(found[:3])}"
                f"{', …' if len(found) > 3 else ''}); choose another folder or give --overwrite"
            )

    def _open(self, overwrite: bool) -> None:
        plan_hash, records = self._journal.read()
        resumes = plan_hash == self.plan.hash
        if resumes:
            names = [job.name for job in self.plan.jobs if job.name in records]
            self.records = {name: records[name] for name in names}
        elif records and not overwrite:
            raise PlanError(
                f"{self.folder} holds an unfinished merge of another recipe or of inputs that "
                "changed since; finish it with its own recipe, or give --overwrite to discard it"
            )
        try:
            if plan_hash is None:
                self._refuse_model(overwrite)
            self._require_space(resumes)
        except (PlanError, StorageError):
            if plan_hash is None or (resumes and not self.records):
                self._abandon()
            raise
        if not resumes:
            self._discard()
        created = []
        try:
            for number, layout in enumerate(self.plan.shards):
                if self._is_complete(number):
                    continue
                path = self.folder / (layout.file_name + PARTIAL)
                resume = path.exists() and path.stat().st_size == layout.num_bytes
                if not resume:
                    for job in self.plan.jobs:
                        if job.shard == number:
                            self.records.pop(job.name, None)
                    created.append(path)
                self._shards[number] = _C.ShardFile(
                    str(path), layout.num_bytes, self._drop_cache, resume
                )
            self._journal.begin(self.plan.hash, self.records)
            self._sync_folder()
        except OSError as error:
            for path in created:
                path.unlink(missing_ok=True)
            failure = self._write_error(error)
            if not self.records:
                self._abandon()
            raise failure from error

    def _is_complete(self, number: int) -> bool:
        """Whether a shard was completed and renamed by the run that is being continued."""
        layout = self.plan.shards[number]
        path = self.folder / layout.file_name
        if not self.records or not path.exists() or path.stat().st_size != layout.num_bytes:
            return False
        return all(name in self.records for name in layout.tensors)

    def _require_space(self, resumes: bool) -> None:
        """:raises StorageError: less is free than the output and 1 % need."""
        if resumes:
            missing = sum(self._missing(layout) for layout in self.plan.shards)
        else:
            missing = self.plan.bytes_written - sum(map(_allocated, self._replaced()))
        free = _C.free_bytes(str(self.folder))
        needed = missing + missing // 100
        if needed > free:
            raise StorageError(
                f"not enough space in {self.folder}: the output needs {needed:,} bytes, {free:,} "
                f"are free, {needed - free:,} are missing; free that much or choose another folder"
            )

    def _missing(self, layout: ShardLayout) -> int:
        """Bytes of a shard that the device has not given yet."""
        path = self.folder / layout.file_name
        held = _allocated(path) + _allocated(path.with_name(path.name + PARTIAL))
        return max(0, layout.num_bytes - held)

    def _replaced(self) -> list[Path]:
        """The weights of a previous output, finished or not."""
        return [
            path
            for path in self.folder.iterdir()
            if path.is_file() and _MODEL_FILE.fullmatch(path.name.removesuffix(PARTIAL))
        ]

    def _discard(self) -> None:
        """Remove a previous output: its commit mark first, its list of files last."""
        (self.folder / INDEX_NAME).unlink(missing_ok=True)
        for path in self._replaced():
            path.unlink()
        for path in self._written_before():
            path.unlink()
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)

    def _written_before(self) -> list[Path]:
        """Files beside the weights that a previous merge wrote and nobody changed since."""
        try:
            files = read_manifest(self.folder).files
        except CheckpointError:
            return []
        paths = {self.folder / name: record for name, record in files.items()}
        return [
            path
            for path, record in paths.items()
            if path.is_file() and FileRecord.of_file(path) == record
        ]

    def _abandon(self) -> None:
        """Leave nothing behind of a run that could not begin."""
        for layout in self.plan.shards:
            (self.folder / (layout.file_name + PARTIAL)).unlink(missing_ok=True)
        self._journal.remove()
        if self._created_folder:
            try:
                self.folder.rmdir()
            except OSError:
                return  # somebody put a file there meanwhile: it is theirs

    def _complete(self, number: int) -> None:
        """Header, sync, length bytes, sync; rename where an index will be the commit mark."""
        shard, layout = self._shards[number], self.plan.shards[number]
        if shard is None:
            raise RuntimeError(f"shard {layout.file_name} is complete already")
        try:
            _write_bytes(shard, 8, layout.header[8:])
            self.make_durable()
            _write_bytes(shard, 0, layout.header[:8])
            self.make_durable()
            with self._syncing:
                with self._lock:
                    self._shards[number] = None
                shard.close()
            if len(self.plan.shards) > 1:
                path = self.folder / layout.file_name
                os.replace(f"{path}{PARTIAL}", path)
                self._sync_folder()
        except OSError as error:
            raise self._write_error(error) from error

    def _replace(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + PARTIAL)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            if self.sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)

    def _sync_folder(self) -> None:
        if self.sync:
            _C.fsync_directory(str(self.folder))

    def _write_error(self, error: OSError) -> StorageError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = _C.free_bytes(str(self.folder)) if self.folder.exists() else 0
            left = sum(job.num_bytes for job in self.plan.jobs if job.name not in self.records)
            return StorageError(
                f"no space left while writing to {self.folder}: up to {left:,} bytes are "
                "still to be "
                f"written, {free:,} are free ({error}); free space and run the same command "
                "to continue"
            )
        return StorageError(
            f"writing to {self.folder} failed: {error}; check the device, then run the same "
            "command to "
            "continue"
        )


def _allocated(path: Path) -> int:
    """Bytes of the device that a file holds; 0 where there is none."""
    return path.stat().st_blocks * 512 if path.exists() else 0


def _write_bytes(shard: _C.ShardFile, offset: int, data: bytes) -> None:
    array = np.frombuffer(data, np.uint8)
    shard.write(offset, array.ctypes.data, len(data))

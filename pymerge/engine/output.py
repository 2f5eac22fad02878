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
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pymerge import _C
from pymerge.checkpoint import INDEX_NAME, MANIFEST_NAME, index_json
from pymerge.engine.journal import NAME as JOURNAL_NAME
from pymerge.engine.journal import Journal, Record
from pymerge.errors import StorageError
from pymerge.plan import Job, Plan

PARTIAL = ".partial"
SYNC_SECONDS = 10.0
SYNC_BYTES = 2 << 30
#: Weight files of any tool: a folder that holds one is somebody's model.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


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
        self._unsynced = 0
        self._last_sync = time.monotonic()
        self._refuse_sources()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create the output folder {folder}: {error}") from error
        if not (folder / JOURNAL_NAME).exists():
            self._refuse_model(overwrite)
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
        """Journal a tensor whose bytes are all written; complete its shard if it was the last."""
        with self._lock:
            self._journal.add(job.name, record)
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
        """Sync the open shards, then mark the journal."""
        if not self.sync:
            return
        with self._lock:
            num_records = self._journal.num_records
            shards = [shard for shard in self._shards if shard is not None]
        try:
            for shard in shards:
                shard.sync()
            with self._lock:
                self._journal.mark_durable(num_records)
        except OSError as error:
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
            if checkpoint.folder is not None and checkpoint.folder.resolve() == here:
                raise StorageError(
                    f"the output folder {self.folder} is the input model {reference!r}; "
                    "choose another "
                    "output folder"
                )

    def _refuse_model(self, overwrite: bool) -> None:
        found = sorted(
            name
            for name in os.listdir(self.folder)
            if name.endswith(_WEIGHTS) or name in (INDEX_NAME, "config.json", MANIFEST_NAME)
        )
        if found and not overwrite:
            raise StorageError(
                f"the output folder {self.folder} holds a model already ({', '.join(found[:3])}"
                f"{', …' if len(found) > 3 else ''}); choose another folder or give --overwrite"
            )

    def _open(self, overwrite: bool) -> None:
        plan_hash, records = self._journal.read()
        if plan_hash == self.plan.hash:
            self.records = {
                job.name: records[job.name] for job in self.plan.jobs if job.name in records
            }
        elif plan_hash is not None and not overwrite:
            raise StorageError(
                f"{self.folder} holds an unfinished merge of another recipe or of inputs "
                "that changed "
                "since; finish it with its own recipe, or give --overwrite to discard it"
            )
        self._require_space()
        if plan_hash != self.plan.hash:
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
        except OSError as error:
            for path in created:
                path.unlink(missing_ok=True)
            if not self.records:
                self._abandon()
            raise self._write_error(error) from error

    def _is_complete(self, number: int) -> bool:
        """Whether a shard was completed and renamed by the run that is being continued."""
        layout = self.plan.shards[number]
        path = self.folder / layout.file_name
        if not self.records or not path.exists() or path.stat().st_size != layout.num_bytes:
            return False
        return all(name in self.records for name in layout.tensors)

    def _require_space(self) -> None:
        """:raises StorageError: less is free than the output and 1 % need."""
        missing = 0
        for layout in self.plan.shards:
            missing += layout.num_bytes
            for name in (layout.file_name, layout.file_name + PARTIAL):
                path = self.folder / name
                if path.exists():
                    missing -= min(layout.num_bytes, path.stat().st_blocks * 512)
        free = _C.free_bytes(str(self.folder)) + self._removable()
        needed = missing + missing // 100
        if needed > free:
            if not self.records:
                self._abandon()
            raise StorageError(
                f"not enough space in {self.folder}: the output needs {needed:,} bytes, "
                f"{free:,} are free, "
                f"{needed - free:,} are missing; free that much or choose another folder"
            )

    def _removable(self) -> int:
        """Bytes that an overwritten model gives back."""
        if self.records:
            return 0
        planned = {layout.file_name for layout in self.plan.shards}
        return sum(
            path.stat().st_blocks * 512
            for path in self.folder.iterdir()
            if path.name.endswith(_WEIGHTS) and path.name not in planned
        )

    def _discard(self) -> None:
        """Remove a previous output, its commit marks first."""
        for name in (INDEX_NAME, MANIFEST_NAME):
            (self.folder / name).unlink(missing_ok=True)
        for path in list(self.folder.iterdir()):
            if path.is_file() and path.name.endswith((*_WEIGHTS, PARTIAL)):
                path.unlink()

    def _abandon(self) -> None:
        """Leave nothing behind of a run that could not begin."""
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
            if self.sync:
                shard.sync()
            _write_bytes(shard, 0, layout.header[:8])
            self.make_durable()
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


def _write_bytes(shard: _C.ShardFile, offset: int, data: bytes) -> None:
    array = np.frombuffer(data, np.uint8)
    shard.write(offset, array.ctypes.data, len(data))

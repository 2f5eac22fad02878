"""The output folder: preallocated shards written in place, and a commit that is all or nothing.

1. The folder is locked by its journal. An unfinished merge with the same plan is continued; a
   finished model is refused or, with ``overwrite``, removed once the space for the new one is known
   to be there. Before anything is removed or created the journal is written anew, for this plan and
   with those tensors only that are still there.
2. Every shard is created as ``NAME.partial`` at its full length with its space reserved; the first
   eight bytes stay zero, which no reader accepts. No space: everything is removed and the error
   names the missing bytes.
3. Tensors are written in place and journalled when all their bytes are written; every few seconds
   the shards are synced and the journal marks what is durable.
4. A shard whose tensors are all written gets its header, a sync, then the eight length bytes, a
   sync. Where the model has several shards it is renamed then: without the index no loader takes
   the folder for a model. So are the shards of what stands beside a model, which no loader reads.
5. All shards complete: configuration, tokenizer, card and manifest, each by temporary file and
   rename, and a sync of their folders; then the commit mark, which is the index or, for a model of
   one shard, its rename; then the journal is removed.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from pymerge import _C
from pymerge.checkpoint import (
    INDEX_NAME,
    MANIFEST_NAME,
    ShardLayout,
    index_json,
)
from pymerge.engine.folder import Folder
from pymerge.engine.journal import Journal, Record
from pymerge.errors import PlanError, StorageError
from pymerge.plan import Job, Part, Plan

SYNC_SECONDS = 10.0
SYNC_BYTES = 2 << 30


class Output:
    """The output of one plan, open for writing."""

    def __init__(self, plan: Plan, folder: Path, *, overwrite: bool, sync: bool, drop_cache: bool):
        self.plan = plan
        self.folder = folder
        self.sync = sync
        self.records: dict[str, Record] = {}
        self._drop_cache = drop_cache
        self._place = Folder(folder, plan, sync=sync)
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._sync_failed = False
        self._unsynced = 0
        self._last_sync = time.monotonic()
        self._place.refuse_sources()
        try:
            self._place.make()
        except OSError as error:
            self._place.remove_made()
            raise StorageError(f"cannot create the output folder {folder}: {error}") from error
        self._journal = Journal(folder)
        self._shards: list[_C.ShardFile | None] = [None] * len(plan.shards)
        self._jobs_of_shards: list[list[str]] = [[] for _ in plan.shards]
        for job in plan.jobs:
            for shard in _shards_of(job):
                self._jobs_of_shards[shard].append(job.name)
        try:
            with self._storage_errors():
                self._open(overwrite)
        except BaseException:
            self.close()
            raise
        self.resumed = frozenset(self.records)
        self._pieces_left = Counter(
            job.tensor_name for job in plan.jobs if job.piece and job.name not in self.records
        )
        self._left = [
            sum(name not in self.records for name in names) for names in self._jobs_of_shards
        ]

    def write(self, place: Job | Part, first_byte: int, address: int, num_bytes: int) -> None:
        """Write bytes of a tensor to their final place.

        :raises StorageError: the device is full or failed; what was written so far can be resumed.
        """
        shard = self._shards[place.shard]
        if shard is None:
            raise RuntimeError(f"shard {place.shard} of tensor {place.name!r} is complete already")
        with self._storage_errors():
            shard.write(place.offset + first_byte, address, num_bytes)

    def finish(self, job: Job, record: Record) -> bool:
        """Journal a job whose bytes are all written; complete a shard if it was its last.

        :returns: whether that was all of a tensor.
        :raises StorageError: the device is full or failed; what was written so far can be resumed.
        """
        with self._lock:
            with self._storage_errors():
                self._journal.add(job.name, record)
            self.records[job.name] = record
            is_whole = job.piece is None or self._is_whole(job.piece.tensor)
            full = []
            for shard in _shards_of(job):
                self._left[shard] -= 1
                if self._left[shard] == 0:
                    full.append(shard)
            self._unsynced += job.output_bytes
            now = time.monotonic()
            due = self._unsynced >= SYNC_BYTES or now - self._last_sync >= SYNC_SECONDS
            if due:
                self._unsynced, self._last_sync = 0, now
        for shard in full:
            self._complete(shard)
        if due and not full:
            self.make_durable()
        return is_whole

    @contextmanager
    def journal_together(self) -> Iterator[None]:
        """The journal's lines of what is finished meanwhile are written at once, at the end.

        :raises StorageError: they cannot be written.
        """
        with self._lock:
            self._journal.hold()
        try:
            yield
        finally:
            with self._lock, self._storage_errors():
                self._journal.write_held(and_stop=True)

    def _is_whole(self, tensor: str) -> bool:
        """Whether a job was the last of its tensor's."""
        self._pieces_left[tensor] -= 1
        return self._pieces_left[tensor] == 0

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
                failure = self._write_error(error)
                try:
                    self._journal.distrust()
                except OSError:
                    failure = StorageError(
                        f"writing to {self.folder} failed: {error}; the journal cannot be marked "
                        "either: check the device, then begin again with --overwrite"
                    )
                raise failure from error

    def complete_resumed(self) -> None:
        """Complete shards whose tensors were all written before the run was interrupted."""
        for number, left in enumerate(self._left):
            if left == 0 and self._shards[number] is not None:
                self._complete(number)

    def commit(self, files: Mapping[str, bytes], manifest: bytes) -> None:
        """Write everything beside the weights, then the commit mark."""
        with self._storage_errors():
            for name, content in files.items():
                self._place.replace(name, content)
            self._place.replace(MANIFEST_NAME, manifest)
            self._place.sync_names_of(files)
            if len(self.plan.model_shards) == 1:
                layout = self.plan.shards[0]
                if self._place.partial(layout).exists():
                    os.replace(self._place.partial(layout), self.folder / layout.file_name)
            else:
                self._place.replace(INDEX_NAME, index_json(self.plan.model_shards))
            self._place.sync_names()
            self._journal.remove()
            self._place.sync_names()

    def close(self) -> None:
        """Release files and lock; an unfinished state stays resumable."""
        for number, shard in enumerate(self._shards):
            self._shards[number] = None
            if shard is None:
                continue
            try:
                shard.close()
            except OSError:  # the device reports lost bytes as late as here
                with suppress(OSError):
                    self._journal.distrust()
        self._journal.close()

    def _open(self, overwrite: bool) -> None:
        found = self._journal.read()
        of_this_plan = found.plan_hash == self.plan.hash
        if found.records and not of_this_plan and not overwrite:
            raise PlanError(
                f"{self.folder} holds an unfinished merge of another recipe or of inputs that "
                "changed since; finish it with its own recipe, or give --overwrite to discard it"
            )
        try:
            with self._storage_errors():
                if of_this_plan:
                    self._recall(found.records)
                resumes = bool(self.records)
                written = all(job.name in found.records for job in self.plan.jobs)
                complete = [s for n, s in enumerate(self.plan.shards) if self._is_complete(n)]
                strangers = self._place.strangers(complete, commits=resumes and written)
                if strangers and not overwrite:
                    self._place.refuse(strangers, resumes)
                self._place.require_space(resumes, overwrite)
                # From here on the journal must not speak of a file that the next steps touch.
                self._journal.begin(self.plan.hash, self.records, found.durable)
        except (PlanError, StorageError):
            if found.plan_hash is None:
                self._abandon(())
            elif of_this_plan and not self.records:
                self._abandon(self._place.partials())
            raise
        try:
            with self._storage_errors():
                self._place.sync_names()
                if resumes:
                    self._place.remove_loadable(strangers)
                else:
                    self._place.discard(overwrite)
                self._open_shards()
                self._place.sync_names()
        except StorageError:
            if not resumes:
                self._abandon(self._place.partials())
            raise

    def _recall(self, records: Mapping[str, Record]) -> None:
        """Take over the journal's records of tensors whose shards are still there."""
        self.records = {
            job.name: records[job.name] for job in self.plan.jobs if job.name in records
        }
        # A tensor that is lost with one shard may make another, complete one incomplete.
        while lost := [number for number in range(len(self.plan.shards)) if self._is_lost(number)]:
            for number in lost:
                for name in self._jobs_of_shards[number]:
                    self.records.pop(name, None)

    def _is_lost(self, number: int) -> bool:
        """Whether the journal speaks of tensors in a shard that is not there."""
        recorded = any(name in self.records for name in self._jobs_of_shards[number])
        begun = self._place.is_begun(self.plan.shards[number])
        return recorded and not begun and not self._is_complete(number)

    def _open_shards(self) -> None:
        created = []
        try:
            for number, layout in enumerate(self.plan.shards):
                if self._is_complete(number):
                    self._sync_complete(layout)
                    continue
                path = self._place.partial(layout)
                begun = self._place.is_begun(layout)
                if not begun:
                    created.append(path)
                self._shards[number] = _C.ShardFile(
                    str(path), layout.num_bytes, self._drop_cache, begun
                )
        except OSError:
            _remove(created)
            raise

    def _sync_complete(self, layout: ShardLayout) -> None:
        """A run without syncs may have completed the shard that is taken over."""
        if not self.sync:
            return
        path = self.folder / layout.file_name
        shard = _C.ShardFile(str(path), layout.num_bytes, self._drop_cache, True)
        try:
            shard.sync()
        finally:
            shard.close()

    def _is_complete(self, number: int) -> bool:
        """Whether a shard was completed and renamed by the run that is being continued."""
        layout = self.plan.shards[number]
        path = self.folder / layout.file_name
        names = self._jobs_of_shards[number]
        if not self.records or any(name not in self.records for name in names):
            return False
        if self._place.partial(layout).exists() or not path.exists():
            return False
        if path.stat().st_size != layout.num_bytes:
            return False
        with path.open("rb") as file:
            return file.read(len(layout.header)) == layout.header

    def _abandon(self, partials: Iterable[Path]) -> None:
        """Leave nothing behind of a run that could not begin; never hides why it could not."""
        _remove(partials)
        with suppress(OSError):
            self._journal.remove()
        self._place.remove_made()

    def _complete(self, number: int) -> None:
        """Header, sync, length bytes, sync; rename where an index will be the commit mark."""
        shard, layout = self._shards[number], self.plan.shards[number]
        if shard is None:
            raise RuntimeError(f"shard {layout.file_name} is complete already")
        with self._storage_errors():
            _write_bytes(shard, 8, layout.header[8:])
            self.make_durable()
            _write_bytes(shard, 0, layout.header[:8])
            self.make_durable()
            with self._syncing:
                with self._lock:
                    self._journal.write_held()
                    self._shards[number] = None
                shard.close()
            num_model_shards = len(self.plan.model_shards)
            if num_model_shards > 1 or number >= num_model_shards:
                os.replace(self._place.partial(layout), self.folder / layout.file_name)
                self._place.sync_names()

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._write_error(error) from error

    def _write_error(self, error: OSError) -> StorageError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            try:
                free = f"{_C.free_bytes(str(self.folder)):,}"
            except OSError:
                free = "unknown"
            left = sum(job.output_bytes for job in self.plan.jobs if job.name not in self.records)
            return StorageError(
                f"no space left while writing to {self.folder}: up to {left:,} bytes are still to "
                f"be written, {free} are free ({error}); free space and run the same command to "
                "continue"
            )
        return StorageError(
            f"writing to {self.folder} failed: {error}; check the device, then run the same "
            "command to continue"
        )


def _shards_of(job: Job) -> set[int]:
    """Numbers of the shards that hold the job's outputs."""
    return {job.shard, *(part.shard for part in job.parts)}


def _remove(paths: Iterable[Path]) -> None:
    """Remove what was created, as far as that is possible: another error is on its way."""
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _write_bytes(shard: _C.ShardFile, offset: int, data: bytes) -> None:
    array = np.frombuffer(data, np.uint8)
    shard.write(offset, array.ctypes.data, len(data))

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
   sync. Where there are several shards it is renamed then: without the index no loader takes the
   folder for a model.
5. All shards complete: configuration, tokenizer, card and manifest, each by temporary file and
   rename, and a sync of their folders; then the commit mark, which is the index or, for a single
   shard, its rename; then the journal is removed.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
#: Other files that only a model has.
_BESIDE_WEIGHTS = (INDEX_NAME, "config.json", MANIFEST_NAME)
#: What a loader would take for a part of the model of a folder, and an overwriting merge removes.
_MODEL_FILE = re.compile(r"(pytorch_)?model([-.].+)?\.(safetensors|bin)(\.index\.json)?")
#: What an unfinished merge calls its shards.
_PARTIAL_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors\.partial")


class Output:
    """The output of one plan, open for writing."""

    def __init__(self, plan: Plan, folder: Path, *, overwrite: bool, sync: bool, drop_cache: bool):
        self.plan = plan
        self.folder = folder
        self.sync = sync
        self.records: dict[str, Record] = {}
        self._drop_cache = drop_cache
        self._created_folders: list[Path] = []
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._sync_failed = False
        self._unsynced = 0
        self._last_sync = time.monotonic()
        self._refuse_sources()
        try:
            self._make_folder()
        except OSError as error:
            self._remove_folders()
            raise StorageError(f"cannot create the output folder {folder}: {error}") from error
        self._journal = Journal(folder)
        self._shards: list[_C.ShardFile | None] = [None] * len(plan.shards)
        try:
            with self._storage_errors():
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
        with self._storage_errors():
            shard.write(job.offset + first_byte, address, num_bytes)

    def finish(self, job: Job, record: Record) -> None:
        """Journal a tensor whose bytes are all written; complete its shard if it was the last.

        :raises StorageError: the device is full or failed; what was written so far can be resumed.
        """
        with self._lock:
            with self._storage_errors():
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
                self._replace(name, content)
            self._replace(MANIFEST_NAME, manifest)
            self._sync_folders_of(files)
            if len(self.plan.shards) == 1:
                layout = self.plan.shards[0]
                if self._partial(layout).exists():
                    os.replace(self._partial(layout), self.folder / layout.file_name)
            else:
                self._replace(INDEX_NAME, index_json(self.plan.shards))
            self._sync_folder()
            self._journal.remove()
            self._sync_folder()

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

    def _make_folder(self) -> None:
        """Create the folder and those above it that are missing, each durable in its parent."""
        missing = [self.folder] if not self.folder.exists() else []
        while missing and not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        self._created_folders = missing
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.sync:
            for path in reversed(missing):
                with suppress(PermissionError):  # a folder that may be written but not read
                    _C.fsync_directory(str(path.parent))

    def _refuse_sources(self) -> None:
        here = Path(os.path.realpath(self.folder))
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

    def _strangers(self, resumes: bool, commits: bool) -> list[str]:
        """Names of files in the folder that belong to a model which this merge did not write.

        ``commits``: the run that is continued had begun to write what lies beside the weights.
        """
        ours: set[str] = set()
        if resumes:
            shards = enumerate(self.plan.shards)
            ours |= {layout.file_name for number, layout in shards if self._is_complete(number)}
        if commits:
            ours |= set(_BESIDE_WEIGHTS)
        return sorted(
            name
            for name in os.listdir(self.folder)
            if name not in ours and (name.endswith(_WEIGHTS) or name in _BESIDE_WEIGHTS)
        )

    def _refuse(self, strangers: list[str], resumes: bool) -> None:
        names = f"{', '.join(strangers[:3])}{', …' if len(strangers) > 3 else ''}"
        if resumes:
            raise PlanError(
                f"{self.folder} holds an unfinished merge and files of another model ({names}); "
                "move those away, or give --overwrite to continue without them"
            )
        raise PlanError(
            f"the output folder {self.folder} holds a model already ({names}); choose another "
            "folder or give --overwrite"
        )

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
                strangers = self._strangers(resumes, resumes and written)
                if strangers and not overwrite:
                    self._refuse(strangers, resumes)
                self._require_space(resumes, overwrite)
                # From here on the journal must not speak of a file that the next steps touch.
                self._journal.begin(self.plan.hash, self.records, found.durable)
        except (PlanError, StorageError):
            if found.plan_hash is None:
                self._abandon(())
            elif of_this_plan and not self.records:
                self._abandon(self._partials())
            raise
        try:
            with self._storage_errors():
                self._sync_folder()
                if resumes:
                    for name in filter(_MODEL_FILE.fullmatch, strangers):
                        (self.folder / name).unlink()
                else:
                    self._discard(overwrite)
                self._open_shards()
                self._sync_folder()
        except StorageError:
            if not resumes:
                self._abandon(self._partials())
            raise

    def _recall(self, records: Mapping[str, Record]) -> None:
        """Take over the journal's records of tensors whose shard is still there."""
        self.records = {
            job.name: records[job.name] for job in self.plan.jobs if job.name in records
        }
        for number, layout in enumerate(self.plan.shards):
            if not self._is_complete(number) and not self._is_begun(layout):
                for name in layout.tensors:
                    self.records.pop(name, None)

    def _open_shards(self) -> None:
        created = []
        try:
            for number, layout in enumerate(self.plan.shards):
                if self._is_complete(number):
                    self._sync_complete(layout)
                    continue
                path = self._partial(layout)
                begun = self._is_begun(layout)
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

    def _partial(self, layout: ShardLayout) -> Path:
        return self.folder / (layout.file_name + PARTIAL)

    def _partials(self) -> list[Path]:
        return [self._partial(layout) for layout in self.plan.shards]

    def _is_begun(self, layout: ShardLayout) -> bool:
        """Whether the run that is being continued created a shard and left it incomplete."""
        path = self._partial(layout)
        return path.exists() and path.stat().st_size == layout.num_bytes

    def _is_complete(self, number: int) -> bool:
        """Whether a shard was completed and renamed by the run that is being continued."""
        layout = self.plan.shards[number]
        path = self.folder / layout.file_name
        if not self.records or any(name not in self.records for name in layout.tensors):
            return False
        if self._partial(layout).exists() or not path.exists():
            return False
        if path.stat().st_size != layout.num_bytes:
            return False
        with path.open("rb") as file:
            return file.read(len(layout.header)) == layout.header

    def _require_space(self, resumes: bool, overwrite: bool) -> None:
        """:raises StorageError: less is free than the output and 1 % need."""
        if resumes:
            missing = sum(self._missing(layout) for layout in self.plan.shards)
        else:
            missing = self.plan.bytes_written - sum(map(_allocated, self._replaced(overwrite)))
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

    def _replaced(self, overwrite: bool) -> list[Path]:
        """The weights of a previous output: of an unfinished one, or of any to overwrite."""
        return [
            path
            for path in self.folder.iterdir()
            if path.is_file()
            and (
                _PARTIAL_FILE.fullmatch(path.name)
                or (overwrite and _MODEL_FILE.fullmatch(path.name))
            )
        ]

    def _discard(self, overwrite: bool) -> None:
        """Remove a previous output: its commit mark first, its list of files last."""
        if overwrite:
            (self.folder / INDEX_NAME).unlink(missing_ok=True)
        for path in self._replaced(overwrite):
            path.unlink()
        if not overwrite:
            return
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

    def _abandon(self, partials: Iterable[Path]) -> None:
        """Leave nothing behind of a run that could not begin; never hides why it could not."""
        _remove(partials)
        with suppress(OSError):
            self._journal.remove()
        self._remove_folders()

    def _remove_folders(self) -> None:
        with suppress(OSError):  # somebody put a file there meanwhile: it is theirs
            for folder in self._created_folders:
                folder.rmdir()

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
                    self._shards[number] = None
                shard.close()
            if len(self.plan.shards) > 1:
                os.replace(self._partial(layout), self.folder / layout.file_name)
                self._sync_folder()

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

    def _sync_folders_of(self, names: Iterable[str]) -> None:
        """Make the names of files below the folder durable, the deepest first."""
        if not self.sync:
            return
        folders = {parent for name in names for parent in Path(name).parents} | {Path()}
        for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
            _C.fsync_directory(str(self.folder / folder))

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
            left = sum(job.num_bytes for job in self.plan.jobs if job.name not in self.records)
            return StorageError(
                f"no space left while writing to {self.folder}: up to {left:,} bytes are still to "
                f"be written, {free} are free ({error}); free space and run the same command to "
                "continue"
            )
        return StorageError(
            f"writing to {self.folder} failed: {error}; check the device, then run the same "
            "command to continue"
        )


def _allocated(path: Path) -> int:
    """Bytes of the device that a file holds; 0 where there is none."""
    return path.stat().st_blocks * 512 if path.exists() else 0


def _remove(paths: Iterable[Path]) -> None:
    """Remove what was created, as far as that is possible: another error is on its way."""
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _write_bytes(shard: _C.ShardFile, offset: int, data: bytes) -> None:
    array = np.frombuffer(data, np.uint8)
    shard.write(offset, array.ctypes.data, len(data))

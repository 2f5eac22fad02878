"""The output folder as it is found: whose files lie there, what may be removed, is there space.

Nothing here knows of the journal or of tensors; :mod:`pymerge.engine.output` decides in which order
these steps happen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pymerge import _C
from pymerge.checkpoint import (
    INDEX_NAME,
    MANIFEST_NAME,
    STATISTICS_FILES,
    STATISTICS_FOLDER,
    STATISTICS_NAME,
    TASKS_FILE,
    FileRecord,
    ShardLayout,
    read_manifest,
)
from pymerge.errors import CheckpointError, PlanError, StorageError
from pymerge.plan import Plan

PARTIAL = ".partial"
#: Weight files of any tool: a folder that holds one is somebody's model.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: Other files that only a model has.
_BESIDE_WEIGHTS = (INDEX_NAME, "config.json", MANIFEST_NAME)
#: What a loader would take for a part of the model of a folder, and an overwriting merge removes.
_MODEL_FILE = re.compile(
    r"(pytorch_)?model([-.].+)?\.(safetensors|bin)(\.index\.json)?|" + TASKS_FILE.pattern
)
#: What an unfinished merge calls its shards.
_PARTIAL_FILE = re.compile(r"(model|tasks)(-\d+-of-\d+)?\.safetensors\.partial")


class Folder:
    """The folder that a plan is written to; ``sync`` makes what changes in it durable."""

    def __init__(self, path: Path, plan: Plan, *, sync: bool) -> None:
        self.path = path
        self.plan = plan
        self.sync = sync
        self._made: list[Path] = []

    def make(self) -> None:
        """Create the folder and those above it that are missing, each durable in its parent."""
        missing = [self.path] if not self.path.exists() else []
        while missing and not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        self._made = missing
        self.path.mkdir(parents=True, exist_ok=True)
        if self.sync:
            for path in reversed(missing):
                with suppress(PermissionError):  # a folder that may be written but not read
                    _C.fsync_directory(str(path.parent))

    def refuse_sources(self) -> None:
        """:raises PlanError: an input model lies in the folder."""
        here = Path(os.path.realpath(self.path))
        for reference, checkpoint in self.plan.checkpoints.items():
            folders = {header.path.parent.resolve() for header in checkpoint.headers}
            folders |= {header.path.resolve().parent for header in checkpoint.headers}
            if checkpoint.folder is not None:
                folders.add(checkpoint.folder.resolve())
            if here in folders:
                raise PlanError(
                    f"the output folder {self.path} holds the input model {reference!r}; "
                    "choose another output folder"
                )

    def strangers(self, shards: Iterable[ShardLayout], *, commits: bool) -> list[str]:
        """Names of files in the folder that belong to a model which this merge did not write.

        ``shards`` are those that the run which is continued completed; ``commits`` says that it had
        begun to write what lies beside the weights.
        """
        ours = {layout.file_name for layout in shards}
        if commits:
            ours |= set(_BESIDE_WEIGHTS)
        return sorted(
            name
            for name in os.listdir(self.path)
            if name not in ours and (name.endswith(_WEIGHTS) or name in _BESIDE_WEIGHTS)
        )

    def refuse(self, strangers: list[str], resumes: bool) -> None:
        """:raises PlanError: always, with what is in the way and what to do."""
        names = f"{', '.join(strangers[:3])}{', …' if len(strangers) > 3 else ''}"
        if resumes:
            raise PlanError(
                f"{self.path} holds an unfinished merge and files of another model ({names}); "
                "move those away, or give --overwrite to continue without them"
            )
        raise PlanError(
            f"the output folder {self.path} holds a model already ({names}); choose another "
            "folder or give --overwrite"
        )

    def partial(self, layout: ShardLayout) -> Path:
        """Where a shard is written before it is complete."""
        return self.path / (layout.file_name + PARTIAL)

    def partials(self) -> list[Path]:
        """Where the shards are written before they are complete."""
        return [self.partial(layout) for layout in self.plan.shards]

    def is_begun(self, layout: ShardLayout) -> bool:
        """Whether the run that is being continued created a shard and left it incomplete."""
        path = self.partial(layout)
        return path.exists() and path.stat().st_size == layout.num_bytes

    def require_space(self, resumes: bool, overwrite: bool) -> None:
        """:raises StorageError: less is free than the output and 1 % need."""
        if resumes:
            missing = sum(self._missing(layout) for layout in self.plan.shards)
        else:
            missing = self.plan.bytes_written - sum(map(_allocated, self._replaced(overwrite)))
        free = _C.free_bytes(str(self.path))
        needed = missing + missing // 100
        if needed > free:
            raise StorageError(
                f"not enough space in {self.path}: the output needs {needed:,} bytes, {free:,} "
                f"are free, {needed - free:,} are missing; free that much or choose another folder"
            )

    def _missing(self, layout: ShardLayout) -> int:
        """Bytes of a shard that the device has not given yet."""
        path = self.path / layout.file_name
        held = _allocated(path) + _allocated(path.with_name(path.name + PARTIAL))
        return max(0, layout.num_bytes - held)

    def _replaced(self, overwrite: bool) -> list[Path]:
        """The weights of a previous output: of an unfinished one, or of any to overwrite."""
        return [
            path
            for path in self.path.iterdir()
            if path.is_file()
            and (
                _PARTIAL_FILE.fullmatch(path.name)
                or (overwrite and _MODEL_FILE.fullmatch(path.name))
            )
        ]

    def remove_loadable(self, names: Iterable[str]) -> None:
        """Remove files that a loader would take for a part of this model."""
        for name in filter(_MODEL_FILE.fullmatch, names):
            (self.path / name).unlink()

    def discard(self, overwrite: bool) -> None:
        """Remove a previous output: its commit mark first, its list of files last."""
        if overwrite:
            (self.path / INDEX_NAME).unlink(missing_ok=True)
        for path in self._replaced(overwrite):
            path.unlink()
        if not overwrite:
            return
        for path in self._written_before():
            path.unlink()
        self._remove_statistics()
        (self.path / MANIFEST_NAME).unlink(missing_ok=True)

    def _remove_statistics(self) -> None:
        """Remove what was collected of the model that is overwritten: it describes no other."""
        place = self.path / STATISTICS_FOLDER
        for name in (STATISTICS_NAME, *STATISTICS_FILES):
            (place / name).unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or somebody put a file of theirs there
            place.rmdir()

    def _written_before(self) -> list[Path]:
        """Files beside the weights that a previous merge wrote and nobody changed since."""
        try:
            files = read_manifest(self.path).files
        except CheckpointError:
            return []
        paths = {self.path / name: record for name, record in files.items()}
        return [
            path
            for path, record in paths.items()
            if path.is_file() and FileRecord.of_file(path) == record
        ]

    def remove_made(self) -> None:
        """Remove the folders that :meth:`make` created, as far as they are empty."""
        with suppress(OSError):  # somebody put a file there meanwhile: it is theirs
            for folder in self._made:
                folder.rmdir()

    def replace(self, name: str, content: bytes) -> None:
        """Write a file below the folder by temporary file and rename."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + PARTIAL)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            if self.sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)

    def sync_names(self) -> None:
        """Make the names in the folder durable."""
        if self.sync:
            _C.fsync_directory(str(self.path))

    def sync_names_of(self, names: Iterable[str]) -> None:
        """Make the names of files below the folder durable, the deepest first."""
        if not self.sync:
            return
        folders = {parent for name in names for parent in Path(name).parents} | {Path()}
        for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
            _C.fsync_directory(str(self.path / folder))


def _allocated(path: Path) -> int:
    """Bytes of the device that a file holds; 0 where there is none."""
    return path.stat().st_blocks * 512 if path.exists() else 0

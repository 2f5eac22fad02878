"""A folder that holds a model for each task: the base, a vector, masks and scales.

Beside the base model lie the shards that tasks.json names, with NAME.vector and NAME.masks for
every merged tensor NAME. The model of a task has ``NAME + scale * (NAME.vector where the task's bit
is set)``, and every other tensor as the base has it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple, NoReturn

from pymerge.checkpoint import (
    TASKS_FILE,
    Checkpoint,
    TensorEntry,
    open_checkpoint,
    read_header,
)
from pymerge.checkpoint.config import read_json_object
from pymerge.errors import CheckpointError, PymergeError
from pymerge.formats import BITS, FORMATS
from pymerge.methods.smile_outputs import SMILE_NAME
from pymerge.methods.task_outputs import MASKS, TASKS_FORMAT, TASKS_NAME, VECTOR
from pymerge.names import shown


@dataclass(frozen=True)
class Task:
    """One task: its number, its name in the recipe, and the factor on its part of the vector."""

    number: int
    name: str
    scale: float


class Delta(NamedTuple):
    """What the base's tensor gains in a task's model: the vector, where the mask has a bit."""

    vector: TensorEntry
    mask: TensorEntry


@dataclass(frozen=True)
class TaskFolder:
    """An opened folder. ``checkpoint`` has the base's tensors and the headers of all files."""

    method: str
    tasks: tuple[Task, ...]
    checkpoint: Checkpoint
    beside: Mapping[str, TensorEntry]
    rows: Mapping[str, tuple[int, ...]]

    def find(self, wanted: str | int) -> Task:
        """A task by its name, number, or an unambiguous part of its name.

        :raises PymergeError: none or several fit; the message names the tasks there are.
        """
        text = str(wanted)
        found = [task for task in self.tasks if text == task.name]
        found = found or [task for task in self.tasks if text == PurePath(task.name).name]
        found = found or [task for task in self.tasks if text == str(task.number)]
        found = found or [
            task for task in self.tasks if isinstance(wanted, str) and text in task.name
        ]
        if len(found) == 1 and text:
            return found[0]
        what = f"{len(found)} tasks fit" if text and found else "there is no task"
        raise PymergeError(
            f"{self.checkpoint.reference}: {what} {shown(wanted)}; its tasks are "
            f"{', '.join(f'{task.number}: {task.name}' for task in self.tasks)}"
        )

    def delta(self, name: str, task: Task) -> Delta | None:
        """What a task adds to a tensor, or None where it has the base's."""
        vector, masks = (self.beside.get(f"{name}.{x.suffix}") for x in (VECTOR, MASKS))
        if vector is None or masks is None:
            return None
        rows = self.rows.get(name, range(len(self.tasks)))
        if task.number not in rows:
            return None
        row_bytes = masks.shape[1]
        first = masks.offset + rows.index(task.number) * row_bytes
        return Delta(
            vector, TensorEntry(masks.name, BITS, vector.shape, masks.file, first, row_bytes)
        )


def is_task_folder(checkpoint: Checkpoint) -> bool:
    """Whether a model has others beside it in its folder."""
    return checkpoint.folder is not None and (checkpoint.folder / TASKS_NAME).is_file()


def open_tasks(folder: Path | str) -> TaskFolder:
    """Read tasks.json and the headers of the files it names.

    :raises CheckpointError: the folder holds no such model, or its files do not fit together.
    """
    checkpoint = open_checkpoint(os.fspath(folder))
    if checkpoint.folder is None or not is_task_folder(checkpoint):
        if checkpoint.folder is not None and (checkpoint.folder / SMILE_NAME).is_file():
            raise CheckpointError(
                f"{folder}: expected {TASKS_NAME}, found {SMILE_NAME}: a merge by smile is one "
                "model that has an expert for each task; pymerge.load_smile loads it"
            )
        raise CheckpointError(
            f"{folder}: expected {TASKS_NAME}, as a merge by emr or tall_masks writes it, found "
            "none; a folder of any other method is one model, which loads as it is"
        )
    path = checkpoint.folder / TASKS_NAME
    content = read_json_object(path) or {}
    if content.get("format") != TASKS_FORMAT:
        _refuse(path, "format", TASKS_FORMAT, content.get("format"))
    tasks = _tasks(path, content.get("tasks"))
    files = content.get("files")
    if not isinstance(files, list) or not all(
        isinstance(name, str) and TASKS_FILE.fullmatch(name) for name in files
    ):
        _refuse(path, "files", "names of files beside it", files)
    headers = [read_header(checkpoint.folder / name) for name in files]
    beside = {name: entry for header in headers for name, entry in header.tensors.items()}
    rows = _rows(path, content.get("rows"), len(tasks))
    _check_parts(path, checkpoint, beside, rows, len(tasks))
    return TaskFolder(
        method=str(content.get("method")),
        tasks=tasks,
        checkpoint=replace(checkpoint, headers=(*checkpoint.headers, *headers)),
        beside=beside,
        rows=rows,
    )


def _tasks(path: Path, found: Any) -> tuple[Task, ...]:
    if not isinstance(found, list) or not found:
        _refuse(path, "tasks", "a list of tasks", found)
    tasks = []
    for number, entry in enumerate(found):
        fields = entry if isinstance(entry, dict) else {}
        name, scale = fields.get("name"), fields.get("scale")
        if not isinstance(name, str) or not isinstance(scale, float | int) or scale != scale:
            _refuse(path, f"tasks, number {number}", "a name and a scale", entry)
        tasks.append(Task(number, name, float(scale)))
    return tuple(tasks)


def _rows(path: Path, found: Any, num_tasks: int) -> dict[str, tuple[int, ...]]:
    """Tensors that have not one row of masks for every task in order."""
    if not isinstance(found, dict):
        _refuse(path, "rows", "an object", found)
    for name, numbers in found.items():
        if not isinstance(numbers, list) or not all(n in range(num_tasks) for n in numbers):
            _refuse(path, f"rows, {shown(name)}", "numbers of tasks", numbers)
    return {name: tuple(numbers) for name, numbers in found.items()}


def _check_parts(
    path: Path,
    checkpoint: Checkpoint,
    beside: Mapping[str, TensorEntry],
    rows: Mapping[str, tuple[int, ...]],
    num_tasks: int,
) -> None:
    """Every vector and every mask belongs to a tensor of the model and has its size."""
    left = set(beside)
    for name, entry in checkpoint.tensors.items():
        vector, masks = (beside.get(f"{name}.{x.suffix}") for x in (VECTOR, MASKS))
        if vector is None and masks is None:
            continue
        num_rows = len(rows.get(name, range(num_tasks)))
        expected = (FORMATS["U8"], (num_rows, -(-entry.num_elements // 8)))
        if (
            not entry.format.is_float
            or vector is None
            or (vector.format, vector.shape) != (entry.format, entry.shape)
        ):
            _refuse(path, f"{name}.vector", f"{entry.format.name} {list(entry.shape)}", vector)
        if masks is None or (masks.format, masks.shape) != expected:
            _refuse(path, f"{name}.masks", f"U8 {list(expected[1])}", masks)
        left -= {vector.name, masks.name}
    if left:
        _refuse(path, "files", "vectors and masks of the model's tensors", sorted(left)[0])


def _refuse(path: Path, where: str, expected: object, found: object) -> NoReturn:
    if isinstance(found, TensorEntry):
        found = f"{found.format.name} {list(found.shape)}"
    raise CheckpointError(
        f"{path}, {where}: expected {expected}, found {shown(found)}; copy the folder again or "
        "repeat the merge"
    )

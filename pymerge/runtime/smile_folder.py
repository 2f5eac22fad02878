"""A folder that holds a base model and the experts of its layers, as a merge by smile writes it.

Beside the base model lie the shards that smile.json names, with the factors of the experts and the
routers' directions of every upscaled layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from pymerge.checkpoint import TASKS_FILE, Checkpoint, TensorEntry, open_checkpoint, read_header
from pymerge.checkpoint.config import read_json_object
from pymerge.errors import CheckpointError
from pymerge.methods.smile_outputs import DENSE, DOWN, ROUTER, SMILE_FORMAT, SMILE_NAME, UP
from pymerge.methods.task_outputs import TASKS_NAME
from pymerge.names import shown


@dataclass(frozen=True)
class Upscaled:
    """An upscaled layer: the tensors of its experts, and how an input is routed to them.

    ``parts`` are the tensors by their suffixes; ``bias`` is [rows, outputs] or None, and
    ``bias_rows`` the row of each expert, None for one without.
    """

    name: str
    weight: TensorEntry
    transposed: bool
    num_experts: int
    top_k: int
    parts: Mapping[str, TensorEntry]
    bias: TensorEntry | None
    bias_rows: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class SmileFolder:
    """An opened folder. ``checkpoint`` has the base's tensors and the headers of all files."""

    experts: tuple[str, ...]
    modules: tuple[Upscaled, ...]
    checkpoint: Checkpoint


def is_smile_folder(checkpoint: Checkpoint) -> bool:
    """Whether a model has experts beside it in its folder."""
    return checkpoint.folder is not None and (checkpoint.folder / SMILE_NAME).is_file()


def open_smile(folder: Path | str) -> SmileFolder:
    """Read smile.json and the headers of the files it names.

    :raises CheckpointError: the folder holds no such model, or its files do not fit together.
    """
    checkpoint = open_checkpoint(os.fspath(folder))
    if checkpoint.folder is None or not is_smile_folder(checkpoint):
        tasks = checkpoint.folder is not None and (checkpoint.folder / TASKS_NAME).is_file()
        hint = (
            f"found {TASKS_NAME}: pymerge.load_task loads the model of one task"
            if tasks
            else "found none; a folder of any other method is one model, which loads as it is"
        )
        raise CheckpointError(
            f"{folder}: expected {SMILE_NAME}, as a merge by smile writes it, {hint}"
        )
    path = checkpoint.folder / SMILE_NAME
    content = read_json_object(path) or {}
    if content.get("format") != SMILE_FORMAT:
        _refuse(path, "format", SMILE_FORMAT, content.get("format"))
    experts = content.get("experts")
    if not isinstance(experts, list) or not all(isinstance(name, str) for name in experts):
        _refuse(path, "experts", "a list of names", experts)
    files = content.get("files")
    if not isinstance(files, list) or not all(
        isinstance(name, str) and TASKS_FILE.fullmatch(name) for name in files
    ):
        _refuse(path, "files", "names of files beside it", files)
    headers = [read_header(checkpoint.folder / name) for name in files]
    beside = {name: entry for header in headers for name, entry in header.tensors.items()}
    modules = content.get("modules")
    if not isinstance(modules, dict):
        _refuse(path, "modules", "an object", modules)
    return SmileFolder(
        tuple(experts),
        tuple(
            _module(path, checkpoint, beside, name, fields, len(experts))
            for name, fields in modules.items()
        ),
        replace(checkpoint, headers=(*checkpoint.headers, *headers)),
    )


def _module(
    path: Path,
    checkpoint: Checkpoint,
    beside: Mapping[str, TensorEntry],
    name: str,
    fields: Any,
    num_models: int,
) -> Upscaled:
    where = f"modules, {name}"
    fields = fields if isinstance(fields, dict) else {}
    experts = _numbers(path, f"{where}, experts", fields.get("experts"), num_models)
    weight = checkpoint.tensors.get(f"{name}.weight")
    if weight is None or len(weight.shape) != 2:
        _refuse(path, where, f"a matrix {name}.weight in the model", weight)
    transposed = fields.get("transposed")
    if not isinstance(transposed, bool):
        _refuse(path, f"{where}, transposed", "true or false", transposed)
    outputs, inputs = reversed(weight.shape) if transposed else weight.shape
    num = len(experts)
    top_k, k, gate_k = (
        _number(path, f"{where}, {key}", fields.get(key), low, high)
        for key, low, high in (
            ("top_k", 1, num),
            ("k", 0, min(weight.shape)),
            ("gate_k", 1, min(weight.shape)),
        )
    )
    expected: dict[str, tuple[int, ...]] = {ROUTER.suffix: (num, gate_k, inputs)}
    if k:
        expected |= {DOWN.suffix: (num, k, inputs), UP.suffix: (num, outputs, k)}
    else:
        expected[DENSE.suffix] = (num, *weight.shape)
    parts = {
        suffix: _part(path, beside, weight, suffix, shape) for suffix, shape in expected.items()
    }
    bias: TensorEntry | None = None
    rows: tuple[int | None, ...] = ()
    if fields.get("biases") is not None:
        models = _numbers(path, f"{where}, biases", fields["biases"], num_models)
        entry = checkpoint.tensors.get(f"{name}.bias")
        if entry is None:
            _refuse(path, f"{where}, biases", f"null without {name}.bias", fields["biases"])
        bias = _part(path, beside, entry, DENSE.suffix, (len(models), outputs))
        rows = tuple(models.index(model) if model in models else None for model in experts)
    return Upscaled(name, weight, transposed, num, top_k, parts, bias, rows)


def _part(
    path: Path,
    beside: Mapping[str, TensorEntry],
    of: TensorEntry,
    suffix: str,
    shape: tuple[int, ...],
) -> TensorEntry:
    name = f"{of.name}.{suffix}"
    found = beside.get(name)
    if found is None or (found.format, found.shape) != (of.format, shape):
        _refuse(path, name, f"{of.format.name} {list(shape)}", found)
    return found


def _numbers(path: Path, where: str, found: Any, end: int) -> tuple[int, ...]:
    if (
        not isinstance(found, list)
        or not found
        or not all(type(n) is int and 0 <= n < end for n in found)
        or len(set(found)) != len(found)
    ):
        _refuse(path, where, "numbers of experts", found)
    return tuple(found)


def _number(path: Path, where: str, found: Any, low: int, high: int) -> int:
    if type(found) is not int or not low <= found <= high:
        _refuse(path, where, f"a number from {low} to {high}", found)
    return found


def _refuse(path: Path, where: str, expected: object, found: object) -> NoReturn:
    if isinstance(found, TensorEntry):
        found = f"{found.format.name} {list(found.shape)}"
    raise CheckpointError(
        f"{path}, {where}: expected {expected}, found {shown(found)}; copy the folder again or "
        "repeat the merge"
    )

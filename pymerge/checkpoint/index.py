"""The index of a sharded checkpoint: which file holds which tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from pymerge.checkpoint.header import Header
from pymerge.checkpoint.paths import stays_inside
from pymerge.checkpoint.strict_json import is_text, parse_object, shown, shown_names
from pymerge.errors import CheckpointError

INDEX_SUFFIX = ".index.json"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000

COPY_AGAIN = "copy or download the checkpoint again"


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, relative to the folder of the index.

    Only the text of the file names is checked: it may not lead out of the folder. Raises
    CheckpointError.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_INDEX_BYTES:
                _refuse(path, "", f"at most {MAX_INDEX_BYTES} bytes", "more")
            text = file.read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        fields = parse_object(text)
    except ValueError as error:
        _refuse(path, "", "a JSON object", str(error))
    weight_map = fields.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(path, "field weight_map", "an object that is not empty", shown(weight_map))
    for name, file_name in weight_map.items():
        where = f"field weight_map, tensor {shown(name)}"
        if not name or not is_text(name):
            _refuse(path, where, "a name that is non-empty UTF-8 text", shown(name))
        if not is_text(file_name) or not stays_inside(file_name):
            _refuse(path, where, "the name of a file in the same folder", shown(file_name))
    return weight_map


def check_agreement(path: Path, weight_map: Mapping[str, str], headers: Iterable[Header]) -> None:
    """Raise CheckpointError unless every tensor is in the file that the index names, only there."""
    indexed: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        indexed.setdefault(file_name, set()).add(name)
    by_path = {path.parent / file_name: names for file_name, names in indexed.items()}
    for header in headers:
        expected = by_path[header.path]
        missing = sorted(expected - header.tensors.keys())
        if missing:
            _refuse(
                path,
                "field weight_map",
                f"{shown_names(missing)} in {header.path.name}",
                "none there",
            )
        extra = sorted(header.tensors.keys() - expected)
        if extra:
            _refuse(
                path,
                "field weight_map",
                f"every tensor of {header.path.name} listed as being there",
                f"{shown_names(extra)} not listed so",
            )


def _refuse(path: Path, where: str, expected: str, found: str) -> NoReturn:
    place = f"{path}: {where}" if where else str(path)
    raise CheckpointError(f"{place}: expected {expected}, found {found}; {COPY_AGAIN}")

"""Writing statistics beside a checkpoint.

1. The data goes to ``KIND.safetensors.partial`` in ``pymerge-statistics`` and is made durable.
2. ``statistics.json`` is rewritten without this kind, so that no index speaks of a file that
   another has replaced.
3. The data file is renamed to its name.
4. ``statistics.json`` is rewritten with this kind: it now counts.

Wherever this stops, the index is whole and what it names is what it describes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pymerge.checkpoint import INDEX_NAME, OutputTensor, open_checkpoint
from pymerge.checkpoint.layout import (
    METADATA,
    STATISTICS_FOLDER,
    STATISTICS_NAME,
    encode_header,
)
from pymerge.checkpoint.source import SINGLE_FILE
from pymerge.checkpoint.statistics import (
    ROWS_SUFFIX,
    STATISTICS_FORMAT,
    check_weights,
    read_statistics_index,
)
from pymerge.errors import StorageError
from pymerge.formats import F32, FORMATS

PARTIAL = ".partial"


@dataclass(frozen=True)
class Part:
    """One float32 tensor to write; ``pieces`` gives its elements in order."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray[Any, Any]]]


def write_statistics(
    folder: Path,
    kind: str,
    parts: Sequence[Part],
    section: Callable[[], Mapping[str, Any]],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    counts: Mapping[str, int] | None = None,
) -> Path:
    """Write one kind of statistics.

    :param section: what the index says of them, asked for when the data is written.
    :param shapes: of the weights that they describe, compared with the folder's checkpoint.
    :param counts: rows seen by part, written as whole numbers too.
    :returns: the folder of the statistics.
    """
    if any((folder / name).exists() for name in (SINGLE_FILE, INDEX_NAME)):
        tensors = open_checkpoint(str(folder)).tensors
        check_weights(folder, shapes, {name: entry.shape for name, entry in tensors.items()})
    place = folder / STATISTICS_FOLDER
    index = read_statistics_index(folder) or {"format": STATISTICS_FORMAT}
    index.pop(kind, None)
    target = place / f"{kind}.safetensors"
    temporary = target.with_name(target.name + PARTIAL)
    try:
        place.mkdir(parents=True, exist_ok=True)
        _write_data(temporary, parts, counts or {})
        _write_index(place, index)
        os.replace(temporary, target)
        _write_index(place, {**index, kind: {"file": target.name, **section()}})
    except OSError as error:
        raise StorageError(
            f"{place}: writing the statistics failed: {error.strerror}; free space there or save "
            "to another folder"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return place


def _write_data(path: Path, parts: Sequence[Part], counts: Mapping[str, int]) -> None:
    # The counts lie before the matrices, whose sizes would leave them unaligned.
    numbers = [OutputTensor(f"{name}{ROWS_SUFFIX}", FORMATS["I64"], (1,)) for name in counts]
    tensors = [*numbers, *(OutputTensor(part.name, F32, part.shape) for part in parts)]
    with open(path, "wb") as file:
        file.write(encode_header(tensors, METADATA))
        file.write(np.array(list(counts.values()), "<i8").data)
        for part in parts:
            for piece in part.pieces():
                file.write(np.ascontiguousarray(piece, "<f4").data)
        file.flush()
        os.fsync(file.fileno())


def _write_index(place: Path, index: Mapping[str, Any]) -> None:
    path = place / STATISTICS_NAME
    temporary = path.with_name(path.name + PARTIAL)
    text = json.dumps(index, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

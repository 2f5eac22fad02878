"""Statistics beside a checkpoint: input Grams and Fisher diagonals, found and checked by headers.

The folder ``pymerge-statistics`` in that of a model holds ``gram.safetensors`` or
``fisher.safetensors`` or both, and ``statistics.json``, which says what they describe. A Gram
[columns, columns] is symmetric and the mean over the rows seen: its lower triangle lies there row
after row, and layers with the same inputs name the same one. A Fisher diagonal has its weight's
shape. No data is read here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from pymerge.checkpoint.adapter import AdapterTensor
from pymerge.checkpoint.config import read_json_object
from pymerge.checkpoint.header import Header, TensorEntry, read_header
from pymerge.checkpoint.layout import STATISTICS_FOLDER, STATISTICS_NAME
from pymerge.checkpoint.paths import stays_inside
from pymerge.checkpoint.source import Checkpoint, open_checkpoint
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError
from pymerge.formats import F32
from pymerge.names import nearest

#: Version of the description above.
STATISTICS_FORMAT = 1
#: Ends the names of the tensors that count the rows of a Gram.
ROWS_SUFFIX = ".rows_seen"
#: How a Fisher diagonal was estimated.
ESTIMATORS = ("monte_carlo", "exact", "empirical", "mergelm")
#: What no norm of float32 numbers reaches; one that is not 0 is above its inverse.
LARGEST_NORM = 1e60

Kind = Literal["gram", "fisher"]

COLLECT_AGAIN = "collect them again with pymerge.collect"


@dataclass(frozen=True)
class GramOf:
    """What the index says of one weight: how many inputs its layer has, over how many rows their
    Gram is a mean, and whether the weight is stored [inputs, outputs]."""

    columns: int
    rows_seen: int
    transposed: bool = False


@dataclass(frozen=True)
class Statistics:
    """Statistics of one kind; every claim of the index is checked against the headers.

    ``entries`` says for each weight where its statistic lies, always float32: a Gram's lower
    triangle [n (n + 1) / 2], which several weights may share, or a Fisher diagonal of the weight's
    shape. ``grams`` is of kind gram; ``norm`` (over all entries), ``examples`` and ``estimator``
    are of kind fisher.
    """

    kind: Kind
    path: Path  # of statistics.json
    header: Header
    entries: Mapping[str, TensorEntry]
    grams: Mapping[str, GramOf] = field(default_factory=dict)
    norm: float = math.nan
    examples: int = 0
    estimator: str = ""


def find_statistics(checkpoint: Checkpoint | Path | str, kind: Kind) -> Statistics | None:
    """The statistics of one kind beside a checkpoint, None where there are none.

    :param checkpoint: the model, or its folder. A model with an adapter has none: those beside its
        base describe the base.
    :raises CheckpointError: there are some, but of another version, not whole, or not of this
        checkpoint.
    """
    if kind not in ("gram", "fisher"):
        raise ValueError(f"expected the kind gram or fisher, found {kind!r}")
    if isinstance(checkpoint, Checkpoint):
        if checkpoint.folder is None or any(
            isinstance(entry, AdapterTensor) for entry in checkpoint.tensors.values()
        ):
            return None
        folder = checkpoint.folder
    else:
        folder = Path(checkpoint)
    index = read_statistics_index(folder)
    if index is None or kind not in index:
        return None
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(str(folder))
    path = folder / STATISTICS_FOLDER / STATISTICS_NAME
    section = index[kind]
    if not isinstance(section, dict):
        _refuse(path, kind, "an object", section)
    header = _open(path, kind, section.get("file"))
    read = _read_grams if kind == "gram" else _read_fisher
    found = read(path, section, header)
    _check_against(path, found, checkpoint)
    return found


def read_statistics_index(folder: Path) -> dict[str, Any] | None:
    """The object in statistics.json of a checkpoint's folder, None where there is none.

    :raises CheckpointError: it cannot be read, or is of another version.
    """
    path = folder / STATISTICS_FOLDER / STATISTICS_NAME
    index = read_json_object(path)
    if index is not None and index.get("format") != STATISTICS_FORMAT:
        raise CheckpointError(
            f"{path}, format: expected {STATISTICS_FORMAT}, found {shown(index.get('format'))}; "
            f"update pymerge, or remove that folder and {COLLECT_AGAIN}"
        )
    return index


def check_weights(
    where: Path, shapes: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]]
) -> None:
    """Statistics describe weights that a model has.

    :param where: what to name in the message.
    :raises CheckpointError: the model has no such weight, or one of another shape.
    """
    for name, shape in shapes.items():
        if name not in model:
            like = nearest(name, model)
            hint = f"; its nearest is {shown(like)}" if like else ""
            raise CheckpointError(
                f"{where}: expected statistics of the checkpoint's weights, found some of "
                f"{shown(name)}, which it does not have{hint}. Load the model by the class that "
                f"saved it, and {COLLECT_AGAIN}"
            )
        if tuple(model[name]) != tuple(shape):
            raise CheckpointError(
                f"{where}: expected statistics of {shown(name)} with the checkpoint's shape "
                f"{list(model[name])}, found {list(shape)}; they are of another model: "
                f"{COLLECT_AGAIN}"
            )


def _open(path: Path, kind: str, name: Any) -> Header:
    if not isinstance(name, str) or not stays_inside(name) or "/" in name:
        _refuse(path, f"{kind}, file", "the name of a file beside it", name)
    file = path.parent / name
    if not file.is_file():
        raise CheckpointError(
            f"{path}, {kind}: expected the file {shown(name)} beside it, found none; copy the "
            f"folder again or {COLLECT_AGAIN}"
        )
    return read_header(file)


def _read_grams(path: Path, section: dict[str, Any], header: Header) -> Statistics:
    weights = section.get("weights")
    if not isinstance(weights, dict) or not weights:
        _refuse(path, "gram, weights", "weights by name", weights)
    entries, grams = {}, {}
    for name, said in weights.items():
        where = f"gram, weights, {shown(name)}"
        fields = said if isinstance(said, dict) else {}
        key, transposed = fields.get("key"), fields.get("transposed", False)
        if not isinstance(key, str) or not isinstance(transposed, bool):
            _refuse(path, where, "a key, columns and rows_seen", said)
        columns, rows = (_count(path, where, fields, x) for x in ("columns", "rows_seen"))
        entry = header.tensors.get(key)
        expected = (columns * (columns + 1) // 2,)
        if entry is None:
            _refuse(path, where, f"a tensor {shown(key)} in {header.path.name}", None)
        if (entry.format, entry.shape) != (F32, expected):
            _refuse(path, where, f"F32 {list(expected)} in {header.path.name}", entry)
        entries[name] = entry
        grams[name] = GramOf(columns, rows, transposed)
    return Statistics("gram", path, header, entries, grams)


def _read_fisher(path: Path, section: dict[str, Any], header: Header) -> Statistics:
    norm, estimator = section.get("norm"), section.get("estimator")
    examples = _count(path, "fisher", section, "examples")
    if (
        isinstance(norm, bool)
        or not isinstance(norm, float | int)
        or not (norm == 0 or 1 / LARGEST_NORM <= norm <= LARGEST_NORM)
    ):
        _refuse(path, "fisher, norm", f"a number from 0 to {LARGEST_NORM:g}", norm)
    if estimator not in ESTIMATORS:
        _refuse(path, "fisher, estimator", f"one of {', '.join(ESTIMATORS)}", estimator)
    for name, entry in header.tensors.items():
        if entry.format != F32:
            _refuse(path, f"fisher, {shown(name)}", "F32", entry)
    return Statistics(
        "fisher",
        path,
        header,
        dict(header.tensors),
        norm=float(norm),
        examples=examples,
        estimator=estimator,
    )


def _check_against(path: Path, found: Statistics, checkpoint: Checkpoint) -> None:
    model = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    if found.kind == "fisher":
        check_weights(path, {name: entry.shape for name, entry in found.entries.items()}, model)
        return
    check_weights(path, {name: model.get(name, ()) for name in found.entries}, model)
    for name, gram in found.grams.items():
        shape = model[name]
        columns = shape[0 if gram.transposed else -1] if len(shape) == 2 else None
        if columns != gram.columns:
            _refuse(
                path,
                f"gram, weights, {shown(name)}, columns",
                f"the inputs of a weight {list(shape)}",
                gram.columns,
            )


def _count(path: Path, where: str, fields: dict[str, Any], key: str) -> int:
    value = fields.get(key)
    if type(value) is not int or not 1 <= value < 1 << 63:
        _refuse(path, f"{where}, {key}", "a positive whole number of 64 bits", value)
    return value


def _refuse(path: Path, where: str, expected: str, found: object) -> NoReturn:
    if isinstance(found, TensorEntry):
        text = f"{found.format.name} {list(found.shape)}"
    else:
        text = "nothing" if found is None else shown(found)
    raise CheckpointError(
        f"{path}, {where}: expected {expected}, found {text}; copy the folder again or "
        f"{COLLECT_AGAIN}"
    )

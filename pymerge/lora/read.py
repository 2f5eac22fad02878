"""Tensors of checkpoints and adapters in memory: whole, as float32, or piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint import Header, TensorEntry, refuse_derived
from pymerge.errors import CheckpointError, StorageError
from pymerge.formats import BF16, F32, Format
from pymerge.ops import axpy_n, convert, view
from pymerge.ops.view import View

#: Bytes that are copied or compared at once.
PIECE = 16 << 20

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def pieces(entry: TensorEntry) -> Iterator[Bytes]:
    """A tensor's bytes in order, each piece good until the next.

    :raises StorageError: the file cannot be read, or is shorter than its header says.
    """
    memory = np.empty(min(PIECE, entry.num_bytes), np.uint8)
    for first in range(0, entry.num_bytes, PIECE):
        piece = memory[: min(PIECE, entry.num_bytes - first)]
        _fill(entry, first, piece)
        yield piece


def read_float32(entry: TensorEntry) -> Floats:
    """A tensor of a floating type as float32 in its shape. Raises StorageError."""
    raw = _read(entry)
    if entry.format == F32:
        return raw.view(np.float32).reshape(entry.shape)
    out = np.empty(entry.num_elements, np.float32)
    convert(view(out), _view(raw, entry))
    return out.reshape(entry.shape)


def difference(model: TensorEntry, base: TensorEntry) -> Floats:
    """model - base, rounded once to float32, in their shape. Raises StorageError."""
    raw = _read(model), _read(base)
    out = np.empty(model.num_elements, np.float32)
    axpy_n(view(out), [_view(raw[0], model), _view(raw[1], base)], [1.0, -1.0])
    return out.reshape(model.shape)


def mean(entries: Sequence[TensorEntry], format: Format) -> Bytes:
    """The mean of tensors of one shape, in float32 and rounded once. Raises StorageError, and
    CheckpointError for one that is not finite."""
    raw = [_read(entry) for entry in entries]
    inputs = [_view(each, entry) for each, entry in zip(raw, entries, strict=True)]
    out = np.empty(entries[0].num_elements, np.float32)
    axpy_n(view(out), inputs, [1.0] * len(inputs), divisor=len(inputs))
    return rounded(out, format, entries[0].name)


def equal(one: TensorEntry, two: TensorEntry) -> bool:
    """Whether two tensors hold the same values; of one format they are compared byte by byte.
    Raises StorageError."""
    if one.shape != two.shape:
        return False
    if one.format == two.format:
        return all(map(np.array_equal, _copies(one), pieces(two)))
    if not one.format.is_float or not two.format.is_float:
        return False
    return not difference(one, two).any()


def _copies(entry: TensorEntry) -> Iterator[Bytes]:
    return (piece.copy() for piece in pieces(entry))


def rounded(array: NDArray[Any], format: Format, name: str) -> Bytes:
    """The bytes of a float32 or float64 array in a format, rounded once.

    :param name: what to name in the message.
    :raises CheckpointError: the format cannot hold some of them.
    """
    array = np.ascontiguousarray(array)
    out = np.empty(array.size * format.num_bytes, np.uint8)
    if array.size:
        kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
        typed = out.view(kind[format.name])
        count = convert(view(typed, BF16 if format == BF16 else None), view(array))
        if count:
            raise CheckpointError(
                f"{name}: expected values that {format.name} can hold, found {count} that are "
                "beyond it or not finite; choose dtype float32 or bfloat16, and check the models"
            )
    return out


def check_unchanged(headers: Iterable[Header]) -> None:
    """Compare size and modification time of the files with what they were when their headers were
    read.

    :raises StorageError: a file changed while it was being read.
    """
    for header in headers:
        try:
            now = header.path.stat()
        except OSError as error:
            raise StorageError(f"source {header.path} vanished: {error.strerror}") from None
        if (now.st_size, now.st_mtime_ns) != (header.file_bytes, header.mtime_ns):
            raise StorageError(
                f"source {header.path} changed while it was read: expected {header.file_bytes} "
                f"bytes and the modification time of the start, found {now.st_size} bytes or "
                "another time; run again once the file is at rest"
            )


def refuse_non_finite(entry: TensorEntry, values: Floats, what: str) -> None:
    """:raises CheckpointError: NaN or infinite elements, of which no decomposition can be made."""
    count = values.size - int(np.isfinite(values).sum())
    if count:
        raise CheckpointError(
            f"{entry.file}, tensor {entry.name!r}: expected finite {what}, found {count} elements "
            "that are NaN or infinite; repair the model or leave the tensor out"
        )


def _read(entry: TensorEntry) -> Bytes:
    raw = np.empty(entry.num_bytes, np.uint8)
    _fill(entry, 0, raw)
    return raw


def _view(raw: Bytes, entry: TensorEntry) -> View:
    if entry.format.code is None:
        raise RuntimeError(f"{entry.format.name} is not computed on")
    return View(raw.ctypes.data, entry.format.code, entry.num_elements)


def _fill(entry: TensorEntry, first_byte: int, into: Bytes) -> None:
    refuse_derived(entry)
    left = memoryview(into.data)
    try:
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.offset + first_byte)
            while left:
                count = file.readinto(left)
                if not count:
                    raise StorageError(
                        f"{entry.file}, tensor {entry.name!r}: expected {len(left)} more bytes, "
                        "found none; the file was cut short: copy it again"
                    )
                left = left[count:]
    except OSError as error:
        raise StorageError(f"reading tensor {entry.name!r} of {entry.file}: {error}") from error

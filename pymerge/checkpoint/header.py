"""Strict reader of safetensors headers: every claim is checked before a data byte is used.

A file is 8 bytes (little-endian header length), that many bytes of JSON padded with spaces, then
the data of all tensors back to back. Only the first two parts are ever read here. What the
safetensors library refuses is refused, and so are headers that two programs could read differently.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pymerge.checkpoint.strict_json import is_text, parse_object, shown
from pymerge.errors import CheckpointError
from pymerge.formats import FORMATS, Format

LENGTH_BYTES = 8
#: The limit of the safetensors library.
MAX_HEADER_BYTES = 100_000_000
#: numpy holds at most 64 dimensions; real weights have fewer than 10.
MAX_DIMENSIONS = 64
MAX_BITS = 2**63 - 1
METADATA_KEY = "__metadata__"
TENSOR_KEYS = {"dtype", "shape", "data_offsets"}

COPY_AGAIN = "copy or download the file again"
SAVE_AGAIN = "save the model again with the safetensors library"

#: What files that are often mistaken for safetensors begin with.
_KNOWN_STARTS = {
    b"version ": "it is a Git LFS pointer, not the weights; run 'git lfs pull' in that folder",
    b"PK\x03\x04": "it is a PyTorch (zip) file; rename it to .bin and convert it to safetensors",
    b"\x80\x02\x8a\n": "it is an old PyTorch (pickle) file; convert it to safetensors",
    b"GGUF": "it is a GGUF file, which pymerge does not read; use the safetensors original",
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies; ``offset`` counts bytes from the start of the file."""

    name: str
    format: Format
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return self.num_bytes * 8 // self.format.bits

    @property
    def key(self) -> Hashable:
        """Two entries of one key are the same elements: they are read once."""
        return self.file, self.offset

    @property
    def read_bytes(self) -> int:
        """Bytes that reading all of it once takes from storage."""
        return self.num_bytes


@dataclass(frozen=True)
class Header:
    """One checked safetensors file; ``sha256`` is that of the length and header bytes."""

    path: Path
    file_bytes: int
    mtime_ns: int
    sha256: str
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]  # by offset


def read_header(path: Path | str) -> Header:
    """Read and check the header of one safetensors file.

    Raises CheckpointError naming the file, tensor and field, what was expected and found, and what
    to do.
    """
    path = Path(path)
    try:
        # O_NONBLOCK: a named pipe must not hang us; regular files ignore it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be opened: {reason}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            _refuse(path, "", "a regular file", "something else", "name a .safetensors file")
        raw = _read_raw(path, descriptor, status.st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: reading the header failed: {error.strerror}") from None
    finally:
        os.close(descriptor)
    metadata, tensors = _parse(path, raw, status.st_size)
    return Header(
        path=path,
        file_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        sha256=hashlib.sha256(raw).hexdigest(),
        metadata=metadata,
        tensors=tensors,
    )


def _refuse(path: Path, where: str, expected: str, found: str, advice: str) -> NoReturn:
    place = f"{path}: {where}" if where else str(path)
    raise CheckpointError(f"{place}: expected {expected}, found {found}; {advice}")


def _read_raw(path: Path, descriptor: int, file_bytes: int) -> bytes:
    """The 8 length bytes and the header, after checking the length."""
    if file_bytes < LENGTH_BYTES:
        _refuse(
            path,
            "",
            "at least 8 bytes",
            f"{file_bytes}",
            f"the file is empty or cut short: {COPY_AGAIN}",
        )
    start = _read_exactly(path, descriptor, LENGTH_BYTES, 0)
    header_bytes = int.from_bytes(start, "little")
    if start == bytes(LENGTH_BYTES):
        raise CheckpointError(
            f"{path}: the first 8 bytes are zero: this is the unfinished output of a merge, whose "
            "length is written last; resume that merge or remove the file"
        )
    hint = next((text for known, text in _KNOWN_STARTS.items() if start.startswith(known)), None)
    if header_bytes > MAX_HEADER_BYTES:
        _refuse(
            path,
            "header length",
            f"at most {MAX_HEADER_BYTES} bytes",
            f"{header_bytes} (first bytes {start!r})",
            hint or f"the file is no safetensors file or is damaged: {COPY_AGAIN}",
        )
    if header_bytes > file_bytes - LENGTH_BYTES:
        _refuse(
            path,
            "header length",
            f"at most the {file_bytes - LENGTH_BYTES} bytes that follow it",
            f"{header_bytes}",
            hint or f"the file is cut short: {COPY_AGAIN}",
        )
    return start + _read_exactly(path, descriptor, header_bytes, LENGTH_BYTES)


def _read_exactly(path: Path, descriptor: int, num_bytes: int, offset: int) -> bytes:
    parts = []
    while num_bytes:
        part = os.pread(descriptor, num_bytes, offset)
        if not part:
            _refuse(
                path, "header", f"{num_bytes} more bytes at byte {offset}", "the end", COPY_AGAIN
            )
        parts.append(part)
        offset += len(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _parse(
    path: Path, raw: bytes, file_bytes: int
) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    text = raw[LENGTH_BYTES:]
    if not text.startswith(b"{"):
        _refuse(path, "header", "a JSON object from its first byte", shown(text[:16]), COPY_AGAIN)
    text = text.rstrip(b" ")
    if not text.endswith(b"}"):
        _refuse(path, "header", "'}' and then only spaces", shown(text[-16:]), COPY_AGAIN)
    try:
        fields = parse_object(text)
    except ValueError as error:
        _refuse(path, "header", "a JSON object", str(error), COPY_AGAIN)
    metadata = _check_metadata(path, fields.pop(METADATA_KEY, {}))
    entries = [_check_tensor(path, name, value, len(raw)) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    _check_cover(path, entries, len(raw), file_bytes)
    return metadata, {entry.name: entry for entry in entries}


def _check_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict):
        _refuse(path, METADATA_KEY, "an object", shown(metadata), SAVE_AGAIN)
    for key, value in metadata.items():
        if not is_text(key) or not is_text(value):
            _refuse(path, f"{METADATA_KEY} {shown(key)}", "a string", shown(value), SAVE_AGAIN)
    return metadata


def _check_tensor(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    where = f"tensor {shown(name)}"
    if not name or not is_text(name):
        _refuse(path, where, "a name that is non-empty UTF-8 text", shown(name), SAVE_AGAIN)
    if not isinstance(value, dict):
        _refuse(path, where, "an object", shown(value), SAVE_AGAIN)
    if value.keys() != TENSOR_KEYS:
        _refuse(
            path,
            where,
            "the fields dtype, shape and data_offsets",
            shown(sorted(value)),
            SAVE_AGAIN,
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    format = FORMATS.get(dtype) if isinstance(dtype, str) else None
    if format is None:
        _refuse(
            path,
            f"{where}, field dtype",
            f"one of {', '.join(FORMATS)}",
            shown(dtype),
            "save the tensor in one of these formats",
        )
    num_bits = _check_shape(path, f"{where}, field shape", shape, format)
    place = f"{where}, field data_offsets"
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(x) is int for x in offsets)
    ):
        _refuse(path, place, "two non-negative integers", shown(offsets), SAVE_AGAIN)
    begin, end = offsets
    if begin > end:
        _refuse(path, place, "begin at or before end", shown(offsets), COPY_AGAIN)
    if num_bits != 8 * (end - begin):
        _refuse(
            path,
            place,
            f"{num_bits} bits for {dtype} {shown(shape)}",
            f"{8 * (end - begin)} bits in {shown(offsets)}",
            COPY_AGAIN,
        )
    return TensorEntry(name, format, tuple(shape), path, data_start + begin, end - begin)


def _check_shape(path: Path, where: str, shape: object, format: Format) -> int:
    """Bits that the tensor takes."""
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        _refuse(path, where, "a list of non-negative integers", shown(shape), SAVE_AGAIN)
    if len(shape) > MAX_DIMENSIONS:
        _refuse(path, where, f"at most {MAX_DIMENSIONS} dimensions", f"{len(shape)}", SAVE_AGAIN)
    # The bound ignores zeros, since readers multiply the other dimensions into strides.
    bound = num_bits = format.bits
    for size in shape:
        num_bits *= size
        bound *= size or 1
        if bound > MAX_BITS:
            _refuse(path, where, f"at most {MAX_BITS} bits in all", shown(shape), COPY_AGAIN)
    return num_bits


def _check_cover(path: Path, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    """The tensors must cover the data without gap, overlap or rest."""
    position, previous = data_start, "the header"
    for entry in entries:
        if entry.offset != position:
            kind = "a gap" if entry.offset > position else "an overlap"
            _refuse(
                path,
                f"tensor {shown(entry.name)}, field data_offsets",
                f"data from byte {position - data_start}, where {previous} ends",
                f"{kind}: it begins at {entry.offset - data_start}",
                COPY_AGAIN,
            )
        position, previous = entry.offset + entry.num_bytes, f"tensor {shown(entry.name)}"
    if position > file_bytes:
        _refuse(
            path,
            previous,
            f"a file of {position} bytes",
            f"{file_bytes} bytes, {position - file_bytes} missing",
            f"the file is cut short: {COPY_AGAIN}",
        )
    if position < file_bytes:
        _refuse(
            path,
            "",
            f"the file to end at byte {position} with {previous}",
            f"{file_bytes - position} bytes after it",
            COPY_AGAIN,
        )

"""Safetensors files written by hand, so that no code under test makes its own input."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

BYTES = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
}


def pack(header: str | bytes | Mapping[str, Any], data: bytes = b"") -> bytes:
    if isinstance(header, Mapping):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def pack_tensors(
    tensors: Mapping[str, tuple[str, list[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A valid file with recognisable bytes as data."""
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape) in tensors.items():
        num_bytes = BYTES[dtype]
        for size in shape:
            num_bytes *= size
        fields[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, position + num_bytes],
        }
        position += num_bytes
    return pack(fields, bytes(i * 37 % 251 for i in range(position)))


@pytest.fixture(scope="session")
def packed() -> Callable[..., bytes]:
    return pack


@pytest.fixture(scope="session")
def packed_tensors() -> Callable[..., bytes]:
    return pack_tensors


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str, bytes | Mapping[str, Any] | list[Any]], Path]:
    """Writes bytes, or an object as JSON, to a file below tmp_path."""

    def write(name: str, content: bytes | Mapping[str, Any] | list[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write

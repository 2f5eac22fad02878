"""Where every output byte goes: shards, headers and offsets, known before any is computed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pymerge.checkpoint.header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    METADATA_KEY,
)
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import PlanError
from pymerge.formats import Format

#: What the files beside a model are called.
TASKS_STEM = "tasks"
TASKS_FILE = re.compile(rf"{TASKS_STEM}(-\d+-of-\d+)?\.safetensors")
#: A folder of measurements in that of a model, and what describes them; not part of the model.
STATISTICS_FOLDER = "pymerge-statistics"
STATISTICS_NAME = "statistics.json"
STATISTICS_FILES = ("gram.safetensors", "fisher.safetensors")
#: Data begins at a multiple of this, so that tensors of whole pages are page-aligned in the file.
PAGE_BYTES = 4096
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output."""

    name: str
    format: Format
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        num_bits = math.prod(self.shape) * self.format.bits
        if num_bits % 8:
            raise PlanError(
                f"output tensor {shown(self.name)}: expected whole bytes, found {num_bits} bits "
                f"for {self.format.name} {shown(self.shape)}; copy it from a model where it fills "
                "whole bytes"
            )
        return num_bits // 8


@dataclass(frozen=True)
class ShardLayout:
    """One output file of ``num_bytes``: ``header`` (length and JSON), then the tensors' data.

    ``tensors`` maps names to (offset from the start of the file, bytes) in data order.
    """

    file_name: str
    header: bytes
    num_bytes: int
    tensors: dict[str, tuple[int, int]]

    @property
    def payload_bytes(self) -> int:
        return self.num_bytes - len(self.header)


def encode_header(tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    """Length bytes and JSON of a file that holds ``tensors`` in this order, padded to whole pages.

    Raises PlanError where the header is larger than readers accept.
    """
    fields: dict[str, object] = {METADATA_KEY: dict(metadata)}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        fields[tensor.name] = {
            "dtype": tensor.format.name,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    padded = -(len(text) + LENGTH_BYTES) % PAGE_BYTES + len(text)
    if padded > MAX_HEADER_BYTES:
        raise PlanError(
            f"output shard: expected a header of at most {MAX_HEADER_BYTES} bytes, found {padded} "
            f"for {len(tensors)} tensors; choose a smaller shard size"
        )
    return padded.to_bytes(LENGTH_BYTES, "little") + text.ljust(padded, b" ")


def plan_shards(
    tensors: Sequence[OutputTensor], shard_bytes: int, stem: str = "model"
) -> list[ShardLayout]:
    """Cut the tensors, in order, into files of at most ``shard_bytes`` payload; 0 means one file.

    A tensor larger than that gets a file of its own. Raises PlanError for no tensors, a name given
    twice or a negative size.
    """
    if shard_bytes < 0:
        raise PlanError(f"shard size: expected 0 (one file) or more bytes, found {shard_bytes}")
    if not tensors:
        raise PlanError(
            "output: expected at least one tensor, found none; check the recipe's models"
        )
    names: set[str] = set()
    groups: list[list[OutputTensor]] = [[]]
    payload = 0
    for tensor in tensors:
        if tensor.name in names:
            raise PlanError(f"output tensor {shown(tensor.name)}: expected once, found twice")
        names.add(tensor.name)
        if groups[-1] and 0 < shard_bytes < payload + tensor.num_bytes:
            groups.append([])
            payload = 0
        groups[-1].append(tensor)
        payload += tensor.num_bytes
    return [_lay_out(_file_name(stem, i, len(groups)), group) for i, group in enumerate(groups)]


def index_json(shards: Sequence[ShardLayout]) -> bytes:
    """The text of model.safetensors.index.json."""
    index = {
        "metadata": {"total_size": sum(shard.payload_bytes for shard in shards)},
        "weight_map": {name: shard.file_name for shard in shards for name in shard.tensors},
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _file_name(stem: str, shard: int, num_shards: int) -> str:
    if num_shards == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{shard + 1:05d}-of-{num_shards:05d}.safetensors"


def _lay_out(file_name: str, tensors: Sequence[OutputTensor]) -> ShardLayout:
    header = encode_header(tensors, METADATA)
    position = len(header)
    places = {}
    for tensor in tensors:
        places[tensor.name] = (position, tensor.num_bytes)
        position += tensor.num_bytes
    return ShardLayout(file_name, header, position, places)

"""A plan: everything a merge will do, decided before the first tensor byte is read. Pure data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pymerge.checkpoint import Checkpoint, ShardLayout, TensorEntry
from pymerge.formats import Format
from pymerge.methods.protocol import Method, Tensor
from pymerge.methods.spec import ParameterValue
from pymerge.ops.opset import OpSet

#: Part of the plan's hash: raised when the same plan would give other bytes.
NUMERICS_VERSION = 1

#: What the process takes before it holds any tensor.
IDLE_BYTES = 72 << 20


@dataclass(frozen=True)
class Job:
    """One output tensor: its sources, its parameters and its exact place in the output.

    ``kind`` is ``copy`` where bytes move or are only converted to ``format``, and ``merge`` where
    the method computes. ``offset`` is absolute in shard number ``shard``.
    """

    name: str
    kind: Literal["copy", "merge"]
    shape: tuple[int, ...]
    format: Format
    base: TensorEntry | None
    models: tuple[TensorEntry, ...]
    model_names: tuple[str, ...]
    parameters: Mapping[str, ParameterValue]
    model_parameters: tuple[Mapping[str, ParameterValue], ...]
    shard: int
    offset: int
    num_bytes: int

    @property
    def sources(self) -> tuple[TensorEntry, ...]:
        """Every tensor that is read, the base first, each once even if it is named twice."""
        entries = (self.base, *self.models) if self.base is not None else self.models
        return tuple({(entry.file, entry.offset): entry for entry in entries}.values())

    @property
    def num_elements(self) -> int:
        return self.sources[0].num_elements

    @property
    def source_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.sources)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of the widest array that the job holds (bits of sub-byte formats
        are rounded up: such tensors are copied whole bytes at a time)."""
        widest = max((self.format, *(entry.format for entry in self.sources)), key=_bits)
        return max(1, widest.bits // 8)

    def tensor(self, ops: OpSet, state: Any = None) -> Tensor:
        """The method's view of this job."""
        return Tensor(
            name=self.name,
            shape=self.shape,
            num_models=len(self.models),
            has_base=self.base is not None,
            parameters=self.parameters,
            model_parameters=self.model_parameters,
            ops=ops,
            model_names=self.model_names,
            state=state,
        )


def _bits(format: Format) -> int:
    return format.bits


@dataclass(frozen=True)
class Tiling:
    """How memory is cut: ``num_blocks`` blocks of ``block_bytes`` are all that data ever
    occupies."""

    memory: int
    overhead: int
    block_bytes: int
    num_blocks: int
    threads: int
    readers: int

    @property
    def arena_bytes(self) -> int:
        return self.block_bytes * self.num_blocks

    #: Spare bytes of a block, for reads that must begin and end at a device's alignment.
    SLACK = 8192

    def tile_elements(self, job: Job) -> int:
        """Elements of one tile of the job: what fits in one block in its widest format."""
        fit = (self.block_bytes - self.SLACK) // job.element_bytes
        return max(1, fit - fit % 4096 if fit >= 4096 else fit)

    def num_tiles(self, job: Job) -> int:
        if job.kind == "copy" and not job_converts(job):  # elements may be smaller than a byte
            return -(-job.num_bytes // (self.tile_elements(job) * job.element_bytes))
        return -(-job.num_elements // self.tile_elements(job))

    def streamed_blocks(self, job: Job) -> int:
        """Blocks that one tile of the job needs while it passes through."""
        return 1 if job.kind == "copy" and not job_converts(job) else len(job.sources) + 1

    def resident_blocks(self, job: Job) -> int:
        """Blocks that hold all inputs of the job, and outputs for each compute thread."""
        tiles = self.num_tiles(job)
        return tiles * len(job.sources) + min(tiles, self.threads + 1)

    def is_resident(self, job: Job) -> bool:
        return self.resident_blocks(job) <= self.num_blocks


def job_converts(job: Job) -> bool:
    """Whether a copy changes the format."""
    return job.sources[0].format != job.format


@dataclass(frozen=True)
class Plan:
    """What a merge does: jobs in order, the output's exact layout, memory, backends.

    Raised errors belong to making it; a plan that exists can be run.
    """

    recipe_text: str
    method: Method
    checkpoints: Mapping[str, Checkpoint]
    donor: Checkpoint
    tokenizer_donor: Checkpoint
    jobs: tuple[Job, ...]
    shards: tuple[ShardLayout, ...]
    config: Mapping[str, Any] | None
    tiling: Tiling
    ops: OpSet
    model_wide: bool
    warnings: tuple[str, ...] = ()
    dropped: tuple[str, ...] = field(default=())

    @cached_property
    def looks(self) -> dict[str, int]:
        """How often the sources of each merge job are read from storage."""
        times: dict[str, int] = {}
        for job in self.jobs:
            if job.kind == "copy":
                times[job.name] = 1
                continue
            looks = 0 if self.model_wide else self.method.looks(job.tensor(self.ops))
            again = 0 if self.tiling.is_resident(job) else looks
            times[job.name] = 1 + again + (self.method.model_looks if self.model_wide else 0)
        return times

    @property
    def bytes_read(self) -> int:
        """Bytes that will be read from the sources, repeated looks included."""
        return sum(job.source_bytes * self.looks[job.name] for job in self.jobs)

    @property
    def bytes_written(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def streamed(self) -> tuple[Job, ...]:
        """Jobs that are read more than once because their inputs exceed the memory."""
        return tuple(job for job in self.jobs if self.looks[job.name] > 1)

    @property
    def peak_memory(self) -> int:
        """Estimated peak resident bytes of the whole process."""
        tiling, block = self.tiling, self.tiling.block_bytes
        widest = max((tiling.streamed_blocks(job) for job in self.jobs), default=0)
        flying = widest * (tiling.threads + tiling.readers + 1) * block
        resident = sum(
            sorted((job.source_bytes for job in self.jobs if self._is_held(job)), reverse=True)[:2]
        )
        everything = sum(job.source_bytes + job.num_bytes for job in self.jobs)
        return IDLE_BYTES + min(tiling.arena_bytes, everything, max(flying, resident))

    def _is_held(self, job: Job) -> bool:
        """Whether the inputs of a job stay in memory between the looks at them."""
        measured = job.kind == "merge" and not self.model_wide
        return (
            measured
            and self.method.looks(job.tensor(self.ops)) > 0
            and self.tiling.is_resident(job)
        )

    @cached_property
    def hash(self) -> str:
        """Identity of the merge: equal hashes give equal bytes, whatever the memory and threads."""
        digest = hashlib.sha256()

        def add(*values: Any) -> None:
            digest.update(json.dumps(values, sort_keys=True, default=str).encode())
            digest.update(b"\n")

        add("numerics", NUMERICS_VERSION, self.method.spec.name, self.recipe_text)
        files: dict[str, int] = {}
        for name, checkpoint in self.checkpoints.items():
            for header in checkpoint.headers:
                files.setdefault(str(header.path), len(files))
                add(name, header.path.name, header.file_bytes, header.mtime_ns, header.sha256)
        for shard in self.shards:
            add(shard.file_name, hashlib.sha256(shard.header).hexdigest(), shard.num_bytes)
        for job in self.jobs:
            sources = [(files[str(s.file)], s.offset) for s in _all_sources(job)]
            add(job.name, job.kind, sources, dict(job.parameters))
            add([dict(values) for values in job.model_parameters])
        add(self.config)
        return digest.hexdigest()


def _all_sources(job: Job) -> Sequence[TensorEntry]:
    return job.models if job.base is None else (job.base, *job.models)

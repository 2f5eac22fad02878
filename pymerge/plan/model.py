"""A plan: everything a merge will do, decided before the first tensor byte is read. Pure data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pymerge.checkpoint import (
    AdapterTensor,
    Checkpoint,
    DerivedTensor,
    Header,
    ShardLayout,
    TensorEntry,
    entries_within,
)
from pymerge.formats import F32, Format
from pymerge.methods.numerics import Numerics
from pymerge.methods.protocol import NO_COST, SPAN, Cost, Description, Method, Store, Tensor
from pymerge.methods.spec import ParameterValue
from pymerge.ops import device
from pymerge.ops.opset import OpSet
from pymerge.ops.workspace import Workspace

#: Part of the plan's hash: raised when the same plan would give other bytes.
NUMERICS_VERSION = 2

#: What the process takes before it holds any tensor.
IDLE_BYTES = 72 << 20
#: What torch takes beside, with the buffers of its BLAS, where matrices are computed.
TORCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Part:
    """A further output of a job and its exact place: ``rows`` rows of ``bits`` an element of the
    job's tensor, each beginning with a byte; or, with no rows, a tensor of any shape that the
    method gives as a whole. ``suffix`` is what its name has beside the job's."""

    name: str
    format: Format
    shape: tuple[int, ...]
    rows: int
    bits: int
    suffix: str
    shard: int = 0
    offset: int = 0
    num_bytes: int = 0

    @property
    def is_whole(self) -> bool:
        return self.rows == 0


@dataclass(frozen=True)
class Piece:
    """A job's place in a tensor that several jobs write: ``number`` of ``count`` equal parts along
    the first dimension, in order."""

    tensor: str
    number: int
    count: int


@dataclass(frozen=True)
class Inputs:
    """What a look at a job's tiles reads: some of its tensors."""

    base: TensorEntry | None
    models: tuple[TensorEntry, ...]
    diagonals: tuple[TensorEntry, ...] = ()

    @cached_property
    def sources(self) -> tuple[TensorEntry, ...]:
        """Every tensor that is read, the base first, each once even if it is named twice."""
        entries = (*self._weights, *self.diagonals)
        return tuple({entry.key: entry for entry in entries}.values())

    @cached_property
    def updates(self) -> tuple[AdapterTensor, ...]:
        """The sources that an adapter's update is put on, in float32, each once."""
        found = (e for e in self._weights if isinstance(e, AdapterTensor) and e.update)
        return tuple(dict.fromkeys(found))

    @cached_property
    def num_arrays(self) -> int:
        """Arrays of a tile: what is read, what updates make of it, and what making a derived tensor
        takes."""
        derived = (each.scratch_blocks for each in self.sources if isinstance(each, DerivedTensor))
        return len(self.sources) + len(self.updates) + max(derived, default=0)

    @property
    def _weights(self) -> tuple[TensorEntry, ...]:
        return self.models if self.base is None else (self.base, *self.models)


@dataclass(frozen=True)
class Job:
    """One output tensor: its sources, its parameters and its exact place in the output.

    ``kind`` is ``copy`` where bytes move or are only converted to ``format``, and ``merge`` where
    the method computes. ``offset`` is absolute in shard number ``shard``. ``granule`` is the number
    of elements that every tile holds a multiple of. ``parts`` are what the method puts beside it.
    ``cost`` is what its matrices take. ``transposed`` says that it is stored as [inputs, outputs].
    ``statistics`` are what was collected beside each model for it, or nothing, and
    ``statistic_numbers`` the number that goes with each. ``siblings`` are the shapes of its
    module's tensors. ``working`` is the format that the recipe computes in (``dtype``, else the
    promotion of the inputs'). ``piece`` is the part of a tensor that it is, where it is not all of
    one: then the name is that of the tensor with the number behind it.
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
    model_numbers: tuple[int, ...] = ()
    granule: int = 1
    parts: tuple[Part, ...] = ()
    cost: Cost = NO_COST
    transposed: bool = False
    statistics: tuple[TensorEntry, ...] = ()
    statistic_numbers: tuple[float, ...] = ()
    siblings: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    working: Format = F32
    piece: Piece | None = None

    @property
    def tensor_name(self) -> str:
        """The name of the tensor in the output."""
        return self.name if self.piece is None else self.piece.tensor

    @property
    def is_later_piece(self) -> bool:
        """Whether another job writes the beginning of its tensor."""
        return self.piece is not None and self.piece.number > 0

    def inputs(self, models: tuple[int, ...] | None = None) -> Inputs:
        """What a look reads: everything, or the base and the models of these indices alone."""
        if models is None:
            return self._everything
        return Inputs(self.base, tuple(self.models[index] for index in models))

    @cached_property
    def _everything(self) -> Inputs:
        return Inputs(self.base, self.models, self.diagonals)

    @cached_property
    def sources(self) -> tuple[TensorEntry, ...]:
        """Every tensor that tiles are read from, each once."""
        return self.inputs().sources

    @cached_property
    def updates(self) -> tuple[AdapterTensor, ...]:
        """The sources that an adapter's update is put on."""
        return self.inputs().updates

    @property
    def num_inputs(self) -> int:
        """Arrays of a tile of everything."""
        return self.inputs().num_arrays

    @property
    def diagonals(self) -> tuple[TensorEntry, ...]:
        """Statistics of the tensor's own shape: they are read along with it."""
        return tuple(entry for entry in self.statistics if entry.shape == self.shape)

    @property
    def update_bytes(self) -> int:
        """Bytes that the matrices of the updates take in memory."""
        return sum(entry.update.num_bytes for entry in self.updates if entry.update)

    @property
    def once_bytes(self) -> int:
        """Bytes that are read once beside the tiles: statistics, the adapters' tensors, and weights
        whose norms are measured."""
        total = sum(each.num_bytes for each in self.statistics) if not self.diagonals else 0
        for entry in self.updates:
            if entry.update is not None:
                total += sum(each.num_bytes for each in entry.update.entries)
                total += entry.num_bytes if entry.update.magnitude is not None else 0
        return total

    @cached_property
    def input_bytes(self) -> int:
        """Bytes of all arrays of the job's inputs."""
        arrays = sum(entry.num_bytes for entry in self.sources)
        return arrays + len(self.updates) * self.num_elements * F32.num_bytes

    @property
    def num_elements(self) -> int:
        return self.sources[0].num_elements

    @property
    def source_bytes(self) -> int:
        """Bytes that one look reads."""
        return sum(entry.read_bytes for entry in self.sources)

    @property
    def output_bytes(self) -> int:
        return self.num_bytes + sum(part.num_bytes for part in self.parts)

    @cached_property
    def output_blocks(self) -> int:
        """Blocks that hold the outputs of one tile: one for the tensor, others for its parts."""
        return 1 + sum(-(-part.rows // self.rows_of_block(part)) for part in self.parts)

    def rows_of_block(self, part: Part) -> int:
        """How many rows of a part one block holds."""
        return 8 * self.element_bytes // part.bits

    @cached_property
    def element_bytes(self) -> int:
        """Bytes of one element of the widest array that the job holds (bits of sub-byte formats
        are rounded up: such tensors are copied whole bytes at a time)."""
        read = (each.format for entry in self.sources for each in entries_within(entry))
        widest = max((self.format, *read), key=_bits)
        return max(1, widest.bits // 8, F32.num_bytes if self.updates else 1)

    def tensor(
        self,
        ops: OpSet,
        state: Any = None,
        workspace: Workspace | None = None,
        store: Store | None = None,
    ) -> Tensor:
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
            model_numbers=self.model_numbers,
            input_names=tuple(
                entry.name for entry in (self.base, *self.models) if entry is not None
            ),
            state=state,
            transposed=self.transposed,
            statistics=self.statistic_numbers,
            format=self.format,
            working=self.working,
            siblings=self.siblings,
            workspace=workspace,
            store=store,
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
    #: Bytes for the matrices of adapters in use, part of the overhead.
    update_bytes: int = 0
    #: Bytes for the matrices that methods compute with, part of the overhead.
    matrix_bytes: int = 0
    #: Threads that have room for the panels of matrices.
    matrix_threads: int = 1

    @property
    def arena_bytes(self) -> int:
        return self.block_bytes * self.num_blocks

    #: Spare bytes of a block, for reads that must begin and end at a device's alignment.
    SLACK = 8192

    def tile_elements(self, job: Job) -> int:
        """Elements of one tile of the job: what fits in one block in its widest format, in whole
        spans or the job's granules."""
        fit = (self.block_bytes - self.SLACK) // job.element_bytes
        granule = SPAN if job.granule == 1 else job.granule
        # The plan gives a block room for a granule; only a test makes smaller ones.
        return max(1, fit - fit % granule if fit >= granule else fit)

    def num_tiles(self, job: Job) -> int:
        if job.kind == "copy" and not job_converts(job):  # elements may be smaller than a byte
            return -(-job.num_bytes // (self.tile_elements(job) * job.element_bytes))
        return -(-job.num_elements // self.tile_elements(job))

    def tiles_within(self, job: Job, within: tuple[int, int] | None) -> range:
        """The tiles that hold elements of a run (first, number), all without one."""
        if within is None:
            return range(self.num_tiles(job))
        first, num = within
        size = self.tile_elements(job)
        return range(first // size, -(-(first + num) // size))

    def streamed_blocks(self, job: Job) -> int:
        """Blocks that one tile of the job needs while it passes through."""
        if job.kind == "copy" and not job_converts(job):
            return 1
        return job.num_inputs + job.output_blocks

    def resident_blocks(self, job: Job) -> int:
        """Blocks that hold all inputs of the job, and outputs for each compute thread."""
        tiles = self.num_tiles(job)
        return tiles * job.num_inputs + min(tiles, self.threads + 1) * job.output_blocks

    def is_resident(self, job: Job) -> bool:
        return self.resident_blocks(job) <= self.num_blocks


def job_converts(job: Job) -> bool:
    """Whether a copy changes the bytes."""
    source = job.sources[0]
    return bool(job.updates) or isinstance(source, DerivedTensor) or source.format != job.format


@dataclass(frozen=True)
class Plan:
    """What a merge does: jobs in order, the output's exact layout, memory, backends.

    The last ``num_task_shards`` shards hold the parts beside the model. ``statistics`` are the
    files collected beside the models that the method reads, by model.

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
    numerics: Numerics = "accurate"
    warnings: tuple[str, ...] = ()
    dropped: tuple[str, ...] = field(default=())
    num_task_shards: int = 0
    statistics: Mapping[str, Header] = field(default_factory=dict)
    #: Files beside the weights that are not as in a donor's folder, by name.
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def headers(self) -> tuple[Header, ...]:
        """The files that are read, those of statistics among them, each once."""
        found = {h.path: h for c in self.checkpoints.values() for h in c.headers}
        return tuple({**found, **{h.path: h for h in self.statistics.values()}}.values())

    @cached_property
    def jobs_of_tensors(self) -> dict[str, tuple[Job, ...]]:
        """The jobs of each output tensor, in order: one, or its pieces."""
        found: dict[str, list[Job]] = {}
        for job in self.jobs:
            found.setdefault(job.tensor_name, []).append(job)
        return {name: tuple(jobs) for name, jobs in found.items()}

    @property
    def num_tensors(self) -> int:
        """Tensors of the output."""
        return len(self.jobs_of_tensors)

    @property
    def model_shards(self) -> tuple[ShardLayout, ...]:
        """The shards that a loader of the model reads."""
        return self.shards[: len(self.shards) - self.num_task_shards]

    @property
    def task_shards(self) -> tuple[ShardLayout, ...]:
        return self.shards[len(self.model_shards) :]

    @property
    def description(self) -> Description | None:
        """The file that describes what stands beside the model; usually nothing does."""
        return self.method.description if self.num_task_shards else None

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The models that something beside the output is of, in order; usually none."""
        return tuple(dict.fromkeys(n for job in self.jobs if job.parts for n in job.model_names))

    @cached_property
    def looks(self) -> dict[str, float]:
        """How often the sources of each merge job are read from storage."""
        times: dict[str, float] = {}
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
        read = (job.source_bytes * self.looks[job.name] + job.once_bytes for job in self.jobs)
        return round(sum(read))

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
            sorted((job.input_bytes for job in self.jobs if self._is_held(job)), reverse=True)[:2]
        )
        everything = sum(job.input_bytes + job.output_bytes for job in self.jobs)
        held = min(tiling.arena_bytes, everything, max(flying, resident))
        libraries = TORCH_BYTES if tiling.matrix_bytes else 0
        return IDLE_BYTES + libraries + held + tiling.update_bytes + tiling.matrix_bytes

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
        if self.numerics != "accurate":
            add("numerics", self.numerics)
        files: dict[str, int] = {}
        named = [(name, h) for name, c in self.checkpoints.items() for h in c.headers]
        for name, header in (*named, *self.statistics.items()):
            files.setdefault(str(header.path), len(files))
            add(name, header.path.name, header.file_bytes, header.mtime_ns, header.sha256)
        for shard in self.shards:
            add(shard.file_name, hashlib.sha256(shard.header).hexdigest(), shard.num_bytes)
        for job in self.jobs:
            sources = [_identity(files, s) for s in _all_sources(job)]
            add(job.name, job.kind, sources, dict(job.parameters))
            add([dict(values) for values in job.model_parameters], job.model_numbers)
            if job.statistics:
                add([_identity(files, s) for s in job.statistics], job.statistic_numbers)
        if any(job.cost.num_bytes for job in self.jobs):
            # Products of matrices are not the same to the bit there.
            add("matrices", sorted(map(device.memory_of, set(self.ops.backends.values()))))
        add(self.config)
        return digest.hexdigest()


def _identity(files: Mapping[str, int], entry: TensorEntry) -> tuple[Any, ...]:
    """Where a source lies and what is done to it."""
    if isinstance(entry, DerivedTensor):
        parts = [_identity(files, each) for each in entry.stored]
        return (type(entry).__name__, list(entry.shape), parts, entry.fingerprint())
    place = (files[str(entry.file)], entry.offset)
    if not isinstance(entry, AdapterTensor) or entry.update is None:
        return place
    update = entry.update
    matrices = [(files[str(each.file)], each.offset) for each in update.entries]
    return (*place, matrices, update.rank, update.scale, update.transposed)


def _all_sources(job: Job) -> Sequence[TensorEntry]:
    return job.models if job.base is None else (job.base, *job.models)

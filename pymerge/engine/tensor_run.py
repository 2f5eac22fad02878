"""Run one job: bring its tiles into memory, let the method measure and decide, apply tile by tile.

A tensor whose inputs fit in the budget is *resident*: its blocks are taken at once, each tile is
read when it is first looked at and stays until the tensor is done. A larger one is *streamed*: each
look reads the tiles again.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge import _C
from pymerge.checkpoint import TensorEntry
from pymerge.engine.batch import Batch
from pymerge.engine.context import Context
from pymerge.engine.gather import gather
from pymerge.engine.loader import TileLoader
from pymerge.engine.rows import Written, by_output, record_of, rows_of
from pymerge.errors import PymergeError
from pymerge.methods.protocol import (
    Applied,
    Apply,
    Factors,
    Folded,
    Measure,
    Question,
    Solve,
    Tensor,
    Tile,
    answer,
    decide,
)
from pymerge.ops.view import View
from pymerge.plan import Inputs, Job, Part
from pymerge.plan.model import job_converts


class TensorRun:
    """One job in progress."""

    def __init__(
        self,
        context: Context,
        job: Job,
        *,
        state: Any = None,
        may_stay: bool = True,
        batch: Batch | None = None,
    ) -> None:
        self.context = context
        self.job = job
        self.tensor = job.tensor(context.ops, state)
        self._state = state
        self._device: str | None = None
        tiling = context.plan.tiling
        self._loader = TileLoader(context, job)
        self.num_tiles = self._loader.num_tiles
        self._sink = context.output if batch is None else batch
        self._submit = context.run_now if context.is_small(job) else context.submit
        looks = 0 if job.kind == "copy" else context.plan.method.looks(self.tensor)
        self.resident = may_stay and looks > 0 and tiling.is_resident(job)
        self._loaded: list[Tile | None] = [None] * self.num_tiles
        self._inputs: list[int] = []
        self._outputs: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        self._values: Callable[[Sequence[Any]], list[float]] | None = None
        self._wholes: Mapping[str, NDArray[np.generic]] = {}
        self._warnings: list[str] = []

    def run(self) -> None:
        """Compute and write the job's tensor, then journal it."""
        with self._held():
            self._run()

    def explore(self, questions: Callable[[Tensor], Generator[Any, Any, Any]]) -> Any:
        """Answer a generator of questions about the tensor; nothing is written."""
        with self._held():
            return answer(questions(self.tensor), self.ask)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """What the job needs beside its blocks."""
        context = self.context
        context.updates.hold(self.job)
        try:
            with context.matrices.hold(self.job) as workspace:
                if workspace is not None:
                    self._device = workspace.name
                    self.tensor = self.job.tensor(
                        context.ops, self._state, workspace, context.matrices.store
                    )
                yield
        finally:
            self.tensor = self.job.tensor(context.ops, self._state)
            context.updates.release(self.job)

    def _run(self) -> None:
        if not self.resident:
            self._finish(self._write_all())
            return
        num_inputs = self.num_tiles * self.job.num_inputs
        blocks = self.context.pool.acquire(self.context.plan.tiling.resident_blocks(self.job))
        try:
            self._inputs = blocks[:num_inputs]
            width = self.job.output_blocks
            for first in range(num_inputs, len(blocks), width):
                self._outputs.put(blocks[first : first + width])
            self._finish(self._write_all())
        finally:
            self.context.pool.release(blocks)

    def ask(self, question: Question) -> Any:
        """Answer one question of the method."""
        if isinstance(question, Measure):
            return self.measure(question)
        if isinstance(question, Solve):
            with (
                self.context.events.stage("solve", self.job.name, 0),
                self.tensor.room.active(),
            ):
                return self._solve(question)
        if isinstance(question, Factors):
            return self.context.updates.factors(self.job)
        return self._statistic(self.job.statistics[question.model])

    def _solve(self, question: Solve) -> Any:
        """Do the work; an objection names the tensor."""
        try:
            return question.run()
        except PymergeError as error:
            if self.job.name in str(error):
                raise
            raise type(error)(f"tensor {self.job.name!r}: {error}") from error

    def measure(self, question: Measure) -> Any:
        """Answer one look of the method."""
        self._settle()
        tiles: Iterable[int] = (question.only,) if question.only is not None else ()
        if question.only is None:
            tiles = self.context.plan.tiling.tiles_within(self.job, question.within)
        models = question.models
        if question.ordered:
            return [gather([self.submit_look(i, question.run, models)])[0] for i in tiles]
        if question.fold is None:
            return gather(self.submit_look(i, question.run, models) for i in tiles)
        total = Folded(question.run, question.fold)
        gather(self.submit_look(i, total.add, models) for i in tiles)
        return total.value

    def _settle(self) -> None:
        """Tiles work on the workspace's tensors in streams of their own."""
        if self.tensor.workspace is not None:
            self.tensor.workspace.settle()

    def _statistic(self, entry: TensorEntry) -> Any:
        """What was collected, read through a block; a resident job, which holds blocks and must not
        wait for more, has one of its outputs' free while it decides."""
        if not self.resident:
            return self.context.updates.read(self.job, entry)
        blocks = self._outputs.get()
        try:
            return self.context.updates.read(self.job, entry, blocks[0])
        finally:
            self._outputs.put(blocks)

    def submit_look(
        self, index: int, run: Callable[[Tile], Any], models: tuple[int, ...] | None = None
    ) -> Future[Any]:
        """Start a look at one tile; waits here for its blocks."""
        if self.resident:
            return self._submit(self._look_resident, index, run, models)
        inputs = self.job.inputs(models)
        blocks = self.context.acquire_tile(inputs.num_arrays)
        return self._submit(self._look_streamed, index, run, inputs, blocks)

    def _look_resident(
        self, index: int, run: Callable[[Tile], Any], models: tuple[int, ...] | None
    ) -> Any:
        tile = self._resident_tile(index)
        return self._look(index, tile.of_models(models), run, self.job.inputs(models))

    def _look_streamed(
        self, index: int, run: Callable[[Tile], Any], inputs: Inputs, blocks: list[int]
    ) -> Any:
        try:
            return self._look(index, self._loader.read_tile(index, blocks, inputs), run, inputs)
        finally:
            self.context.release_tile(blocks)

    def _look(self, index: int, tile: Tile, run: Callable[[Tile], Any], inputs: Inputs) -> Any:
        with (
            self.context.computing(self.job.name, self._loader.tile_bytes(index, inputs)),
            self.context.here(tile, device=self._device) as (there, _),
        ):
            return run(there)

    def _write_all(self) -> list[Written]:
        """Apply to every tile; what each gave, in tile order."""
        if self.job.kind == "copy":
            apply = Apply(lambda tile, out: self.context.ops.convert(out, tile.models[0]))
            if not job_converts(self.job):
                return self._submit_all(self._copy_tile, 1)
        else:
            tensor = replace(self.tensor, warn=self._warnings.append)
            apply = decide(self.context.plan.method, tensor, self.ask)
            self._settle()
        self._values, self._wholes = apply.values, apply.wholes
        if self.resident:
            return gather(
                self._submit(self._apply_resident, index, apply) for index in range(self.num_tiles)
            )
        inputs = self.job.inputs(apply.models)
        num_blocks = inputs.num_arrays + self.job.output_blocks
        return self._submit_all(self._apply_streamed, num_blocks, apply, inputs)

    def _submit_all(self, task: Callable[..., Any], num_blocks: int, *args: Any) -> list[Any]:
        acquire, submit = self.context.acquire_tile, self._submit
        return gather(
            submit(task, index, acquire(num_blocks), *args) for index in range(self.num_tiles)
        )

    def _apply_resident(self, index: int, apply: Apply) -> Written:
        tile = self._resident_tile(index).of_models(apply.models)
        blocks = self._outputs.get()
        try:
            return self._apply(index, tile, apply, blocks, self.job.inputs(apply.models))
        finally:
            self._outputs.put(blocks)

    def _apply_streamed(
        self, index: int, blocks: list[int], apply: Apply, inputs: Inputs
    ) -> Written:
        try:
            tile = self._loader.read_tile(index, blocks, inputs)
            return self._apply(index, tile, apply, blocks[inputs.num_arrays :], inputs)
        finally:
            self.context.release_tile(blocks)

    def _apply(
        self, index: int, tile: Tile, apply: Apply, blocks: list[int], inputs: Inputs
    ) -> Written:
        job = self.job
        rows = rows_of(job, tile.start, tile.num, blocks)
        views = [row.view for row in rows]
        with self.context.computing(job.name, self._loader.tile_bytes(index, inputs)):
            with self.context.here(tile, views, self._device) as (there, outputs):
                found = apply.run(there, *by_output(job, outputs))
            crcs = tuple((_C.crc32c(row.view.ptr, row.num_bytes), row.num_bytes) for row in rows)
        with self.context.events.stage("write", job.name, sum(row.num_bytes for row in rows)):
            for row in rows:
                self._sink.write(row.place, row.first_byte, row.view.ptr, row.num_bytes)
        return Written(crcs, *(found if isinstance(found, Applied) else (found,)))

    def _copy_tile(self, index: int, blocks: list[int]) -> Written:
        """Move bytes without looking at them as numbers, except to count the non-finite ones."""
        entry = self.job.sources[0]
        try:
            first, num_bytes = self._byte_range(index)
            with self.context.events.stage("read", self.job.name, num_bytes):
                address = self._loader.read(entry, first, num_bytes, blocks[0])
            with self.context.computing(self.job.name, num_bytes):
                crc = _C.crc32c(address, num_bytes)
                code, nonfinite = entry.format.code, 0
                if code is not None:
                    nonfinite = self._count_nonfinite(
                        View(address, code, num_bytes // entry.format.num_bytes)
                    )
            with self.context.events.stage("write", self.job.name, num_bytes):
                self._sink.write(self.job, first, address, num_bytes)
            return Written(((crc, num_bytes),), nonfinite)
        finally:
            self.context.release_tile(blocks)

    def _count_nonfinite(self, view: View) -> int:
        with self.context.here(Tile(0, view.num, None, (view,))) as (there, _):
            count: int = self.context.ops.count_nonfinite(there.models[0])
            return count

    def _byte_range(self, index: int) -> tuple[int, int]:
        """Bytes of a copied tile; formats of less than a byte an element are cut at whole bytes."""
        step = self._loader.tile_elements * self.job.element_bytes
        first = index * step
        return first, min(step, self.job.num_bytes - first)

    def _resident_tile(self, index: int) -> Tile:
        tile = self._loaded[index]
        if tile is None:
            width = self.job.num_inputs
            blocks = self._inputs[index * width : (index + 1) * width]
            tile = self._loader.read_tile(index, blocks, self.job.inputs())
            self._loaded[index] = tile
        return tile

    def _finish(self, tiles: list[Written]) -> None:
        values = [] if self._values is None else self._values([tile.measured for tile in tiles])
        wholes = {
            part.name: self._write_whole(part, self._wholes[part.suffix])
            for part in self.job.parts
            if part.is_whole
        }
        record = record_of(self.job, tiles, values, wholes, self._warnings)
        if self._sink.finish(self.job, record):
            self.context.events.tensor_done()

    def _write_whole(self, part: Part, array: NDArray[np.generic]) -> int:
        """Write a part that the method made as a whole; returns the checksum."""
        if array.nbytes != part.num_bytes:
            raise RuntimeError(
                f"{part.name}: the method gave {array.nbytes} bytes, {part.num_bytes} are planned"
            )
        data = np.ascontiguousarray(array)
        if not data.nbytes:
            return 0
        with self.context.events.stage("write", self.job.name, data.nbytes):
            self._sink.write(part, 0, data.ctypes.data, data.nbytes)
        crc: int = _C.crc32c(data.ctypes.data, data.nbytes)
        return crc

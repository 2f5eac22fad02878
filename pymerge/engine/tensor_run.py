"""Run one job: bring its tiles into memory, let the method measure and decide, apply tile by tile.

A tensor whose inputs fit in the budget is *resident*: its blocks are taken at once, each tile is
read when it is first looked at and stays until the tensor is done. A larger one is *streamed*: each
look reads the tiles again.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from pymerge import _C
from pymerge.engine.context import Context
from pymerge.engine.gather import gather
from pymerge.engine.loader import TileLoader
from pymerge.engine.rows import Written, by_output, record_of, rows_of
from pymerge.methods.protocol import Applied, Apply, Folded, Measure, Tile, decide
from pymerge.ops.view import View
from pymerge.plan import Job
from pymerge.plan.model import job_converts


class TensorRun:
    """One job in progress."""

    def __init__(self, context: Context, job: Job, *, state: Any = None, may_stay: bool = True):
        self.context = context
        self.job = job
        self.tensor = job.tensor(context.ops, state)
        tiling = context.plan.tiling
        self._loader = TileLoader(context, job)
        self.num_tiles = self._loader.num_tiles
        looks = 0 if job.kind == "copy" else context.plan.method.looks(self.tensor)
        self.resident = may_stay and looks > 0 and tiling.is_resident(job)
        self._loaded: list[Tile | None] = [None] * self.num_tiles
        self._inputs: list[int] = []
        self._outputs: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        self._values: Callable[[Sequence[Any]], list[float]] | None = None

    def run(self) -> None:
        """Compute and write the job's tensor, then journal it."""
        self.context.updates.hold(self.job)
        try:
            self._run()
        finally:
            self.context.updates.release(self.job)

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

    def measure(self, question: Measure) -> Any:
        """Answer one look of the method."""
        tiles = range(self.num_tiles) if question.only is None else (question.only,)
        if question.ordered:
            return [gather([self.submit_look(index, question.run)])[0] for index in tiles]
        if question.fold is None:
            return gather(self.submit_look(index, question.run) for index in tiles)
        total = Folded(question.run, question.fold)
        gather(self.submit_look(index, total.add) for index in tiles)
        return total.value

    def submit_look(self, index: int, run: Callable[[Tile], Any]) -> Future[Any]:
        """Start a look at one tile; waits here for its blocks."""
        if self.resident:
            return self.context.submit(self._look_resident, index, run)
        blocks = self.context.acquire_tile(self.job.num_inputs)
        return self.context.submit(self._look_streamed, index, run, blocks)

    def _look_resident(self, index: int, run: Callable[[Tile], Any]) -> Any:
        return self._look(index, self._resident_tile(index), run)

    def _look_streamed(self, index: int, run: Callable[[Tile], Any], blocks: list[int]) -> Any:
        try:
            return self._look(index, self._loader.read_tile(index, blocks), run)
        finally:
            self.context.release_tile(blocks)

    def _look(self, index: int, tile: Tile, run: Callable[[Tile], Any]) -> Any:
        with (
            self.context.computing(self.job.name, self._loader.tile_bytes(index)),
            self.context.here(tile) as (there, _),
        ):
            return run(there)

    def _write_all(self) -> list[Written]:
        """Apply to every tile; what each gave, in tile order."""
        if self.job.kind == "copy":
            apply = Apply(lambda tile, out: self.context.ops.convert(out, tile.models[0]))
            if not job_converts(self.job):
                return self._submit_all(self._copy_tile, 1)
        else:
            apply = decide(self.context.plan.method, self.tensor, self.measure)
        self._values = apply.values
        if self.resident:
            return gather(
                self.context.submit(self._apply_resident, index, apply)
                for index in range(self.num_tiles)
            )
        num_blocks = self.job.num_inputs + self.job.output_blocks
        return self._submit_all(self._apply_streamed, num_blocks, apply)

    def _submit_all(self, task: Callable[..., Any], num_blocks: int, *args: Any) -> list[Any]:
        acquire, submit = self.context.acquire_tile, self.context.submit
        return gather(
            submit(task, index, acquire(num_blocks), *args) for index in range(self.num_tiles)
        )

    def _apply_resident(self, index: int, apply: Apply) -> Written:
        tile = self._resident_tile(index)
        blocks = self._outputs.get()
        try:
            return self._apply(index, tile, apply, blocks)
        finally:
            self._outputs.put(blocks)

    def _apply_streamed(self, index: int, blocks: list[int], apply: Apply) -> Written:
        try:
            tile = self._loader.read_tile(index, blocks)
            return self._apply(index, tile, apply, blocks[self.job.num_inputs :])
        finally:
            self.context.release_tile(blocks)

    def _apply(self, index: int, tile: Tile, apply: Apply, blocks: list[int]) -> Written:
        job = self.job
        rows = rows_of(job, tile.start, tile.num, blocks)
        with self.context.computing(job.name, self._loader.tile_bytes(index)):
            with self.context.here(tile, [row.view for row in rows]) as (there, outputs):
                found = apply.run(there, *by_output(job, outputs))
            crcs = tuple((_C.crc32c(row.view.ptr, row.num_bytes), row.num_bytes) for row in rows)
        with self.context.events.stage("write", job.name, sum(row.num_bytes for row in rows)):
            for row in rows:
                self.context.output.write(row.place, row.first_byte, row.view.ptr, row.num_bytes)
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
                self.context.output.write(self.job, first, address, num_bytes)
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
            tile = self._loader.read_tile(index, self._inputs[index * width : (index + 1) * width])
            self._loaded[index] = tile
        return tile

    def _finish(self, tiles: list[Written]) -> None:
        values = [] if self._values is None else self._values([tile.measured for tile in tiles])
        self.context.output.finish(self.job, record_of(self.job, tiles, values))
        self.context.events.tensor_done()

"""Run one job: bring its tiles into memory, let the method measure and decide, apply tile by tile.

A tensor whose inputs fit in the budget is *resident*: its blocks are taken at once, each tile is
read when it is first looked at and stays until the tensor is done. A larger one is *streamed*: each
look reads the tiles again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from pymerge import _C
from pymerge.engine.blocks import Stopped
from pymerge.engine.context import Context
from pymerge.engine.journal import Record
from pymerge.methods.protocol import Apply, Measure, Tile, decide
from pymerge.ops.view import View
from pymerge.plan import Job


class Folded:
    """The running fold of a look: results are combined as they come, not collected."""

    def __init__(self, run: Callable[[Tile], Any], fold: Callable[[Any, Any], Any]) -> None:
        self.value: Any = None
        self._run, self._fold = run, fold
        self._lock = threading.Lock()

    def add(self, tile: Tile) -> None:
        result = self._run(tile)
        with self._lock:
            self.value = result if self.value is None else self._fold(self.value, result)


class TensorRun:
    """One job in progress."""

    def __init__(self, context: Context, job: Job, *, state: Any = None, may_stay: bool = True):
        self.context = context
        self.job = job
        self.tensor = job.tensor(context.plan.ops, state)
        tiling = context.plan.tiling
        self.tile_elements = tiling.tile_elements(job)
        self.num_tiles = tiling.num_tiles(job)
        looks = 0 if job.kind == "copy" else context.plan.method.looks(self.tensor)
        self.resident = may_stay and looks > 0 and tiling.is_resident(job)
        self._loaded: list[Tile | None] = [None] * self.num_tiles
        self._inputs: list[int] = []
        self._outputs: queue.SimpleQueue[int] = queue.SimpleQueue()

    def run(self) -> None:
        """Compute and write the job's tensor, then journal it."""
        if not self.resident:
            self._finish(self._write_all())
            return
        num_inputs = self.num_tiles * len(self.job.sources)
        blocks = self.context.pool.acquire(self.context.plan.tiling.resident_blocks(self.job))
        try:
            self._inputs = blocks[:num_inputs]
            for block in blocks[num_inputs:]:
                self._outputs.put(block)
            self._finish(self._write_all())
        finally:
            self.context.pool.release(blocks)

    def measure(self, question: Measure) -> Any:
        """Answer one look of the method."""
        tiles = range(self.num_tiles) if question.only is None else (question.only,)
        if question.fold is None:
            return gather(self.submit_look(index, question.run) for index in tiles)
        total = Folded(question.run, question.fold)
        gather(self.submit_look(index, total.add) for index in tiles)
        return total.value

    def submit_look(self, index: int, run: Callable[[Tile], Any]) -> Future[Any]:
        """Start a look at one tile; waits here for its blocks."""
        if self.resident:
            return self.context.submit(self._look_resident, index, run)
        blocks = self.context.acquire_tile(len(self.job.sources))
        return self.context.submit(self._look_streamed, index, run, blocks)

    def _look_resident(self, index: int, run: Callable[[Tile], Any]) -> Any:
        tile = self._resident_tile(index)
        with self.context.computing(self.job.name, self._tile_bytes(index)):
            return run(tile)

    def _look_streamed(self, index: int, run: Callable[[Tile], Any], blocks: list[int]) -> Any:
        try:
            tile = self._read_tile(index, blocks)
            with self.context.computing(self.job.name, self._tile_bytes(index)):
                return run(tile)
        finally:
            self.context.release_tile(blocks)

    def _write_all(self) -> list[tuple[int, int, int]]:
        """Apply to every tile; [(crc32c, bytes, non-finite)] in tile order."""
        if self.job.kind == "copy":
            apply = Apply(lambda tile, out: self.context.plan.ops.convert(out, tile.models[0]))
            if self.job.sources[0].format == self.job.format:
                return self._submit_all(self._copy_tile, 1)
        else:
            apply = decide(self.context.plan.method, self.tensor, self.measure)
        if self.resident:
            return gather(
                self.context.submit(self._apply_resident, index, apply)
                for index in range(self.num_tiles)
            )
        return self._submit_all(self._apply_streamed, len(self.job.sources) + 1, apply)

    def _submit_all(self, task: Callable[..., Any], num_blocks: int, *args: Any) -> list[Any]:
        acquire, submit = self.context.acquire_tile, self.context.submit
        return gather(
            submit(task, index, acquire(num_blocks), *args) for index in range(self.num_tiles)
        )

    def _apply_resident(self, index: int, apply: Apply) -> tuple[int, int, int]:
        tile = self._resident_tile(index)
        block = self._outputs.get()
        try:
            return self._apply(index, tile, apply, block)
        finally:
            self._outputs.put(block)

    def _apply_streamed(self, index: int, blocks: list[int], apply: Apply) -> tuple[int, int, int]:
        try:
            tile = self._read_tile(index, blocks)
            return self._apply(index, tile, apply, blocks[-1])
        finally:
            self.context.release_tile(blocks)

    def _apply(self, index: int, tile: Tile, apply: Apply, block: int) -> tuple[int, int, int]:
        code = self.job.format.code
        if code is None:
            raise RuntimeError(f"{self.job.name}: {self.job.format.name} is not computed on")
        out = View(block, code, tile.num)
        num_bytes = tile.num * self.job.format.num_bytes
        with self.context.computing(self.job.name, self._tile_bytes(index)):
            nonfinite = apply.run(tile, out)
            crc = _C.crc32c(block, num_bytes)
        first = tile.start * self.job.format.num_bytes
        with self.context.events.stage("write", self.job.name, num_bytes):
            self.context.output.write(self.job, first, block, num_bytes)
        return crc, num_bytes, nonfinite

    def _copy_tile(self, index: int, blocks: list[int]) -> tuple[int, int, int]:
        """Move bytes without looking at them as numbers, except to count the non-finite ones."""
        entry = self.job.sources[0]
        try:
            first, num_bytes = self._byte_range(index)
            with self.context.events.stage("read", self.job.name, num_bytes):
                address = self._read(entry, first, num_bytes, blocks[0])
            with self.context.computing(self.job.name, num_bytes):
                crc = _C.crc32c(address, num_bytes)
                code, nonfinite = entry.format.code, 0
                if code is not None:
                    view = View(address, code, num_bytes // entry.format.num_bytes)
                    nonfinite = self.context.plan.ops.count_nonfinite(view)
            with self.context.events.stage("write", self.job.name, num_bytes):
                self.context.output.write(self.job, first, address, num_bytes)
            return crc, num_bytes, nonfinite
        finally:
            self.context.release_tile(blocks)

    def _byte_range(self, index: int) -> tuple[int, int]:
        """Bytes of a copied tile; formats of less than a byte an element are cut at whole bytes."""
        step = self.tile_elements * self.job.element_bytes
        first = index * step
        return first, min(step, self.job.num_bytes - first)

    def _span(self, index: int) -> tuple[int, int]:
        start = index * self.tile_elements
        return start, min(self.tile_elements, self.job.num_elements - start)

    def _tile_bytes(self, index: int) -> int:
        _, num = self._span(index)
        return sum(num * entry.format.num_bytes for entry in self.job.sources)

    def _resident_tile(self, index: int) -> Tile:
        tile = self._loaded[index]
        if tile is None:
            width = len(self.job.sources)
            tile = self._read_tile(index, self._inputs[index * width : (index + 1) * width])
            self._loaded[index] = tile
        return tile

    def _read_tile(self, index: int, blocks: list[int]) -> Tile:
        """Read one tile of every source; a source that is named twice is read once."""
        start, num = self._span(index)
        views = {}
        with self.context.events.stage("read", self.job.name, self._tile_bytes(index)):
            for entry, block in zip(self.job.sources, blocks, strict=False):
                size = entry.format.num_bytes
                address = self._read(entry, start * size, num * size, block)
                views[entry.file, entry.offset] = View(address, entry.format.code or 0, num)
        base = self.job.base
        return Tile(
            start,
            num,
            None if base is None else views[base.file, base.offset],
            tuple(views[entry.file, entry.offset] for entry in self.job.models),
        )

    def _read(self, entry: Any, first: int, num_bytes: int, block: int) -> int:
        if self.context.stopping:
            raise Stopped
        pool = self.context.pool
        return self.context.sources.read(entry, first, num_bytes, block, pool.block_bytes)

    def _finish(self, parts: list[tuple[int, int, int]]) -> None:
        crc = 0
        for part, num_bytes, _ in parts:
            crc = _C.crc32c_combine(crc, part, num_bytes)
        record = Record(crc, sum(nonfinite for _, _, nonfinite in parts))
        self.context.output.finish(self.job, record)
        self.context.events.tensor_done()


def gather(futures: Iterable[Future[Any]]) -> list[Any]:
    """Results in order; on a failure the other tasks are waited for before it is raised, because
    they still use blocks that the caller is about to give back."""
    started: list[Future[Any]] = []
    failures: list[BaseException] = []
    try:
        for future in futures:
            started.append(future)
    except BaseException as error:
        failures.append(error)
    failures += [each for future in started if (each := future.exception()) is not None]
    # Stopped is only what a failure elsewhere brings about.
    for failure in sorted(failures, key=lambda each: isinstance(each, Stopped)):
        raise failure
    return [future.result() for future in started]

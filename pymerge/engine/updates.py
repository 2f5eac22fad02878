"""The adapters' matrices of the jobs in progress, and the weights with the adapters' updates on
them.

The matrices of a tensor are read whole when its job begins, in float32, and dropped when their room
is wanted; together they never take more than the plan gave them. An update with a magnitude (DoRA)
divides each row of W + s B A by its norm, so the weight is streamed once before its tiles are
loaded. The sums of squares are float64 over spans that do not depend on the tiles, and so neither
does the norm.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint import AdapterTensor, LowRank, TensorEntry
from pymerge.engine.blocks import Stopped
from pymerge.engine.gather import gather
from pymerge.formats import F32, Format
from pymerge.methods.protocol import SPAN, Tile
from pymerge.ops.reference.elements import memory_of, value
from pymerge.ops.view import View
from pymerge.plan import Job, Tiling

if TYPE_CHECKING:
    from pymerge.engine.context import Context

#: Elements of a matrix that are converted at once.
PIECE = 1 << 16
#: Sums of shorter spans would take memory beside the weight that counts.
LEAST_SPAN = 512
#: How often a waiting job looks whether the run ends, in seconds.
POLL = 0.05

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


class Matrices(NamedTuple):
    """One update in memory: left [rows, rank], right [rank, columns], and what each row or each
    column is multiplied by, where it is."""

    left: Floats
    right: Floats
    of_rows: Floats | None = None
    of_columns: Floats | None = None


class _Held:
    """The matrices of one job."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.users = 0
        self.lock = threading.Lock()
        self.matrices: dict[AdapterTensor, Matrices] | None = None


class Updates:
    """The matrices of all jobs in progress, within the plan's share of the memory."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._room = context.plan.tiling.update_bytes
        self._held: dict[str, _Held] = {}  # the one used last stands last
        self._used = 0
        self._condition = threading.Condition()
        # Looks at the whole model come back to every tensor, and factors are small.
        self._factors: dict[AdapterTensor, Floats] = {}

    def hold(self, job: Job) -> None:
        """Have the matrices of a job in memory until :meth:`release`; waits for their room.

        Called by threads that hold no blocks.

        :raises Stopped: the run is ending.
        """
        if not job.updates:
            return
        with self._condition:
            held = self._held.pop(job.name, None)
            while held is None:
                self._evict(job.update_bytes)
                if self._used + job.update_bytes <= self._room or not self._held:
                    self._used += job.update_bytes
                    held = _Held(job.update_bytes)
                    break
                self._condition.wait(POLL)
                if self._context.stopping:
                    raise Stopped
                held = self._held.pop(job.name, None)
            self._held[job.name] = held
            held.users += 1
        try:
            with held.lock:
                if held.matrices is None:
                    held.matrices = {entry: self._load(job, entry) for entry in job.updates}
        except BaseException:
            self.release(job)
            raise

    def release(self, job: Job) -> None:
        """One user of the matrices less."""
        if not job.updates:
            return
        with self._condition:
            self._held[job.name].users -= 1
            self._condition.notify_all()

    def _evict(self, num_bytes: int) -> None:
        """Drop matrices that nobody uses, the longest unused first, until there is room."""
        for name in [name for name, held in self._held.items() if not held.users]:
            if self._used + num_bytes <= self._room:
                return
            self._used -= self._held.pop(name).num_bytes

    def put_on(self, job: Job, entry: AdapterTensor, start: int, weight: View, out: View) -> None:
        """``out`` float32 becomes the weight's elements from ``start`` on with the update on them.

        ``weight`` and ``out`` are in host memory; the job is held.
        """
        matrices = self._matrices(job, entry)
        update = _update(entry)
        with self._context.computing(job.name, weight.num * entry.format.num_bytes):
            tile = Tile(start, weight.num, None, (weight,))
            with self._context.here(tile, (out,)) as (there, outputs):
                self._add(update, matrices, there, outputs[0])
            if matrices.of_columns is not None:
                _multiply_columns(out, start, matrices.of_columns)

    def factors(self, job: Job) -> list[tuple[Floats, Floats]] | None:
        """What the models add to the base as products left [rows, rank] @ right [rank, columns],
        scales in the left, one for each model; None where one is not the base with a low-rank
        update. The job is held."""
        base = job.base
        if base is None or (isinstance(base, AdapterTensor) and base.update is not None):
            return None
        found = []
        for entry in job.models:
            update = entry.update if isinstance(entry, AdapterTensor) else None
            if (entry.file, entry.offset) != (base.file, base.offset):
                return None
            if update is None:
                rows = math.prod(entry.shape[:-1])
                columns = entry.shape[-1] if entry.shape else 1
                empty = np.zeros((rows, 0), np.float32), np.zeros((0, columns), np.float32)
                found.append(empty)
            elif update.magnitude is not None:
                return None
            else:
                matrices = self._matrices(job, entry)  # type: ignore[arg-type]
                left = np.asarray(matrices.left * np.float32(update.scale), np.float32)
                found.append((left, matrices.right))
        return found

    def read(self, job: Job, entry: TensorEntry, block: int | None = None) -> Floats:
        """All elements of a tensor that stands beside the job's, float32 [num_elements]; ``block``
        is one that the caller holds, else one is waited for."""
        if block is not None:
            return self._read_flat(job, entry, block)
        return self._read(job, entry, entry.num_elements, False).reshape(-1)

    def _add(self, update: LowRank, matrices: Matrices, tile: Tile, out: View) -> None:
        self._context.ops.lora_add(
            out,
            tile.models[0],
            matrices.left,
            matrices.right,
            tile.start,
            columns=update.columns,
            scale=update.scale,
            factors=matrices.of_rows,
        )

    def _matrices(self, job: Job, entry: AdapterTensor) -> Matrices:
        with self._condition:
            found = self._held[job.name].matrices
        if found is None:
            raise RuntimeError(f"{job.name}: its updates are not held")
        return found[entry]

    def _load(self, job: Job, entry: AdapterTensor) -> Matrices:
        update = _update(entry)
        left = self._read(job, update.left, update.rank, update.transposed)
        right = np.ones((1, update.columns), np.float32)
        if update.right is not None:
            right = self._read(job, update.right, update.columns, update.transposed)
        matrices = Matrices(left, right)
        if update.magnitude is None:
            return matrices
        factors = self._factors.get(entry)
        if factors is None:
            factors = self._measure(job, entry, matrices, update.magnitude)
            if self._context.plan.model_wide:
                self._factors[entry] = factors
        if update.transposed:
            return matrices._replace(of_columns=factors)
        return matrices._replace(of_rows=factors)

    def _measure(
        self, job: Job, entry: AdapterTensor, matrices: Matrices, magnitude: TensorEntry
    ) -> Floats:
        """float32 [rows], or [columns] where the update is transposed: magnitude / norm."""
        squared = self._columns_squared if _update(entry).transposed else self._rows_squared
        count = _update(entry).columns if _update(entry).transposed else _update(entry).rows
        norms = np.sqrt(squared(job, entry, matrices)) if entry.num_elements else np.zeros(count)
        wanted = self._read(job, magnitude, norms.size, False).reshape(-1).astype(np.float64)
        with np.errstate(all="ignore"):
            return np.asarray(wanted / norms, np.float32)

    def _read(self, job: Job, entry: TensorEntry, columns: int, transposed: bool) -> Floats:
        """A matrix of the adapter with so many columns, or one that lies as its transpose."""
        blocks = self._context.acquire_tile(1)
        try:
            flat = self._read_flat(job, entry, blocks[0])
        finally:
            self._context.release_tile(blocks)
        if transposed:
            return np.ascontiguousarray(flat.reshape(columns, -1).T)
        return flat.reshape(-1, columns)

    def _read_flat(self, job: Job, entry: TensorEntry, block: int) -> Floats:
        """All elements of a tensor, through one block."""
        flat = np.empty(entry.num_elements, np.float32)
        room = self._context.pool.block_bytes - Tiling.SLACK
        step = min(PIECE, room // entry.format.num_bytes)
        with self._context.events.stage("read", job.name, entry.num_bytes):
            for first in range(0, len(flat), step):
                num = min(step, len(flat) - first)
                address = self._read_part(entry, first, num, block)
                flat[first : first + num] = value(float_view(address, entry.format, num))
        return flat

    def _read_part(self, entry: TensorEntry, first: int, num: int, block: int) -> int:
        if self._context.stopping:
            raise Stopped
        size, pool = entry.format.num_bytes, self._context.pool
        return self._context.sources.read(entry, first * size, num * size, block, pool.block_bytes)

    def _rows_squared(self, job: Job, entry: AdapterTensor, matrices: Matrices) -> Doubles:
        """float64 [rows]: the sum of squares of each row, as exact sum of its spans."""
        update = _update(entry)
        span, even = _span_of(update.columns)

        def look(start: int, num: int, blocks: list[int]) -> Doubles:
            try:
                return self._squares(job, entry, matrices, start, num, blocks, span, even)
            finally:
                self._context.release_tile(blocks)

        def started() -> Iterator[Future[Any]]:
            fit = self._fit(entry)
            if fit < span:
                raise RuntimeError(f"{job.name}: a block has less room than a span of {span}")
            # Parts of a row begin with a span of it.
            fit = fit if not even and fit >= update.columns else fit // span * span
            rows, columns = (1, entry.num_elements) if even else (update.rows, update.columns)
            for start, num in _row_pieces(rows, columns, fit):
                blocks = self._context.acquire_tile(2)
                yield self._context.submit(look, start, num, blocks)

        parts = gather(started())
        sums = np.concatenate(parts).reshape(update.rows, -1)
        if sums.shape[1] == 1:
            return sums[:, 0]
        return np.array([_exact_sum(row) for row in sums.tolist()])

    def _squares(
        self,
        job: Job,
        entry: AdapterTensor,
        matrices: Matrices,
        start: int,
        num: int,
        blocks: list[int],
        span: int,
        even: bool,
    ) -> Doubles:
        """float64 [num_spans]: sums of squares of the updated elements; where spans are not even,
        those of each row end with a shorter one."""
        weight, out = self._weight(job, entry, start, num, blocks)
        with (
            self._context.computing(job.name, num * entry.format.num_bytes),
            self._context.here(Tile(start, num, None, (weight,)), (out,)) as (there, outputs),
        ):
            self._add(_update(entry), matrices, there, outputs[0])
            size = num if even else min(num, _update(entry).columns)
            runs = [outputs[0].part(first, size) for first in range(0, num, size)]
            gram_n = self._context.ops.gram_n
            return np.concatenate([gram_n(None, [run], span=span)[:, 0] for run in runs])

    def _columns_squared(self, job: Job, entry: AdapterTensor, matrices: Matrices) -> Doubles:
        """float64 [columns]: the sum of squares of each column, added row after row."""
        update = _update(entry)
        sums = np.zeros((1, update.columns))
        for start, num in _row_pieces(update.rows, update.columns, self._fit(entry)):
            blocks = self._context.acquire_tile(2)
            try:
                weight, out = self._weight(job, entry, start, num, blocks)
                tile = Tile(start, num, None, (weight,))
                first = start % update.columns
                columns = min(num, update.columns)
                part = np.ascontiguousarray(sums[:, first : first + columns])
                with (
                    self._context.computing(job.name, num * entry.format.num_bytes),
                    self._context.here(tile, (out,)) as (there, outputs),
                ):
                    self._add(update, matrices, there, outputs[0])
                    self._context.ops.gram_columns(None, [outputs[0]], part, columns=columns)
                sums[:, first : first + columns] = part
            finally:
                self._context.release_tile(blocks)
        return sums.reshape(-1)

    def _fit(self, entry: TensorEntry) -> int:
        """Elements of the widest of the two arrays that a block holds."""
        widest = max(entry.format.num_bytes, F32.num_bytes)
        return (self._context.pool.block_bytes - Tiling.SLACK) // widest

    def _weight(
        self, job: Job, entry: TensorEntry, start: int, num: int, blocks: list[int]
    ) -> tuple[View, View]:
        """The weight's elements in the first block, and room for float32 in the second."""
        with self._context.events.stage("read", job.name, num * entry.format.num_bytes):
            address = self._read_part(entry, start, num, blocks[0])
        return float_view(address, entry.format, num), float_view(blocks[1], F32, num)


def float_view(address: int, format: Format, num: int) -> View:
    """Elements of a format that the kernels read."""
    if format.code is None:
        raise RuntimeError(f"{format.name} is not computed on")
    return View(address, format.code, num)


def _update(entry: AdapterTensor) -> LowRank:
    if entry.update is None:
        raise RuntimeError(f"{entry.name}: there is nothing to put on it")
    return entry.update


def _span_of(columns: int) -> tuple[int, bool]:
    """The largest divisor of a row's length that is no longer than a span, and True: then one call
    sums many rows. A row without one has spans of its own, the last one shorter."""
    size = next(size for size in range(min(columns, SPAN), 0, -1) if columns % size == 0)
    return (size, True) if size >= min(columns, LEAST_SPAN) else (SPAN, False)


def _exact_sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # infinite terms: the sum is infinite or no number
        return sum(values)


def _row_pieces(rows: int, columns: int, fit: int) -> Iterator[tuple[int, int]]:
    """(start, num) of pieces in order: as many whole rows as fit, or parts of one row."""
    if fit >= columns:
        step = fit // columns * columns
        for start in range(0, rows * columns, step):
            yield start, min(step, rows * columns - start)
        return
    for row in range(rows):
        for first in range(0, columns, fit):
            yield row * columns + first, min(fit, columns - first)


def _multiply_columns(out: View, start: int, factors: Floats) -> None:
    """Multiply elements by the factor of their column, in place."""
    elements = memory_of(out).view(np.float32)
    columns = len(factors)
    with np.errstate(all="ignore"):
        head = min(-start % columns, len(elements))
        first = start % columns
        elements[:head] *= factors[first : first + head]
        whole = (len(elements) - head) // columns * columns
        rows = elements[head : head + whole].reshape(-1, columns)
        np.multiply(rows, factors, out=rows)
        rest = elements[head + whole :]
        rest *= factors[: len(rest)]

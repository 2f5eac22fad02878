"""Making the tiles of tensors whose rows are put together of others' rows.

A run of rows that lie one after another, and near ones beside it, are one read. Means are formed in
float64 sums over groups of rows that depend on the tensor alone, and so do not depend on the tiles.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint import DerivedTensor, TensorEntry
from pymerge.checkpoint.rows import MEAN, PAD, RowsTensor
from pymerge.engine.updates import float_view
from pymerge.formats import BF16, F16, F32, F64, Format
from pymerge.ops.reference.elements import memory_of, value
from pymerge.ops.view import View
from pymerge.plan import Tiling

if TYPE_CHECKING:
    from pymerge.engine.loader import TileLoader

#: Elements that are held as numbers beside the blocks, and rows that are added at once.
PIECE, GROUP = 1 << 16, 64
PAGE = 4096
#: Bytes that are read for nothing where that joins two reads.
GAP_BYTES = 64 << 10
#: Elements of the widest format that made tensors may pass through.
WIDEST_BYTES = 8

Bits = NDArray[Any]
Numbers = NDArray[Any]
Rows = NDArray[Any]


class Once:
    """Values that are computed when they are first asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[Hashable, threading.Lock] = {}
        self._values: dict[Hashable, Any] = {}

    def get(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._values:
                self._values[key] = compute()
            return self._values[key]


def make_rows(
    make: Callable[..., View],
    loader: TileLoader,
    entry: RowsTensor,
    start: int,
    num: int,
    block: int,
    scratch: Sequence[int],
) -> View:
    """The rows of a tile, the first and the last perhaps in part; ``make`` makes those of stored
    tensors that are made themselves."""
    out = float_view(block, entry.format, num)
    elements: Bits = memory_of(out).view(_bits(entry.format))
    gathering = _Gathering(make, loader, entry, scratch)
    width = entry.row_elements
    position = 0
    while position < num:
        row, column = divmod(start + position, width)
        whole = (num - position) // width if column == 0 else 0
        count = min(width - column, num - position) if whole == 0 else width
        last = row + max(whole, 1)
        part = elements[position : position + (last - row) * count].reshape(last - row, count)
        gathering.fill(part, row, last, column)
        position += part.size
    return out


class _Gathering:
    """Puts rows of one tensor together."""

    def __init__(
        self,
        make: Callable[..., View],
        loader: TileLoader,
        entry: RowsTensor,
        scratch: Sequence[int],
    ) -> None:
        self._make = make
        self._loader = loader
        self._context = loader.context
        self._entry = entry
        self._scratch = scratch

    def fill(self, out: Bits, first: int, last: int, column: int) -> None:
        """Rows first to last [last - first, columns from ``column`` on], as bit patterns."""
        entry = self._entry
        origins, rows = entry.origins[first:last], entry.rows[first:last]
        wanted = set(np.unique(origins).tolist())
        for number, stored in enumerate(entry.stored):
            if number not in wanted:
                continue
            here = np.flatnonzero(origins == number)
            for chosen, part, view in self._read(stored, rows[here], column, out.shape[1]):
                with self._context.computing(entry.name, part.size * out.itemsize):
                    step = max(1, PIECE // max(1, part.width))
                    for begin in range(0, len(chosen), step):
                        few = slice(begin, begin + step)
                        bits = self._as_bits(stored.format, view, part, few)
                        out[here[chosen[few]], part.columns] = bits
        if MEAN in wanted:
            here = np.flatnonzero(origins == MEAN)
            step = max(1, PIECE // out.shape[1])
            for begin in range(0, len(here), step):
                some = here[begin : begin + step]
                out[some] = self._means(rows[some], column, out.shape[1])
        if PAD in wanted:
            pad = self._context.once.get(entry, self._pad)
            out[origins == PAD] = pad[column : column + out.shape[1]]
        rest = (origins < 0) & (origins != MEAN) & (origins != PAD)
        out[rest] = 0

    def _means(self, rows: Rows, column: int, width: int) -> Bits:
        entry = self._entry
        numbers = entry.means[rows]
        total = np.zeros((len(rows), width), _working(entry.format))
        for number, stored in enumerate(entry.stored):
            here = np.flatnonzero(numbers[:, number] >= 0)
            wanted = numbers[here, number]
            for chosen, part, view in self._read(stored, wanted, column, width):
                bits = self._as_bits(stored.format, view, part, slice(None))
                at = (here[chosen], part.columns)
                total[at] = self._step(total[at] + _numbers(bits, entry.format))
        count = np.count_nonzero(numbers >= 0, axis=1).astype(total.dtype)
        return _rounded(total / count[:, None], entry.format)

    def _step(self, numbers: Numbers) -> Numbers:
        if not self._entry.stepwise:
            return numbers
        return _numbers(_rounded(numbers, self._entry.format), self._entry.format)

    def _pad(self) -> Bits:
        """The mean of all rows that come from somewhere, [columns]."""
        entry = self._entry
        width = entry.row_elements
        real = np.flatnonzero(entry.origins != PAD)
        total = np.zeros(width)
        step = max(1, min(GROUP, PIECE // max(1, width)))
        bits = np.empty((step, width), _bits(entry.format))
        for begin, end in _groups(real, step):
            part = bits[: end - begin]
            self.fill(part, begin, end, 0)
            total += np.add.reduce(_numbers(part, entry.format), axis=0, dtype=np.float64)
        mean = (total / max(1, len(real))).astype(_working(entry.format))
        return _rounded(mean, entry.format)

    def _as_bits(self, format: Format, view: View, part: _Part, few: slice) -> Bits:
        """A few of the rows of what was read, in the format of the tensor."""
        read = memory_of(view).view(_bits(format)).reshape(part.num_rows, part.width)
        bits: Bits = read[part.inside[few]]
        if format == self._entry.format or not bits.size:
            return bits
        numbers = _values(float_view(bits.ctypes.data, format, bits.size)).reshape(bits.shape)
        return _rounded(numbers, self._entry.format)

    def _read(
        self, stored: TensorEntry, rows: Rows, column: int, width: int
    ) -> Iterator[tuple[Rows, _Part, View]]:
        """Read rows of a tensor, as few times as fit into a block: which of ``rows``, where they
        lie in what was read, and that."""
        made = isinstance(stored, DerivedTensor)
        all_columns = self._entry.row_elements
        row_bytes = all_columns * stored.format.bits // 8
        order = np.argsort(rows, kind="stable")
        inside = rows[order]
        far = np.flatnonzero(np.diff(inside) > max(1, GAP_BYTES // max(1, row_bytes))) + 1
        begins = np.concatenate(([0], far))[: len(order)]
        ends = np.concatenate((far, [len(order)]))[: len(order)]
        lone = (ends - begins == 1) & (not made)
        if self._packs(stored, width):
            yield from self._packed(stored, order[begins[lone]], rows, column, width)
        else:
            lone[:] = False
        room = (self._context.pool.block_bytes - Tiling.SLACK) // (
            WIDEST_BYTES if made else stored.format.num_bytes
        )
        most = max(1, room // all_columns) if width == all_columns else 1
        for first, last in zip(begins[~lone].tolist(), ends[~lone].tolist(), strict=True):
            begin = first
            while begin < last:
                end = begin + int(np.searchsorted(inside[begin:last], inside[begin] + most))
                low, high = int(inside[begin]), int(inside[end - 1]) + 1
                for left in range(0, width, room):
                    taken = min(room, width - left)
                    start = low * all_columns + column + left
                    view = self._elements(stored, start, (high - low) * taken)
                    part = _Part(inside[begin:end] - low, high - low, left, taken)
                    yield order[begin:end], part, view
                begin = end

    def _packs(self, stored: TensorEntry, width: int) -> bool:
        """Whether rows that lie alone can be read one behind another into a block."""
        if isinstance(stored, DerivedTensor):
            return False
        row_bytes = width * stored.format.num_bytes
        return row_bytes + _tail(row_bytes) <= self._context.pool.block_bytes

    def _packed(
        self, stored: TensorEntry, lone: Rows, rows: Rows, column: int, width: int
    ) -> Iterator[tuple[Rows, _Part, View]]:
        """Read rows that lie alone, as many as fit into a block."""
        block, size = self._scratch[0], self._context.pool.block_bytes
        row_bytes, tail = width * stored.format.num_bytes, _tail(width * stored.format.num_bytes)
        read, move = self._loader.read, ctypes.memmove
        step = (size - tail) // row_bytes
        for begin in range(0, len(lone), step):
            some = lone[begin : begin + step]
            firsts = (rows[some].astype(np.int64) * self._entry.row_elements + column).tolist()
            with self._context.events.stage("read", self._entry.name, len(some) * row_bytes):
                for number, first in enumerate(firsts):
                    byte = first * stored.format.num_bytes
                    address = read(stored, byte, row_bytes, block + size - tail, tail)
                    move(block + number * row_bytes, address, row_bytes)
            view = float_view(block, stored.format, len(some) * width)
            yield some, _Part(np.arange(len(some)), len(some), 0, width), view

    def _elements(self, stored: TensorEntry, first: int, num: int) -> View:
        """Elements of a stored tensor in memory."""
        if isinstance(stored, DerivedTensor):
            return self._make(self._loader, stored, first, num, self._scratch[0], self._scratch[1:])
        size = stored.format.num_bytes
        with self._context.events.stage("read", self._entry.name, num * size):
            address = self._loader.read(stored, first * size, num * size, self._scratch[0])
        return float_view(address, stored.format, num)


class _Part:
    """Where rows lie in what was read: ``inside`` of ``num_rows``; and which columns of the result
    these are."""

    def __init__(self, inside: Rows, num_rows: int, left: int, width: int) -> None:
        self.inside = inside
        self.num_rows = num_rows
        self.width = width
        self.columns = slice(left, left + width)

    @property
    def size(self) -> int:
        return len(self.inside) * self.width


def _tail(row_bytes: int) -> int:
    """Bytes that reading one row takes, aligned as a device may ask for."""
    return -(-(row_bytes + Tiling.SLACK) // PAGE) * PAGE


def _groups(rows: Rows, step: int) -> Iterator[tuple[int, int]]:
    """Runs of consecutive rows, cut into no more than ``step``."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for run in np.split(rows, breaks):
        for begin in range(0, len(run), step):
            part = run[begin : begin + step]
            if len(part):
                yield int(part[0]), int(part[-1]) + 1


def _bits(format: Format) -> np.dtype[Any]:
    return np.dtype(f"u{format.num_bytes}")


def _working(format: Format) -> type[np.floating[Any]]:
    return np.float64 if format == F64 else np.float32


def _values(view: View) -> Numbers:
    """The elements as float32, those of float64 as they are."""
    if view.code == F64.code:
        return memory_of(view).view(np.float64)
    if view.code == F16.code:
        return memory_of(view).view(np.float16).astype(np.float32)
    return value(view)


def _numbers(bits: Bits, format: Format) -> Numbers:
    """Bit patterns of a format that can be written as float32, those of float64 as they are."""
    if format == BF16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if format == F16:
        return bits.view(np.float16).astype(np.float32)
    return bits.view(_working(format))


def _rounded(numbers: Numbers, format: Format) -> Bits:
    """The bit patterns of numbers in a format, to nearest even."""
    with np.errstate(all="ignore"):
        if format == F64:
            return np.ascontiguousarray(numbers, np.float64).view(np.uint64)
        single = np.ascontiguousarray(numbers, np.float32)
        if format == F32:
            return single.view(np.uint32)
        if format == F16:
            return single.astype(np.float16).view(np.uint16)
    bits = single.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(single), np.uint64(0x7FC0), rounded).astype(np.uint16)

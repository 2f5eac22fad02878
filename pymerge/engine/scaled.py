"""Making the tiles of float8 codes with scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint import ScaledTensor, TensorEntry
from pymerge.engine.updates import float_view
from pymerge.formats import BYTES, F32
from pymerge.ops import convert
from pymerge.ops.reference.elements import memory_of, value
from pymerge.ops.view import View
from pymerge.plan import Tiling

if TYPE_CHECKING:
    from pymerge.engine.loader import TileLoader

PAGE = 4096
EXPONENT_BIAS, NO_EXPONENT = 127, 255

Floats = NDArray[np.float32]


def make_scaled(
    loader: TileLoader,
    entry: ScaledTensor,
    start: int,
    num: int,
    block: int,
    scratch: Sequence[int],
) -> View:
    """codes * scales, float32; one block of scratch holds both while they are read."""
    context = loader.context
    half = context.pool.block_bytes // 2 // PAGE * PAGE
    out = float_view(block, F32, num)
    with context.events.stage("read", entry.name, num * entry.codes.format.num_bytes):
        first = start * entry.codes.format.num_bytes
        address = loader.read(entry.codes, first, num, scratch[0], half)
    with context.computing(entry.name, num):
        convert(out, float_view(address, entry.codes.format, num))
    elements: Floats = memory_of(out).view(np.float32)
    for begin, end in _pieces(entry, start, start + num, half - Tiling.SLACK):
        low, high = _scales_of(entry, begin, end)
        size = entry.scales.format.num_bytes
        with context.events.stage("read", entry.name, (high - low) * size):
            address = loader.read(
                entry.scales, low * size, (high - low) * size, scratch[0] + half, half
            )
            scales = read_scales(address, entry.scales, high - low)
        with context.computing(entry.name, (end - begin) * F32.num_bytes):
            _multiply(entry, elements[begin - start : end - start], begin, scales, low)
    return out


def read_scales(address: int, entry: TensorEntry, num: int) -> Floats:
    """Scales in memory as float32 [num], a copy."""
    if entry.format.code is not None:
        return value(float_view(address, entry.format, num))
    exponents = memory_of(View(address, BYTES, num)).astype(np.int32)
    powers: Floats = np.ldexp(np.ones(num, np.float32), exponents - EXPONENT_BIAS)
    powers[exponents == NO_EXPONENT] = np.nan
    return powers


def _pieces(entry: ScaledTensor, begin: int, end: int, room: int) -> Iterator[tuple[int, int]]:
    """Runs of elements whose scales, as one run, take no more than ``room`` bytes."""
    low, high = _scales_of(entry, begin, end)
    if (high - low) * entry.scales.format.num_bytes <= room:
        yield begin, end
        return
    middle = (begin + end) // 2
    yield from _pieces(entry, begin, middle, room)
    yield from _pieces(entry, middle, end, room)


def _scales_of(entry: ScaledTensor, begin: int, end: int) -> tuple[int, int]:
    """The run of scales that holds those of the elements from ``begin`` to ``end``."""
    if entry.scales.num_elements == 1:
        return 0, 1
    rows = begin // entry.columns, (end - 1) // entry.columns
    along = entry.grid[1]
    first, last = (_scale_row(entry, row) * along for row in rows)
    if rows[0] != rows[1]:
        return first, last + along
    columns = begin % entry.columns, (end - 1) % entry.columns
    return first + columns[0] // entry.block_columns, last + columns[1] // entry.block_columns + 1


def _scale_row(entry: ScaledTensor, row: int) -> int:
    """The row of scales, over all matrices, of a row of elements, over all matrices."""
    matrix, inside = divmod(row, entry.rows)
    return matrix * entry.grid[0] + inside // entry.block_rows


def _multiply(entry: ScaledTensor, elements: Floats, begin: int, scales: Floats, low: int) -> None:
    """Multiply the elements from ``begin`` on in place; ``scales`` begin with scale ``low``."""
    with np.errstate(all="ignore"):
        if entry.scales.num_elements == 1:
            elements *= scales[0]
            return
        columns, along = entry.columns, entry.grid[1]
        position = 0
        while position < len(elements):
            row, column = divmod(begin + position, columns)
            scale_row = _scale_row(entry, row)
            num = min(columns - column, len(elements) - position)
            whole = 1
            if column == 0 and num == columns:
                left = entry.block_rows - row % entry.rows % entry.block_rows
                left = min(left, entry.rows - row % entry.rows)
                whole = min(left, (len(elements) - position) // columns)
            part = elements[position : position + whole * num].reshape(whole, num)
            first = column // entry.block_columns
            last = (column + num - 1) // entry.block_columns + 1
            base = scale_row * along - low
            part *= _along(entry, scales[base + first : base + last], column, num)
            position += whole * num


def _along(entry: ScaledTensor, scales: Floats, column: int, num: int) -> Floats:
    """The scale of each of ``num`` columns from ``column`` on, or one for all of them."""
    if len(scales) == 1:
        return scales
    skip = column % entry.block_columns
    return np.repeat(scales, entry.block_columns)[skip : skip + num]

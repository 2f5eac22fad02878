"""The outputs of one tile as runs of bytes, and of all tiles as the record of a tensor.

A tensor is one row of its elements; a part beside it has one or more, each beginning with a byte of
its own, so that a tile gives a run of bytes of every row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pymerge import _C
from pymerge.engine.journal import Record
from pymerge.formats import BYTES
from pymerge.ops.view import View
from pymerge.plan import Job, Part


class Row(NamedTuple):
    """What a tile gives of one row: where it goes and where in memory it lies."""

    place: Job | Part
    first_byte: int
    num_bytes: int
    view: View


class Written(NamedTuple):
    """What writing a tile gave: checksum and bytes of each row's run, non-finite elements, and what
    the method measured."""

    rows: tuple[tuple[int, int], ...]
    nonfinite: int
    measured: Any = None


def rows_of(job: Job, start: int, num: int, blocks: Sequence[int]) -> list[Row]:
    """The rows of a tile's outputs in ``job.output_blocks`` blocks, the tensor's own first."""
    code, size = job.format.code, job.format.num_bytes
    if code is None:
        raise RuntimeError(f"{job.name}: {job.format.name} is not computed on")
    rows = [Row(job, start * size, num * size, View(blocks[0], code, num))]
    free = iter(blocks[1:])
    for part in job.parts:
        if part.is_whole:
            continue
        rows += _rows_of_part(job, part, start, num, free)
    return rows


def _rows_of_part(
    job: Job, part: Part, start: int, num: int, blocks: Iterator[int]
) -> Iterator[Row]:
    whole = part.num_bytes // part.rows
    run = -(-num * part.bits // 8)
    code = part.format.code
    per_block = job.rows_of_block(part)
    block = 0
    for row in range(part.rows):
        if row % per_block == 0:
            block = next(blocks)
        address = block + row % per_block * run
        view = View(address, BYTES, run) if code is None else View(address, code, num)
        yield Row(part, row * whole + start * part.bits // 8, run, view)


def by_output(job: Job, views: Sequence[View]) -> Iterator[Any]:
    """The views of all rows as a method gets them: the tensor's own, then the rows of each part
    that comes by rows."""
    yield views[0]
    first = 1
    for part in job.parts:
        if part.is_whole:
            continue
        yield views[first : first + part.rows]
        first += part.rows


def record_of(
    job: Job,
    tiles: Sequence[Written],
    values: Sequence[float],
    wholes: Mapping[str, int],
    warnings: Sequence[str] = (),
) -> Record:
    """The record of a tensor whose tiles are all written, in their order; ``wholes`` are the
    checksums of the parts that were written as a whole."""
    crcs, first = [], 0
    places: tuple[Job | Part, ...] = (job, *job.parts)
    for place in places:
        if place.name in wholes:
            crcs.append(wholes[place.name])
            continue
        num_rows = place.rows if isinstance(place, Part) else 1
        crc = 0
        for row in range(first, first + num_rows):
            for tile in tiles:
                crc = _C.crc32c_combine(crc, *tile.rows[row])
        crcs.append(crc)
        first += num_rows
    nonfinite = sum(tile.nonfinite for tile in tiles)
    return Record(crcs[0], nonfinite, tuple(crcs[1:]), tuple(values), tuple(sorted(warnings)))

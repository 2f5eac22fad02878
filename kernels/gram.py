"""Gram matrices of the columns or the rows of a matrix, or of what it differs from a base by.

    gram_acc: total += Xᵀ X or X Xᵀ, X = value(model) - value(base)

Tiles of the lower triangle alone are computed, the upper one is their mirror. Products and their
sums over at most CHUNK terms are float32 ("ieee": no tensor core rounds them to tf32), sums of
chunks are float64; every sum has an order that the shapes alone decide. Bytes: each tile reads its
two panels of X, 16 of the total for every chunk. Iterative: the error is that of float32 dot
products of CHUNK terms, whatever the length. Other backends: torch, see pymerge/ops/matrix/gram.py.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from pymerge.errors import BackendError
from pymerge.formats import BF16, F16, F32
from pymerge.kernels import launch as launching
from pymerge.kernels.elements import load, load_base, load_delta
from pymerge.kernels.launch import Elements, Piece, Room, access_of, ceil_div, launch, power_of_two

#: Terms of a float32 sum: its rounding grows with their number, and the traffic of the float64
#: total falls with it.
CHUNK = 1024

#: Programs that fill a device with some to spare. Where a matrix has fewer tiles its terms are cut
#: into parts with totals of their own; of the shapes alone, so that devices agree.
FILL = 264

#: Tiles on a side of a group that is computed together, so that its panels stay in the cache.
GROUP = 8

VECTORS = tl.constexpr(launching.VECTORS)


class Tile(NamedTuple):
    """``side`` columns of X on each side of a tile of the total, ``depth`` terms at a time."""

    side: int
    depth: int
    num_warps: int
    num_stages: int


#: By compute capability, the least first, and by the columns of X that a tile is for at least.
#: Chosen by reasoning and by what compiles without spills; none was timed on a device. A square
#: of 128 gives each of 256 threads 64 products for 16 numbers from shared memory; a small matrix
#: is cut finer to have tiles enough. One step of 128 takes longer than memory does to answer, so
#: that few stages are enough.
TILES: dict[int, dict[int, Tile]] = {
    80: {0: Tile(32, 32, 4, 2), 512: Tile(64, 16, 4, 3), 2048: Tile(128, 16, 8, 2)},
    90: {0: Tile(32, 32, 4, 2), 512: Tile(64, 32, 4, 2), 2048: Tile(128, 16, 8, 3)},
}
#: The interpreter pays for operations, not for elements.
INTERPRETED_TILE = Tile(64, 64, 4, 1)
#: The largest ``depth`` of them: a chunk is whole steps of every tile.
DEPTH = 64


@triton.jit
def term_index(first, place, ld, SIDE: tl.constexpr):
    """The indices in X of the terms ``first`` at columns (SIDE 0) or rows (SIDE 1) ``place``."""
    if SIDE == 0:
        index = first[:, None] * ld + place[None, :]
    else:
        index = place[:, None] * ld + first[None, :]
    return index


@triton.jit
def inside_of(term, place, num_terms, num_places, SIDE: tl.constexpr):
    if SIDE == 0:
        inside = (term < num_terms)[:, None] & (place < num_places)[None, :]
    else:
        inside = (place < num_places)[:, None] & (term < num_terms)[None, :]
    return inside


@triton.jit
def load_panel(
    x,
    base,
    term,
    place,
    x_ld,
    base_ld,
    num_terms,
    num_places,
    CODE: tl.constexpr,
    BASE: tl.constexpr,
    SIDE: tl.constexpr,
    ACCESS: tl.constexpr,
):
    """X in float32, [DEPTH, TILE] of columns or [TILE, DEPTH] of rows, 0 outside."""
    inside = inside_of(term, place, num_terms, num_places, SIDE)
    index = term_index(term, place, x_ld, SIDE)
    if BASE < 0:
        panel = load(x, index, inside, CODE, ACCESS)
    else:
        start = load_base(base, term_index(term, place, base_ld, SIDE), inside, BASE, ACCESS)
        panel = load_delta(x, start, index, inside, CODE, BASE, ACCESS)
    return panel


@triton.jit
def halves(sums, TILE: tl.constexpr):
    """The left and the right half of a tile."""
    pairs = tl.permute(tl.reshape(sums, (TILE, 2, TILE // 2)), (0, 2, 1))
    return tl.split(pairs)


@triton.jit
def add_to(totals, sums, start, row, column, width):
    """Adds float32 sums to what float64 total ``start`` has at ``row`` and ``column`` on."""
    down = row + tl.arange(0, sums.shape[0])
    across = column + tl.arange(0, sums.shape[1])
    inside = (down < width)[:, None] & (across < width)[None, :]
    spot = start + down[:, None] * width + across[None, :]
    address = totals.to(tl.pointer_type(tl.float64)) + spot
    total = tl.load(address, mask=inside, other=0.0)
    tl.store(address, total + sums.to(tl.float64), mask=inside)


@triton.jit(
    do_not_specialize=[
        *("totals", "x", "base", "tiles", "x_ld", "base_ld", "num_terms", "num_places"),
        "part_chunks",
    ]
)
def gram_tiles_kernel(
    totals,
    x,
    base,
    tiles,
    x_ld,
    base_ld,
    num_terms,
    num_places,
    part_chunks,
    CODE: tl.constexpr,
    BASE: tl.constexpr,
    SIDE: tl.constexpr,
    ACCESS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Adds a tile of the Gram matrix of part ``program_id(1)`` of the terms to that part's total.

    The total is float64 in memory: no register holds it while a chunk is summed.
    """
    pair = tiles.to(tl.pointer_type(tl.int32)) + 2 * tl.program_id(0)
    row = tl.load(pair).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.load(pair + 1).to(tl.int64) * TILE + tl.arange(0, TILE)
    part = tl.program_id(1).to(tl.int64)
    width = num_places.to(tl.int64)
    num_terms = num_terms.to(tl.int64)
    if ACCESS == VECTORS:
        # Changes nothing, and tells that vectors are inside or outside whole.
        x_ld, base_ld = x_ld // 16 * 16, base_ld // 16 * 16
        if SIDE == 0:
            num_places = num_places // 16 * 16
        else:
            num_terms = num_terms // 16 * 16
    chunk = part * part_chunks
    last = tl.minimum((chunk + part_chunks) * (STEPS * DEPTH), num_terms)
    while chunk * (STEPS * DEPTH) < last:
        sums = tl.zeros((TILE, TILE), tl.float32)
        for step in range(STEPS):
            term = (chunk * STEPS + step) * DEPTH + tl.arange(0, DEPTH)
            left = load_panel(
                x, base, term, row, x_ld, base_ld, num_terms, num_places, CODE, BASE, SIDE, ACCESS
            )
            right = load_panel(
                x,
                base,
                term,
                column,
                x_ld,
                base_ld,
                num_terms,
                num_places,
                CODE,
                BASE,
                SIDE,
                ACCESS,
            )
            if SIDE == 0:
                left = tl.trans(left)
            else:
                right = tl.trans(right)
            sums = tl.dot(left, right, sums, input_precision="ieee")
        # Read again, so that the addresses of a tile's total hold no registers meanwhile; and half
        # after half, since all addresses and float64 sums of a tile at once would spill.
        down = tl.load(pair).to(tl.int64) * TILE
        across = tl.load(pair + 1).to(tl.int64) * TILE
        near, far = halves(sums, TILE)
        add_to(totals, near, part * width * width, down, across, width)
        add_to(totals, far, part * width * width, down, across + TILE // 2, width)
        chunk += 1


@triton.jit(do_not_specialize=["total", "parts", "num_parts", "num_places"])
def gram_mirror_kernel(total, parts, num_parts, num_places, TILE: tl.constexpr):
    """Adds the totals of parts, in order, to the lower triangle and copies it to the upper one."""
    upper, lower = tl.program_id(0), tl.program_id(1)
    if upper <= lower:
        width = num_places.to(tl.int64)
        row = lower.to(tl.int64) * TILE + tl.arange(0, TILE)
        column = upper.to(tl.int64) * TILE + tl.arange(0, TILE)
        inside = (row < num_places)[:, None] & (column < num_places)[None, :]
        start = total.to(tl.pointer_type(tl.float64))
        spot = row[:, None] * width + column[None, :]
        value = tl.load(start + spot, mask=inside, other=0.0)
        source = parts.to(tl.pointer_type(tl.float64)) + spot
        part = num_parts * 0
        while part < num_parts:
            value += tl.load(source, mask=inside, other=0.0)
            source += width * width
            part += 1
        # On the diagonal the tile's own upper half is the mirror of its lower one.
        tl.store(start + spot, value, mask=inside & (row[:, None] >= column[None, :]))
        spot = column[:, None] * width + row[None, :]
        inside = (column < num_places)[:, None] & (row < num_places)[None, :]
        mirrored = inside & (column[:, None] < row[None, :])
        tl.store(start + spot, tl.trans(value), mask=mirrored)


def why_not() -> str | None:
    """Why the kernels cannot run here, or None."""
    if launching.INTERPRETED:
        return None
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU, and TRITON_INTERPRET=1 is not set"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability {major}.{minor}; the kernels need 8.0"
    return None


def gram_acc(total: Any, x: Any, side: str = "columns", base: Any = None) -> None:
    """Adds the Gram matrix of ``x - base``, or of ``x``, to ``total``, in place.

    :param total: torch float64 [c, c], contiguous and symmetric; c is n for columns, m for rows.
    :param x: torch matrix [m, n], float32, float16 or bfloat16. Differences are float32.
    :param side: ``columns`` for Xᵀ X, ``rows`` for X Xᵀ.
    :param base: like ``x`` in shape, of any of its dtypes.
    :raises BackendError: shapes, dtypes, devices or memory are not those above.

    Work is queued on the stream that the thread has entered, or on torch's current one. A matrix
    whose rows are not contiguous is copied first.
    """
    matrix = _operand("x", x, total, None)
    start = None if base is None else _operand("base", base, total, tuple(x.shape))
    if side not in _SIDES:
        raise BackendError(f"gram_acc: expected side columns or rows, found {side!r}")
    num_rows, num_columns = x.shape
    num_terms, num_places = (
        (num_rows, num_columns) if side == "columns" else (num_columns, num_rows)
    )
    if str(total.dtype) != "torch.float64" or tuple(total.shape) != (num_places, num_places):
        raise BackendError(
            f"gram_acc: expected a float64 total of [{num_places}, {num_places}] for the {side} of "
            f"x {list(x.shape)}, found {total.dtype} {list(total.shape)}"
        )
    if not total.is_contiguous():
        raise BackendError("gram_acc: expected a contiguous total; the sum would be lost in a copy")
    if num_terms and num_places:
        _launch(total.data_ptr(), matrix, start, _SIDES.index(side), num_terms, num_places)


_SIDES = ("columns", "rows")
_CODES = {"torch.float32": F32.code, "torch.float16": F16.code, "torch.bfloat16": BF16.code}


class Operand(NamedTuple):
    """A matrix in memory: its elements, how far apart rows are, and what owns it."""

    elements: Elements
    ld: int
    owner: Any


def _operand(name: str, matrix: Any, total: Any, shape: tuple[int, int] | None) -> Operand:
    code = _CODES.get(str(matrix.dtype))
    if matrix.dim() != 2 or code is None or tuple(matrix.shape) != (shape or tuple(matrix.shape)):
        expected = "a matrix" if shape is None else f"[{shape[0]}, {shape[1]}]"
        raise BackendError(
            f"gram_acc: expected {name} to be {expected} of float32, float16 or bfloat16, found "
            f"{matrix.dtype} {list(matrix.shape)}"
        )
    memory = "cpu" if launching.INTERPRETED else "cuda"
    if matrix.device != total.device or matrix.device.type != memory:
        raise BackendError(
            f"gram_acc: expected {name} and total on one {memory} device, found {matrix.device} "
            f"and {total.device}"
        )
    if matrix.stride(1) != 1 or matrix.stride(0) < matrix.shape[1]:
        matrix = matrix.contiguous()
    ld = int(matrix.stride(0))
    return Operand(Piece(matrix.data_ptr(), code, ld), ld, matrix)


def _launch(
    total: int, x: Operand, base: Operand | None, side: int, num_terms: int, num_places: int
) -> None:
    chunk = min(CHUNK, power_of_two(max(num_terms, DEPTH)))
    # A row must end where a vector does; beyond it begins another row or nobody's memory.
    period = num_places if side == 0 else num_terms
    given = [operand.elements for operand in (x, base) if operand is not None]
    with Room(total) as room:
        tile = tile_of(num_places)
        order = tile_order(ceil_div(num_places, tile.side))
        part_chunks, num_parts = parts_of(ceil_div(num_terms, chunk), len(order))
        tiles = room.upload(order)
        totals = total
        if num_parts > 1:
            totals = room.zeros((num_parts, num_places, num_places), "float64").address
        launch(
            gram_tiles_kernel,
            (len(order), num_parts),
            totals,
            x.elements.ptr,
            0 if base is None else base.elements.ptr,
            tiles.address,
            x.ld,
            0 if base is None else base.ld,
            num_terms,
            num_places,
            part_chunks,
            CODE=x.elements.code,
            BASE=-1 if base is None else base.elements.code,
            SIDE=side,
            ACCESS=access_of(*given, period=period),
            TILE=tile.side,
            DEPTH=tile.depth,
            STEPS=chunk // tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        num_squares = ceil_div(num_places, MIRROR)
        launch(
            gram_mirror_kernel,
            (num_squares, num_squares),
            total,
            totals,
            num_parts if num_parts > 1 else 0,
            num_places,
            TILE=MIRROR,
        )


#: A side of the squares that are mirrored: 32 KiB of float64 pass through shared memory.
MIRROR = 64


def tile_of(num_places: int) -> Tile:
    """The tile for a Gram matrix of ``num_places`` on the current device."""
    if launching.INTERPRETED:
        return INTERPRETED_TILE
    rows = TILES[max((each for each in TILES if each <= _capability()), default=min(TILES))]
    return rows[max(least for least in rows if least <= num_places)]


def _capability() -> int:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * int(major) + int(minor)


@functools.lru_cache(maxsize=64)
def tile_order(num: int) -> NDArray[np.int32]:
    """The (row, column) of tiles of the lower triangle of ``num`` by ``num``, group by group."""
    row, column = np.tril_indices(num)
    keys = (column % GROUP, row % GROUP, column // GROUP, row // GROUP)
    order = np.lexsort(keys)
    return np.stack([row[order], column[order]], axis=1).astype(np.int32)


def parts_of(num_chunks: int, num_tiles: int) -> tuple[int, int]:
    """Chunks of a part, and the number of parts: one where there are tiles enough."""
    part_chunks = ceil_div(num_chunks, max(1, FILL // num_tiles))
    return part_chunks, ceil_div(num_chunks, part_chunks)

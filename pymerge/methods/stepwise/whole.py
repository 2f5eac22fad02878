"""Whole tensors in the working format: torch's sums over a tensor have the same bits only where
torch adds up all of it at once, on one thread."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from pymerge.methods.protocol import Apply, Cost, Measure, Question, Tensor, Tile
from pymerge.methods.stepwise.pieces import (
    PIECE,
    active,
    by_piece,
    load_into,
    load_piece,
    piece_bytes,
    view_of,
)

if TYPE_CHECKING:
    import torch

Asking = Generator[Question, Any, Any]


def gather(tensor: Tensor) -> Asking:
    """The base (None without one) and the models, each [num_elements], in one look."""
    count = tensor.num_models + int(tensor.has_base)
    found = [_empty(tensor) for _ in range(count)]
    views = [view_of(each) for each in found]

    def run(tile: Tile) -> None:
        for view, source in zip(views, tile.views, strict=True):
            load_into(tensor, view.part(tile.start, tile.num), source)

    yield Measure(run)
    return (found[0], found[1:]) if tensor.has_base else (None, found)


def gather_delta(tensor: Tensor, model: int) -> Asking:
    """One model less the base, [num_elements]."""
    out = _empty(tensor)

    def run(tile: Tile) -> None:
        with active(tensor):
            for _, part in tile.pieces(PIECE):
                piece = load_piece(tensor, part)
                out[part.start : part.start + part.num] = piece.models[0] - piece.origin

    yield Measure(run, models=(model,))
    return out


def gather_deltas(tensor: Tensor) -> Asking:
    """All models less the base, [models, num_elements], in one look."""
    out = _empty(tensor, tensor.num_models)

    def run(tile: Tile) -> None:
        with active(tensor):
            for _, part in tile.pieces(PIECE):
                for row, delta in zip(out, load_piece(tensor, part).deltas(), strict=True):
                    row[part.start : part.start + part.num] = delta

    yield Measure(run)
    return out


def _empty(tensor: Tensor, *rows: int) -> torch.Tensor:
    return tensor.room.empty(*rows, tensor.num_elements, dtype=str(tensor.working.torch_name))


def put(tensor: Tensor, result: torch.Tensor) -> Apply:
    """A merged tensor of the workspace as it is."""
    flat = result.reshape(-1)
    return by_piece(tensor, lambda piece: flat[piece.start : piece.start + piece.num], models=())


def chunks(tensor: Tensor) -> Sequence[slice]:
    """The tensor cut into pieces; where an end would be too short for torch to add it up as it
    does in the whole, :func:`sum_models` sees to it."""
    n = tensor.num_elements
    return [slice(first, min(first + PIECE, n)) for first in range(0, n, PIECE)]


def whole_cost(tensor: Tensor, bytes_of_element: Callable[[int], float]) -> Cost:
    """The cost of a method that holds so many bytes for each element of a tensor, by the bytes of
    an element of the working format, at its peak."""
    held = bytes_of_element(tensor.working.num_bytes) * tensor.num_elements
    return Cost(int(held) + piece_bytes(tensor), panels=False)

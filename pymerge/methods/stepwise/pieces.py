"""Torch on the elements of a tensor, a piece at a time, in the format that mergekit computes in.

Element-wise steps may be cut anywhere, but torch adds up models in another order near the end of a
tensor than within it. So pieces begin at multiples of a span, and :func:`sum_models` gives what the
sum over the whole tensor would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.formats import BY_TORCH_NAME, F32, F64, Format
from pymerge.methods.protocol import SPAN, Apply, Cost, Tensor, Tile
from pymerge.ops.view import View

if TYPE_CHECKING:
    import torch

#: Elements of a piece: the steps stay in cache, and their scratch is within what a thread may use
#: for each model beside its tiles.
PIECE = 8 * SPAN
#: Bytes of scratch for each element of a piece and model.
SCRATCH = 24
#: As many elements as torch's sums take at once or more; divides a span.
WIDE = 64


class Piece(NamedTuple):
    """Consecutive elements of every input, [num], in the working format; ``start`` is the index of
    the first one in the tensor."""

    start: int
    num: int
    base: torch.Tensor | None
    models: Sequence[torch.Tensor]

    @property
    def origin(self) -> torch.Tensor:
        """The base of a method that has one."""
        if self.base is None:
            raise RuntimeError("a task vector has no base")
        return self.base

    def deltas(self) -> list[torch.Tensor]:
        """The models less the base."""
        return [model - self.origin for model in self.models]


def dtype_of(format: Format) -> torch.dtype:
    """Torch's dtype of a format."""
    import torch

    dtype: torch.dtype = getattr(torch, str(format.torch_name))
    return dtype


def view_of(elements: torch.Tensor) -> View:
    """A contiguous torch tensor on the host as the ops take it."""
    format = BY_TORCH_NAME[str(elements.dtype).removeprefix("torch.")]
    if format.code is None or not elements.is_contiguous():
        raise RuntimeError("expected contiguous elements of a floating-point format")
    return View(elements.data_ptr(), format.code, elements.numel())


def load(tensor: Tensor, source: View) -> torch.Tensor:
    """The elements in the working format."""
    import torch

    found = torch.empty(source.num, dtype=dtype_of(tensor.working))
    load_into(tensor, view_of(found), source)
    return found


def load_into(tensor: Tensor, out: View, source: View) -> None:
    """Convert elements; from float64 by way of float32, as torch does."""
    if source.code == F64.code and out.code not in (F32.code, F64.code):
        half_way = tensor.ops.buffer(source.num)
        tensor.ops.convert(half_way.view, source)
        source = half_way.view
        tensor.ops.convert(out, source)
        return
    tensor.ops.convert(out, source)


def active(tensor: Tensor) -> AbstractContextManager[Any]:
    """What torch computes inside is computed by one thread: its sums depend on their number."""
    return tensor.room.active()


def by_piece(
    tensor: Tensor,
    run: Callable[[Piece], torch.Tensor],
    models: tuple[int, ...] | None = None,
) -> Apply:
    """The map that writes ``run(piece)``, [num], once rounded to the output's format."""

    def write(tile: Tile, out: View) -> int:
        nonfinite = 0
        with active(tensor):
            for first, part in tile.pieces(PIECE):
                result = run(load_piece(tensor, part)).contiguous()
                nonfinite += tensor.ops.convert(out.part(first, part.num), view_of(result))
        return nonfinite

    return Apply(write, models=models)


def load_piece(tensor: Tensor, part: Tile) -> Piece:
    """A part of a tile in the working format."""
    base = None if part.base is None else load(tensor, part.base)
    return Piece(part.start, part.num, base, [load(tensor, model) for model in part.models])


def sum_models(tensor: Tensor, values: torch.Tensor) -> torch.Tensor:
    """The sum of [models, num] over models, in the order of the sum over the whole tensor."""
    num = values.shape[1]
    if num >= WIDE or num == tensor.num_elements:
        return values.sum(dim=0)
    import torch

    return torch.nn.functional.pad(values, (WIDE, 0)).sum(dim=0)[WIDE:]


def piece_bytes(tensor: Tensor) -> int:
    """What the steps on one piece hold at once."""
    return min(tensor.num_elements, PIECE) * (tensor.num_models + 1) * SCRATCH


def piece_cost(tensor: Tensor) -> Cost:
    """The cost of a method that needs no more than pieces."""
    return Cost(piece_bytes(tensor), panels=False)

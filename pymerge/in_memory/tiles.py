"""How tensors in memory are cut into tiles."""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.methods.protocol import Method, Tensor, Tile
from pymerge.ops.view import View

TILE_ELEMENTS = 1 << 19


def tile_elements(method: Method, tensor: Tensor) -> int:
    """Elements of a tile: a multiple of the method's granule."""
    granule = method.granule(tensor)
    return max(granule, TILE_ELEMENTS // granule * granule)


def cut(
    base: View | None,
    models: Sequence[View],
    num_elements: int,
    diagonals: Sequence[View] = (),
) -> list[Tile]:
    """Tiles of ``num_elements`` elements, the last one shorter."""
    whole = Tile(0, models[0].num, base, tuple(models), tuple(diagonals))
    return [tile for _, tile in whole.pieces(num_elements)]

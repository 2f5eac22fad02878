"""RAM and RAM+ (tensor-local), step by step as mergekit takes them.

mergekit's ramplus_tl gives float32 whatever its inputs are, since its factors are float32; here the
result is rounded to the output's format once, from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pymerge.methods.protocol import Apply, Measure, Measuring, Method, Tensor, Tile
from pymerge.methods.stepwise.form import form
from pymerge.methods.stepwise.pieces import (
    PIECE,
    Piece,
    active,
    by_piece,
    load_piece,
    sum_models,
)

if TYPE_CHECKING:
    import torch


class Changes(NamedTuple):
    """Task vectors [models, num], which of their elements are active, and in how many models."""

    deltas: torch.Tensor
    active: torch.Tensor
    changers: torch.Tensor


def _changes(tensor: Tensor, piece: Piece) -> Changes:
    import torch

    deltas = torch.stack(piece.deltas())
    found = deltas.abs() > float(tensor.parameters["epsilon"])
    return Changes(deltas, found, found.sum(dim=0, keepdim=True))


def _merge(tensor: Tensor, factors: torch.Tensor | None) -> Apply:
    def run(piece: Piece) -> torch.Tensor:
        deltas, found, changers = _changes(tensor, piece)
        deltas = deltas * found
        alone = deltas * (changers == 1)
        if factors is not None:
            alone = alone * factors
        shared = deltas * (changers > 1) / changers.clamp(min=1)
        return piece.origin + sum_models(tensor, alone + shared)

    return by_piece(tensor, run)


def ram(tensor: Tensor) -> Apply:
    """What one model changed is taken whole, what several changed is averaged over them."""
    return _merge(tensor, None)


def ramplus_tl(tensor: Tensor) -> Measuring:
    """As RAM; what one model changed alone is enlarged by the share that it changed with others."""
    import torch

    def look(tile: Tile) -> NDArray[np.int64]:
        counts = np.zeros((2, tensor.num_models), np.int64)
        with active(tensor):
            for _, part in tile.pieces(PIECE):
                _, found, changers = _changes(tensor, load_piece(tensor, part))
                counts[0] += (found & (changers > 1)).sum(dim=1).numpy()
                counts[1] += (found & (changers == 1)).sum(dim=1).numpy()
        return counts

    if not tensor.num_elements:
        return _merge(tensor, None)
    shared, alone = torch.from_numpy((yield Measure(look, fold=np.add)))
    numbers = {name: float(tensor.parameters[name]) for name in ("r", "alpha", "epsilon")}
    ratio = shared / alone.clamp(min=numbers["epsilon"])
    factors = 1 + numbers["r"] * ratio.clamp(min=0, max=numbers["alpha"])
    return _merge(tensor, factors.unsqueeze(-1))


METHODS: Mapping[str, Method] = {
    "ram": form("ram", ram, ("epsilon",)),
    "ramplus_tl": form("ramplus_tl", ramplus_tl, ("r", "alpha", "epsilon"), looks=lambda tensor: 1),
}

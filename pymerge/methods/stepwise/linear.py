"""linear, passthrough and nearswap, step by step as mergekit takes them.

linear adds up in float32, of float64 in float64; the others round every step to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pymerge.formats import F64
from pymerge.methods.protocol import Apply, Method, Tensor
from pymerge.methods.stepwise.form import DOUBLE, form
from pymerge.methods.stepwise.pieces import Piece, by_piece

if TYPE_CHECKING:
    import torch


def linear(tensor: Tensor) -> Apply:
    """``Σ wᵢ·xᵢ / Σ wᵢ``; a sum of weights that vanishes is divided by, as mergekit does."""
    weights = tensor.each("weight")

    def run(piece: Piece) -> torch.Tensor:
        import torch

        wide = torch.float64 if tensor.working is F64 else torch.float32
        factors = torch.tensor([weights], dtype=wide)
        total = torch.zeros(piece.num, dtype=wide)
        for model, factor in zip(piece.models, factors.unbind(1), strict=True):
            total.addcmul_(model, factor)
        if tensor.parameters["normalize"]:
            total.div_(factors.sum(dim=1))
        return total.to(piece.models[0].dtype)

    return by_piece(tensor, run)


def passthrough(tensor: Tensor) -> Apply:
    """``x·scale``."""
    (scale,) = tensor.each("scale")

    def run(piece: Piece) -> torch.Tensor:
        (model,) = piece.models
        return model if scale == 1.0 else model * scale

    return by_piece(tensor, run)


def nearswap(tensor: Tensor) -> Apply:
    """``w·x + (1 − w)·θ₀`` with ``w = t / |θ₀ − x|``, between 0 and 1."""
    t = float(tensor.parameters["t"])

    def run(piece: Piece) -> torch.Tensor:
        (model,) = piece.models
        gap = (piece.origin - model).abs()
        share = (t / gap.clamp(min=1e-6)).clamp(min=0, max=1)
        return share * model + (1 - share) * piece.origin

    return by_piece(tensor, run)


METHODS: Mapping[str, Method] = {
    "linear": form("linear", linear, ("weight", "normalize"), working=DOUBLE),
    "passthrough": form("passthrough", passthrough, ("scale",), working=DOUBLE),
    "nearswap": form("nearswap", nearswap, ("t",), working=DOUBLE),
}

"""model_stock, step by step as mergekit takes them: pairwise cosines of the task vectors, of the
whole tensor or of each vector along its last dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pymerge.methods.protocol import Cost, Method, Solve, Solving, Tensor
from pymerge.methods.stepwise.form import form
from pymerge.methods.stepwise.pieces import Piece, by_piece
from pymerge.methods.stepwise.whole import gather, gather_deltas, put, whole_cost

if TYPE_CHECKING:
    import torch

SMALLEST_PRODUCT, SMALLEST_DENOMINATOR = 1e-6, 1e-6


def model_stock(tensor: Tensor) -> Solving:
    """``t·mean + (1 − t)·θ₀`` with t from the mean cosine."""
    if tensor.parameters["filter_wise"] and len(tensor.shape) != 1:
        base, models = yield from gather(tensor)
        return put(tensor, (yield Solve(partial(_by_vector, tensor, base, models))))
    deltas = yield from gather_deltas(tensor)
    ratio = yield Solve(partial(_ratio, list(deltas)))
    del deltas

    def run(piece: Piece) -> torch.Tensor:
        return _toward(piece.origin, piece.models, ratio)

    return by_piece(tensor, run)


def _ratio(deltas: list[torch.Tensor]) -> torch.Tensor:
    """t of vectors along the last dimension, which has one element in the result."""
    import torch

    norms = [torch.norm(delta, dim=-1) for delta in deltas]
    cosines = []
    for i, first in enumerate(deltas):
        for j in range(i + 1, len(deltas)):
            product = (first * deltas[j]).sum(dim=-1)
            length = (norms[i] * norms[j]).clamp(min=SMALLEST_PRODUCT)
            cosines.append((product / length).clamp(-1, 1))
    cosine = torch.stack(cosines).mean(dim=0).unsqueeze(-1)
    count = len(deltas)
    below = 1 + (count - 1) * cosine
    vanishes = below.abs() < SMALLEST_DENOMINATOR
    ratio = (count * cosine) / torch.where(vanishes, torch.ones_like(below), below)
    return torch.where(vanishes, torch.zeros_like(ratio), ratio)


def _toward(
    base: torch.Tensor, models: Sequence[torch.Tensor], ratio: torch.Tensor
) -> torch.Tensor:
    mean: torch.Tensor = sum(models) / len(models)  # type: ignore[assignment]
    return ratio * mean + (1 - ratio) * base


def _by_vector(tensor: Tensor, base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    origin = base.view(tensor.shape)
    shaped = [model.view(tensor.shape) for model in models]
    ratio = _ratio([model - origin for model in shaped])
    return _toward(origin, shaped, ratio)


def _cost(tensor: Tensor) -> Cost:
    count = tensor.num_models
    if tensor.parameters["filter_wise"] and len(tensor.shape) != 1:
        return whole_cost(tensor, lambda size: (2 * count + 2) * size)
    return whole_cost(tensor, lambda size: (count + 1) * size)


METHODS: Mapping[str, Method] = {
    "model_stock": form(
        "model_stock", model_stock, ("filter_wise",), looks=lambda tensor: 1, cost=_cost
    ),
}

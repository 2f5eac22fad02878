"""arcee_fusion, step by step as mergekit takes them.

A large tensor's quartiles are those of elements that torch's generator picks. mergekit gives
float32 whatever its inputs are; here that is rounded to the output's format once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from pymerge.methods.protocol import Cost, Method, Solve, Solving, Tensor
from pymerge.methods.sparsify import SEED
from pymerge.methods.stepwise.draws import deal, generator_of
from pymerge.methods.stepwise.form import form
from pymerge.methods.stepwise.pieces import PIECE, Piece, by_piece
from pymerge.methods.stepwise.whole import gather, whole_cost

if TYPE_CHECKING:
    import torch

#: Elements whose quartiles are taken, at most.
SAMPLE = 1_000_000
#: Added to probabilities before their logarithm.
SMALLEST_CHANCE = 1e-8
#: Torch's sorted copy and indices of the sample, and the indices that were picked.
SAMPLE_BYTES = 32
#: What the steps on one row hold at once, float32 in softmax and its like.
ROW_BYTES = 40


def arcee_fusion(tensor: Tensor) -> Solving:
    """Take what is more important than most: difference times divergence of the row."""
    if not tensor.num_elements:
        return by_piece(tensor, lambda piece: piece.origin)
    base, models = yield from gather(tensor)
    chosen: torch.Tensor = yield Solve(partial(_chosen, tensor, base, models[0]))
    del base, models

    def run(piece: Piece) -> torch.Tensor:
        mask = chosen[piece.start : piece.start + piece.num].float()
        return piece.origin + (piece.models[0] - piece.origin) * mask

    return by_piece(tensor, run)


def _chosen(tensor: Tensor, base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """bool [num_elements]. The model is spent."""
    rows, columns = tensor.num_rows, tensor.columns
    at_once = max(1, PIECE // columns)
    base_rows, model_rows = base.view(rows, columns), model.view(rows, columns)
    for first in range(0, rows, at_once):
        part = slice(first, first + at_once)
        model_rows[part] = _importance(model_rows[part], base_rows[part])
    return model >= _threshold(tensor, model)


def _importance(model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    import torch

    gap = (model - base).abs()
    p = torch.softmax(model, dim=-1) + SMALLEST_CHANCE
    q = torch.softmax(base, dim=-1) + SMALLEST_CHANCE
    return gap * torch.sum(p * torch.log(p / q), dim=-1, keepdim=True)


def _threshold(tensor: Tensor, scores: torch.Tensor) -> torch.Tensor:
    import torch

    if _samples(tensor):
        scores = scores[_picked(generator_of(tensor), tensor)]
    ordered = torch.sort(scores).values
    places = (torch.tensor([0.25, 0.5, 0.75]) * (len(ordered) - 1)).long()
    low, middle, high = ordered[places].unbind()
    threshold: torch.Tensor = middle + 1.5 * (high - low)
    return threshold


def _picked(generator: torch.Generator, tensor: Tensor) -> torch.Tensor:
    import torch

    return torch.randint(tensor.num_elements, (SAMPLE,), generator=generator)


def _take(generator: torch.Generator, tensor: Tensor) -> None:
    _picked(generator, tensor)


def _samples(tensor: Tensor) -> bool:
    return tensor.num_elements > SAMPLE


def _cost(tensor: Tensor) -> Cost:
    cost = whole_cost(tensor, lambda size: 2 * size + 1)
    beside = SAMPLE_BYTES * min(tensor.num_elements, SAMPLE)
    rows = ROW_BYTES * min(tensor.num_elements, max(PIECE, tensor.columns))
    return cost._replace(num_bytes=cost.num_bytes + max(beside, rows))


METHODS: Mapping[str, Method] = {
    "arcee_fusion": form(
        "arcee_fusion",
        arcee_fusion,
        looks=lambda tensor: 1,
        cost=_cost,
        draws=_samples,
        measure_model=deal(lambda tensor: SAMPLE * _samples(tensor), _take),
        more=(SEED,),
    ),
}

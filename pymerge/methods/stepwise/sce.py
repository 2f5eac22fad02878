"""sce, step by step as mergekit takes them. The elements of the largest variance over models are
those of torch's topk, as mergekit's, equal variances included."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from pymerge.methods.protocol import Cost, Method, Solve, Solving, Tensor
from pymerge.methods.stepwise.form import form
from pymerge.methods.stepwise.pieces import Piece, by_piece, sum_models
from pymerge.methods.stepwise.whole import chunks, gather_deltas, whole_cost

if TYPE_CHECKING:
    import torch

SMALLEST_SUM, SMALLEST_DIVISOR = 1e-6, 1e-6


def sce(tensor: Tensor) -> Solving:
    """Select, elect signs, weight models by their mean squares, sum."""
    if not tensor.num_elements:
        return by_piece(tensor, lambda piece: piece.origin)
    share = float(tensor.parameters["select_topk"])
    deltas = yield from gather_deltas(tensor)
    selected = None
    if share < 1:
        selected = yield Solve(partial(_selected, tensor, deltas, share))
    weights = yield Solve(partial(_weights, deltas, selected))
    del deltas

    def run(piece: Piece) -> torch.Tensor:
        import torch

        stack = torch.stack(piece.deltas())
        if selected is not None:
            stack = stack * selected[piece.start : piece.start + piece.num]
        plus = sum_models(tensor, stack) >= 0
        agrees = torch.where(plus, stack > 0, stack < 0)
        shares = weights * agrees
        divisor = sum_models(tensor, shares).clamp(min=SMALLEST_DIVISOR)
        return piece.origin + sum_models(tensor, stack * shares) / divisor

    return by_piece(tensor, run)


def _selected(tensor: Tensor, deltas: torch.Tensor, share: float) -> torch.Tensor:
    """Which elements take part, bool [num_elements]."""
    import torch

    selected = torch.zeros(deltas.shape[1], dtype=torch.bool)
    if share <= 0:
        return selected
    spread = torch.empty(deltas.shape[1], dtype=deltas.dtype)
    for part in chunks(tensor):
        spread[part] = torch.var(deltas[:, part], dim=0, unbiased=False)
    count = int(torch.count_nonzero(spread) * share)
    if count:
        selected[torch.topk(spread.abs_(), count, sorted=False).indices] = True
    return selected


def _weights(deltas: torch.Tensor, selected: torch.Tensor | None) -> torch.Tensor:
    """Mean squares of the models, as shares, [models, 1]. The deltas are spent."""
    import torch

    means = []
    for delta in deltas:
        if selected is not None:
            delta.mul_(selected)
        means.append(delta.square_().view(1, -1).mean(dim=1))
    weights = torch.cat(means)
    total = torch.sum(weights).item()
    if abs(total) < SMALLEST_SUM:
        weights = torch.ones_like(weights) / len(weights)
    else:
        weights = weights / total
    return weights.unsqueeze(-1)


def _cost(tensor: Tensor) -> Cost:
    """The task vectors, and their squares in float32 while they are averaged; for the selection
    variances, and pairs of value and index that torch orders."""
    selects = float(tensor.parameters["select_topk"]) < 1
    count = tensor.num_models
    return whole_cost(tensor, lambda size: count * size + ((2 * size + 25) if selects else 4))


METHODS: Mapping[str, Method] = {
    "sce": form("sce", sce, ("select_topk",), looks=lambda tensor: 1, cost=_cost),
}

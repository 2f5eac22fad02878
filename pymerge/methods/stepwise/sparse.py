"""What mergekit's methods of task vectors share: sparse task vectors, weighted, elected, summed.

Every step is rounded to the working format: the difference to the base, its product with mask,
factor and weight, the sum over models (added up in float32, rounded once), the division and the
product with lambda.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pymerge.methods.protocol import Apply, Tensor
from pymerge.methods.stepwise.pieces import Piece, by_piece, dtype_of, sum_models

if TYPE_CHECKING:
    import torch

#: ``sparse(model, piece, delta)``: what stays of a model's task vector.
Sparse = Callable[[int, Piece, "torch.Tensor"], "torch.Tensor"]

SHARED = ("normalize", "rescale", "lambda", "weight", "density")
#: Sums of magnitudes below this are not divided by, and sums of weights below the other.
SMALLEST_NORM, SMALLEST_DIVISOR = 1e-7, 1e-8


def whole_delta(model: int, piece: Piece, delta: torch.Tensor) -> torch.Tensor:
    """Everything stays."""
    return delta


def merge_sparse(tensor: Tensor, sparse: Sparse, *, elects: bool) -> Apply:
    """The base plus the sum, or with ``normalize`` the weighted mean, of the sparse task vectors;
    ``elects`` leaves out what disagrees with the sign of the sum (of zero: plus)."""
    values = tensor.each("weight")
    scale = float(tensor.parameters["lambda"])

    def run(piece: Piece) -> torch.Tensor:
        import torch

        dtype = dtype_of(tensor.working)
        weights = torch.tensor(values, dtype=dtype).unsqueeze(1)
        stack = torch.empty((len(values), piece.num), dtype=dtype)
        for index, model in enumerate(piece.models):
            stack[index] = sparse(index, piece, model - piece.origin)
        stack.mul_(weights)
        if elects:
            plus = sum_models(tensor, stack) >= 0
            agrees = torch.where(plus, stack > 0, stack < 0)
            stack.mul_(agrees)
            divisor = sum_models(tensor, weights * agrees)
            divisor[divisor == 0] = 1
        else:
            divisor = weights.sum(dim=0)
            divisor[divisor.abs() < SMALLEST_DIVISOR] = 1
        mixed = sum_models(tensor, stack)
        if tensor.parameters["normalize"]:
            mixed /= divisor
        if scale != 1:
            mixed *= scale
        return piece.origin + mixed

    return by_piece(tensor, run)


def l1_factor(delta: torch.Tensor, masked: torch.Tensor) -> torch.Tensor | None:
    """What gives ``masked`` the sum of magnitudes of ``delta``, a number in their format; None
    where there is nothing to restore. ``masked`` and ``delta`` are spent."""
    before = delta.abs_().sum()
    after = masked.abs_().sum()
    if bool(before < SMALLEST_NORM) or bool(after < SMALLEST_NORM):
        return None
    return before / after


def task_arithmetic(tensor: Tensor) -> Apply:
    """Nothing is dropped, nothing elected."""
    return merge_sparse(tensor, whole_delta, elects=False)

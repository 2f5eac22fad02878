"""Squared gradients of a linear layer's weight, example by example, from inputs and output
gradients.

An example with inputs X [rows, inputs] and output gradients G [rows, outputs] has the weight's
gradient GᵀX. Where every example is one row, Σ (GᵀX)² over examples is (G⊙G)ᵀ(X⊙X), one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge.adaptive.gram_sums import version_of
from pymerge.errors import PymergeError

if TYPE_CHECKING:
    import torch

    from pymerge.adaptive.layers import LinearWeight


@dataclass(frozen=True)
class Call:
    """One call of a linear layer: its input, and where the gradient of its output appears."""

    linear: LinearWeight
    bias: str | None
    x: torch.Tensor
    version: int
    edge: Any

    @classmethod
    def of(cls, linear: LinearWeight, bias: str | None, x: torch.Tensor, edge: Any) -> Call:
        return cls(linear, bias, x.detach(), version_of(x), edge)

    def check(self, num: int, lengths: set[int], pooled: bool) -> None:
        """Raises PymergeError where the input was changed since the call, or where it is not known
        which of its rows are of which of ``num`` examples."""
        if version_of(self.x) != self.version:
            raise PymergeError(
                f"collect: expected the input of the layer of {self.linear.name!r} as it was "
                "called, found it changed in place since; make that operation one that returns a "
                "new tensor"
            )
        shape = self.x.shape[:-1]
        flat = {num * length for length in lengths} | ({num} if pooled else set())
        fits = shape[0] == num if len(shape) > 1 else bool(shape) and shape[0] in flat
        if num != 1 and not fits:
            raise PymergeError(
                f"collect: expected the layer of {self.linear.name!r} to get the {num} examples as "
                f"its first dimension, found rows {list(shape)}, of which it is not known whose "
                "they are; give the model batches of one example"
            )


def by_example(x: torch.Tensor, num: int) -> torch.Tensor:
    """An input, or the gradient of an output, as float32 [examples, rows, columns]."""
    return x.detach().reshape(num, -1, x.shape[-1]).float()


def add_squares(
    total: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]], *, transposed: bool
) -> None:
    """Add Σ over examples of (Σ over calls GᵀX)².

    :param total: float32 [outputs, inputs], with ``transposed`` [inputs, outputs].
    :param pairs: for each call X [examples, rows, inputs] and G [examples, rows, outputs].
    """
    if not pairs:
        return
    out = total.T if transposed else total
    if len(pairs) == 1 and pairs[0][0].shape[1] == 1:
        x, g = (part[:, 0].square() for part in pairs[0])
        out += g.T @ x
        return
    for example in range(len(pairs[0][0])):
        gradient = sum(g[example].T @ x[example] for x, g in pairs)
        out += gradient.square()  # type: ignore[union-attr]

"""Products of a float32 matrix with a float64 one, without a float64 copy of the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace


def product(
    x: torch.Tensor, right: torch.Tensor, ws: Workspace, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ right`` computed in right's dtype, by panels of x's rows.

    :param x: [m, n], or a transposed view.
    :param right: [n, k].
    :param out: [m, k] in any dtype; right's if not given.
    """
    if out is None:
        out = right.new_empty((x.shape[0], right.shape[1]))
    target = out

    def panel(rows: slice) -> None:
        target[rows] = x[rows].to(right.dtype) @ right

    ws.map(panel, ws.panels(x.shape[0]))
    return target

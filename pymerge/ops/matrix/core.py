"""Low-rank updates in their common core space.

Updates t_i = left_i @ right_i of one weight share bases of few columns: with the QR decompositions

    [left_1 .. left_N] = left R_B        [right_1; ..; right_N]^T = right R_A

each of them is t_i = left C_i right^T with a small core C_i = R_B,i R_A,i^T, exactly. What commutes
with isometries on both sides (sums, polar factors, singular value thresholds, Grams and their
filters) can be computed on the cores and expanded once (arXiv 2509.17786); what works element by
element cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.errors import PymergeError

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace


@dataclass(frozen=True)
class Core:
    """Updates as left [m, RB] @ cores[i] [RB, RA] @ right [n, RA]^T.

    The columns of ``left`` and of ``right`` are orthonormal, whatever the rank of the updates; RB
    is the sum of the ranks or m, whichever is smaller, RA likewise with n. The bases are in the
    dtype of the decomposition, the cores float64.
    """

    left: torch.Tensor
    right: torch.Tensor
    cores: tuple[torch.Tensor, ...]

    def expand(self, core: torch.Tensor, ws: Workspace, dtype: str = "float32") -> torch.Tensor:
        """left @ core @ right^T [m, n] for any core [RB, RA]: float64 products, rounded once to
        ``dtype``."""
        import torch

        out = ws.empty(self.left.shape[0], self.right.shape[0], dtype=dtype)
        turned = self.right.to(torch.float64).T
        core = core.to(torch.float64)

        def panel(rows: slice) -> None:
            out[rows] = self.left[rows].to(torch.float64) @ core @ turned

        ws.map(panel, ws.panels(self.left.shape[0]))
        return out


def core_space(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], ws: Workspace, *, dtype: str = "float64"
) -> Core:
    """The core space of updates given as (left [m, rank], right [rank, n]); ranks may differ.

    :param factors: on the device of ``ws``, any scale already multiplied into one of the two.
    :param dtype: of the QR decompositions and so of the bases, float64 or float32. The updates come
        back to about 1e-15 and 1e-6 of their norm.
    :raises PymergeError: no factors, or shapes that do not fit.
    """
    import torch

    _check(factors)
    wanted = getattr(torch, dtype)
    stacks = (
        torch.cat([left.to(wanted) for left, _ in factors], dim=1),
        torch.cat([right.to(wanted) for _, right in factors], dim=0).T,
    )
    (left, upper_left), (right, upper_right) = ws.map(torch.linalg.qr, stacks)
    upper_left, upper_right = upper_left.to(torch.float64), upper_right.to(torch.float64)
    cores = []
    first = 0
    for each, _ in factors:
        part = slice(first, first + each.shape[1])
        cores.append(upper_left[:, part] @ upper_right[:, part].T)
        first = part.stop
    return Core(left, right, tuple(cores))


def _check(factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    if not factors:
        raise PymergeError("core_space: expected at least one pair of factors, found none")
    rows, columns = factors[0][0].shape[0], factors[0][1].shape[-1]
    for index, (left, right) in enumerate(factors):
        shapes = f"{list(left.shape)} and {list(right.shape)}"
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise PymergeError(
                f"core_space, pair {index}: expected [m, rank] and [rank, n], found {shapes}"
            )
        if (left.shape[0], right.shape[1]) != (rows, columns):
            raise PymergeError(
                f"core_space, pair {index}: expected factors of a {rows} by {columns} matrix as "
                f"pair 0 has, found {shapes}"
            )

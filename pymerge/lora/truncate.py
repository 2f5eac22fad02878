"""How many singular directions are kept, and how they become the two factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge.errors import PymergeError
from pymerge.formats import BF16, F16, F32, Format
from pymerge.names import listed, shown

if TYPE_CHECKING:
    import torch

#: Formats that factors are written in.
DTYPES = {"float32": F32, "float16": F16, "bfloat16": BF16}


@dataclass(frozen=True)
class Truncation:
    """``rank`` is the largest rank, None for no bound; ``energy`` the share of the squared norm
    that the smallest enough rank holds, None for all of it; singular values at or below ``epsilon``
    are dropped. With ``distribute`` each factor takes the roots of the values, else A all."""

    rank: int | None
    energy: float | None = None
    epsilon: float = 0.0
    distribute: bool = True

    def count(self, values: torch.Tensor, total: float) -> tuple[int, float]:
        """How many of the descending float64 values are kept, and the share of ``total``, the
        squared norm, that these hold."""
        held = values.square().cumsum(0)
        keep = int((values > self.epsilon).sum())
        if self.rank is not None:
            keep = min(keep, self.rank)
        if self.energy is not None:
            keep = min(keep, int((held < self.energy * total).sum()) + 1)
        share = float(held[keep - 1]) / total if keep and total else float(not total)
        return keep, min(share, 1.0)

    def split(
        self, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """B [m, k] and A [k, n] with B A = left diag(values) right."""
        if self.distribute:
            roots = values.sqrt()
            return left * roots, roots[:, None] * right
        return left, values[:, None] * right


def checked(rank: Any, energy: Any, epsilon: Any = 0.0, distribute: bool = True) -> Truncation:
    """Raises PymergeError for values that make no sense."""
    if rank is not None and (type(rank) is not int or rank < 1):
        raise PymergeError(f"rank: expected a whole number of at least 1, found {shown(rank)}")
    if energy is not None and not (_is_number(energy) and 0 < energy <= 1):
        raise PymergeError(
            f"energy: expected a share above 0 and at most 1, found {shown(energy)}; 0.99 keeps "
            "the directions that hold 99 % of the squared norm"
        )
    if not (_is_number(epsilon) and 0 <= epsilon < math.inf):
        raise PymergeError(f"epsilon: expected a number of at least 0, found {shown(epsilon)}")
    return Truncation(rank, energy, float(epsilon), distribute)


def format_of(dtype: str) -> Format:
    """The format of the factors. Raises PymergeError."""
    if dtype not in DTYPES:
        raise PymergeError(f"dtype: expected {listed(DTYPES)}, found {shown(dtype)}")
    return DTYPES[dtype]


def rank_text(ranks: Sequence[int]) -> str:
    """Ranks in ascending order, for a sentence."""
    return f"rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[-1] > ranks[0] else "")


def percent(share: float) -> str:
    """A share in words, rounded down, so that only all is 100 %."""
    return f"{math.floor(share * 1e4) / 1e2:g} %"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

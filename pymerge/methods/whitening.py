"""Sets of singular vectors of several models, made orthonormal together.

The vectors of one model are orthonormal, those of several are not. ``(B·Bᵀ)^(−1/2)·B``, with the
vectors as rows of B, is the nearest set that is: the polar factor of B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

#: Relative singular values below which a direction does not count.
CUT = 1e-6
#: Singular values below which a set of unit vectors is nearly dependent.
NEARLY_DEPENDENT = 1e-4


class Stack:
    """Vectors as rows, float64, that come a few at a time."""

    def __init__(self, num_rows: int, columns: int, ws: Workspace) -> None:
        self._all = ws.empty(num_rows, columns, dtype="float64")
        self._num = 0

    def add(self, vectors: torch.Tensor) -> None:
        """Put [k, columns] below the rows that are there."""
        self._all[self._num : self._num + len(vectors)] = vectors
        self._num += len(vectors)

    @property
    def rows(self) -> torch.Tensor:
        return self._all[: self._num]


def group_size(rows: int, columns: int) -> int:
    """How many models are decomposed at once: an eigendecomposition takes one thread, however large
    it is. By the shape alone, since the peak of memory depends on it."""
    return 4 if min(rows, columns) <= 1024 else 2


def whitened(
    stacks: Sequence[torch.Tensor], ws: Workspace, warn: Callable[[str], None]
) -> list[torch.Tensor]:
    """The nearest orthonormal rows to those of each stack, float32 like it.

    Directions whose singular values are below ``CUT`` times the largest are left out: rows that
    depend on others share their direction. Stacks that are not finite give NaN.

    :param stacks: float64 [k, columns] of unit vectors.
    :param warn: hears of stacks of which more than one row in a hundred nearly depends on others: a
        direction or two of thousands may by chance.
    """
    from pymerge.ops.matrix.gram import gram
    from pymerge.ops.matrix.products import product

    grams = [gram(stack, ws, side="rows") for stack in stacks]
    found = ws.map(lambda g: _inverse_root(g, ws), grams)
    del grams
    counts = [count for _, count in found]
    if any(100 * count > len(stack) for count, stack in zip(counts, stacks, strict=True)):
        warn(
            f"of {max(map(len, stacks))} singular vectors of different models {max(counts)} nearly "
            f"depend on the others (singular values below {NEARLY_DEPENDENT:.0e}), so that small "
            "differences decide; leave out models that are almost copies of others"
        )
    results = []
    for stack, (root, _) in zip(stacks, found, strict=True):
        results.append(product(root, stack, ws, out=ws.empty(*stack.shape)))
    return results


def _inverse_root(g: torch.Tensor, ws: Workspace) -> tuple[torch.Tensor, int]:
    """The pseudo-inverse square root of a Gram matrix, and how many eigenvalues are nearly 0."""
    from pymerge.ops.matrix.gram import gram
    from pymerge.ops.matrix.spectrum import gram_eigh

    if not len(g):
        return g, 0
    values, vectors = gram_eigh(g, ws)
    if bool(values.isnan().any()):
        return vectors, 0
    num_small = int((values < NEARLY_DEPENDENT**2).sum())
    kept = values > CUT * CUT * values[0]
    half = vectors[:, kept]
    del vectors
    half *= values[kept].pow(-0.25)
    return gram(half, ws, side="rows"), num_small

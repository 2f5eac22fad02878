"""Arcee Fusion: take over the elements that matter most; mergekit's ``arcee_fusion``.

A row's divergence is ``Σ p·log(p/q)`` with ``p = softmax(θ₁) + 1e-8`` and ``q = softmax(θ₀) +
1e-8`` along the last dimension (a tensor of one dimension is one row), an element's score is
``|θ₁ − θ₀|`` times that of its row. Elements whose score is at least ``median + 1.5·(third quartile
− first quartile)`` of their tensor are the model's, the others the base's. The quartiles are the
scores at ``floor(q·(n − 1))`` in upward order, q = 0.25, 0.5, 0.75.

Quartiles are exact for every size, so the result is reproducible: above a million elements mergekit
takes them from a million random ones. The softmax is computed in float32, whose rounding leaves a
divergence open by about 1e-7: rows that moved less have a score of noise, in float32 with mergekit
too (in its bfloat16 much more so), and it may be negative.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pymerge.methods.order import ORDER_OPS, order_statistics
from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import Apply, Measuring, Tensor, Tile
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec
from pymerge.ops.view import View

SPEC = MethodSpec(
    name="arcee_fusion",
    summary="Take over the elements whose change, scaled by their row's divergence, stands out.",
    paper="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    base="required",
    min_models=1,
    max_models=1,
    parameters=by_name(),
    statistics="tensor",
)

#: Scores are made in pieces of about this many elements, which stay in cache while they are
#: counted.
PIECE_ELEMENTS = 1 << 16


class _Importance:
    """The divergence of every row, measured when a tile is first looked at, and the scores."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._rows: dict[int, NDArray[np.float32]] = {}  # by the start of the tile

    def rows(self, tile: Tile) -> NDArray[np.float32]:
        """The divergence of each row of the tile."""
        found = self._rows.get(tile.start)
        if found is None:
            found = self._tensor.ops.row_divergence(
                tile.base, tile.models[0], columns=self._tensor.columns
            )
            self._rows[tile.start] = found
        return found

    def scores(self, tile: Tile) -> Iterator[tuple[View, ...]]:
        """The scores in pieces of whole rows, see :data:`pymerge.methods.order.Scores`."""
        columns = self._tensor.columns
        size = max(1, PIECE_ELEMENTS // columns) * columns
        divergence = self.rows(tile)
        buffers = [self._tensor.ops.buffer(min(size, tile.num))]
        for first, piece in tile.pieces(size):
            factors = divergence[first // columns : (first + piece.num) // columns]
            parts = [factors]
            if np.any(factors < 0):
                parts = [np.where(factors < 0, np.nan, factors), _negated(factors)]
                if len(buffers) == 1:
                    buffers.append(self._tensor.ops.buffer(min(size, tile.num)))
            views = tuple(buffer.view.part(0, piece.num) for buffer in buffers[: len(parts)])
            for view, part in zip(views, parts, strict=True):
                self._tensor.ops.row_scores(
                    view, piece.base, piece.models[0], part, columns=columns
                )
            yield views


def _negated(factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Minus the negative factors, NaN for the others."""
    result: NDArray[np.float32] = np.where(factors < 0, -factors, np.float32(np.nan))
    return result


@method(
    SPEC,
    ops=("row_divergence", "row_scores", *ORDER_OPS, "select_by_score"),
    looks=lambda tensor: 2,
    granule=lambda tensor: tensor.columns,
)
def arcee_fusion(tensor: Tensor) -> Measuring:
    """Measure divergences and quartiles of the scores, then select."""
    importance, threshold, num = _Importance(tensor), 0.0, tensor.num_elements
    if num:
        ranks = [(num - 1) * quarter // 4 for quarter in (1, 2, 3)]
        first, median, third = yield from order_statistics(tensor.ops, importance.scores, ranks)
        with np.errstate(all="ignore"):
            threshold = float(median + np.float32(1.5) * (third - first))
    return Apply(
        lambda tile, out: tensor.ops.select_by_score(
            out,
            tile.base,
            tile.models[0],
            importance.rows(tile),
            threshold,
            columns=tensor.columns,
        )
    )

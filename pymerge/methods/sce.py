"""SCE: select elements by their variance over the models, calculate weights, erase the minority
sign. Wan et al. 2024 (FuseChat), arXiv 2408.07990.

Per tensor: the variance over the models of the task vectors ``τᵢ = θᵢ − θ₀`` is ranked, and of the
elements where it is not zero the share ``select_topk`` of largest variance is selected (equal
variances in index order). The weight of a model is the mean square of its selected elements, the
weights divided by their sum. Each element elects the sign of ``Σ τᵢ`` (zero counts as plus), and
``out = θ₀ + Σ wᵢ·τᵢ / Σ wᵢ`` over the models that agree. With ``mask: merge`` (default, mergekit)
only the selected elements are merged; with ``mask: weights`` (``preset: official``, the authors'
code) the selection decides over the weights alone and every element is merged.

mergekit takes equal weights where the sum of the mean squares is below 1e-6, which the task
vectors of many models never reach, and divides by no less than 1e-6. Here weights are equal only
where that sum is zero, so that a model merges alike whatever its scale; ``smallest_sum: 1e-6``
brings mergekit's rule back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from pymerge.methods.parameters import INT8_MASK, by_name, preset
from pymerge.methods.protocol import SPAN, Apply, Measure, Measuring, Tensor, Tile
from pymerge.methods.registry import method
from pymerge.methods.sparsify import KEEP_OPS, SCRATCH, totals
from pymerge.methods.spec import MethodSpec, ParameterSpec
from pymerge.methods.trim import TRIM_OPS, trim_tensor
from pymerge.ops.selection import ABOVE_ALL, BELOW_ALL, Keep
from pymerge.ops.view import Buffer, View

SPEC = MethodSpec(
    name="sce",
    summary="Merge the elements of largest variance, weighted by energy, of the elected sign.",
    paper="https://arxiv.org/abs/2408.07990",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec(
            "select_topk",
            "float",
            "shared",
            1.0,
            "Share of the elements of nonzero variance that is selected, the largest first.",
            minimum=0.0,
            maximum=1.0,
        ),
        ParameterSpec(
            "mask",
            "str",
            "shared",
            "merge",
            "Whether the selection masks what is merged or only what the weights are made of.",
            choices=("merge", "weights"),
        ),
        ParameterSpec(
            "smallest_sum",
            "float",
            "shared",
            0.0,
            "Weights are equal where the mean squares sum to less than this (mergekit: 1e-6).",
            minimum=0.0,
        ),
        preset(
            "mergekit",
            {
                "mergekit": "merges the selected elements",
                "official": "the authors' code, merges all elements",
            },
        ),
        INT8_MASK,
    ),
    statistics="tensor",
    presets={"mergekit": {}, "official": {"mask": "weights"}},
)


def _selects(tensor: Tensor) -> bool:
    return 0 < float(tensor.parameters["select_topk"]) < 1


def _looks(tensor: Tensor) -> int:
    return 4 if _selects(tensor) else 1


@method(SPEC, ops=(*TRIM_OPS, *KEEP_OPS, "variance_score"), looks=_looks)
def sce(tensor: Tensor) -> Measuring:
    """Select by variance, weigh by energy, then one fused elect → mean → add."""
    if not tensor.num_elements:
        return Apply(lambda tile, out: 0)
    keep = yield from _select(tensor)
    weights = yield from _weights(tensor, keep)
    if tensor.parameters["mask"] == "weights":
        keep = Keep()
    keeps = [keep] * tensor.num_models
    merge = tensor.ops.disjoint_merge

    def run(tile: Tile, out: View) -> int:
        if not _needs_score(keep):
            return int(
                merge(out, tile.base, tile.models, weights, keeps, tile.start, elect="plain")
            )
        nonfinite = 0
        for first, piece, score in _scored(tensor, tile):
            nonfinite += merge(
                out.part(first, piece.num),
                piece.base,
                piece.models,
                weights,
                keeps,
                piece.start,
                elect="plain",
                score=score.view,
            )
        return nonfinite

    return Apply(run)


def _needs_score(keep: Keep) -> bool:
    """Whether elements differ: a keep of everything or nothing asks for no score."""
    return keep.threshold not in (BELOW_ALL, ABOVE_ALL)


def _scored(tensor: Tensor, tile: Tile) -> Iterator[tuple[int, Tile, Buffer]]:
    """The tile in pieces, each with its elements' variance over the models in scratch memory."""
    for first, piece in tile.pieces(SCRATCH):
        score = tensor.ops.buffer(piece.num)
        tensor.ops.variance_score(score.view, piece.base, piece.models)
        yield first, piece, score


def _select(tensor: Tensor) -> Generator[Measure, Any, Keep]:
    """The elements of largest variance: a share of those where it is not zero."""
    share = float(tensor.parameters["select_topk"])
    if not _selects(tensor):
        return Keep() if share >= 1 else Keep(ABOVE_ALL, 0)

    def ranked(tile: Tile) -> Iterator[Tile]:
        for _, piece, score in _scored(tensor, tile):
            yield Tile(piece.start, piece.num, None, (score.view,))

    def nonzero(tile: Tile) -> int:
        return sum(
            int(tensor.ops.bracket_count(None, part.models, [0], [0], 0)[0][0, 0])
            for part in ranked(tile)
        )

    varying = yield Measure(nonzero, fold=lambda a, b: a + b)
    (keep,) = yield from trim_tensor(tensor, [int(share * varying)], ranked=ranked)
    return keep


def _weights(tensor: Tensor, keep: Keep) -> Generator[Measure, Any, list[float]]:
    """The share of each model in the mean squares of the selected elements."""
    keeps = [keep] * tensor.num_models
    kept_sums = tensor.ops.kept_sums

    def look(tile: Tile) -> Any:
        if not _needs_score(keep):
            return [kept_sums(tile.base, tile.models, keeps, tile.start, span=SPAN)]
        return [
            kept_sums(piece.base, piece.models, keeps, piece.start, span=SPAN, score=score.view)
            for _, piece, score in _scored(tensor, tile)
        ]

    tiles = yield Measure(look)
    squares = totals([spans for parts in tiles for spans in parts])[:, 2]
    total = float(squares.sum())
    if not 0 < total < float("inf"):
        return [1 / tensor.num_models] * tensor.num_models
    if total / tensor.num_elements < float(tensor.parameters["smallest_sum"]):
        return [1 / tensor.num_models] * tensor.num_models
    return [float(square) / total for square in squares]

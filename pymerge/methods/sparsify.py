"""The frame of the methods that sparsify task vectors and then merge them, as mergekit has it.

``τᵢ = θᵢ − θ₀`` is sparsified, the kept elements are multiplied by a factor, ``dᵢ = wᵢ·factor·τᵢ``.
With a sign election the sum of the ``dᵢ`` elects a sign for each element (zero counts as plus) and
the ``dᵢ`` of that sign are summed and, if ``normalize``, divided by the sum of their weights;
without one all are summed and, if ``normalize``, divided by the sum of all weights. ``out = θ₀ +
λ·that``.

What survives is told by a :class:`Keep` for each model where one number decides over an element, or
by a :class:`RowRule` where its rank in its row does: then each piece of a tile is sparsified into
scratch memory first.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pymerge.methods.gram import exact_sum
from pymerge.methods.parameters import INT8_MASK, LAMBDA, WEIGHT, normalize, sum_or_one
from pymerge.methods.protocol import SPAN, Apply, Measure, Tensor, Tile, remembered
from pymerge.methods.spec import ParameterSpec
from pymerge.ops.selection import ALL_DRAWS, Keep
from pymerge.ops.view import Buffer, View

KEEP_OPS = ("kept_sums", "disjoint_merge")
ROW_OPS = ("axpy_n", "row_sparsify", "kept_sums", "disjoint_merge")

#: Elements that are sparsified into scratch memory at once; longer rows are taken one by one.
SCRATCH = 1 << 16
#: Sums of magnitudes below this are not divided by (mergekit's constant).
SMALLEST_NORM = 1e-7
LARGEST_FACTOR = float(np.finfo(np.float32).max)

Factors = Generator[Measure, Any, list[float] | None]

SEED = ParameterSpec(
    "seed", "int", "shared", 0, "Another seed draws other masks; the same gives the same bytes."
)
RESCALE_BY = ParameterSpec(
    "rescale_by",
    "str",
    "shared",
    "l1",
    "What rescaling restores. l1: the sum of magnitudes of the whole tensor, as mergekit does; "
    "density: the expectation, dividing what is kept by its probability.",
    choices=("l1", "density"),
)


def rescale(default: bool, doc: str) -> ParameterSpec:
    """The ``rescale`` switch with the method's own default."""
    return ParameterSpec("rescale", "bool", "shared", default, doc)


def density(doc: str) -> ParameterSpec:
    """The share of elements that is kept."""
    return ParameterSpec("density", "float", "model", 1.0, doc, minimum=0.0, maximum=1.0)


def common(elects: bool, normalizes: bool) -> tuple[ParameterSpec, ...]:
    """The parameters of every method of the family but the sparsifier's."""
    whose = "the models that agree" if elects else "all models"
    return (
        WEIGHT,
        normalize(normalizes, f"Divide the summed task vectors by the weights of {whose}."),
        LAMBDA,
        INT8_MASK,
    )


@dataclass(frozen=True)
class Combination:
    """How the sparse task vectors become one: the words of ``disjoint_merge``."""

    weights: list[float]
    elect: str
    combine: str
    divisor: float
    scale: float
    zero_sign: int = 1


def combination(tensor: Tensor, elects: bool) -> Combination:
    """mergekit's way, with or without the election of signs."""
    weights = tensor.each("weight")
    divides = bool(tensor.parameters["normalize"])
    scale = float(tensor.parameters["lambda"])
    if elects:
        return Combination(weights, "weighted", "mean" if divides else "sum", 1.0, scale)
    divisor = sum_or_one(weights) if divides else 1.0
    return Combination(weights, "none", "sum", divisor, scale)


def merge_kept(
    tensor: Tensor,
    keeps: Sequence[Keep],
    how: Combination,
    factors: Sequence[float] | None = None,
) -> Apply:
    """One fused mask → factor → sign → sum → add."""
    return Apply(
        lambda tile, out: tensor.ops.disjoint_merge(
            out,
            tile.base,
            tile.models,
            how.weights,
            keeps,
            tile.start,
            elect=how.elect,
            zero_sign=how.zero_sign,
            combine=how.combine,
            factors=factors,
            divisor=how.divisor,
            scale=how.scale,
        )
    )


def totals(spans: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The sums of all spans, exact until one rounding: nothing depends on how they were cut.

    :param spans: arrays [num_spans, ...] in any number.
    """
    whole = np.concatenate(spans) if spans else np.zeros((0, 1))
    columns = whole.reshape(len(whole), -1)
    sums = [exact_sum(column) for column in columns.T]
    return np.array(sums).reshape(whole.shape[1:])


def l1_factor(before: float, after: float) -> float:
    """What restores a sum of magnitudes; 1 where there is nothing to restore, NaN where a sum is
    not finite or no float32 restores it: a factor that is not known must show, also where the mask
    drops the element that spoiled it."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return math.nan
    if not (before >= SMALLEST_NORM and after >= SMALLEST_NORM):
        return 1.0
    factor = before / after
    return factor if factor <= LARGEST_FACTOR else math.nan


def l1_factors(tensor: Tensor, keeps: Sequence[Keep]) -> Factors:
    """The factor of each model that gives what is kept the magnitude of the whole, by one look."""
    if not tensor.num_elements:
        return None

    def measure() -> Factors:
        spans = yield Measure(
            lambda tile: tensor.ops.kept_sums(tile.base, tile.models, keeps, tile.start, span=SPAN)
        )
        return [l1_factor(before, after) for before, after, _ in totals(spans).tolist()]

    return (yield from remembered(tensor, ("l1", tuple(keeps)), measure))


class RowRule(NamedTuple):
    """What is kept of each row of one model, by rank from 0 for the smallest magnitude.

    Kept are the ranks from ``first`` up to, without, ``last``, and of these the elements whose draw
    is below a limit that grows with the rank from ``draws_low`` by ``draws_span``. ``rescale``
    divides each by its probability.
    """

    first: int
    last: int
    draws_low: int = ALL_DRAWS
    draws_span: int = 0
    seed: int = 0
    rescale: bool = False


def row_granule(tensor: Tensor) -> int:
    """The elements of as many whole rows as make a span."""
    return tensor.columns * -(-SPAN // tensor.columns)


def merge_rows(
    tensor: Tensor,
    rules: Sequence[RowRule | None],
    how: Combination,
    factors: Sequence[float] | None = None,
) -> Apply:
    """Sparsify piece by piece into scratch memory, then merge that; None keeps a model whole."""
    everything = [Keep()] * tensor.num_models

    def run(tile: Tile, out: View) -> int:
        nonfinite = 0
        for first, piece in tile.pieces(_piece_size(tensor)):
            sparse = [_sparsify(tensor, piece, i, rule) for i, rule in enumerate(rules)]
            nonfinite += tensor.ops.disjoint_merge(
                out.part(first, piece.num),
                piece.base,
                [buffer.view for buffer in sparse],
                how.weights,
                everything,
                piece.start,
                elect=how.elect,
                zero_sign=how.zero_sign,
                combine=how.combine,
                factors=factors,
                divisor=how.divisor,
                scale=how.scale,
                deltas=True,
            )
        return nonfinite

    return Apply(run)


def l1_row_factors(tensor: Tensor, rules: Sequence[RowRule | None]) -> Factors:
    """As :func:`l1_factors` for rules of rows."""
    if not tensor.num_elements:
        return None
    everything = [Keep()] * tensor.num_models
    span = row_granule(tensor)

    def look(tile: Tile) -> NDArray[np.float64]:
        spans = []
        for _, piece in tile.pieces(_piece_size(tensor)):
            sparse = [_sparsify(tensor, piece, i, rule) for i, rule in enumerate(rules)]
            views = [buffer.view for buffer in sparse]
            kept_sums, start = tensor.ops.kept_sums, piece.start
            before = kept_sums(piece.base, piece.models, everything, start, span=span)[..., 0]
            after = kept_sums(None, views, everything, start, span=span)[..., 0]
            spans.append(np.stack([before, after], axis=-1))
        return np.concatenate(spans)

    def measure() -> Factors:
        spans = yield Measure(look)
        return [l1_factor(before, after) for before, after in totals(spans).tolist()]

    return (yield from remembered(tensor, ("l1 of rows", tuple(rules)), measure))


def _piece_size(tensor: Tensor) -> int:
    granule = row_granule(tensor)
    return max(granule, SCRATCH // granule * granule)


def _sparsify(tensor: Tensor, piece: Tile, model: int, rule: RowRule | None) -> Buffer:
    """The sparse task vector of one model, float32."""
    scratch = tensor.ops.buffer(piece.num)
    x = piece.models[model]
    if rule is None:
        tensor.ops.axpy_n(scratch.view, [x], [1.0], base=piece.base, add_base=False)
    else:
        tensor.ops.row_sparsify(
            scratch.view, piece.base, x, piece.start, columns=tensor.columns, **rule._asdict()
        )
    return scratch

"""Model Breadcrumbs: drop the smallest and the very largest elements of the task vectors. Davari
and Belilovsky 2023, arXiv 2312.06795.

Of the n elements of a task vector ``τᵢ = θᵢ − θ₀`` the ``⌊gamma·n⌋`` of largest magnitude are
outliers and go; of the rest the ``⌊density·n⌋`` largest stay. Equal magnitudes rank in index order,
the lower index first. ``breadcrumbs`` adds up ``wᵢ·τᵢ``; ``breadcrumbs_ties`` elects a sign for
each element by the weighted sum (zero counts as plus) and adds up those that agree. ``out = θ₀ +
λ·sum``.

``trim_scope: tensor`` (default, mergekit) ranks each tensor as a whole; where density and gamma
exceed 1 together, fewer outliers go, and with a density of 1 none. ``trim_scope: row`` (``preset:
official``, the authors' code) ranks each row on its own (the last dimension; a vector is one row),
n being its length; there the outliers go at any density, and a scalar stays untouched.

``order: outliers_first`` is described above; ``order: small_first`` keeps the ``⌊density·n⌋``
largest first and drops the outliers of these. mergekit before 0.1.5 zeroed the task vector wherever
``⌊gamma·n⌋`` is 0; here and in 0.1.5 no outlier goes.
"""

from __future__ import annotations

from collections.abc import Mapping

from pymerge.methods.parameters import by_name, preset
from pymerge.methods.protocol import Measuring, Tensor, remembered
from pymerge.methods.registry import method
from pymerge.methods.sparsify import (
    KEEP_OPS,
    ROW_OPS,
    RowRule,
    combination,
    common,
    density,
    l1_factors,
    l1_row_factors,
    merge_kept,
    merge_rows,
    rescale,
    row_granule,
)
from pymerge.methods.spec import MethodSpec, ParameterSpec, ParameterValue
from pymerge.methods.trim import TRIM_OPS, Trimming, trim_tensor
from pymerge.ops.selection import Keep

PRESETS: Mapping[str, Mapping[str, ParameterValue]] = {
    "mergekit": {},
    "official": {"trim_scope": "row", "weight": 1.0},
}


def _spec(name: str, summary: str, elects: bool) -> MethodSpec:
    return MethodSpec(
        name=name,
        summary=summary,
        paper="https://arxiv.org/abs/2312.06795",
        base="required",
        min_models=1,
        max_models=None,
        parameters=by_name(
            *common(elects, normalizes=False),
            density("Share of the task vector's elements that is kept."),
            ParameterSpec(
                "gamma",
                "float",
                "model",
                0.01,
                "Share of the elements, those of largest magnitude, that is dropped as outliers.",
                minimum=0.0,
                maximum=1.0,
            ),
            ParameterSpec(
                "trim_scope",
                "str",
                "shared",
                "tensor",
                "Rank the magnitudes of each tensor (mergekit) or of each row (the authors).",
                choices=("tensor", "row"),
            ),
            ParameterSpec(
                "order",
                "str",
                "shared",
                "outliers_first",
                "Drop the outliers and keep a share of the rest, or keep a share and drop the "
                "outliers of it.",
                choices=("outliers_first", "small_first"),
            ),
            rescale(False, "Rescale what is kept to the sum of magnitudes before."),
            preset(
                "mergekit",
                {
                    "mergekit": "ranks within each tensor",
                    "official": "the authors' code, ranks within each row",
                },
            ),
        ),
        statistics="row or tensor",
        presets=PRESETS,
    )


SPEC = _spec("breadcrumbs", "Sum of task vectors without their small and outlying elements.", False)
TIES = _spec("breadcrumbs_ties", "Breadcrumbs, then TIES' election of signs.", True)
OPS = tuple(dict.fromkeys((*TRIM_OPS, *KEEP_OPS, *ROW_OPS)))


def _by_row(tensor: Tensor) -> bool:
    return tensor.parameters["trim_scope"] == "row"


def _looks(tensor: Tensor) -> int:
    trims = not _by_row(tensor) and any(share < 1 for share in tensor.each("density"))
    return 2 * int(trims) + int(bool(tensor.parameters["rescale"]))


def _granule(tensor: Tensor) -> int:
    return row_granule(tensor) if _by_row(tensor) else 1


@method(SPEC, ops=OPS, looks=_looks, granule=_granule)
def breadcrumbs(tensor: Tensor) -> Measuring:
    """Trim at both ends, sum."""
    return _trim_and_merge(tensor, elects=False)


@method(TIES, ops=OPS, looks=_looks, granule=_granule)
def breadcrumbs_ties(tensor: Tensor) -> Measuring:
    """Trim at both ends, elect, sum."""
    return _trim_and_merge(tensor, elects=True)


def _trim_and_merge(tensor: Tensor, elects: bool) -> Measuring:
    how = combination(tensor, elects)
    rescales = bool(tensor.parameters["rescale"])
    factors = None
    if _by_row(tensor):
        rules = row_rules(tensor)
        if rescales:
            factors = yield from l1_row_factors(tensor, rules)
        return merge_rows(tensor, rules, how, factors)
    keeps = yield from _trim(tensor)
    if rescales:
        factors = yield from l1_factors(tensor, keeps)
    return merge_kept(tensor, keeps, how, factors)


def kept_ranks(n: int, share: float, gamma: float, order: str, scope: str) -> tuple[int, int]:
    """How many of the largest of n elements are reached, and how many of these are dropped."""
    kept, outliers = int(share * n), int(gamma * n)
    if order == "small_first":
        return kept, min(outliers, kept)
    if scope == "tensor":
        outliers = min(outliers, n - kept)
    return min(n, outliers + kept), outliers


def _ranks(tensor: Tensor, n: int) -> list[tuple[int, int]]:
    order, scope = str(tensor.parameters["order"]), str(tensor.parameters["trim_scope"])
    return [
        kept_ranks(n, share, gamma, order, scope)
        for share, gamma in zip(tensor.each("density"), tensor.each("gamma"), strict=True)
    ]


def row_rules(tensor: Tensor) -> list[RowRule | None]:
    """The ranks that stay in each row of each model; a scalar stays as it is."""
    if not tensor.shape:
        return [None] * tensor.num_models
    columns = tensor.columns
    return [
        RowRule(columns - reached, columns - dropped)
        for reached, dropped in _ranks(tensor, columns)
    ]


def _trim(tensor: Tensor) -> Trimming:
    """For each model the keys and indices that bound what stays, by two ranks of each."""
    n, models = tensor.num_elements, range(tensor.num_models)
    ranks = [
        (n, 0) if share >= 1 else pair
        for share, pair in zip(tensor.each("density"), _ranks(tensor, n), strict=True)
    ]
    wanted = [reached for reached, _ in ranks] + [dropped for _, dropped in ranks]
    trims = yield from remembered(
        tensor,
        ("trim", tuple(wanted)),
        lambda: trim_tensor(tensor, wanted, models=[*models, *models]),
    )
    lower, upper = trims[: len(models)], trims[len(models) :]
    return [
        Keep(reached.threshold, reached.cutoff, dropped.threshold, dropped.cutoff)
        for reached, dropped in zip(lower, upper, strict=True)
    ]

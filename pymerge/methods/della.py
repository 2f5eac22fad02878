"""DELLA (MagPrune): drop elements at random, small ones more often. Deep et al. 2024, arXiv
2406.11617.

In each row of a task vector ``τᵢ = θᵢ − θ₀`` (the last dimension; a vector is one row) the
magnitudes are ranked, and an element is kept with a probability that grows evenly with its rank
from ``density − epsilon`` for the smallest to ``density + epsilon`` for the largest; of equal
magnitudes the lower index ranks higher, and the only element of a row has ``density``. What is kept
is multiplied by a factor and merged: ``della`` elects a sign for each element by the weighted sum
(zero counts as plus) and takes the weighted mean of those that agree; ``della_linear`` adds all up.
``out = θ₀ + λ·that``.

The factor: ``rescale_by: l1`` (default, mergekit) gives each model and tensor the sum of magnitudes
it had before the drop; ``rescale_by: density`` (``preset: official``, the authors' code, whose
window ``2·epsilon`` is 0 unless given) divides each element by its own probability.

``density ± epsilon`` must lie strictly between 0 and 1 unless the density is 0 or 1. mergekit
differs: it ranks a tensor of three dimensions (packed experts) along the middle one, keeps ranks in
the working type (in bfloat16 a row of 4096 has 704 different ones), fails on rows of one element
and draws from torch's global generator; here ranks are exact and the mask is a pure function of
seed, tensor name, the model's position in the recipe and the element's index.
"""

from __future__ import annotations

from collections.abc import Mapping

from pymerge.errors import RecipeError
from pymerge.methods.parameters import by_name, preset
from pymerge.methods.protocol import Measuring, Tensor
from pymerge.methods.randomness import key
from pymerge.methods.registry import method
from pymerge.methods.sparsify import (
    RESCALE_BY,
    ROW_OPS,
    SEED,
    Factors,
    RowRule,
    combination,
    common,
    density,
    l1_row_factors,
    merge_rows,
    rescale,
    row_granule,
)
from pymerge.methods.spec import MethodSpec, ParameterSpec, ParameterValue
from pymerge.ops.selection import ALL_DRAWS

PRESETS: Mapping[str, Mapping[str, ParameterValue]] = {
    "mergekit": {},
    "official": {"rescale_by": "density", "epsilon": 0.0},
}


def _spec(name: str, summary: str, elects: bool) -> MethodSpec:
    return MethodSpec(
        name=name,
        summary=summary,
        paper="https://arxiv.org/abs/2406.11617",
        base="required",
        min_models=1,
        max_models=None,
        parameters=by_name(
            *common(elects, normalizes=elects),
            density("Mean probability with which an element of the task vector is kept."),
            ParameterSpec(
                "epsilon",
                "float",
                "model",
                0.15,
                "Half the difference between the probabilities of a row's largest and smallest.",
                minimum=0.0,
                maximum=0.5,
            ),
            rescale(True, "Rescale what is kept."),
            RESCALE_BY,
            SEED,
            preset(
                "mergekit",
                {
                    "mergekit": "rescales to the sum of magnitudes",
                    "official": "the authors' code, rescales each element by its probability",
                },
            ),
        ),
        statistics="row or tensor",
        presets=PRESETS,
    )


SPEC = _spec("della", "Random drop by rank of magnitude, then election and mean.", True)
LINEAR = _spec("della_linear", "Random drop by rank of magnitude, rescaled and summed.", False)


def _takes_sums(tensor: Tensor) -> bool:
    by_l1 = tensor.parameters["rescale"] and tensor.parameters["rescale_by"] == "l1"
    return bool(by_l1) and any(0 < share < 1 for share in tensor.each("density"))


def _looks(tensor: Tensor) -> int:
    return int(_takes_sums(tensor))


@method(SPEC, ops=ROW_OPS, looks=_looks, granule=row_granule)
def della(tensor: Tensor) -> Measuring:
    """Drop by rank, rescale, elect, mean."""
    return _drop_and_merge(tensor, row_rules(tensor), elects=True)


@method(LINEAR, ops=ROW_OPS, looks=_looks, granule=row_granule)
def della_linear(tensor: Tensor) -> Measuring:
    """Drop by rank, rescale, sum."""
    return _drop_and_merge(tensor, row_rules(tensor), elects=False)


def _drop_and_merge(tensor: Tensor, rules: list[RowRule | None], elects: bool) -> Measuring:
    factors = yield from _factors(tensor, rules)
    return merge_rows(tensor, rules, combination(tensor, elects), factors)


def row_rules(tensor: Tensor) -> list[RowRule | None]:
    """For each model the limits of the draws, in whole numbers, so that all devices agree.

    :raises RecipeError: a probability would not lie between 0 and 1.
    """
    seed = int(tensor.parameters["seed"])
    divides = bool(tensor.parameters["rescale"]) and tensor.parameters["rescale_by"] == "density"
    rules: list[RowRule | None] = []
    for i, (share, epsilon) in enumerate(
        zip(tensor.each("density"), tensor.each("epsilon"), strict=True)
    ):
        if share >= 1:
            rules.append(None)
            continue
        if share <= 0:
            rules.append(RowRule(0, 0))
            continue
        low, high = share - epsilon, share + epsilon
        if low <= 0 or high >= 1:
            raise RecipeError(
                f"della: density {share:g} with epsilon {epsilon:g} keeps elements of tensor "
                f"{tensor.name!r} with probabilities from {low:g} to {high:g}; both must lie "
                "strictly between 0 and 1: lower epsilon, or set density to 1 to keep everything"
            )
        rules.append(
            RowRule(
                0,
                tensor.columns,
                int(low * ALL_DRAWS),
                int(2 * epsilon * ALL_DRAWS),
                key(seed, "della", tensor.name, tensor.model_numbers[i]),
                divides,
            )
        )
    return rules


def _factors(tensor: Tensor, rules: list[RowRule | None]) -> Factors:
    if not _takes_sums(tensor):
        return None
    return (yield from l1_row_factors(tensor, rules))

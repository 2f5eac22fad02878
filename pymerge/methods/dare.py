"""DARE: drop elements of the task vectors at random and rescale the rest. Yu et al. 2023, arXiv
2311.03099.

Each element of a task vector ``τᵢ = θᵢ − θ₀`` is kept with probability ``density``, on its own. The
kept ones are multiplied by a factor and merged: ``dare_linear`` adds up ``wᵢ·τᵢ``; ``dare_ties``
elects a sign for each element by the weighted sum (zero counts as plus) and adds up those that
agree. ``out = θ₀ + λ·sum``.

The factor: ``rescale_by: l1`` (default, mergekit) gives each model and tensor the sum of magnitudes
it had before the drop, in one look; ``rescale_by: density`` (``preset: official``, the authors'
code) is 1/density. Sums of magnitudes below 1e-7 are left alone.

The mask is a pure function of seed, tensor name, the model's position in the recipe and the
element's index (Philox 4x32-10): the same on every device, with any number of threads, any memory,
and in both methods. mergekit draws from torch's global generator, so its masks are other ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from pymerge.methods.parameters import by_name, preset
from pymerge.methods.protocol import Measuring, Tensor
from pymerge.methods.randomness import key
from pymerge.methods.registry import method
from pymerge.methods.sparsify import (
    KEEP_OPS,
    RESCALE_BY,
    SEED,
    Factors,
    combination,
    common,
    density,
    l1_factors,
    merge_kept,
    rescale,
)
from pymerge.methods.spec import MethodSpec, ParameterValue
from pymerge.ops.selection import ALL_DRAWS, Keep

PRESETS: Mapping[str, Mapping[str, ParameterValue]] = {
    "mergekit": {},
    "official": {"rescale_by": "density"},
}


def _spec(name: str, summary: str, elects: bool) -> MethodSpec:
    return MethodSpec(
        name=name,
        summary=summary,
        paper="https://arxiv.org/abs/2311.03099",
        base="required",
        min_models=1,
        max_models=None,
        parameters=by_name(
            *common(elects, normalizes=False),
            density("Probability with which an element of the task vector is kept."),
            rescale(True, "Rescale what is kept."),
            RESCALE_BY,
            SEED,
            preset(
                "mergekit",
                {
                    "mergekit": "rescales to the sum of magnitudes",
                    "official": "the authors' code, rescales by 1/density",
                },
            ),
        ),
        statistics="tensor",
        presets=PRESETS,
    )


LINEAR = _spec("dare_linear", "Random drop of task vectors, rescaled and summed.", False)
TIES = _spec("dare_ties", "Random drop of task vectors, then TIES' election of signs.", True)


def _is_random(density: float) -> bool:
    return 0 < density < 1


def _takes_sums(tensor: Tensor) -> bool:
    by_l1 = tensor.parameters["rescale"] and tensor.parameters["rescale_by"] == "l1"
    return bool(by_l1) and any(map(_is_random, tensor.each("density")))


def _looks(tensor: Tensor) -> int:
    return int(_takes_sums(tensor))


@method(LINEAR, ops=KEEP_OPS, looks=_looks)
def dare_linear(tensor: Tensor) -> Measuring:
    """Drop, rescale, sum."""
    return _drop_and_merge(tensor, elects=False)


@method(TIES, ops=KEEP_OPS, looks=_looks)
def dare_ties(tensor: Tensor) -> Measuring:
    """Drop, rescale, elect, sum."""
    return _drop_and_merge(tensor, elects=True)


def _drop_and_merge(tensor: Tensor, elects: bool) -> Measuring:
    keeps = random_keeps(tensor)
    factors = yield from _factors(tensor, keeps)
    return merge_kept(tensor, keeps, combination(tensor, elects), factors)


def random_keeps(tensor: Tensor) -> list[Keep]:
    """For each model: keep an element where its draw out of 2³² is below density·2³²."""
    seed = int(tensor.parameters["seed"])
    return [
        Keep(
            draws=int(share * ALL_DRAWS),
            seed=key(seed, "dare", tensor.name, tensor.model_numbers[i]),
        )
        if share < 1
        else Keep()
        for i, share in enumerate(tensor.each("density"))
    ]


def _factors(tensor: Tensor, keeps: list[Keep]) -> Factors:
    if not tensor.parameters["rescale"]:
        return None
    if tensor.parameters["rescale_by"] == "density":
        return [1 / share if _is_random(share) else 1.0 for share in tensor.each("density")]
    if not _takes_sums(tensor):
        return None
    return (yield from l1_factors(tensor, keeps))

"""EMR-Merging: elect, mask, rescale. Huang et al. 2024, arXiv 2405.17461.

One vector serves all tasks: each element elects the sign of ``Σ τᵢ`` (plus where it is above zero,
else minus) and takes the largest ``|τᵢ|`` among the models of that sign. Task t uses the elements
whose sign is that of its own τₜ (its mask, one bit an element) and multiplies them by its scale:
``model of task t = θ₀ + scaleₜ·maskₜ⊙vector``. No parameter has to be chosen.

``rescale: official``, the default, divides the sum over the tensors of the mean ``|τₜ|`` by that of
the mean ``|maskₜ⊙vector|``, as the authors' code does, so that a small tensor counts as much as a
large one; ``rescale: paper`` divides the sums over all elements, as the paper's formula does. Both
are measured on the vector as it is stored, in the one pass that writes it.

The output folder is the base model with the vector, the masks and the scales beside it;
``pymerge materialize`` and ``pymerge.load_task`` make one task's model of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pymerge.errors import PymergeError, RecipeError
from pymerge.methods.gram import exact_sum
from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import SPAN, Applied, Apply, Tensor, Tile
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec
from pymerge.methods.task_outputs import MASKS, TASKS, VECTOR
from pymerge.ops.selection import Keep
from pymerge.ops.view import View

SPEC = MethodSpec(
    name="emr",
    summary="One vector for all tasks with a mask and a scale for each; gives a model per task.",
    paper="https://arxiv.org/abs/2405.17461",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec(
            "rescale",
            "str",
            "shared",
            "official",
            "Scale by the means of the tensors (official) or the sums over all elements (paper).",
            choices=("official", "paper"),
        )
    ),
)


def check(tensors: Sequence[Tensor]) -> None:
    """:raises RecipeError: rescale differs between tensors."""
    if len({tensor.parameters["rescale"] for tensor in tensors}) > 1:
        raise RecipeError(
            "emr: a task has one scale for the whole model, so rescale must be the same for all "
            "tensors; remove its filter"
        )


def scales(tensors: Sequence[Tensor], values: Sequence[Sequence[float]]) -> dict[str, float]:
    """The scale of each task by its name.

    ``values`` holds for each tensor the sum of each model's |τ|, then that of its masked vector.

    :raises PymergeError: one is not finite.
    """
    whole: dict[str, list[float]] = {}
    masked: dict[str, list[float]] = {}
    for tensor, sums in zip(tensors, values, strict=True):
        count = tensor.num_elements if tensor.parameters["rescale"] == "official" else 1
        for index, name in enumerate(tensor.model_names):
            terms = whole.setdefault(name, []), masked.setdefault(name, [])
            if count:
                terms[0].append(sums[index] / count)
                terms[1].append(sums[tensor.num_models + index] / count)
    found = {}
    for name in whole:
        over, under = math.fsum(whole[name]), math.fsum(masked[name])
        if not (math.isfinite(over) and math.isfinite(under)):
            raise PymergeError(
                f"emr: the scale of task {name} is not finite: that model, the base or another "
                "model holds NaN or infinite elements; look for them with `pymerge inspect --check`"
            )
        # A task that uses nothing is the base, whatever its scale.
        found[name] = over / under if under else 1.0
    return found


@method(
    SPEC,
    ops=("convert", "elect_max", "elect_masks", "kept_sums", "masked_sums"),
    extras=(VECTOR, MASKS),
    description=TASKS,
    check=check,
    scales=scales,
)
def emr(tensor: Tensor) -> Apply:
    """One pass writes base, vector and masks, and sums what the scales are made of."""
    ops, everything = tensor.ops, [Keep()] * tensor.num_models

    def run(tile: Tile, out: View, vectors: Sequence[View], masks: Sequence[View]) -> Applied:
        vector, rows = vectors[0], [row.ptr for row in masks]
        nonfinite = ops.convert(out, tile.base)
        nonfinite += ops.elect_max(vector, tile.base, tile.models)
        ops.elect_masks(rows, tile.base, tile.models)
        whole = ops.kept_sums(tile.base, tile.models, everything, tile.start, span=SPAN)[:, :, 0]
        masked = ops.masked_sums(vector, rows, span=SPAN)
        return Applied(nonfinite, np.concatenate((whole, masked), axis=1))

    def total(tiles: Sequence[Any]) -> list[float]:
        spans = np.concatenate(tiles) if tiles else np.zeros((0, 2 * tensor.num_models))
        return [exact_sum(column) for column in spans.T]

    return Apply(run, total)

"""Fisher merging: Matena and Raffel 2022, arXiv 2111.09832.

Each element is the mean of the models by how much it matters to each model's own answers:

``out = Σ cₖ·(Fₖ + ε)·θₖ / Σ cₖ·(Fₖ + ε)``

with the diagonals ``Fₖ`` of the Fisher information, that ``pymerge.collect(model, kind="fisher")``
saves beside each model, and ``cₖ = weight / ‖Fₖ‖₂`` over all parameters of the model, so that no
model wins because its gradients are larger; ``normalize: false`` leaves ``cₖ = weight``. Only the
ratios of the ``cₖ`` matter; they are made to sum to 1. In memory a tensor's own norm stands for
that of the model.

``floor: add`` adds ε, as FusionBench and MergeLM do; ``floor: max`` takes the larger of ``Fₖ`` and
ε, as the authors do. With ``favor_first``, the authors' default, only the first model has the
floor: where no model's gradient says anything the result is the first model's. ``preset: official``
sets both. With an ε of 0 an element that matters to no model is the mean by the ``cₖ``. FusionBench
adds ε to the norms too, which changes nothing unless they are as small. Tensors without diagonals
become the plain mean.
"""

from __future__ import annotations

from collections.abc import Mapping

from pymerge.errors import RecipeError
from pymerge.methods.parameters import by_name, normalize, preset
from pymerge.methods.protocol import Apply, Tensor, Tile
from pymerge.methods.registry import method
from pymerge.methods.regmean import mean_of
from pymerge.methods.spec import MethodSpec, ParameterSpec, ParameterValue
from pymerge.ops.view import View

PRESETS: Mapping[str, Mapping[str, ParameterValue]] = {
    "fusionbench": {},
    "official": {"floor": "max", "favor_first": True},
}

SPEC = MethodSpec(
    name="fisher",
    summary="Mean of the models by the saved diagonals of their Fisher information.",
    paper="https://arxiv.org/abs/2111.09832",
    base="optional",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec(
            "weight", "float", "model", 1.0, "Factor on the model's Fisher diagonal.", minimum=0.0
        ),
        ParameterSpec(
            "epsilon", "float", "shared", 1e-6, "Floor of the Fisher diagonals.", minimum=0.0
        ),
        ParameterSpec(
            "floor",
            "str",
            "shared",
            "add",
            "Add epsilon to the diagonals, or take the larger of both.",
            choices=("add", "max"),
        ),
        normalize(True, "Divide each diagonal by its L2 norm over the whole model."),
        ParameterSpec(
            "favor_first",
            "bool",
            "shared",
            False,
            "Only the first model has the floor: where nothing matters the result is its own.",
        ),
        preset(
            "fusionbench",
            {"fusionbench": "FusionBench and MergeLM", "official": "the authors' code"},
        ),
    ),
    statistics="none",
    presets=PRESETS,
)


@method(SPEC, ops=("weighted_mean", "axpy_n"), reads="fisher")
def fisher(tensor: Tensor) -> Apply:
    """One pass over the models and their diagonals."""
    if not tensor.statistics or tensor.num_models == 1:
        return mean_of(tensor)
    ops, mode = tensor.ops, str(tensor.parameters["floor"])
    epsilon = float(tensor.parameters["epsilon"])
    others = 0.0 if tensor.parameters["favor_first"] else epsilon
    floors = [epsilon, *[others] * (tensor.num_models - 1)]
    coefficients = _coefficients(tensor)

    def write(tile: Tile, out: View) -> int:
        count: int = ops.weighted_mean(
            out, tile.models, tile.diagonals, coefficients, floors, mode=mode
        )
        return count

    return Apply(write)


def _coefficients(tensor: Tensor) -> list[float]:
    """The factor on each model's diagonal.

    :raises RecipeError: all are zero, or a diagonal that is to be divided by its norm is.
    """
    found = tensor.each("weight")
    if sum(found) == 0:
        raise RecipeError(
            f"fisher: the weights of tensor {tensor.name!r} sum to zero ({found}), so their mean "
            "does not exist; give weights that do not"
        )
    if not tensor.parameters["normalize"]:
        return found
    names = tensor.model_names
    for model, (weight, norm) in enumerate(zip(found, tensor.statistics, strict=True)):
        if weight and norm == 0:
            raise RecipeError(
                f"fisher: the Fisher diagonal of {names[model]} is zero everywhere, so that it has "
                "no share in the mean; collect it again with batches that the model is not "
                "certain about, set its weight to 0, or set normalize: false"
            )
    scaled = [w and w / norm for w, norm in zip(found, tensor.statistics, strict=True)]
    total = sum(scaled)
    return [c / total for c in scaled]

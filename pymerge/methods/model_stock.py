"""Model Stock: the mean of fine-tuned models, drawn towards the base by how far they disagree. Jang
et al. 2024, arXiv 2403.19522.

``out = t·mean(θᵢ) + (1 − t)·θ₀`` with ``t = N·c / (1 + (N − 1)·c)`` and c the cosine between the
task vectors ``τᵢ = θᵢ − θ₀``, per tensor or, with ``filter_wise``, per row (vectors along the last
dimension; a tensor of one dimension is one row). The paper has one angle; for more than two models
``average`` says how it comes from the pairs. ``cosine`` (mergekit): c is the mean of the cosines
``⟨τᵢ, τⱼ⟩ / max(‖τᵢ‖·‖τⱼ‖, 1e-6)``. ``angle`` (FusionBench; the authors released no code): c is the
cosine of the mean angle, with 1e-8 added to the product of the norms and to the divisor of t.

Where the divisor vanishes, ``c = −1/(N − 1)``, t does not exist and the base is kept (within 1e-6,
as in mergekit; FusionBench divides). Short of that t can be far outside [0, 1]; ``clamp`` holds it.

``skip: true`` takes the plain mean of a tensor's models. FusionBench's configuration for CLIP skips
six tensors this way: ``skip: [{filter: positional_embedding, value: true}, {filter:
text_projection, value: true}, {filter: logit_scale, value: true}, {filter: token_embedding, value:
true}, {filter: ln_final, value: true}]``.
"""

from __future__ import annotations

import numpy as np

from pymerge.methods.angles import arccosine, cosine
from pymerge.methods.gram import (
    Doubles,
    cosines,
    gram_of_rows,
    gram_of_tensor,
    row_pieces,
    task_vectors,
)
from pymerge.methods.parameters import by_name, preset
from pymerge.methods.protocol import Apply, Measuring, Tensor, Tile
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec
from pymerge.ops.view import View

SPEC = MethodSpec(
    name="model_stock",
    summary="Mean of fine-tuned models, drawn towards the base by the angle between them.",
    paper="https://arxiv.org/abs/2403.19522",
    base="required",
    min_models=2,
    max_models=None,
    parameters=by_name(
        ParameterSpec(
            "filter_wise", "bool", "shared", False, "A ratio for each row instead of each tensor."
        ),
        preset(
            "mergekit",
            {"mergekit": "mergekit's mean of cosines", "official": "FusionBench's mean of angles"},
        ),
        ParameterSpec(
            "average",
            "str",
            "shared",
            "cosine",
            "What is averaged over the pairs of models.",
            choices=("cosine", "angle"),
        ),
        ParameterSpec("clamp", "bool", "shared", False, "Hold the ratio t in [0, 1]."),
        ParameterSpec(
            "skip",
            "bool",
            "shared",
            False,
            "Take the plain mean of the models; for tensors named by filters.",
        ),
    ),
    statistics="row or tensor",
    presets={"official": {"average": "angle"}},
)

SMALLEST_PRODUCT = 1e-6
SMALLEST_DIVISOR = 1e-6
#: FusionBench's guard of both divisions.
EPSILON = 1e-8


def ratio(products: Doubles, num: int, average: str, clamp: bool) -> Doubles:
    """t [...] from the inner products [num_pairs, ...] of ``num`` task vectors."""
    firsts, seconds = np.triu_indices(num)
    place = {(int(i), int(j)): k for k, (i, j) in enumerate(zip(firsts, seconds, strict=True))}
    norms = [np.sqrt(products[place[i, i]]) for i in range(num)]
    pairs = [(i, j) for i, j in place if i < j]
    total = np.zeros(products.shape[1:])
    for i, j in pairs:
        size = norms[i] * norms[j]
        if average == "cosine":
            total = total + cosines(products[place[i, j]], np.maximum(size, SMALLEST_PRODUCT))
        else:
            total = total + arccosine(cosines(products[place[i, j]], size + EPSILON))
    mean = total / len(pairs)
    c, guard = (mean, 0.0) if average == "cosine" else (cosine(mean), EPSILON)
    divisor = 1 + (num - 1) * c + guard
    with np.errstate(all="ignore"):
        t = np.where(np.abs(divisor) < SMALLEST_DIVISOR, 0.0, num * c / divisor)
    result: Doubles = np.clip(t, 0.0, 1.0) if clamp else t
    return result


def _by_rows(tensor: Tensor) -> bool:
    wanted = tensor.parameters["filter_wise"] and not tensor.parameters["skip"]
    return bool(wanted) and len(tensor.shape) > 1 and tensor.num_elements > 0


@method(
    SPEC,
    ops=("gram_n", "axpy_n", "axpy_grid"),
    looks=lambda tensor: 0 if _by_rows(tensor) or tensor.parameters["skip"] else 1,
    granule=lambda tensor: tensor.columns if _by_rows(tensor) else 1,
)
def model_stock(tensor: Tensor) -> Apply | Measuring:
    """Choose what is measured: nothing, rows (as they are merged) or the tensor."""
    if tensor.parameters["skip"]:
        ones, num = [1.0] * tensor.num_models, tensor.num_models
        return Apply(lambda tile, out: tensor.ops.axpy_n(out, tile.models, ones, divisor=num))
    if _by_rows(tensor):
        return Apply(lambda tile, out: _merge_rows(tensor, tile, out))
    return _merge(tensor)


def _ratio(tensor: Tensor, products: Doubles) -> Doubles:
    average, clamp = str(tensor.parameters["average"]), bool(tensor.parameters["clamp"])
    return ratio(products, tensor.num_models, average, clamp)


def _merge(tensor: Tensor) -> Measuring:
    """Measure the angles of the whole task vectors, then one weighted sum."""
    weight = 0.0
    if tensor.num_elements:
        gram = yield from gram_of_tensor(tensor, task_vectors)
        t = _ratio(tensor, gram[np.triu_indices(tensor.num_models)])
        weight = float(t) / tensor.num_models
    weights = [weight] * tensor.num_models
    return Apply(lambda tile, out: tensor.ops.axpy_n(out, tile.models, weights, base=tile.base))


def _merge_rows(tensor: Tensor, tile: Tile, out: View) -> int:
    """Measure and merge the rows of one tile."""
    nonfinite, num = 0, tensor.num_models
    for first, piece in row_pieces(tile, tensor.columns):
        t = _ratio(tensor, gram_of_rows(tensor, task_vectors(piece)))
        grid = np.broadcast_to(t / num, (num, len(t))).astype(np.float32)
        nonfinite += tensor.ops.axpy_grid(
            out.part(first, piece.num),
            piece.models,
            grid,
            columns=tensor.columns,
            along="rows",
            base=piece.base,
        )
    return nonfinite

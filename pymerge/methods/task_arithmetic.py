"""Task arithmetic, Ilharco et al. 2023, arXiv 2212.04089.

``out = θ₀ + λ·Σ wᵢ·τᵢ`` with task vectors ``τᵢ = θᵢ − θ₀``; ``normalize`` divides the sum by ``Σ
wᵢ``.
"""

from __future__ import annotations

from pymerge.methods.parameters import INT8_MASK, LAMBDA, WEIGHT, by_name, normalize, sum_or_one
from pymerge.methods.protocol import Apply, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec

SPEC = MethodSpec(
    name="task_arithmetic",
    summary="Weighted sum of task vectors added to the base.",
    paper="https://arxiv.org/abs/2212.04089",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        WEIGHT,
        normalize(False, "Divide the summed task vectors by the sum of the weights."),
        LAMBDA,
        INT8_MASK,
    ),
)


@method(SPEC, ops=("axpy_n",))
def task_arithmetic(tensor: Tensor) -> Apply:
    """Decide the divisor (a vanishing one counts as 1, as in mergekit), then one fused sum."""
    weights = tensor.each("weight")
    divisor = sum_or_one(weights) if tensor.parameters["normalize"] else 1.0
    scale = float(tensor.parameters["lambda"])
    return Apply(
        lambda tile, out: tensor.ops.axpy_n(
            out, tile.models, weights, base=tile.base, divisor=divisor, scale=scale
        )
    )

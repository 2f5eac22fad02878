"""Weighted mean of the models ("model soup"), Wortsman et al. 2022, arXiv 2203.05482.

``out = Σ wᵢ·θᵢ / Σ wᵢ``; without ``normalize`` the sum is not divided. No task vectors: a
``base_model`` is the donor of names and configuration and, like any other input, needs a weight.
"""

from __future__ import annotations

from pymerge.methods.parameters import INT8_MASK, WEIGHT, by_name, nonzero_sum, normalize
from pymerge.methods.protocol import Apply, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec

SPEC = MethodSpec(
    name="linear",
    summary="Weighted mean of the models (model soup).",
    paper="https://arxiv.org/abs/2203.05482",
    base="input",
    min_models=1,
    max_models=None,
    parameters=by_name(
        WEIGHT, normalize(True, "Divide the weighted sum by the sum of the weights."), INT8_MASK
    ),
)


@method(SPEC, ops=("axpy_n",))
def linear(tensor: Tensor) -> Apply:
    """Decide the divisor, then one fused weighted sum."""
    weights = tensor.each("weight")
    divisor = nonzero_sum(weights, tensor.name, "linear") if tensor.parameters["normalize"] else 1.0
    return Apply(lambda tile, out: tensor.ops.axpy_n(out, tile.models, weights, divisor=divisor))

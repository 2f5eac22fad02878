"""MagMax: of the task vectors the element of largest magnitude. Marczak et al. 2024, arXiv
2407.06322.

``out = θ₀ + λ·τᵢ`` with, for each element, the i of largest ``|τᵢ|``; of equal ones the last model
in the recipe, as in the authors' code.
"""

from __future__ import annotations

from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import Apply, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec

SPEC = MethodSpec(
    name="magmax",
    summary="Each element from the model that changed it most.",
    paper="https://arxiv.org/abs/2407.06322",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec(
            "lambda",
            "float",
            "shared",
            0.5,
            "Factor on the merged task vector; the paper chooses it on validation data, 0.5 is "
            "FusionBench's value for eight tasks.",
        )
    ),
)


@method(SPEC, ops=("magmax_merge",))
def magmax(tensor: Tensor) -> Apply:
    """One fused pass."""
    scale = float(tensor.parameters["lambda"])
    return Apply(
        lambda tile, out: tensor.ops.magmax_merge(out, tile.base, tile.models, scale=scale)
    )

"""NearSwap: take over what is near, alchemonaut 2024; mergekit's ``nearswap``.

``out = w·θ₁ + (1 − w)·θ₀`` with ``w = t / max(|θ₁ − θ₀|, 1e-6)`` held in [0, 1], per element:
elements that differ by less than ``t`` become the model's, the others move towards it by ``t``.
"""

from __future__ import annotations

from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import Apply, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec

SPEC = MethodSpec(
    name="nearswap",
    summary="Move each element of the base towards one model by at most t.",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    base="required",
    min_models=1,
    max_models=1,
    parameters=by_name(
        ParameterSpec("t", "float", "shared", None, "How far an element of the base may move.")
    ),
)


@method(SPEC, ops=("nearswap",))
def nearswap(tensor: Tensor) -> Apply:
    """One map; nothing is measured."""
    t = float(tensor.parameters["t"])
    return Apply(lambda tile, out: tensor.ops.nearswap(out, tile.base, tile.models[0], t=t))

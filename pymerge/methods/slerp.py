"""Spherical linear interpolation between two models, Shoemake 1985.

``out = [sin((1 − t)·φ)·θ₀ + sin(t·φ)·θ₁] / sin φ`` with the angle φ between the two tensors, each
taken as one long vector. ``base_model`` is θ₀, the end at ``t = 0``, and the other model is θ₁.
Tensors that are (anti)parallel, |cos φ| above 0.9995, are interpolated linearly; a tensor of norm
1e-8 or less counts as orthogonal. ``t`` outside [0, 1] extrapolates.

The formula and its constants are mergekit's; here φ comes from sums in float64.
"""

from __future__ import annotations

import numpy as np

from pymerge.methods.angles import arccosine, sine
from pymerge.methods.gram import Doubles, cosines, every_input, gram_of_tensor
from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import Apply, Measuring, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec

SPEC = MethodSpec(
    name="slerp",
    summary="Spherical interpolation between the base and one model.",
    paper="https://en.wikipedia.org/wiki/Slerp",
    base="required",
    min_models=1,
    max_models=1,
    parameters=by_name(
        ParameterSpec(
            "t", "float", "shared", None, "Where to go: 0 is the base, 1 the other model."
        )
    ),
    statistics="tensor",
)

#: Above this |cos φ| the interpolation is linear.
PARALLEL = 0.9995
SMALLEST_NORM = 1e-8


def slerp_weights(gram: Doubles, t: float) -> tuple[float, float]:
    """The factors on both tensors, from their Gram matrix [2, 2]."""
    norms = np.sqrt(np.diag(gram))
    norms = np.where(norms <= SMALLEST_NORM, 1.0, norms)
    cosine = cosines(gram[0, 1], norms[0] * norms[1])
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = arccosine(cosine)
    first, second = sine([(1 - t) * angle, t * angle]) / sine(angle)
    return float(first), float(second)


@method(SPEC, ops=("gram_n", "axpy_n"), looks=lambda tensor: 1)
def slerp(tensor: Tensor) -> Measuring:
    """Measure the angle between the tensors, then one weighted sum."""
    weights = (0.0, 0.0)
    if tensor.num_elements:
        gram = yield from gram_of_tensor(tensor, every_input)
        weights = slerp_weights(gram, float(tensor.parameters["t"]))
    return Apply(lambda tile, out: tensor.ops.axpy_n(out, (tile.base, *tile.models), weights))

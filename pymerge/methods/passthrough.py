"""Copy one model, optionally scaled; with ``slices`` it stacks layers ("frankenmerge")."""

from __future__ import annotations

from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import Apply, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec

SPEC = MethodSpec(
    name="passthrough",
    summary="Copy tensors unchanged or scaled; with slices: layer stacking.",
    paper="",
    base="input",
    min_models=1,
    max_models=1,
    parameters=by_name(
        ParameterSpec("scale", "float", "model", 1.0, "Factor on every element of the tensor.")
    ),
)


@method(SPEC, ops=("convert", "axpy_n"))
def passthrough(tensor: Tensor) -> Apply:
    """A conversion, which is a byte copy where the format stays; a scale makes it a product."""
    (scale,) = tensor.each("scale")
    if scale == 1.0:
        return Apply(lambda tile, out: tensor.ops.convert(out, tile.models[0]))
    return Apply(lambda tile, out: tensor.ops.axpy_n(out, tile.models, [scale]))

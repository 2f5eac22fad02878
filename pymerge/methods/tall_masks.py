"""TALL-masks: the summed task vectors, a mask for each task. Wang et al. 2024, arXiv 2405.07813.

``τ = Σ τᵢ`` is stored once. Task t uses the elements where ``|τₜ| > lambda_tₜ·|τ − τₜ|``, its mask
of one bit an element: ``model of task t = θ₀ + maskₜ⊙τ``.

The output folder is the base model with the vector and the masks beside it; ``pymerge materialize``
and ``pymerge.load_task`` make one task's model of it. FusionBench compares with θ₀ where the
authors' code, which this follows, compares with zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.methods.consensus_ta import LAMBDA_T, PAPER
from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import Applied, Apply, Tensor, Tile
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec
from pymerge.methods.task_outputs import MASKS, TASKS, VECTOR
from pymerge.ops.view import View

SPEC = MethodSpec(
    name="tall_masks",
    summary="The summed task vectors with a mask for each task; gives a model per task.",
    paper=PAPER,
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(LAMBDA_T),
)


@method(
    SPEC,
    ops=("convert", "axpy_n", "tall_masks"),
    extras=(VECTOR, MASKS),
    description=TASKS,
)
def tall_masks(tensor: Tensor) -> Apply:
    """One pass writes base, vector and masks."""
    ops, thresholds = tensor.ops, tensor.each("lambda_t")
    ones = [1.0] * tensor.num_models

    def run(tile: Tile, out: View, vectors: Sequence[View], masks: Sequence[View]) -> Applied:
        nonfinite = ops.convert(out, tile.base)
        nonfinite += ops.axpy_n(vectors[0], tile.models, ones, base=tile.base, add_base=False)
        ops.tall_masks([row.ptr for row in masks], tile.base, tile.models, thresholds)
        return Applied(nonfinite)

    return Apply(run)

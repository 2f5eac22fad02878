"""Consensus task arithmetic: only what several tasks use. Wang et al. 2024, arXiv 2405.07813.

``τ = Σ τᵢ``. Task i uses an element where ``|τᵢ| > lambda_tᵢ·|τ − τᵢ|``; elements that fewer than
``k`` tasks use are dropped: ``out = θ₀ + alpha·C⊙τ`` with ``C = [number of tasks that use it ≥
k]``. ``k: 0`` is task arithmetic, ``k: 1`` drops what no task uses, ``k: 2`` (the paper's) also
what only one does. The masks are those of ``tall_masks``.
"""

from __future__ import annotations

from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import Apply, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec

PAPER = "https://arxiv.org/abs/2405.07813"
LAMBDA_T = ParameterSpec(
    "lambda_t",
    "float",
    "model",
    0.4,
    "How much of the other tasks' sum a task's change must exceed to count as used; the paper "
    "chooses it for each task out of 0.2 to 0.6 on validation data.",
    minimum=0.0,
)

SPEC = MethodSpec(
    name="consensus_ta",
    summary="Task arithmetic without the elements that fewer than k tasks use.",
    paper=PAPER,
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        LAMBDA_T,
        ParameterSpec(
            "k",
            "int",
            "shared",
            2,
            "Tasks that must use an element for it to stay.",
            minimum=0,
            maximum=2**31 - 1,
        ),
        ParameterSpec(
            "alpha",
            "float",
            "shared",
            1.0,
            "Factor on the merged task vector; the paper chooses it on validation data.",
        ),
    ),
)


@method(SPEC, ops=("consensus_merge",))
def consensus_ta(tensor: Tensor) -> Apply:
    """One fused pass: the masks are counted as they are made."""
    thresholds = tensor.each("lambda_t")
    minimum, scale = int(tensor.parameters["k"]), float(tensor.parameters["alpha"])
    return Apply(
        lambda tile, out: tensor.ops.consensus_merge(
            out, tile.base, tile.models, thresholds, minimum=minimum, scale=scale
        )
    )

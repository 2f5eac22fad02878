"""The ops as plain numpy: the truth that every kernel is tested against, bit by bit.

Written for reading, not for speed: whole tensors in memory, one statement per step of the
definition. Formats are decoded and rounded by hand, so that nothing here depends on the kernels or
on torch. Signatures and definitions are those of pymerge/ops/table.py.
"""

from __future__ import annotations

from pymerge.ops.reference.elements import store, value
from pymerge.ops.reference.elementwise import (
    adam_step,
    apply_task,
    consensus_merge,
    elect_masks,
    elect_max,
    magmax_merge,
    masked_sums,
    nearswap,
    overlap_counts,
    overlap_merge,
    pcb_merge,
    pcb_score,
    tall_masks,
    variance_score,
    weighted_mean,
)
from pymerge.ops.reference.gram import gram_columns, gram_n
from pymerge.ops.reference.merge import (
    axpy_grid,
    axpy_n,
    convert,
    count_nonfinite,
    count_votes,
    disjoint_merge,
    kept_sums,
)
from pymerge.ops.reference.rows import (
    lora_add,
    row_divergence,
    row_scores,
    row_sparsify,
    select_by_score,
)
from pymerge.ops.reference.selection import (
    bracket_count,
    locate_equal,
    magnitude_histogram,
    magnitude_sample,
)

__all__ = [
    "adam_step",
    "apply_task",
    "axpy_grid",
    "axpy_n",
    "bracket_count",
    "consensus_merge",
    "convert",
    "count_nonfinite",
    "count_votes",
    "disjoint_merge",
    "elect_masks",
    "elect_max",
    "gram_columns",
    "gram_n",
    "kept_sums",
    "locate_equal",
    "lora_add",
    "magmax_merge",
    "magnitude_histogram",
    "magnitude_sample",
    "masked_sums",
    "nearswap",
    "overlap_counts",
    "overlap_merge",
    "pcb_merge",
    "pcb_score",
    "row_divergence",
    "row_scores",
    "row_sparsify",
    "select_by_score",
    "store",
    "tall_masks",
    "value",
    "variance_score",
    "weighted_mean",
    "why_not",
]


def why_not(op: str | None = None) -> str | None:
    """Why this backend cannot run ``op``; numpy is everywhere, so always None."""
    return None

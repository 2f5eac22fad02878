"""The arguments of every op, checked once for all backends before a kernel runs.

One function per op, with the op's own signature. Each raises PymergeError, which names what is
wrong, and returns first the number of elements, then the small arguments as kernels take them:
numbers per model as lists of Python floats that are float32 already, larger arrays as contiguous
float32 arrays, integers as ints, keeps as Keeps of ints.
"""

from __future__ import annotations

from pymerge.ops.arguments.elementwise import (
    MODE,
    Pcb,
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
from pymerge.ops.arguments.gram import (
    gram_columns,
    gram_n,
)
from pymerge.ops.arguments.merge import (
    ALONG,
    COMBINE,
    ELECT,
    Disjoint,
    axpy_grid,
    axpy_n,
    convert,
    count_nonfinite,
    count_votes,
    disjoint_merge,
    kept_sums,
)
from pymerge.ops.arguments.rows import (
    Lora,
    Sparsify,
    lora_add,
    row_divergence,
    row_scores,
    row_sparsify,
    select_by_score,
)
from pymerge.ops.arguments.selection import (
    bracket_count,
    locate_equal,
    magnitude_histogram,
    magnitude_sample,
)

__all__ = [
    "ALONG",
    "COMBINE",
    "ELECT",
    "MODE",
    "Disjoint",
    "Lora",
    "Pcb",
    "Sparsify",
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
    "tall_masks",
    "variance_score",
    "weighted_mean",
]

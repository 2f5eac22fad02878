"""Tests of mergekit's suite that pass natively and need not pass against pymerge, with reasons.

A key is the part of a test's identifier before its parameters.
"""

from __future__ import annotations

_ROWS = (
    "expects the donor's vocabulary size in config.json beside fewer rows; pymerge writes how many "
    "rows there are, so that the output can be loaded"
)
_BATCHES = "counts how mergekit's own kernels are batched, which ours replace"

#: By what the suite runs against.
EXCLUDED: dict[str, dict[str, str]] = {
    "engine": {
        "tests/test_embedding_truncation.py::test_truncation_preserves_donor_config": _ROWS,
        "tests/test_embedding_truncation.py::test_truncation_copies_out_of_range_metadata": _ROWS,
        "tests/test_embedding_truncation.py::test_default_and_allow_crimes_do_not_truncate": (
            "expects mergekit's words; pymerge refuses, too, with a ValueError of other words"
        ),
    },
    "executor": {},
    "methods": {
        "tests/test_batched_merges.py::test_different_dtypes_and_input_counts_partition_batches": (
            _BATCHES
        ),
        "tests/test_batched_merges.py::test_linear_buckets_options_shapes_and_restores_order": (
            _BATCHES
        ),
        "tests/test_batched_merges.py::test_packing_budget_and_oversized_singletons": _BATCHES,
        "tests/test_batched_merges.py::"
        "test_slerp_mixed_geometries_varying_coefficients_and_base_order": _BATCHES,
        "tests/test_batched_merges.py::test_linear_zero_weight_sum_follows_tensor_division": (
            "expects NaN and infinity where weights sum to zero; pymerge refuses that in a sentence"
        ),
        "tests/test_basic_merges.py::TestBasicMerges::test_della_invalid_epsilon": (
            "expects a ValueError for an impossible epsilon; pymerge's refusal is a RecipeError"
        ),
    },
}

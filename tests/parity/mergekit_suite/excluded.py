"""Tests of mergekit's suite that pass natively and need not pass against pymerge, with reasons.

A key is the part of a test's identifier before its parameters.
"""

from __future__ import annotations

_BATCHES = "counts how mergekit's own kernels are batched, which ours replace"

#: By what the suite runs against.
EXCLUDED: dict[str, dict[str, str]] = {
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

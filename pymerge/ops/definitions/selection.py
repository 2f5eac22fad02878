"""Measuring magnitudes: samples, counts, histograms, the place of a tie, sums of what is kept."""

from __future__ import annotations

from pymerge.ops.definitions import READS, READS_ONE, Op, Traffic

SELECTION = (
    Op(
        "magnitude_sample",
        "magnitude_sample(base, models, start, *, group, stride) -> int32 [num_models, "
        "num_sampled]",
        "The keys of the elements whose index e satisfies (e // group) % stride == 0, in index "
        "order. base may be None.",
        READS,
    ),
    Op(
        "bracket_count",
        "bracket_count(base, models, low, high, capacity) -> (int64 [num_models, 4], list of "
        "int32 [])",
        "Counts the keys of each model: above high, equal to high, equal to low (0 where low "
        "== high), strictly between. The list holds for each model the keys strictly between "
        "in index order, at most capacity of them; the count is of all. low and high are "
        "int32 per model, low <= high; -1 is below and 0x7fffffff above every key. base may "
        "be None.",
        READS,
    ),
    Op(
        "magnitude_histogram",
        "magnitude_histogram(base, models, counts, *, shift, prefix=None, prefix_shift=None) "
        "-> None",
        "Adds to counts, uint64 [num_models, num_bins], the number of keys in each bin key >> "
        "shift, with num_bins = 2**(31 - shift). With prefix, int32 per model, only keys with "
        "key >> prefix_shift == prefix are counted, in bin (key >> shift) % num_bins with "
        "num_bins = 2**(prefix_shift - shift). base may be None.",
        READS,
    ),
    Op(
        "locate_equal",
        "locate_equal(base, model, key, nth) -> (int, int)",
        "The local index of the nth element, counted from 0, whose key equals key, and nth + "
        "1; or -1 and the number of all such elements where there are not so many. base may "
        "be None.",
        READS_ONE,
    ),
    Op(
        "kept_sums",
        "kept_sums(base, models, keeps, start, *, span, score=None) -> float64 [num_spans, "
        "num_models, 3]",
        "Span sums of |delta_i|, of |delta_i| over the kept elements, and of delta_i * delta_i "
        "over the kept, which keeps[i] decides by the keys of the deltas, or of the score where "
        "one is given. base may be None.",
        READS,
    ),
    Op(
        "count_votes",
        "count_votes(base, models, weights, keeps, start, *, elect='weighted', factors=None) -> "
        "(int, int)",
        "The number of elements whose total vote, as in disjoint_merge, is above 0, and the "
        "number of those where it is below. base may be None.",
        READS,
    ),
    Op(
        "count_nonfinite",
        "count_nonfinite(input) -> int",
        "The number of infinite and NaN elements, judged in the input's own format.",
        Traffic(base="", models="input"),
    ),
)

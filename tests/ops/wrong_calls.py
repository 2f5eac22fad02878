"""Calls with one wrong argument each, and what is said of it; op -> what is wrong -> call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pymerge.ops import View, view
from pymerge.ops.selection import Keep

X = np.arange(8, dtype=np.float32)
Y = np.arange(8, dtype=np.float32)
OUT = np.zeros(8, dtype=np.float32)
SHORT = np.zeros(7, dtype=np.float32)
Z = np.zeros(8, dtype=np.float32)
BINS = np.zeros((1, 2**11), np.uint64)
BITS = np.zeros(2, np.uint8)
SUMS = np.zeros((1, 4))

x, y, out, short = view(X), view(Y), view(OUT), view(SHORT)
AT = BITS.ctypes.data
KEEP = [Keep()]
F8_OUT = View(OUT.ctypes.data, 4, 8)
ONES = np.ones(2, np.float32)
LEFT, RIGHT = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
NAN, INF = float("nan"), float("inf")

Call = Callable[[Any], Any]


def merge(b: Any, **options: Any) -> Any:
    given = {"weights": [1], "keeps": KEEP, "start": 0, **options}
    return b.disjoint_merge(out, x, [y], **given)


def sparsify(b: Any, **options: Any) -> Any:
    return b.row_sparsify(out, x, y, 0, **{"columns": 4, **options})


def lora(b: Any, **options: Any) -> Any:
    given = {"left": LEFT, "right": RIGHT, "start": 0, "columns": 4, "scale": 1, **options}
    return b.lora_add(out, x, **given)


def score(b: Any, **options: Any) -> Any:
    given = {"index": 0, "lows": [0], "highs": [1], "mode": "raw", "part": 1, **options}
    return b.pcb_score(out, x, [y], **given)


def pcb(b: Any, **options: Any) -> Any:
    given = {"lows": [0], "highs": [1], "cuts": [0], "tops": [1], "weights": [1], **options}
    return b.pcb_merge(out, x, [y], **{"mode": "raw", "scale": 1, **given})


def adam(b: Any, *views: View, **options: Any) -> Any:
    """In memory of its own: what is wrong is found before anything is written."""
    given = {"lr": 1, "beta1": 0.9, "beta2": 0.9, "eps": 1, "step": 1, **options}
    return b.adam_step(*(views or (out, x, y, view(Z))), **given)


def mean(b: Any, **options: Any) -> Any:
    given = {"out": out, "models": [x], "weights": [y], "coefficients": [1], "floors": [0]}
    return b.weighted_mean(**{**given, "mode": "add", **options})


WRONG: dict[str, dict[str, tuple[Call, str]]] = {
    "axpy_n": {
        "no input": (lambda b: b.axpy_n(out, [], []), "at least one input, found none"),
        "counts": (
            lambda b: b.axpy_n(out, [x, short], [1, 1]),
            "input 1 has 7 elements, the output has 8",
        ),
        "weights": (lambda b: b.axpy_n(out, [x], [1, 2]), "expected 1 weights.* found 2"),
        "weight": (lambda b: b.axpy_n(out, [x], ["a"]), "expected numbers as weights"),
        "scale": (lambda b: b.axpy_n(out, [x], [1], scale="2"), "scale is '2', expected a number"),
        "overlap": (lambda b: b.axpy_n(x, [y, x], [1, 1]), "output overlaps input 1"),
        "base overlap": (lambda b: b.axpy_n(x, [y], [1], base=x), "output overlaps the base"),
        "float8 output": (
            lambda b: b.axpy_n(F8_OUT, [x], [1]),
            "cannot round to F8_E4M3; writable are F64, F32, F16, BF16",
        ),
        "output format": (
            lambda b: b.axpy_n(View(8, 77, 8), [x], [1]),
            "the output has format code 77",
        ),
    },
    "axpy_grid": {
        "along": (
            lambda b: b.axpy_grid(out, [x], [[1, 1]], columns=4, along="row"),
            "along is 'row', expected one of 'rows', 'columns'",
        ),
        "rows": (
            lambda b: b.axpy_grid(out, [x], [[1]], columns=3, along="rows"),
            "whole rows of 3 elements, found 8",
        ),
        "columns": (
            lambda b: b.axpy_grid(out, [x], [[1]], columns=0, along="rows"),
            "columns is 0, expected 1",
        ),
        "weights": (
            lambda b: b.axpy_grid(out, [x], [[1, 2, 3]], columns=4, along="rows"),
            r"weights of shape \(1, 2\), found \(1, 3\)",
        ),
        "ragged": (
            lambda b: b.axpy_grid(out, [x, y], [[1, 2], [3]], columns=4, along="rows"),
            "expected numbers as weights",
        ),
    },
    "disjoint_merge": {
        "base count": (
            lambda b: b.disjoint_merge(out, short, [x], [1], KEEP, 0),
            "the base has 7 elements",
        ),
        "score": (lambda b: merge(b, score=short), "the score has 7 elements, the output has 8"),
        "score overlap": (lambda b: merge(b, score=out), "output overlaps the score"),
        "float threshold": (
            lambda b: merge(b, keeps=[Keep(0.5)]),
            r"keeps\[0\]\.threshold is 0\.5, expected an integer",
        ),
        "threshold": (
            lambda b: merge(b, keeps=[Keep(2**31)]),
            r"keeps\[0\]\.threshold is 2147483648, expected -2147483648 to 2147483647",
        ),
        "cutoff": (lambda b: merge(b, keeps=[Keep(0, 2**63)]), r"keeps\[0\]\.cutoff is 9223"),
        "draws": (
            lambda b: merge(b, keeps=[Keep(draws=2**32 + 1)]),
            r"keeps\[0\]\.draws is 4294967297, expected 0 to 4294967296",
        ),
        "seed": (lambda b: merge(b, keeps=[Keep(seed=-1)]), r"keeps\[0\]\.seed is -1"),
        "no Keep": (lambda b: merge(b, keeps=[(0, 0)]), r"keeps\[0\] is \(0, 0\), expected a Keep"),
        "keeps": (lambda b: merge(b, keeps=KEEP * 2), "expected 1 keeps, one per model, found 2"),
        "start": (lambda b: merge(b, start=-1), "start is -1"),
        "elect": (lambda b: merge(b, elect="sum"), "elect is 'sum', expected one of 'weighted'"),
        "combine": (lambda b: merge(b, combine=None), "combine is None, expected one of 'mean'"),
        "zero sign": (lambda b: merge(b, zero_sign=2), "zero_sign is 2, expected -1 to 1"),
        "factors": (lambda b: merge(b, factors=[1, 2]), "expected 1 factors"),
    },
    "convert": {
        "counts": (lambda b: b.convert(out, short), "input 0 has 7 elements, the output has 8"),
        "format": (lambda b: b.convert(F8_OUT, x), "cannot round to F8_E4M3"),
    },
    "lora_add": {
        "left": (lambda b: lora(b, left=np.ones(6, np.float32)), r"left of shape \(num_rows, rank"),
        "right": (lambda b: lora(b, right=RIGHT.T), r"right of shape \(3, 4\), found \(4, 3\)"),
        "place": (lambda b: lora(b, start=1), "tensor of 2 rows.*found elements 1 to 9"),
        "factors": (lambda b: lora(b, factors=[1]), r"factors of shape \(2,\), found \(1,\)"),
    },
    "gram_n": {
        "span": (lambda b: b.gram_n(None, [x], span=0), "span is 0, expected 1"),
        "float span": (lambda b: b.gram_n(None, [x], span=2.0), r"span is 2\.0, expected an int"),
    },
    "gram_columns": {
        "sums": (
            lambda b: b.gram_columns(None, [x, y], SUMS, columns=4),
            r"contiguous float64 array of shape \(3, 4\) to add to, found float64 \(1, 4\)",
        ),
        "layout": (
            lambda b: b.gram_columns(None, [x, y], np.zeros((4, 3)).T, columns=4),
            "expected a writable, contiguous float64",
        ),
        "rows": (lambda b: b.gram_columns(None, [x], SUMS, columns=3), "whole rows of 3"),
    },
    "magnitude_sample": {
        "group": (
            lambda b: b.magnitude_sample(None, [x], 0, group=0, stride=1),
            "group is 0, expected 1",
        ),
    },
    "bracket_count": {
        "base count": (
            lambda b: b.bracket_count(short, [x], [0], [1], 9),
            "input 0 has 8 elements, the base has 7",
        ),
        "bracket": (
            lambda b: b.bracket_count(None, [x], [5], [4], 9),
            r"low\[0\] is 5 and above high\[0\], which is 4",
        ),
        "bracket shape": (
            lambda b: b.bracket_count(None, [x], [5, 6], [7, 8], 9),
            r"expected 1 low, one per model, found shape \(2,\)",
        ),
        "key range": (
            lambda b: b.bracket_count(None, [x], [-1], [2**31], 9),
            r"high\[0\] is 2147483648, expected -1 to 2147483647",
        ),
        "float key": (
            lambda b: b.bracket_count(None, [x], [0.5], [1.5], 9),
            "expected integer low, found float64",
        ),
    },
    "magnitude_histogram": {
        "bins": (
            lambda b: b.magnitude_histogram(None, [x], BINS, shift=15),
            r"uint64 array of shape \(1, 65536\) to add to, found uint64 \(1, 2048\)",
        ),
        "bins type": (
            lambda b: b.magnitude_histogram(None, [x], BINS.view(np.int64), shift=20),
            r"found int64 \(1, 2048\)",
        ),
        "half a prefix": (
            lambda b: b.magnitude_histogram(None, [x], BINS, shift=20, prefix=[1]),
            "prefix and prefix_shift go together",
        ),
    },
    "locate_equal": {
        "nth": (lambda b: b.locate_equal(None, x, 0, -1), "nth is -1"),
        "key": (lambda b: b.locate_equal(None, x, -1, 0), "key is -1"),
    },
    "kept_sums": {
        "span": (lambda b: b.kept_sums(None, [x], KEEP, 0, span=-4), "span is -4"),
        "keeps": (lambda b: b.kept_sums(None, [x], [], 0, span=4), "expected 1 keeps"),
        "score": (
            lambda b: b.kept_sums(None, [x], KEEP, 0, span=4, score=short),
            "the score has 7 elements, input 0 has 8",
        ),
    },
    "count_votes": {
        "elect": (
            lambda b: b.count_votes(None, [x], [1], KEEP, 0, elect=""),
            "elect is '', expected one of",
        ),
        "weights": (lambda b: b.count_votes(None, [x], [], KEEP, 0), "expected 1 weights"),
    },
    "count_nonfinite": {
        "format": (lambda b: b.count_nonfinite(View(1, 99, 1)), "input 0 has format code 99"),
        "address": (lambda b: b.count_nonfinite(View(0, 1, 4)), "4 elements at address 0"),
        "count": (lambda b: b.count_nonfinite(View(64, 1, -4)), "-4 elements.*not negative"),
    },
    "row_sparsify": {
        "rows": (lambda b: sparsify(b, columns=5), "whole rows of 5 elements, found 8"),
        "first": (lambda b: sparsify(b, first=-1), "first is -1, expected 0 to 4"),
        "last": (lambda b: sparsify(b, last=5), "last is 5, expected 0 to 4"),
        "draws": (lambda b: sparsify(b, draws_low=-1), "draws_low is -1"),
        "span": (lambda b: sparsify(b, draws_span=2**33), "draws_span is 8589934592"),
        "seed": (lambda b: sparsify(b, seed=2**64), "seed is 18446744073709551616"),
    },
    "row_divergence": {
        "no base": (lambda b: b.row_divergence(None, x, columns=4), "expected a base, found None"),
        "rows": (lambda b: b.row_divergence(x, y, columns=3), "whole rows of 3"),
    },
    "row_scores": {
        "factors": (
            lambda b: b.row_scores(out, x, y, [1, 2, 3], columns=4),
            r"factors of shape \(2,\), found \(3,\)",
        ),
    },
    "select_by_score": {
        "factors": (
            lambda b: b.select_by_score(out, x, y, ONES, 0.5, columns=8),
            r"factors of shape \(1,\), found \(2,\)",
        ),
        "threshold": (
            lambda b: b.select_by_score(out, x, y, ONES, None, columns=4),
            "threshold is None, expected a number",
        ),
    },
    "nearswap": {"t": (lambda b: b.nearswap(out, x, y, t=NAN), "t is nan, expected a finite")},
    "variance_score": {
        "overlap": (lambda b: b.variance_score(y, x, [y]), "output overlaps input 0"),
    },
    "overlap_counts": {
        "epsilon": (lambda b: b.overlap_counts(x, [y], epsilon=INF), "epsilon is inf, expected a"),
        "no base": (lambda b: b.overlap_counts(None, [y], epsilon=0), "expected a base"),
    },
    "overlap_merge": {
        "factors": (lambda b: b.overlap_merge(out, x, [y], [], epsilon=0), "expected 1 factors"),
    },
    "magmax_merge": {
        "no base": (lambda b: b.magmax_merge(out, None, [y], scale=1), "expected a base"),
    },
    "consensus_merge": {
        "thresholds": (
            lambda b: b.consensus_merge(out, x, [y], [NAN], minimum=1, scale=1),
            r"thresholds\[0\] is nan, expected a finite",
        ),
        "minimum": (
            lambda b: b.consensus_merge(out, x, [y], [0.5], minimum=-1, scale=1),
            "minimum is -1",
        ),
    },
    "tall_masks": {
        "masks": (lambda b: b.tall_masks([], x, [y], [0.5]), "expected 1 masks.*found 0"),
        "address": (lambda b: b.tall_masks([0], x, [y], [0.5]), "mask 0 has 8 bits at address 0"),
        "overlap": (
            lambda b: b.tall_masks([AT, AT], x, [x, y], [0.5, 0.5]),
            "mask 1 overlaps mask 0 in memory",
        ),
    },
    "elect_max": {
        "format": (lambda b: b.elect_max(F8_OUT, x, [y]), "cannot round to F8_E4M3"),
    },
    "elect_masks": {
        "overlap": (lambda b: b.elect_masks([y.ptr + 31], x, [y]), "mask 0 overlaps an input"),
    },
    "masked_sums": {
        "no masks": (lambda b: b.masked_sums(x, [], span=4), "at least one mask, found none"),
        "address": (lambda b: b.masked_sums(x, [AT, 0], span=4), "mask 1 has 8 bits at address 0"),
        "span": (lambda b: b.masked_sums(x, [AT], span=0), "span is 0"),
    },
    "apply_task": {
        "overlap": (
            lambda b: b.apply_task(out, x, y, out.ptr + 4, scale=1),
            "mask 0 overlaps the output",
        ),
        "vector": (lambda b: b.apply_task(out, x, short, AT, scale=1), "input 0 has 7 elements"),
    },
    "pcb_score": {
        "index": (lambda b: score(b, index=1), "index is 1, expected 0 to 0"),
        "mode": (lambda b: score(b, mode="both"), "mode is 'both', expected one of 'raw'"),
        "part": (lambda b: score(b, part=0), "part is 0, expected 1 or -1"),
        "limits": (lambda b: score(b, lows=[2]), r"lows\[0\] is 2\.0 and above highs\[0\]"),
    },
    "adam_step": {
        "format": (lambda b: adam(b, F8_OUT, x, y, view(Z)), "theta is F8_E4M3, expected F32"),
        "counts": (lambda b: adam(b, out, short, y, view(Z)), "8 elements.*7"),
        "overlap": (lambda b: adam(b, out, x, x, y), "output overlaps input 2"),
        "gradient": (lambda b: adam(b, out, x, y, out), "output overlaps input 0"),
        "beta1": (lambda b: adam(b, beta1=1.0), "beta1 is 1.0, expected 0 <= beta1 < 1"),
        "beta2": (lambda b: adam(b, beta2=NAN), "beta2 is nan, expected a finite"),
        "lr": (lambda b: adam(b, lr=-1), "lr is -1, expected zero or more"),
        "eps": (lambda b: adam(b, eps=INF), "eps is inf, expected a finite"),
        "step": (lambda b: adam(b, step=0), "step is 0, expected 1 to"),
    },
    "weighted_mean": {
        "no model": (
            lambda b: mean(b, models=[], weights=[], coefficients=[], floors=[]),
            "at least one input, found none",
        ),
        "weights": (
            lambda b: mean(b, weights=[y, y]),
            "expected 1 weights, one per model, found 2",
        ),
        "counts": (lambda b: mean(b, weights=[short]), "input 1 has 7 elements"),
        "overlap": (lambda b: mean(b, weights=[out]), "output overlaps input 1"),
        "output": (lambda b: mean(b, out=F8_OUT), "cannot round to F8_E4M3"),
        "coefficients": (lambda b: mean(b, coefficients=[]), "expected 1 coefficients"),
        "floors": (lambda b: mean(b, floors=["a"]), "expected numbers as floors"),
        "mode": (lambda b: mean(b, mode="min"), "mode is 'min', expected one of 'add', 'max'"),
    },
    "pcb_merge": {
        "cuts": (lambda b: pcb(b, cuts=[1, 2]), "expected 1 cuts"),
        "tops": (lambda b: pcb(b, cuts=[2]), r"cuts\[0\] is 2\.0 and above tops\[0\]"),
        "weights": (lambda b: pcb(b, weights=None), "expected numbers as weights"),
    },
}

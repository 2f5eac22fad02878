"""The op table: what each op computes and moves, how exact it is, which backends offer it.

Shared definitions. An input is a View of raw elements. value(x) is the float32 of an element, exact
for every format but float64, which rounds to nearest even. delta_i = value(x_i) - value(base) in
float32; where an op allows ``base=None`` it is value(x_i). The key of a delta is the int32 bit
pattern of its magnitude, every NaN as 0x7fc00000: keys order like magnitudes, with NaN above
infinity, and -0 has key 0.

Arithmetic is float32 without contraction, models in the given order, one rounding to nearest even
into the output's format. Every NaN is stored as the positive quiet NaN. Ops that write return how
many elements are not finite after rounding. Outputs must not overlap inputs; memory may be
misaligned. Wrong arguments raise PymergeError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

#: (bytes of a base element or 0, bytes of a model's element, number of models, bytes of an output
#: element) -> bytes read and written per element of the tensor.
Traffic = Callable[[int, int, int, int], int]

NumericsClass = Literal["bitwise", "rounded", "iterative"]


@dataclass(frozen=True)
class Op:
    """One op.

    ``numerics``: bitwise ops give the same bytes on every backend, instruction set and tile size.
    """

    name: str
    signature: str
    doc: str
    traffic: Traffic
    numerics: NumericsClass
    backends: tuple[str, ...]


def _reads(base_bytes: int, model_bytes: int, num_models: int, out_bytes: int) -> int:
    return base_bytes + num_models * model_bytes


def _reads_and_writes(base_bytes: int, model_bytes: int, num_models: int, out_bytes: int) -> int:
    return base_bytes + num_models * model_bytes + out_bytes


_BACKENDS = ("cpu", "reference")

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "axpy_n",
            "axpy_n(out, inputs, weights, *, base=None, divisor=1.0, scale=1.0) -> int",
            "acc = w_0 x_0 + w_1 x_1 + ... over one or more inputs, with float32 weights; with a "
            "base the x_i are the deltas. Then acc / divisor unless that is 1, acc * scale unless "
            "that is 1, and out = round(base + acc) with a base, else round(acc).",
            _reads_and_writes,
            "bitwise",
            _BACKENDS,
        ),
        Op(
            "magnitude_sample",
            "magnitude_sample(base, models, start, *, group, stride) -> int32 [num_models, "
            "num_sampled]",
            "The keys of the elements whose index e = start + local in the full tensor satisfies "
            "(e // group) % stride == 0, in index order. base may be None.",
            _reads,
            "bitwise",
            _BACKENDS,
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
            _reads,
            "bitwise",
            _BACKENDS,
        ),
        Op(
            "magnitude_histogram",
            "magnitude_histogram(base, models, counts, *, shift, prefix=None, prefix_shift=None) "
            "-> None",
            "Adds to counts, uint64 [num_models, num_bins], the number of keys in each bin key >> "
            "shift, with num_bins = 2**(31 - shift). With prefix, int32 per model, only keys with "
            "key >> prefix_shift == prefix are counted, in bin (key >> shift) % num_bins with "
            "num_bins = 2**(prefix_shift - shift). base may be None.",
            _reads,
            "bitwise",
            _BACKENDS,
        ),
        Op(
            "locate_equal",
            "locate_equal(base, model, key, nth) -> (int, int)",
            "The local index of the nth element, counted from 0, whose key equals key, and nth + "
            "1; or -1 and the number of all such elements where there are not so many. base may "
            "be None.",
            _reads,
            "bitwise",
            _BACKENDS,
        ),
        Op(
            "disjoint_merge",
            "disjoint_merge(out, base, models, weights, thresholds, cutoffs, start, *, normalize, "
            "scale=1.0) -> int",
            "keep_i = key_i > thresholds[i], or equal to it at an index start + local below "
            "cutoffs[i]. d_i = w_i delta_i where kept, else 0; total = d_0 + d_1 + ...; plus is "
            "elected where total >= 0, else minus, and model i is selected where d_i is not zero "
            "and has the elected sign. num and den sum d_i and w_i over the selected, from +0. "
            "normalize: num / den, with 1 for a den of 0. Then num * scale unless that is 1, and "
            "out = round(base + num). Where total is NaN, so is num.",
            _reads_and_writes,
            "bitwise",
            _BACKENDS,
        ),
        Op(
            "convert",
            "convert(out, input) -> int",
            "out = round(value(x)). Equal formats are copied byte by byte, NaN payloads and "
            "float64 included.",
            _reads_and_writes,
            "bitwise",
            _BACKENDS,
        ),
        Op(
            "count_nonfinite",
            "count_nonfinite(input) -> int",
            "The number of infinite and NaN elements, judged in the input's own format.",
            _reads,
            "bitwise",
            _BACKENDS,
        ),
    )
}

#: Bytes read and written per element, by op: ``TRAFFIC["axpy_n"](base_bytes, model_bytes,
#: num_models, out_bytes)``.
TRAFFIC: dict[str, Traffic] = {name: op.traffic for name, op in OPS.items()}

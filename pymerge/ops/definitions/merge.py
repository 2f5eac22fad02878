"""Weighted sums, the disjoint merge, conversion, and the inner products that coefficients need."""

from __future__ import annotations

from pymerge.ops.definitions import COPIES, READS, READS_AND_WRITES, Op, Traffic

MERGE = (
    Op(
        "axpy_n",
        "axpy_n(out, inputs, weights, *, base=None, divisor=1.0, scale=1.0, add_base=True) -> int",
        "acc = w_0 x_0 + w_1 x_1 + ... over one or more inputs, with float32 weights; with a "
        "base the x_i are the deltas. Then acc / divisor unless that is 1, acc * scale unless "
        "that is 1, and out = round(base + acc) with a base and add_base, else round(acc).",
        READS_AND_WRITES,
    ),
    Op(
        "axpy_grid",
        "axpy_grid(out, inputs, weights, *, columns, along, base=None) -> int",
        "As axpy_n, on whole rows of ``columns`` elements, with weights of each row's own, "
        "float32 [num_inputs, num_rows], with along='rows', or of each column's own, [num_inputs, "
        "columns], with along='columns'. Rows are counted from the first element given.",
        READS_AND_WRITES,
    ),
    Op(
        "disjoint_merge",
        "disjoint_merge(out, base, models, weights, keeps, start, *, elect='weighted', "
        "zero_sign=1, combine='mean', factors=None, divisor=1.0, scale=1.0, score=None, "
        "deltas=False) -> int",
        "keeps[i] decides by the keys of the deltas, or of the score, one array of numbers, where "
        "one is given. tau_i = delta_i, or factors[i] * delta_i with factors. vote_i = w_i tau_i "
        "where kept, else 0; ballot_i is vote_i with elect='weighted', and tau_i where kept, else "
        "0, with 'plain'; total = ballot_0 + ballot_1 + .... Plus is elected where total > 0, "
        "minus where total < 0, and where it is 0 the sign of zero_sign (0: neither). Model i is "
        "selected where its ballot is not zero and has the elected sign; with elect='none' where "
        "it is kept. num and den, from 0, sum the votes and w_i over the selected models: "
        "combine='mean' gives num / den and 'sum' num; 'count' divides by the number of selected "
        "models; a den of 0 counts as 1. combine='max' takes for num the selected vote of largest "
        "magnitude, the first of equals, and 0 if there is none. Where total is NaN, so is num. "
        "Then num / divisor unless that is 1, num * scale unless that is 1, and out = round(base "
        "+ num), or round(num) without a base. deltas=True: the models hold the deltas "
        "themselves, and the base is only added.",
        READS_AND_WRITES,
    ),
    Op(
        "convert",
        "convert(out, input) -> int",
        "out = round(value(x)). Equal formats are copied byte by byte, NaN payloads and "
        "float64 included.",
        COPIES,
    ),
    Op(
        "lora_add",
        "lora_add(out, weight, left, right, start, *, columns, scale, factors=None) -> int",
        "Adds a product of two factors to a weight: acc = left[r, 0] right[0, c] + left[r, 1] "
        "right[1, c] + ..., x = value(weight) + scale * acc, times factors[r] where given, and "
        "out = round(x). left is float32 [num_rows, rank], right [rank, columns], factors "
        "[num_rows]; r = e // columns and c = e % columns.",
        Traffic(base="", models="weight", out="output"),
    ),
    Op(
        "gram_n",
        "gram_n(base, inputs, *, span) -> float64 [num_spans, num_pairs]",
        "Span sums of delta_i * delta_j for the pairs i <= j in the order (0, 0), (0, 1), ..., "
        "(1, 1), .... base may be None.",
        READS,
    ),
    Op(
        "gram_columns",
        "gram_columns(base, inputs, sums, *, columns) -> None",
        "Adds to sums, float64 [num_pairs, columns], the products delta_i * delta_j of each "
        "column, row after row; pairs as in gram_n. Takes whole rows. base may be None.",
        READS,
    ),
)

"""Maps of one element of the base and of every model, one for each method that needs its own."""

from __future__ import annotations

from pymerge.ops.definitions import MAPS_ONE, READS, READS_AND_WRITES, Op, Traffic

ELEMENTWISE = (
    Op(
        "nearswap",
        "nearswap(out, base, model, *, t) -> int",
        "With a = value(base) and b = value(model): w = t / max(|b - a|, 1e-6), limited to 0 and "
        "1; out = round(w b + (1 - w) a).",
        MAPS_ONE,
    ),
    Op(
        "variance_score",
        "variance_score(out, base, models) -> int",
        "The biased variance of the deltas over the models: mean = (delta_0 + ...) / num_models; "
        "out = round(((delta_0 - mean)**2 + ...) / num_models). base may be None.",
        READS_AND_WRITES,
    ),
    Op(
        "overlap_counts",
        "overlap_counts(base, models, *, epsilon) -> int64 [num_models, 2]",
        "A model is active where not |delta_i| <= epsilon, so a NaN is. For each model: the "
        "elements where it is active, and those where it is the only one.",
        READS,
    ),
    Op(
        "overlap_merge",
        "overlap_merge(out, base, models, factors, *, epsilon) -> int",
        "num, from 0, adds for each active model delta_i * factors[i] where it is the only active "
        "one, else delta_i / (number of active models); out = round(base + num).",
        READS_AND_WRITES,
    ),
    Op(
        "magmax_merge",
        "magmax_merge(out, base, models, *, scale) -> int",
        "out = round(base + scale * delta) with the delta of the largest key, the last model's of "
        "equals.",
        READS_AND_WRITES,
    ),
    Op(
        "consensus_merge",
        "consensus_merge(out, base, models, thresholds, *, minimum, scale) -> int",
        "total = delta_0 + delta_1 + ...; model i uses an element where |delta_i| > thresholds[i] "
        "* |total - delta_i|. out = round(base + scale * total) where at least ``minimum`` models "
        "use it or total is not finite, else round(base + scale * 0).",
        READS_AND_WRITES,
    ),
    Op(
        "tall_masks",
        "tall_masks(masks, base, models, thresholds) -> None",
        "Writes for each model, to the address masks[i], ceil(num / 8) bytes: bit j % 8 of byte j "
        "// 8 is whether the model uses element j, as in consensus_merge. Bits past the last "
        "element are 0.",
        Traffic(masks="n bits"),
    ),
    Op(
        "elect_max",
        "elect_max(out, base, models) -> int",
        "Plus is elected where delta_0 + delta_1 + ... > 0, else minus. out is the delta of "
        "largest magnitude among those of the elected sign, the first of equals, 0 if there is "
        "none, NaN where the total is. The base is not added.",
        READS_AND_WRITES,
    ),
    Op(
        "elect_masks",
        "elect_masks(masks, base, models) -> None",
        "Bits as in tall_masks: whether the model's delta is not zero and has the elected sign, "
        "as in elect_max.",
        Traffic(masks="n bits"),
    ),
    Op(
        "masked_sums",
        "masked_sums(vector, masks, *, span) -> float64 [num_spans, num_masks]",
        "Span sums of |value(vector)| where the bit of a mask, laid out as in tall_masks, is set.",
        Traffic(base="vector", models="", masks="n bits"),
    ),
    Op(
        "apply_task",
        "apply_task(out, base, vector, mask, *, scale) -> int",
        "out = round(base + scale * x) with x = value(vector) where the bit of the mask is set, "
        "else 0.",
        Traffic(models="vector", out="output", masks="1 bit"),
    ),
    Op(
        "pcb_score",
        "pcb_score(out, base, models, index, lows, highs, *, mode, part) -> int",
        "out = round(max(part * score_index, 0)) with part 1 or -1 and the score of pcb_merge: the "
        "positive or the negative scores of one model as magnitudes.",
        READS_AND_WRITES,
    ),
    Op(
        "pcb_merge",
        "pcb_merge(out, base, models, lows, highs, cuts, tops, weights, *, mode, scale) -> int",
        "The mean of the clipped deltas by their scores. a_i = min(max(|delta_i|, low_i), high_i), "
        "n_i = (a_i - low_i) / (high_i - low_i), or 0 where these are equal; t_i and s_i are a_i "
        "and n_i with the sign of delta_i, 0 where that is 0. score_i = exp(N (n_i n_i)) * inter_i "
        "for N models, with inter_i = tanh(delta_i * (delta_0 + ...)) in mode 'raw', tanh(delta_i "
        "* (s_0 + ...)) in mode 'normalized', and the sum over j of tanh(s_i s_j) in mode "
        "'pairwise'. k_i = (min(max(score_i, cut_i), top_i) - cut_i) / (top_i - cut_i), or 0 where "
        "these are equal; num = w_0 (k_0 t_0) + ..., den = max(k_0 + ..., 1e-12); out = round(base "
        "+ scale * (num / den)).",
        READS_AND_WRITES,
    ),
    Op(
        "adam_step",
        "adam_step(theta, first, second, gradient, *, lr, beta1, beta2, eps, step) -> int",
        "Step number ``step``, from 1, of Adam, on float32 memory alone; theta, first and second "
        "are updated in place. first = first + gain1 * (gradient - first); second = decay2 * "
        "second + gain2 * (gradient * gradient); theta = theta - (rate * first) / (sqrt(second) + "
        "floor). The numbers are computed in float64 and rounded to float32: gain1 = 1 - beta1, "
        "decay2 = beta2, gain2 = 1 - beta2, rate = lr * root / (1 - beta1**step), floor = eps * "
        "root with root = sqrt(1 - beta2**step). Counts what is not finite in theta.",
        Traffic(base="3 × state", models="gradient", out="3 × state"),
    ),
    Op(
        "weighted_mean",
        "weighted_mean(out, models, weights, coefficients, floors, *, mode) -> int",
        "The mean of the models by a weight for each element, which comes as a view beside each "
        "model. w_i = coefficients[i] * (value(weights_i) + floors[i]) in mode 'add', "
        "coefficients[i] * max(value(weights_i), floors[i]) in mode 'max', where a NaN stays. num "
        "= w_0 value(x_0) + ..., den = w_0 + ...; out = round(num / den). Where den is 0, w_i is "
        "coefficients[i]: the limit of equal floors that vanish.",
        Traffic(base="", models="n × (model + weight)", out="output"),
    ),
)

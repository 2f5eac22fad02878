// Ops that look at whole rows, and low-rank additions.
#pragma once

#include "sums_inl.h"

namespace pymerge {
namespace {

// ---- row_divergence

// The largest number of a row, NaN where there is none.
template <class V>
float top_of_row(const Input& input, size_t first, size_t columns) {
    alignas(64) float x[kBlockElements];
    typename V::F top = nan<V>();
    for (size_t column = 0; column < columns; column += kBlockElements) {
        const size_t n = smaller(kBlockElements, columns - column);
        widen<V>(input, first + column, n, x);
        for (size_t j = 0; j < n; j += V::kLanes) {
            const typename V::M inside = V::first(smaller(n - j, V::kLanes));
            top = larger_number<V>(top, V::select(inside, V::get(x + j), nan<V>()));
        }
    }
    alignas(64) float lanes[V::kLanes];
    V::put(lanes, top);
    float largest = lanes[0];
    for (size_t lane = 1; lane < V::kLanes; ++lane) {
        if (lanes[lane] > largest || largest != largest) largest = lanes[lane];
    }
    return largest;
}

// dst = exp(x - top) for a block, zero behind its end.
template <class V>
void exponentials(const Input& input, size_t begin, size_t n, float top, float* dst) {
    widen<V>(input, begin, n, dst);
    for (size_t j = 0; j < n; j += V::kLanes) V::put(dst + j, exp_f32<V>(V::sub(V::get(dst + j), V::set(top))));
    zero_behind(dst, n);
}

template <class V>
float sum_of_exponentials(const Input& input, size_t first, size_t columns, float top) {
    alignas(64) float x[kBlockElements];
    alignas(64) double lanes[kSumLanes] = {};
    for (size_t column = 0; column < columns; column += kBlockElements) {
        const size_t n = smaller(kBlockElements, columns - column);
        exponentials<V>(input, first + column, n, top, x);
        add_to_lanes<V>(x, n, lanes);
    }
    return static_cast<float>(add_lanes(lanes));
}

template <class V>
void row_divergence(const RowDivergence& op) {
    alignas(64) float p[kBlockElements];
    alignas(64) float q[kBlockElements];
    const size_t num_rows = op.num / op.columns;
    for (size_t row = 0; row < num_rows; ++row) {
        const size_t first = row * op.columns;
        const float model_top = top_of_row<V>(op.model, first, op.columns);
        const float base_top = top_of_row<V>(op.base, first, op.columns);
        const float model_total = sum_of_exponentials<V>(op.model, first, op.columns, model_top);
        const float base_total = sum_of_exponentials<V>(op.base, first, op.columns, base_top);
        alignas(64) double lanes[kSumLanes] = {};
        for (size_t column = 0; column < op.columns; column += kBlockElements) {
            const size_t n = smaller(kBlockElements, op.columns - column);
            exponentials<V>(op.model, first + column, n, model_top, p);
            exponentials<V>(op.base, first + column, n, base_top, q);
            for (size_t j = 0; j < n; j += V::kLanes) {
                V::put(p + j, divergence_term<V>(V::get(p + j), model_total, V::get(q + j), base_total));
            }
            zero_behind(p, n);
            add_to_lanes<V>(p, n, lanes);
        }
        op.divergences[row] = static_cast<float>(add_lanes(lanes));
    }
}

// ---- row_scores, select_by_score

template <class V, class Map>
uint64_t map_with_row_factor(const RowScores& op, Map map) {
    alignas(64) float base[kBlockElements];
    alignas(64) float x[kBlockElements];
    alignas(64) float factors[kBlockElements];
    const Models& models = op.models;
    uint64_t nonfinite = 0;
    for (size_t begin = 0; begin < models.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, models.num - begin);
        widen<V>(models.base, begin, n, base);
        widen<V>(models.inputs[0], begin, n, x);
        fill_by_row<V>(op.factors, op.columns, begin, n, factors);
        for (size_t j = 0; j < n; j += V::kLanes) {
            V::put(x + j, map(V::get(base + j), V::get(x + j), V::get(factors + j)));
        }
        nonfinite += narrow<V>(x, begin, n, op.out);
    }
    return nonfinite;
}

template <class V>
uint64_t row_scores(const RowScores& op) {
    return map_with_row_factor<V>(op, [](typename V::F base, typename V::F x, typename V::F factor) {
        return row_score<V>(V::sub(x, base), factor);
    });
}

template <class V>
uint64_t select_by_score(const RowScores& op) {
    return map_with_row_factor<V>(op, [&](typename V::F base, typename V::F x, typename V::F factor) {
        return select_by_score<V>(base, x, factor, op.threshold);
    });
}

// ---- lora_add

// acc = left[0] right[0] + left[1] right[1] + ... for kVectors vectors of a row.
template <class V, size_t kVectors>
PM_INLINE void low_rank_row(const float* left, const float* right, size_t rank, size_t columns, size_t n, float* acc) {
    const auto term = [&](size_t k, size_t v) __attribute__((always_inline)) {
        const float* b = right + k * columns + v * V::kLanes;
        // A lone vector may be the last of its row, which nothing need follow.
        const typename V::F x = kVectors > 1 ? V::load(Tag<Format::F32>{}, b) : load_up_to<V>(b, n);
        return V::mul(V::set(left[k]), x);
    };
    typename V::F sum[kVectors];
    for (size_t v = 0; v < kVectors; ++v) sum[v] = term(0, v);
    for (size_t k = 1; k < rank; ++k) {
        for (size_t v = 0; v < kVectors; ++v) sum[v] = V::add(sum[v], term(k, v));
    }
    for (size_t v = 0; v < kVectors; ++v) V::put(acc + v * V::kLanes, sum[v]);
}

// A panel of columns at a time, in which the rows of the tile follow each other, so that the panel of the right
// factor stays in the cache.
template <class V>
uint64_t lora_add(const LoraAdd& op) {
    constexpr size_t num_vectors = 8;
    alignas(64) float x[kBlockElements];
    alignas(64) float acc[kBlockElements];
    const size_t start = static_cast<size_t>(op.start);
    const size_t end = start + op.num;
    const size_t first_row = start / op.columns;
    const size_t end_row = op.num ? (end - 1) / op.columns + 1 : first_row;
    uint64_t nonfinite = 0;
    for (size_t column = 0; column < op.columns; column += kBlockElements) {
        const size_t column_end = smaller(column + kBlockElements, op.columns);
        for (size_t row = first_row; row < end_row; ++row) {
            const size_t row_start = row * op.columns;
            const size_t from = row_start + column > start ? row_start + column : start;
            const size_t to = smaller(row_start + column_end, end);
            if (from >= to) continue;
            const size_t n = to - from;
            const float* left = op.left + row * op.rank;
            const float* right = op.right + (from - row_start);
            size_t j = 0;
            for (; j + num_vectors * V::kLanes <= n; j += num_vectors * V::kLanes) {
                low_rank_row<V, num_vectors>(left, right + j, op.rank, op.columns, n - j, acc + j);
            }
            for (; j < n; j += V::kLanes) {
                low_rank_row<V, 1>(left, right + j, op.rank, op.columns, n - j, acc + j);
            }
            widen<V>(op.weight, from - start, n, x);
            const float* factor = op.factors ? op.factors + row : nullptr;
            for (j = 0; j < n; j += V::kLanes) {
                V::put(x + j, lora_add<V>(V::get(x + j), V::get(acc + j), op.scale, factor));
            }
            nonfinite += narrow<V>(x, from - start, n, op.out);
        }
    }
    return nonfinite;
}

}  // namespace
}  // namespace pymerge

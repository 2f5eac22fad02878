// Sums over spans in 64 float64 lanes, see add_lanes: kept magnitudes, inner products, masked magnitudes.
#pragma once

#include "merge_inl.h"

namespace pymerge {
namespace {

constexpr size_t whole_groups(size_t n) { return (n + kSumLanes - 1) / kSumLanes * kSumLanes; }

// Zeros what a vector op left open or wrote behind element n, up to whole groups of lanes.
inline void zero_behind(float* x, size_t n) {
    for (size_t e = n; e < whole_groups(n); ++e) x[e] = 0.0f;
}

inline void zero_lanes(double* lanes, size_t num_sums) {
    for (size_t lane = 0; lane < num_sums * kSumLanes; ++lane) lanes[lane] = 0.0;
}

// Calls visit(begin, n) for the blocks of each span in turn, between start() and finish(span).
template <class Start, class Visit, class Finish>
void for_each_span(size_t num, size_t span, Start start, Visit visit, Finish finish) {
    size_t number = 0;
    for (size_t first = 0; first < num; first += span) {
        const size_t end = first + smaller(span, num - first);
        start();
        for (size_t begin = first; begin < end; begin += kBlockElements) {
            visit(begin, smaller(kBlockElements, end - begin));
        }
        finish(number++);
    }
}

// Adds a block, zero behind its end, to the lanes.
template <class V>
void add_to_lanes(const float* x, size_t n, double* lanes) {
    for (size_t lane = 0; lane < kSumLanes; lane += V::kWideLanes) {
        typename V::D acc = V::get_wide(lanes + lane);
        for (size_t e = lane; e < n; e += kSumLanes) acc = V::add_doubles(acc, V::to_doubles(x + e));
        V::put_wide(lanes + lane, acc);
    }
}

// ---- kept_sums

template <class V>
void add_kept(const float* size, const float* kept, size_t n, double* lanes) {
    for (size_t lane = 0; lane < kSumLanes; lane += V::kWideLanes) {
        typename V::D all = V::get_wide(lanes + lane);
        typename V::D sum = V::get_wide(lanes + kSumLanes + lane);
        typename V::D squares = V::get_wide(lanes + 2 * kSumLanes + lane);
        for (size_t e = lane; e < n; e += kSumLanes) {
            const typename V::D k = V::to_doubles(kept + e);
            all = V::add_doubles(all, V::to_doubles(size + e));
            sum = V::add_doubles(sum, k);
            squares = V::add_product(squares, k, k);
        }
        V::put_wide(lanes + lane, all);
        V::put_wide(lanes + kSumLanes + lane, sum);
        V::put_wide(lanes + 2 * kSumLanes + lane, squares);
    }
}

template <class V>
void kept_sums(const KeptSums& op) {
    alignas(64) float base[kBlockElements] = {};
    alignas(64) float score[kBlockElements];
    alignas(64) float x[kBlockElements];
    alignas(64) float size[kBlockElements];
    alignas(64) float kept_size[kBlockElements];
    const Models& models = op.models;
    const auto add_block = [&](size_t begin, size_t n) {
        if (models.base.data) widen<V>(models.base, begin, n, base);
        if (op.score.data) widen<V>(op.score, begin, n, score);
        for (size_t i = 0; i < models.num_models; ++i) {
            widen<V>(models.inputs[i], begin, n, x);
            for_each_kept<V>(x, base, op.score.data ? score : nullptr, n, op.keeps[i],
                             static_cast<uint64_t>(op.start) + begin,
                             [&](size_t j, typename V::F delta, typename V::M kept) __attribute__((always_inline)) {
                                 V::put(size + j, absolute<V>(delta));
                                 V::put(kept_size + j, V::zero_unless(kept, absolute<V>(delta)));
                             });
            zero_behind(size, n);
            zero_behind(kept_size, n);
            add_kept<V>(size, kept_size, n, op.lanes + i * 3 * kSumLanes);
        }
    };
    for_each_span(
        models.num, op.span, [&] { zero_lanes(op.lanes, models.num_models * 3); }, add_block,
        [&](size_t span) {
            double* sums = op.sums + span * models.num_models * 3;
            for (size_t k = 0; k < models.num_models * 3; ++k) sums[k] = add_lanes(op.lanes + k * kSumLanes);
        });
}

// ---- gram_n, gram_columns

// The deltas of a block in the place of the models, zero behind the end.
template <class V>
void subtract_base(float* x, const float* base, size_t n) {
    for (size_t j = 0; j < n; j += V::kLanes) V::put(x + j, V::sub(V::get(x + j), V::get(base + j)));
    zero_behind(x, n);
}

// Inner products of one model with kCount others that follow each other.
template <class V, size_t kCount>
void add_products(const float* a, const float* b, size_t n, double* lanes) {
    for (size_t lane = 0; lane < kSumLanes; lane += V::kWideLanes) {
        typename V::D acc[kCount];
        for (size_t k = 0; k < kCount; ++k) acc[k] = V::get_wide(lanes + k * kSumLanes + lane);
        for (size_t e = lane; e < n; e += kSumLanes) {
            const typename V::D left = V::to_doubles(a + e);
            for (size_t k = 0; k < kCount; ++k) {
                acc[k] = V::add_product(acc[k], left, V::to_doubles(b + k * kBlockElements + e));
            }
        }
        for (size_t k = 0; k < kCount; ++k) V::put_wide(lanes + k * kSumLanes + lane, acc[k]);
    }
}

template <class V>
void gram_n(const GramN& op) {
    alignas(64) float base[kBlockElements] = {};
    const Models& models = op.models;
    const size_t num_models = models.num_models;
    const size_t num_pairs = num_models * (num_models + 1) / 2;
    const auto add_block = [&](size_t begin, size_t n) {
        widen_all<V>(models, begin, n, base);
        for (size_t i = 0; i < num_models; ++i) subtract_base<V>(models.workspace + i * kBlockElements, base, n);
        double* lanes = op.lanes;
        for (size_t i = 0; i < num_models; ++i) {
            const float* a = models.workspace + i * kBlockElements;
            for (size_t j = i; j < num_models;) {
                const size_t count = smaller(4, num_models - j);
                const float* b = models.workspace + j * kBlockElements;
                if (count == 4) add_products<V, 4>(a, b, n, lanes);
                if (count == 3) add_products<V, 3>(a, b, n, lanes);
                if (count == 2) add_products<V, 2>(a, b, n, lanes);
                if (count == 1) add_products<V, 1>(a, b, n, lanes);
                lanes += count * kSumLanes;
                j += count;
            }
        }
    };
    for_each_span(
        models.num, op.span, [&] { zero_lanes(op.lanes, num_pairs); }, add_block,
        [&](size_t span) {
            double* sums = op.sums + span * num_pairs;
            for (size_t k = 0; k < num_pairs; ++k) sums[k] = add_lanes(op.lanes + k * kSumLanes);
        });
}

// sums[e] += a[r][e] * b[r][e] for the rows in order.
template <class V>
void add_rows(const float* a, const float* b, size_t row_stride, size_t num_rows, size_t n, double* sums) {
    for (size_t e = 0; e < n; e += V::kWideLanes) {
        typename V::D acc = V::get_wide(sums + e);
        for (size_t r = 0; r < num_rows; ++r) {
            acc = V::add_product(acc, V::to_doubles(a + r * row_stride + e), V::to_doubles(b + r * row_stride + e));
        }
        V::put_wide(sums + e, acc);
    }
}

// Adds the products of `rows` rows from element `begin` on, n columns of each, to the sums of these columns.
template <class V>
void add_gram_block(const GramColumns& op, size_t begin, size_t rows, size_t n, double* sums) {
    alignas(64) float base[kBlockElements] = {};
    const Models& models = op.models;
    const size_t row_stride = models.num_models * kBlockElements;
    const size_t whole = n / V::kWideLanes * V::kWideLanes;
    for (size_t r = 0; r < rows; ++r) {
        const size_t from = begin + r * op.columns;
        if (models.base.data) widen<V>(models.base, from, n, base);
        for (size_t i = 0; i < models.num_models; ++i) {
            float* x = models.workspace + r * row_stride + i * kBlockElements;
            widen<V>(models.inputs[i], from, n, x);
            subtract_base<V>(x, base, n);
        }
    }
    for (size_t i = 0; i < models.num_models; ++i) {
        for (size_t j = i; j < models.num_models; ++j, sums += op.columns) {
            const float* a = models.workspace + i * kBlockElements;
            const float* b = models.workspace + j * kBlockElements;
            add_rows<V>(a, b, row_stride, rows, whole, sums);
            if (whole < n) {
                double rest[V::kWideLanes] = {};
                memcpy(rest, sums + whole, (n - whole) * sizeof(double));
                add_rows<V>(a + whole, b + whole, row_stride, rows, n - whole, rest);
                memcpy(sums + whole, rest, (n - whole) * sizeof(double));
            }
        }
    }
}

// Rows in groups, so that sums are loaded and stored less often; columns in panels whose sums stay in the cache.
template <class V>
void gram_columns(const GramColumns& op) {
    constexpr size_t cached_sums = (size_t{1} << 20) / sizeof(double);
    const size_t num_models = op.models.num_models;
    const size_t num_pairs = num_models * (num_models + 1) / 2;
    const size_t num_rows = op.models.num / op.columns;
    const size_t panel = (cached_sums / num_pairs / kBlockElements + 1) * kBlockElements;
    for (size_t first = 0; first < op.columns; first += panel) {
        const size_t end = smaller(first + panel, op.columns);
        for (size_t row = 0; row < num_rows; row += kGramRows) {
            const size_t rows = smaller(kGramRows, num_rows - row);
            for (size_t column = first; column < end; column += kBlockElements) {
                const size_t n = smaller(kBlockElements, end - column);
                add_gram_block<V>(op, row * op.columns + column, rows, n, op.sums + column);
            }
        }
    }
    for (size_t k = 0; k < num_pairs * op.columns; ++k) {
        if (op.sums[k] != op.sums[k]) op.sums[k] = static_cast<double>(__builtin_nanf(""));
    }
}

// ---- masked_sums

// dst = n bits of a mask from bit `begin` on.
inline void copy_bits(const uint8_t* mask, size_t begin, size_t n, uint8_t* dst) {
    if (begin % 8 == 0) {
        memcpy(dst, mask + begin / 8, (n + 7) / 8);
        return;
    }
    memset(dst, 0, (n + 7) / 8);
    for (size_t e = 0; e < n; ++e) {
        const size_t bit = begin + e;
        dst[e / 8] = static_cast<uint8_t>(dst[e / 8] | (mask[bit / 8] >> bit % 8 & 1) << e % 8);
    }
}

template <class V>
void masked_sums(const MaskedSums& op) {
    alignas(64) float x[kBlockElements];
    alignas(64) float kept[kBlockElements];
    uint8_t bits[kBlockElements / 8 + 1] = {};
    const auto add_block = [&](size_t begin, size_t n) {
        widen<V>(op.vector, begin, n, x);
        for (size_t i = 0; i < op.num_masks; ++i) {
            copy_bits(op.masks[i], begin, n, bits);
            for (size_t j = 0; j < n; j += V::kLanes) {
                V::put(kept + j, V::zero_unless(get_bits<V>(bits, j), absolute<V>(V::get(x + j))));
            }
            zero_behind(kept, n);
            add_to_lanes<V>(kept, n, op.lanes + i * kSumLanes);
        }
    };
    for_each_span(
        op.num, op.span, [&] { zero_lanes(op.lanes, op.num_masks); }, add_block,
        [&](size_t span) {
            for (size_t i = 0; i < op.num_masks; ++i) {
                op.sums[span * op.num_masks + i] = add_lanes(op.lanes + i * kSumLanes);
            }
        });
}

}  // namespace
}  // namespace pymerge

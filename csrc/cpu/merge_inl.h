// Weighted sums, the disjoint merge and what it measures, conversion.
#pragma once

#include "elements_inl.h"

namespace pymerge {
namespace {

// ---- axpy_n, axpy_grid: models one after another into an accumulator

template <class V, bool kFirst, bool kDelta>
void accumulate(const float* x, const float* base, size_t n, float weight, float* acc) {
    const typename V::F w = V::set(weight);
    for (size_t j = 0; j < n; j += V::kLanes) {
        typename V::F term = V::get(x + j);
        if (kDelta) term = V::sub(term, V::get(base + j));
        term = V::mul(w, term);
        V::put(acc + j, kFirst ? term : V::add(V::get(acc + j), term));
    }
}

template <class V, bool kDelta>
uint64_t axpy_n_blocks(const AxpyN& op) {
    alignas(64) float base[kBlockElements];
    alignas(64) float x[kBlockElements];
    alignas(64) float acc[kBlockElements];
    const Models& models = op.models;
    const bool add_base = kDelta && op.add_base;
    uint64_t nonfinite = 0;
    for (size_t begin = 0; begin < models.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, models.num - begin);
        const size_t end = padded<V>(n);
        if (kDelta) widen<V>(models.base, begin, n, base);
        widen<V>(models.inputs[0], begin, n, x);
        accumulate<V, true, kDelta>(x, base, end, op.weights[0], acc);
        for (size_t i = 1; i < models.num_models; ++i) {
            widen<V>(models.inputs[i], begin, n, x);
            accumulate<V, false, kDelta>(x, base, end, op.weights[i], acc);
        }
        if (add_base || op.divisor != 1.0f || op.scale != 1.0f) {
            for (size_t j = 0; j < end; j += V::kLanes) {
                typename V::F total = divided_and_scaled<V>(V::get(acc + j), op.divisor, op.scale);
                if (add_base) total = V::add(V::get(base + j), total);
                V::put(acc + j, total);
            }
        }
        nonfinite += narrow<V>(acc, begin, n, op.out);
    }
    return nonfinite;
}

template <class V>
uint64_t axpy_n(const AxpyN& op) {
    return op.models.base.data ? axpy_n_blocks<V, true>(op) : axpy_n_blocks<V, false>(op);
}

template <class V>
uint64_t axpy_grid(const AxpyGrid& op) {
    alignas(64) float base[kBlockElements] = {};
    alignas(64) float x[kBlockElements];
    alignas(64) float w[kBlockElements];
    alignas(64) float acc[kBlockElements];
    const Models& models = op.models;
    const size_t num_rows = models.num / op.columns;
    uint64_t nonfinite = 0;
    for (size_t begin = 0; begin < models.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, models.num - begin);
        if (models.base.data) widen<V>(models.base, begin, n, base);
        for (size_t i = 0; i < models.num_models; ++i) {
            widen<V>(models.inputs[i], begin, n, x);
            if (op.along_rows) {
                fill_by_row<V>(op.weights + i * num_rows, op.columns, begin, n, w);
            } else {
                fill_by_column<V>(op.weights + i * op.columns, op.columns, begin, n, w);
            }
            for (size_t j = 0; j < n; j += V::kLanes) {
                const typename V::F term = V::mul(V::get(w + j), V::sub(V::get(x + j), V::get(base + j)));
                V::put(acc + j, i ? V::add(V::get(acc + j), term) : term);
            }
        }
        if (models.base.data) {
            for (size_t j = 0; j < n; j += V::kLanes) V::put(acc + j, V::add(V::get(base + j), V::get(acc + j)));
        }
        nonfinite += narrow<V>(acc, begin, n, op.out);
    }
    return nonfinite;
}

// ---- What is kept

// Calls visit(j, delta, kept) for each vector of a block of one model. `score`: whose keys decide, or nullptr.
template <class V, bool kCeiling, bool kDraws, class Visit>
PM_INLINE void for_each_kept_of(const float* x, const float* base, const float* score, size_t n, LocalKeep keep,
                                const int32_t* draws, Visit visit) {
    keep.has_ceiling = kCeiling;
    keep.has_draws = kDraws;
    for (size_t j = 0; j < n; j += V::kLanes) {
        const typename V::F delta = V::sub(V::get(x + j), V::get(base + j));
        const typename V::I key = score ? key_of<V>(V::get(score + j)) : key_of_result<V>(delta);
        const typename V::I place = V::add(V::lanes(), V::set(static_cast<int32_t>(j)));
        visit(j, delta, is_kept<V>(keep, key, place, [&] { return V::load_ints(draws + j); }));
    }
}

// As above for elements [index, index + n) of the full tensor.
template <class V, class Visit>
PM_INLINE void for_each_kept(const float* x, const float* base, const float* score, size_t n, const Keep& keep,
                             uint64_t index, Visit visit) {
    alignas(64) int32_t draws[kDrawsCapacity];
    const LocalKeep local = local_keep(keep, static_cast<int64_t>(index), static_cast<int32_t>(n));
    const int32_t* own = draws;
    if (local.has_draws) own += fill_draws<V>(index, n, keep.seed, draws);
    if (!local.has_ceiling && !local.has_draws) {
        for_each_kept_of<V, false, false>(x, base, score, n, local, own, visit);
    } else if (!local.has_ceiling) {
        for_each_kept_of<V, false, true>(x, base, score, n, local, own, visit);
    } else if (!local.has_draws) {
        for_each_kept_of<V, true, false>(x, base, score, n, local, own, visit);
    } else {
        for_each_kept_of<V, true, true>(x, base, score, n, local, own, visit);
    }
}

// ---- disjoint_merge, count_votes

// The ballots of a block, read from the workspace.
template <class V>
struct Ballots {
    const float* x;

    PM_INLINE typename V::F operator()(size_t i) const { return V::get(x + i * kBlockElements); }
};

// Ballots with a bit for each that is kept.
template <class V>
struct KeptBallots {
    const float* x;
    const uint8_t* bits;
    size_t j;

    PM_INLINE typename V::F operator()(size_t i, typename V::M* kept) const {
        *kept = get_bits<V>(bits + i * (kBlockElements / 8), j);
        return V::get(x + i * kBlockElements);
    }
};

// Fills the workspace with the ballots of a block, and with kBits with a bit for each that is kept.
template <class V, Elect kElect, bool kBits>
void cast_ballots(const Models& models, const Vote& vote, const Keep* keeps, const float* base, const float* score,
                  size_t begin, size_t n, uint64_t index) {
    alignas(64) float x[kBlockElements];
    uint8_t* bits = reinterpret_cast<uint8_t*>(models.workspace + models.num_models * kBlockElements);
    for (size_t i = 0; i < models.num_models; ++i) {
        float* ballots = models.workspace + i * kBlockElements;
        widen<V>(models.inputs[i], begin, n, x);
        for_each_kept<V>(x, base, score, n, keeps[i], index,
                         [&](size_t j, typename V::F delta, typename V::M kept) __attribute__((always_inline)) {
                             V::put(ballots + j, ballot_of<V, kElect>(vote, i, delta, kept));
                             if (kBits) put_bits<V>(bits + i * (kBlockElements / 8), j, kept);
                         });
    }
}

template <class V, Elect kElect, Combine kCombine>
uint64_t disjoint_merge_blocks(const DisjointMerge& op) {
    constexpr bool counts_kept = kElect == Elect::None && (kCombine == Combine::Mean || kCombine == Combine::Count);
    alignas(64) float base[kBlockElements] = {};
    alignas(64) float zero[kBlockElements] = {};
    alignas(64) float score[kBlockElements];
    alignas(64) float result[kBlockElements];
    const Models& models = op.models;
    const uint8_t* bits = reinterpret_cast<const uint8_t*>(models.workspace + models.num_models * kBlockElements);
    uint64_t nonfinite = 0;
    for (size_t begin = 0; begin < models.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, models.num - begin);
        if (models.base.data) widen<V>(models.base, begin, n, base);
        if (op.score.data) widen<V>(op.score, begin, n, score);
        cast_ballots<V, kElect, counts_kept>(models, op.vote, op.keeps, op.deltas ? zero : base,
                                             op.score.data ? score : nullptr, begin, n,
                                             static_cast<uint64_t>(op.start) + begin);
        for (size_t j = 0; j < n; j += V::kLanes) {
            const Ballots<V> ballots{models.workspace + j};
            typename V::F num;
            if (counts_kept) {
                num = combine_kept<V, kCombine>(op.vote, KeptBallots<V>{models.workspace + j, bits, j});
            } else if (kElect == Elect::None) {
                num = combine_kept<V, kCombine>(op.vote, [&](size_t i, typename V::M* kept) {
                    *kept = V::first(V::kLanes);
                    return ballots(i);
                });
            } else {
                num = elect_and_combine<V, kElect, kCombine>(op.vote, ballots);
            }
            V::put(result + j, merged<V>(op.vote, V::get(base + j), num));
        }
        nonfinite += narrow<V>(result, begin, n, op.out);
    }
    return nonfinite;
}

template <class V, Elect kElect>
uint64_t disjoint_merge_elect(const DisjointMerge& op) {
    switch (op.combine) {
        case Combine::Mean:
            return disjoint_merge_blocks<V, kElect, Combine::Mean>(op);
        case Combine::Count:
            return disjoint_merge_blocks<V, kElect, Combine::Count>(op);
        case Combine::Sum:
            return disjoint_merge_blocks<V, kElect, Combine::Sum>(op);
        default:
            return disjoint_merge_blocks<V, kElect, Combine::Max>(op);
    }
}

template <class V>
uint64_t disjoint_merge(const DisjointMerge& op) {
    switch (op.elect) {
        case Elect::None:
            return disjoint_merge_elect<V, Elect::None>(op);
        case Elect::Plain:
            return disjoint_merge_elect<V, Elect::Plain>(op);
        default:
            return disjoint_merge_elect<V, Elect::Weighted>(op);
    }
}

template <class V>
void count_votes(const CountVotes& op) {
    alignas(64) float base[kBlockElements] = {};
    const Models& models = op.models;
    const typename V::F zero = V::set(0.0f);
    for (size_t begin = 0; begin < models.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, models.num - begin);
        const uint64_t index = static_cast<uint64_t>(op.start) + begin;
        if (models.base.data) widen<V>(models.base, begin, n, base);
        if (op.elect == Elect::Plain) {
            cast_ballots<V, Elect::Plain, false>(models, op.vote, op.keeps, base, nullptr, begin, n, index);
        } else {
            cast_ballots<V, Elect::Weighted, false>(models, op.vote, op.keeps, base, nullptr, begin, n, index);
        }
        typename V::I plus = V::set(int32_t{0});
        typename V::I minus = V::set(int32_t{0});
        for (size_t j = 0; j < n; j += V::kLanes) {
            const typename V::M inside = V::first(smaller(n - j, V::kLanes));
            const typename V::F total = total_of<V>(models.num_models, Ballots<V>{models.workspace + j});
            plus = V::count(plus, V::both(inside, V::above(total, zero)));
            minus = V::count(minus, V::both(inside, V::above(zero, total)));
        }
        op.counts[0] += V::sum(plus);
        op.counts[1] += V::sum(minus);
    }
}

// ---- convert, count_nonfinite

// float64 is judged by its own bits: 1e300 is finite although its float32 is not.
uint64_t count_nonfinite_f64(const unsigned char* src, size_t num) {
    uint64_t nonfinite = 0;
    for (size_t j = 0; j < num; ++j) {
        uint64_t bits;
        memcpy(&bits, src + j * sizeof bits, sizeof bits);
        nonfinite += (bits & 0x7ff0000000000000u) == 0x7ff0000000000000u;
    }
    return nonfinite;
}

template <class V>
uint64_t count_nonfinite(const Input& input, size_t num) {
    if (input.format == Format::F64) return count_nonfinite_f64(static_cast<const unsigned char*>(input.data), num);
    alignas(64) float x[kBlockElements];
    const typename V::I last_finite = V::set(kInfinity - 1);
    uint64_t nonfinite = 0;
    for (size_t begin = 0; begin < num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, num - begin);
        widen<V>(input, begin, n, x);
        typename V::I counts = V::set(0);
        for (size_t j = 0; j < n; j += V::kLanes) {
            counts = V::count(counts, V::greater(magnitude_bits<V>(V::get(x + j)), last_finite));
        }
        nonfinite += V::sum(counts);
    }
    return nonfinite;
}

template <class V>
uint64_t convert(const Output& out, const Input& input, size_t num) {
    if (out.format == input.format) {
        if (num) memcpy(out.data, input.data, num * num_bytes(input.format));
        return count_nonfinite<V>(input, num);
    }
    alignas(64) float x[kBlockElements];
    uint64_t nonfinite = 0;
    for (size_t begin = 0; begin < num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, num - begin);
        widen<V>(input, begin, n, x);
        nonfinite += narrow<V>(x, begin, n, out);
    }
    return nonfinite;
}

}  // namespace
}  // namespace pymerge

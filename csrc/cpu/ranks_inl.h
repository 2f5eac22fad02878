// row_sparsify: ranks of magnitudes within a row by a radix sort of (key, index) pairs.
//
// Keys have 31 bits, of which a row varies in few: magnitudes lie within some powers of two, differences of
// 16-bit floats have zeros at the end, and 0 stands apart. So keys are first made small in the same order, 0 as 0
// and others from 1 on; two passes then do in most rows. The last pass needs no pairs any more: the place of an
// element is its rank.
#pragma once

#include "merge_inl.h"

namespace pymerge {
namespace {

constexpr int kMaxDigits = 4;

struct Pair {
    uint32_t key;
    uint32_t index;
};

// What the caller's scratch holds; row_sparsify_scratch counts these bytes.
struct RankScratch {
    uint32_t* bins;       // [kRankBins], those of each digit in turn
    int32_t* keys;        // [columns], keys and then ranks
    int32_t* last_draws;  // [columns], by rank: the largest draw that is kept
    float* shares;        // [columns], by rank
    Pair* pairs[2];       // [columns]
};

inline RankScratch rank_scratch(void* scratch, size_t columns) {
    const size_t capacity = (columns + 15) / 16 * 16 + 16;
    RankScratch parts;
    parts.bins = static_cast<uint32_t*>(scratch);
    parts.keys = reinterpret_cast<int32_t*>(parts.bins + kRankBins);
    parts.last_draws = parts.keys + capacity;
    parts.shares = reinterpret_cast<float*>(parts.last_draws + capacity);
    parts.pairs[0] = reinterpret_cast<Pair*>(parts.shares + capacity);
    parts.pairs[1] = parts.pairs[0] + capacity;
    return parts;
}

// Turns the counts of a digit into the place of each bin's first element.
inline void first_places(uint32_t* bins, size_t num_bins) {
    uint32_t place = 0;
    for (size_t bin = 0; bin < num_bins; ++bin) {
        const uint32_t count = bins[bin];
        bins[bin] = place;
        place += count;
    }
}

// How the bits of small keys are cut into digits of equal length.
struct Digits {
    int num;
    int length;

    size_t num_bins() const { return size_t{1} << length; }
    uint32_t mask() const { return (1u << length) - 1; }
};

// Bins are cleared and summed for each row, so a short row has fewer. All bins of a row fit kRankBins.
inline Digits digits_of(uint32_t largest, size_t columns) {
    const int width = largest ? 32 - __builtin_clz(largest) : 0;
    const int longest = columns < 512 ? 8 : columns < 2048 ? 11 : columns < 8192 ? 12 : 13;
    Digits digits;
    digits.num = (width + longest - 1) / longest;
    digits.length = digits.num ? (width + digits.num - 1) / digits.num : 0;
    return digits;
}

inline void count_digits(const int32_t* keys, size_t columns, const Digits& digits, uint32_t* bins) {
    const uint32_t mask = digits.mask();
    const size_t num_bins = digits.num_bins();
    memset(bins, 0, digits.num * num_bins * sizeof(uint32_t));
    if (digits.num == 2) {
        for (size_t e = 0; e < columns; ++e) {
            const uint32_t key = static_cast<uint32_t>(keys[e]);
            ++bins[key & mask];
            ++bins[num_bins + (key >> digits.length)];
        }
    } else {
        for (int d = 0; d < digits.num; ++d) {
            uint32_t* own = bins + d * num_bins;
            const int shift = d * digits.length;
            for (size_t e = 0; e < columns; ++e) ++own[static_cast<uint32_t>(keys[e]) >> shift & mask];
        }
    }
    for (int d = 0; d < digits.num; ++d) first_places(bins + d * num_bins, num_bins);
}

// Replaces small keys, of which `largest` is the largest, by ranks: 0 for the smallest; of equal keys the lower
// index ranks higher.
inline void rank_row(const RankScratch& parts, size_t columns, uint32_t largest) {
    const Digits digits = digits_of(largest, columns);
    const uint32_t mask = digits.mask();
    if (digits.num == 0) {
        for (size_t e = 0; e < columns; ++e) parts.keys[e] = static_cast<int32_t>(columns - 1 - e);
        return;
    }
    count_digits(parts.keys, columns, digits, parts.bins);
    // Stable passes, the first from the last element on: of equal keys the higher index comes first.
    const Pair* from = nullptr;
    for (int d = 0; d < digits.num; ++d) {
        uint32_t* bins = parts.bins + d * digits.num_bins();
        const int shift = d * digits.length;
        const bool last = d == digits.num - 1;
        Pair* to = parts.pairs[d % 2];
        if (d == 0 && last) {
            for (size_t e = columns; e-- > 0;) {
                parts.keys[e] = static_cast<int32_t>(bins[static_cast<uint32_t>(parts.keys[e])]++);
            }
        } else if (d == 0) {
            for (size_t e = columns; e-- > 0;) {
                const uint32_t key = static_cast<uint32_t>(parts.keys[e]);
                to[bins[key & mask]++] = {key, static_cast<uint32_t>(e)};
            }
        } else if (last) {
            for (size_t e = 0; e < columns; ++e) {
                parts.keys[from[e].index] = static_cast<int32_t>(bins[from[e].key >> shift]++);
            }
        } else {
            for (size_t e = 0; e < columns; ++e) to[bins[from[e].key >> shift & mask]++] = from[e];
        }
        from = to;
    }
}

// Writes the keys of a row, made small, to the scratch; returns the largest.
template <class V>
uint32_t small_keys(const RowSparsify& op, size_t row, int32_t* keys) {
    alignas(64) float base[kBlockElements] = {};
    alignas(64) float x[kBlockElements];
    typename V::I any_set = V::set(int32_t{0});
    typename V::I smallest = V::set(INT32_MAX);
    typename V::I largest = V::set(int32_t{0});
    for (size_t column = 0; column < op.columns; column += kBlockElements) {
        const size_t n = smaller(kBlockElements, op.columns - column);
        if (op.base.data) widen<V>(op.base, row + column, n, base);
        widen<V>(op.model, row + column, n, x);
        // The elements behind the end are 0 and so are their keys, which change nothing here.
        for (size_t j = 0; j < n; j += V::kLanes) {
            const typename V::I key = key_of_result<V>(V::sub(V::get(x + j), V::get(base + j)));
            any_set = V::bit_or(any_set, key);
            largest = V::select(V::greater(key, largest), key, largest);
            const typename V::I number = V::select(V::greater(key, V::set(int32_t{0})), key, V::set(INT32_MAX));
            smallest = V::min(smallest, number);
            V::store_ints(keys + column + j, key);
        }
    }
    alignas(64) int32_t any[V::kLanes];
    alignas(64) int32_t low[V::kLanes];
    alignas(64) int32_t high[V::kLanes];
    V::put(any, any_set);
    V::put(low, smallest);
    V::put(high, largest);
    for (size_t lane = 1; lane < V::kLanes; ++lane) {
        any[0] |= any[lane];
        if (low[lane] < low[0]) low[0] = low[lane];
        if (high[lane] > high[0]) high[0] = high[lane];
    }
    if (any[0] == 0) return 0;
    const int shift = __builtin_ctz(static_cast<unsigned>(any[0]));
    for (size_t e = 0; e < op.columns; e += V::kLanes) {
        const typename V::I key = V::load_ints(keys + e);
        const typename V::I above = V::shift_right(V::sub(key, V::set(low[0])), shift);
        const typename V::I small = V::add(above, V::set(int32_t{1}));
        V::store_ints(keys + e, V::select(V::greater(key, V::set(int32_t{0})), small, V::set(int32_t{0})));
    }
    return (static_cast<uint32_t>(high[0] - low[0]) >> shift) + 1;
}

// Which ranks can be kept at all, and how their draws decide.
struct RankRule {
    int32_t first;
    int32_t last;
    bool has_draws;   // not every draw is kept
    bool has_shares;  // kept elements are divided
    bool by_rank;     // by last_draws and shares of the rank, else by those of rank 0
};

inline RankRule rank_rule(const RowSparsify& op, const RankScratch& parts) {
    const int64_t all = static_cast<int64_t>(kAllDraws);
    RankRule rule;
    rule.first = static_cast<int32_t>(op.first);
    rule.last = static_cast<int32_t>(op.last);
    rule.by_rank = op.draws_span != 0;
    rule.has_draws = op.draws_low < all;
    rule.has_shares = op.rescale && rule.has_draws;
    if (!rule.has_draws) rule.by_rank = false;
    const size_t num_ranks = rule.by_rank ? op.columns : 1;
    const int64_t columns = static_cast<int64_t>(op.columns);
    if (!rule.has_draws) return rule;
    for (size_t rank = 0; rank < num_ranks; ++rank) {
        int64_t limit = op.draws_low;
        if (rule.by_rank) limit = draw_limit(static_cast<int64_t>(rank), columns, op.draws_low, op.draws_span);
        // Limits grow with the rank: those of 0 draws come first and are cut off.
        if (limit <= 0) {
            if (rule.first <= static_cast<int32_t>(rank)) rule.first = static_cast<int32_t>(rank) + 1;
            if (!rule.by_rank) rule.last = 0;
        }
        parts.last_draws[rank] = static_cast<int32_t>(static_cast<uint32_t>((limit < all ? limit : all) - 1));
        parts.shares[rank] = draw_share(limit);
    }
    return rule;
}

// The delta of each kept element of a block of a row and every NaN, 0 for the others.
template <class V>
void keep_by_rank(const RankRule& rule, const RankScratch& parts, const int32_t* ranks, const float* base, size_t n,
                  const int32_t* draws, float* x) {
    for (size_t j = 0; j < n; j += V::kLanes) {
        const typename V::I rank = V::load_ints(ranks + j);
        typename V::F delta = V::sub(V::get(x + j), V::get(base + j));
        const typename V::M bad = V::is_nan(delta);
        typename V::M kept = V::both(V::greater(rank, V::set(rule.first - 1)), V::greater(V::set(rule.last), rank));
        if (rule.has_draws) {
            const typename V::I last_draw =
                rule.by_rank ? V::gather(parts.last_draws, rank) : V::set(*parts.last_draws);
            kept = V::both(kept, V::negate(V::below_unsigned(last_draw, V::load_ints(draws + j))));
        }
        if (rule.has_shares) {
            const typename V::F share = rule.by_rank ? V::gather(parts.shares, rank) : V::set(*parts.shares);
            delta = V::div(delta, share);
        }
        V::put(x + j, V::zero_unless(V::either(kept, bad), delta));
    }
}

template <class V>
uint64_t row_sparsify(const RowSparsify& op) {
    alignas(64) float base[kBlockElements] = {};
    alignas(64) float x[kBlockElements];
    alignas(64) int32_t draws[kDrawsCapacity];
    const RankScratch parts = rank_scratch(op.scratch, op.columns);
    const RankRule rule = rank_rule(op, parts);
    const bool needs_ranks =
        rule.by_rank || rule.first > 0 || static_cast<size_t>(rule.last < 0 ? 0 : rule.last) < op.columns;
    for (size_t e = 0; e < op.columns + 16; ++e) parts.keys[e] = 0;
    uint64_t nonfinite = 0;
    for (size_t row = 0; row < op.num; row += op.columns) {
        if (needs_ranks) {
            const uint32_t largest = small_keys<V>(op, row, parts.keys);
            rank_row(parts, op.columns, largest);
        }
        for (size_t column = 0; column < op.columns; column += kBlockElements) {
            const size_t n = smaller(kBlockElements, op.columns - column);
            const int32_t* own = draws;
            if (rule.has_draws) {
                own += fill_draws<V>(static_cast<uint64_t>(op.start) + row + column, n, op.seed, draws);
            }
            if (op.base.data) widen<V>(op.base, row + column, n, base);
            widen<V>(op.model, row + column, n, x);
            for (size_t e = column + n; e < column + padded<V>(n); ++e) parts.keys[e] = 0;
            keep_by_rank<V>(rule, parts, parts.keys + column, base, n, own, x);
            nonfinite += narrow<V>(x, row + column, n, op.out);
        }
    }
    return nonfinite;
}

}  // namespace
}  // namespace pymerge

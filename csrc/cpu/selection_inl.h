// Selection by magnitude: samples, counts, histograms and the place of a tie.
#pragma once

#include "elements_inl.h"

namespace pymerge {
namespace {

// ---- magnitude_sample

template <class V>
void magnitude_sample(const MagnitudeSample& op) {
    alignas(64) float base[kBlockElements] = {};
    alignas(64) float x[kBlockElements];
    alignas(64) int32_t keys[kBlockElements];
    const Models& models = op.models;
    const uint64_t period = op.group * op.stride;
    const uint64_t end = op.start + models.num;
    size_t written = 0;
    for (uint64_t group = op.start / period * period; group < end; group += period) {
        const uint64_t group_end = group + op.group < end ? group + op.group : end;
        uint64_t from = group > op.start ? group : op.start;
        while (from < group_end) {
            const size_t begin = from - op.start;
            const size_t n = smaller(kBlockElements, group_end - from);
            if (models.base.data) widen<V>(models.base, begin, n, base);
            for (size_t i = 0; i < models.num_models; ++i) {
                widen<V>(models.inputs[i], begin, n, x);
                for_each_key<V>(x, base, n, [&](size_t j, typename V::I key) { V::put(keys + j, key); });
                memcpy(op.keys + i * op.num_sampled + written, keys, n * sizeof(int32_t));
            }
            written += n;
            from += n;
        }
    }
}

// ---- bracket_count

template <class V>
void bracket_count(const BracketCount& op) {
    alignas(64) float base[kBlockElements] = {};
    alignas(64) float x[kBlockElements];
    alignas(64) int32_t found[kBlockElements + V::kLanes];
    const Models& models = op.models;
    for (size_t begin = 0; begin < models.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, models.num - begin);
        if (models.base.data) widen<V>(models.base, begin, n, base);
        for (size_t i = 0; i < models.num_models; ++i) {
            const typename V::I low = V::set(op.low[i]);
            const typename V::I high = V::set(op.high[i]);
            typename V::I above = V::set(0);
            typename V::I at_high = V::set(0);
            typename V::I at_low = V::set(0);
            size_t num_found = 0;
            widen<V>(models.inputs[i], begin, n, x);
            for_each_key<V>(x, base, n, [&](size_t, typename V::I key) {
                above = V::count(above, V::greater(key, high));
                at_high = V::count(at_high, V::equal(key, high));
                at_low = V::count(at_low, V::equal(key, low));
                num_found += V::compress(found + num_found, V::both(V::greater(key, low), V::greater(high, key)), key);
            });
            int64_t* counts = op.counts + i * 4;
            const uint64_t so_far = static_cast<uint64_t>(counts[3]);
            if (so_far < op.capacity) {
                memcpy(op.candidates + i * op.capacity + so_far, found,
                       smaller(num_found, op.capacity - so_far) * sizeof(int32_t));
            }
            counts[0] += V::sum(above);
            counts[1] += V::sum(at_high);
            counts[2] += op.low[i] == op.high[i] ? 0 : V::sum(at_low);
            counts[3] += num_found;
        }
    }
}

// ---- magnitude_histogram

// Zeros are often a third of all deltas, and adding to one bin is a chain of dependent stores, so they are counted
// apart; what is left is compressed before the scalar increments.
template <class V>
void magnitude_histogram(const MagnitudeHistogram& op) {
    alignas(64) float base[kBlockElements] = {};
    alignas(64) float x[kBlockElements];
    alignas(64) int32_t bins[kBlockElements + V::kLanes];
    const Models& models = op.models;
    const typename V::I bin_mask = V::set(static_cast<int32_t>(op.num_bins - 1));
    const typename V::I zero = V::set(0);
    for (size_t begin = 0; begin < models.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, models.num - begin);
        if (models.base.data) widen<V>(models.base, begin, n, base);
        for (size_t i = 0; i < models.num_models; ++i) {
            uint64_t* counts = op.counts + i * op.num_bins;
            typename V::I zeros = V::set(0);
            size_t num_kept = 0;
            widen<V>(models.inputs[i], begin, n, x);
            if (op.prefix) {
                const typename V::I prefix = V::set(op.prefix[i]);
                for_each_key<V>(x, base, n, [&](size_t, typename V::I key) {
                    const typename V::M match = V::equal(V::shift_right(key, op.prefix_shift), prefix);
                    zeros = V::count(zeros, V::both(match, V::equal(key, zero)));
                    num_kept += V::compress(bins + num_kept, V::both(match, V::greater(key, zero)),
                                            V::bit_and(V::shift_right(key, op.shift), bin_mask));
                });
            } else {
                for_each_key<V>(x, base, n, [&](size_t, typename V::I key) {
                    zeros = V::count(zeros, V::equal(key, zero));
                    num_kept += V::compress(bins + num_kept, V::greater(key, zero),
                                            V::bit_and(V::shift_right(key, op.shift), bin_mask));
                });
            }
            counts[0] += V::sum(zeros);
            for (size_t j = 0; j < num_kept; ++j) ++counts[bins[j]];
        }
    }
}

// ---- locate_equal

template <class V>
Location locate_equal(const LocateEqual& op) {
    alignas(64) float base[kBlockElements] = {};
    alignas(64) float x[kBlockElements];
    alignas(64) int32_t keys[kBlockElements];
    const typename V::I wanted = V::set(op.key);
    uint64_t count = 0;
    for (size_t begin = 0; begin < op.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, op.num - begin);
        typename V::I equals = V::set(0);
        if (op.base.data) widen<V>(op.base, begin, n, base);
        widen<V>(op.model, begin, n, x);
        for_each_key<V>(x, base, n, [&](size_t j, typename V::I key) {
            equals = V::count(equals, V::equal(key, wanted));
            V::put(keys + j, key);
        });
        const uint64_t in_block = V::sum(equals);
        if (count + in_block > op.nth) {
            size_t j = 0;
            while (keys[j] != op.key || count++ != op.nth) ++j;
            return Location{static_cast<int64_t>(begin + j), count};
        }
        count += in_block;
    }
    return Location{-1, count};
}

}  // namespace
}  // namespace pymerge

// The ops, written once over a vector policy V and compiled once per instruction set.
//
// Everything has internal linkage and no std template is used: the linker merges inline functions of the
// same name, and a copy compiled for AVX-512 must never end up in code that runs elsewhere.
//
// All ops go through blocks of kBlockElements. widen() turns a block of any format into float32 in L1, the
// arithmetic runs on whole vectors of that scratch (its padding is computed on and ignored), narrow() rounds
// to the output format. Bitwise class: models in order, no contraction, one rounding, so that every
// instruction set gives the same bytes.
//
// A policy V has kLanes, the types F (floats), I (int32s), M (lane mask) and the functions used below:
//   load(Tag<format>, p), store(Tag<format>, p, F)     elements at a misaligned address
//   get, put                                           float32 in aligned scratch
//   compress(dst, M, I) -> count                       the lanes of the mask, in order; may write kLanes values
//   first(n)                                           mask of the first n lanes
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "op_table.h"

namespace pymerge {
namespace {

template <Format kFormat>
struct Tag {};

constexpr int32_t kMagnitude = 0x7fffffff;
constexpr int32_t kInfinity = 0x7f800000;
constexpr int32_t kQuietNan = 0x7fc00000;
// Below every key: fills the lanes behind the last element wherever keys are counted.
constexpr int32_t kNoKey = INT32_MIN;

constexpr size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

template <class V>
constexpr size_t padded(size_t n) {
    return (n + V::kLanes - 1) / V::kLanes * V::kLanes;
}

// The smallest float32 magnitude, as bits, that rounds to infinity in a format: halfway above the largest
// finite number, which is odd, so the tie goes up.
constexpr int32_t overflow_bits(Format format) {
    switch (format) {
        case Format::F16:
            return 0x477ff000;
        case Format::BF16:
            return 0x7f7f8000;
        default:
            return kInfinity;
    }
}

template <class V>
typename V::I magnitude_bits(typename V::F x) {
    return V::bit_and(V::bits(x), V::set(kMagnitude));
}

template <class V>
typename V::I key_of(typename V::F delta) {
    return V::min(magnitude_bits<V>(delta), V::set(kQuietNan));
}

template <class V, Format kFormat>
void widen_as(const unsigned char* src, size_t n, float* dst) {
    constexpr size_t size = num_bytes(kFormat);
    const size_t whole = n / V::kLanes * V::kLanes;
    // The streams take turns a block at a time, too briefly for the processor to foresee the next block.
    if (n == kBlockElements) {
        const unsigned char* next = src + n * size;
        for (size_t at = 0; at < n * size; at += 64) __builtin_prefetch(next + at);
    }
    for (size_t j = 0; j < whole; j += V::kLanes) V::put(dst + j, V::load(Tag<kFormat>{}, src + j * size));
    if (whole < n) {
        unsigned char rest[V::kLanes * size] = {};
        memcpy(rest, src + whole * size, (n - whole) * size);
        V::put(dst + whole, V::load(Tag<kFormat>{}, rest));
    }
}

// dst[0:n] = value(input[begin:begin+n]); dst is padded with zeros to a whole vector.
template <class V>
void widen(const Input& input, size_t begin, size_t n, float* dst) {
    const unsigned char* src = static_cast<const unsigned char*>(input.data) + begin * num_bytes(input.format);
    switch (input.format) {
        case Format::F64:
            return widen_as<V, Format::F64>(src, n, dst);
        case Format::F32:
            return widen_as<V, Format::F32>(src, n, dst);
        case Format::F16:
            return widen_as<V, Format::F16>(src, n, dst);
        case Format::BF16:
            return widen_as<V, Format::BF16>(src, n, dst);
        case Format::F8_E4M3:
            return widen_as<V, Format::F8_E4M3>(src, n, dst);
        case Format::F8_E5M2:
            return widen_as<V, Format::F8_E5M2>(src, n, dst);
    }
}

template <class V, Format kFormat>
uint64_t narrow_as(const float* src, size_t n, unsigned char* dst) {
    constexpr size_t size = num_bytes(kFormat);
    const typename V::I last_finite = V::set(overflow_bits(kFormat) - 1);
    const typename V::F nan = V::floats(V::set(kQuietNan));
    typename V::I nonfinite = V::set(0);
    const size_t whole = n / V::kLanes * V::kLanes;
    for (size_t j = 0; j < whole; j += V::kLanes) {
        const typename V::F x = V::get(src + j);
        nonfinite = V::count(nonfinite, V::greater(magnitude_bits<V>(x), last_finite));
        V::store(Tag<kFormat>{}, dst + j * size, V::select(V::is_nan(x), nan, x));
    }
    if (whole < n) {
        alignas(64) float rest[V::kLanes] = {};
        unsigned char rounded[V::kLanes * size];
        memcpy(rest, src + whole, (n - whole) * sizeof(float));
        const typename V::F x = V::get(rest);
        nonfinite = V::count(nonfinite, V::greater(magnitude_bits<V>(x), last_finite));
        V::store(Tag<kFormat>{}, rounded, V::select(V::is_nan(x), nan, x));
        memcpy(dst + whole * size, rounded, (n - whole) * size);
    }
    return V::sum(nonfinite);
}

// output[begin:begin+n] = round(src[0:n]), NaN as the positive quiet NaN. Returns how many are not finite.
template <class V>
uint64_t narrow(const float* src, size_t begin, size_t n, const Output& output) {
    unsigned char* dst = static_cast<unsigned char*>(output.data) + begin * num_bytes(output.format);
    switch (output.format) {
        case Format::F64:
            return narrow_as<V, Format::F64>(src, n, dst);
        case Format::F32:
            return narrow_as<V, Format::F32>(src, n, dst);
        case Format::F16:
            return narrow_as<V, Format::F16>(src, n, dst);
        case Format::BF16:
            return narrow_as<V, Format::BF16>(src, n, dst);
        default:
            return 0;
    }
}

// Calls visit(j, keys) for each vector of a block; lanes past n hold kNoKey.
template <class V, class Visit>
void for_each_key(const float* x, const float* base, size_t n, Visit visit) {
    const size_t whole = n / V::kLanes * V::kLanes;
    for (size_t j = 0; j < whole; j += V::kLanes) visit(j, key_of<V>(V::sub(V::get(x + j), V::get(base + j))));
    if (whole < n) {
        const typename V::I keys = key_of<V>(V::sub(V::get(x + whole), V::get(base + whole)));
        visit(whole, V::select(V::first(n - whole), keys, V::set(kNoKey)));
    }
}

// ---- axpy_n: acc = w_0 x_0 + w_1 x_1 + ..., divided, scaled, added to the base

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
    const bool divide = op.divisor != 1.0f;
    const bool rescale = op.scale != 1.0f;
    const typename V::F divisor = V::set(op.divisor);
    const typename V::F scale = V::set(op.scale);
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
        if (kDelta || divide || rescale) {
            for (size_t j = 0; j < end; j += V::kLanes) {
                typename V::F total = V::get(acc + j);
                if (divide) total = V::div(total, divisor);
                if (rescale) total = V::mul(total, scale);
                if (kDelta) total = V::add(V::get(base + j), total);
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

// ---- disjoint_merge

// d = key > limit ? w * delta : 0 for the vectors in [from, to).
template <class V>
void trim(const float* x, const float* base, size_t from, size_t to, typename V::I limit, float weight, float* d) {
    const typename V::F w = V::set(weight);
    for (size_t j = from; j < to; j += V::kLanes) {
        const typename V::F delta = V::sub(V::get(x + j), V::get(base + j));
        V::put(d + j, V::zero_unless(V::greater(key_of<V>(delta), limit), V::mul(w, delta)));
    }
}

// Elects the sign by the sum of all d and averages what agrees with it: returns the merged delta of one vector.
template <class V, bool kNormalize>
typename V::F elect(const float* d, const float* weights, size_t num_models) {
    typename V::F total = V::get(d);
    for (size_t i = 1; i < num_models; ++i) total = V::add(total, V::get(d + i * kBlockElements));
    const typename V::F zero = V::set(0.0f);
    // Turns "below zero" into "above zero" where minus won.
    const typename V::I flip = V::select(V::at_least(total, zero), V::set(int32_t{0}), V::set(INT32_MIN));
    typename V::F num = zero;
    typename V::F den = zero;
    for (size_t i = 0; i < num_models; ++i) {
        const typename V::F vote = V::get(d + i * kBlockElements);
        const typename V::M selected = V::above(V::floats(V::bit_xor(V::bits(vote), flip)), zero);
        num = V::add_where(selected, num, vote);
        if (kNormalize) den = V::add_where(selected, den, V::set(weights[i]));
    }
    if (kNormalize) num = V::div(num, V::select(V::same(den, zero), V::set(1.0f), den));
    return V::select(V::is_nan(total), total, num);
}

template <class V, bool kNormalize>
uint64_t disjoint_merge_blocks(const DisjointMerge& op) {
    alignas(64) float base[kBlockElements];
    alignas(64) float x[kBlockElements];
    const Models& models = op.models;
    const bool rescale = op.scale != 1.0f;
    const typename V::F scale = V::set(op.scale);
    uint64_t nonfinite = 0;
    for (size_t begin = 0; begin < models.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, models.num - begin);
        const size_t end = padded<V>(n);
        const int64_t index = op.start + static_cast<int64_t>(begin);
        widen<V>(models.base, begin, n, base);
        for (size_t i = 0; i < models.num_models; ++i) {
            float* d = op.workspace + i * kBlockElements;
            // Ties are kept before the cutoff: key >= threshold there, written as key > threshold - 1.
            const int32_t threshold = op.thresholds[i];
            const typename V::I before = V::set(threshold == INT32_MIN ? threshold : threshold - 1);
            const typename V::I after = V::set(threshold);
            size_t split = 0;
            if (op.cutoffs[i] > index) split = smaller(end, static_cast<size_t>(op.cutoffs[i] - index));
            const size_t whole = split / V::kLanes * V::kLanes;
            widen<V>(models.inputs[i], begin, n, x);
            trim<V>(x, base, 0, whole, before, op.weights[i], d);
            if (whole < split) {
                const typename V::I limit = V::select(V::first(split - whole), before, after);
                trim<V>(x, base, whole, whole + V::kLanes, limit, op.weights[i], d);
            }
            trim<V>(x, base, padded<V>(split), end, after, op.weights[i], d);
        }
        for (size_t j = 0; j < end; j += V::kLanes) {
            typename V::F num = elect<V, kNormalize>(op.workspace + j, op.weights, models.num_models);
            if (rescale) num = V::mul(num, scale);
            V::put(x + j, V::add(V::get(base + j), num));
        }
        nonfinite += narrow<V>(x, begin, n, op.out);
    }
    return nonfinite;
}

template <class V>
uint64_t disjoint_merge(const DisjointMerge& op) {
    return op.normalize ? disjoint_merge_blocks<V, true>(op) : disjoint_merge_blocks<V, false>(op);
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

template <class V>
constexpr OpTable op_table(const char* name) {
    return OpTable{name,
                   axpy_n<V>,
                   magnitude_sample<V>,
                   bracket_count<V>,
                   magnitude_histogram<V>,
                   locate_equal<V>,
                   disjoint_merge<V>,
                   convert<V>,
                   count_nonfinite<V>};
}

}  // namespace
}  // namespace pymerge

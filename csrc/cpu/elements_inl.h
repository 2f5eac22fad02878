// Blocks of elements for the ops: widened to float32 in L1, mapped, narrowed; see ops_inl.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "op_table.h"
#include "pymerge/arithmetic.h"

namespace pymerge {
namespace {

// Below every key: fills the lanes behind the last element wherever keys are counted.
constexpr int32_t kNoKey = INT32_MIN;

constexpr size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

template <class V>
constexpr size_t padded(size_t n) {
    return (n + V::kLanes - 1) / V::kLanes * V::kLanes;
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
    for (size_t j = 0; j < whole; j += V::kLanes) visit(j, key_of_result<V>(V::sub(V::get(x + j), V::get(base + j))));
    if (whole < n) {
        const typename V::I keys = key_of_result<V>(V::sub(V::get(x + whole), V::get(base + whole)));
        visit(whole, V::select(V::first(n - whole), keys, V::set(kNoKey)));
    }
}

// A whole vector of float32, or as many of its lanes as there are, the others 0.
template <class V>
typename V::F load_up_to(const float* p, size_t n) {
    return n >= V::kLanes ? V::load(Tag<Format::F32>{}, p) : V::load_first(p, n);
}

// delta(i) of one vector of a block, from the widened models.
template <class V>
struct Deltas {
    const float* x;
    typename V::F base;

    PM_INLINE typename V::F operator()(size_t i) const { return V::sub(V::get(x + i * kBlockElements), base); }
};

// Widens the base, if there is one, and every model into the workspace.
template <class V>
void widen_all(const Models& models, size_t begin, size_t n, float* base) {
    if (models.base.data) widen<V>(models.base, begin, n, base);
    for (size_t i = 0; i < models.num_models; ++i) {
        widen<V>(models.inputs[i], begin, n, models.workspace + i * kBlockElements);
    }
}

// Calls visit(begin, n, base) for each block, with all models in the workspace.
template <class V, class Visit>
void for_each_block(const Models& models, Visit visit) {
    alignas(64) float base[kBlockElements] = {};
    for (size_t begin = 0; begin < models.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, models.num - begin);
        widen_all<V>(models, begin, n, base);
        visit(begin, n, static_cast<const float*>(base));
    }
}

// out = map(base, deltas), a vector at a time.
template <class V, class Map>
uint64_t map_elements(const Models& models, const Output& out, Map map) {
    alignas(64) float result[kBlockElements];
    uint64_t nonfinite = 0;
    for_each_block<V>(models, [&](size_t begin, size_t n, const float* base) {
        for (size_t j = 0; j < n; j += V::kLanes) {
            const typename V::F b = V::get(base + j);
            V::put(result + j, map(b, Deltas<V>{models.workspace + j, b}));
        }
        nonfinite += narrow<V>(result, begin, n, out);
    });
    return nonfinite;
}

// dst[e] = table[(begin + e) / columns] for a block.
template <class V>
void fill_by_row(const float* table, size_t columns, size_t begin, size_t n, float* dst) {
    size_t row = begin / columns;
    size_t left = columns - begin % columns;
    for (size_t e = 0; e < n; left = columns) {
        const size_t end = e + smaller(left, n - e);
        const float value = table[row++];
        for (; e < end; ++e) dst[e] = value;
    }
    for (size_t e = n; e < padded<V>(n); ++e) dst[e] = 0.0f;
}

// dst[e] = table[(begin + e) % columns] for a block.
template <class V>
void fill_by_column(const float* table, size_t columns, size_t begin, size_t n, float* dst) {
    size_t column = begin % columns;
    for (size_t e = 0; e < n; column = 0) {
        const size_t length = smaller(columns - column, n - e);
        memcpy(dst + e, table + column, length * sizeof(float));
        e += length;
    }
    for (size_t e = n; e < padded<V>(n); ++e) dst[e] = 0.0f;
}

// A bit per element of a block, element j in bit j % 8 of byte j / 8.
template <class V>
PM_INLINE void put_bits(uint8_t* bits, size_t j, typename V::M mask) {
    const uint32_t lanes = V::to_bits(mask);
    if (V::kLanes == 16) {
        bits[j / 8] = static_cast<uint8_t>(lanes);
        bits[j / 8 + 1] = static_cast<uint8_t>(lanes >> 8);
    } else if (V::kLanes == 8) {
        bits[j / 8] = static_cast<uint8_t>(lanes);
    } else {
        const uint32_t before = j % 8 ? bits[j / 8] & ((1u << j % 8) - 1) : 0;
        bits[j / 8] = static_cast<uint8_t>(before | lanes << j % 8);
    }
}

template <class V>
PM_INLINE typename V::M get_bits(const uint8_t* bits, size_t j) {
    if (V::kLanes == 16) return V::from_bits(bits[j / 8] | static_cast<uint32_t>(bits[j / 8 + 1]) << 8);
    if (V::kLanes == 8) return V::from_bits(bits[j / 8]);
    return V::from_bits(bits[j / 8] >> j % 8 & 1u);
}

// The draws of elements index to index + n, from dst[result] on: word e % 4 of counter e / 4. dst holds
// kDrawsCapacity words.
constexpr size_t kDrawsCapacity = kBlockElements + 64;

template <class V>
size_t fill_draws(uint64_t index, size_t n, uint64_t seed, int32_t* dst) {
    constexpr size_t step = V::kWideLanes * 4;
    const size_t skipped = index % 4;
    typename V::W quarter = V::add_wide(V::wide_lanes(), V::set_wide(index / 4));
    for (size_t e = 0; e < skipped + n; e += step) {
        typename V::W words[4];
        philox<V>(quarter, seed, words);
        V::put_words(dst + e, words);
        quarter = V::add_wide(quarter, V::set_wide(V::kWideLanes));
    }
    return skipped;
}

}  // namespace
}  // namespace pymerge

// The policy of one lane in portable C++: what processors without vectors run, what a GPU's thread runs, and
// the check of the vector policies. Internal linkage throughout, see arithmetic.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "pymerge/arithmetic.h"
#include "pymerge/format.h"

namespace pymerge {
namespace {

template <class T>
PM_INLINE T load_as(const void* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}

PM_INLINE float as_float(uint32_t bits) { return load_as<float>(&bits); }
PM_INLINE uint32_t as_bits(float x) { return load_as<uint32_t>(&x); }

PM_INLINE float f16_to_f32(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 0x1f;
    const uint32_t mantissa = half & 0x3ffu;
    if (exponent == 0x1f) return as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    // Subnormal: an exact multiple of 2**-24.
    return as_float(as_bits(static_cast<float>(mantissa) * 0x1p-24f) | sign);
}

// Rounds to nearest even; NaN must already be the positive quiet one.
PM_INLINE uint16_t f32_to_f16(float x) {
    const uint32_t sign = (as_bits(x) >> 16) & 0x8000u;
    const uint32_t magnitude = as_bits(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7e00;
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Below the smallest normal half: adding 0.5 leaves the multiple of 2**-24 in the low bits, rounded by the FPU.
        return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u));
    }
    const uint32_t odd = (magnitude >> 13) & 1;
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

PM_INLINE uint16_t f32_to_bf16(float x) {
    const uint32_t bits = as_bits(x);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// An 8-bit float's exponent and mantissa, moved to where float32 has them, are its magnitude but for the
// difference of the exponent biases, which a power of two makes good exactly, for subnormals too.
PM_INLINE float e4m3_to_f32(uint8_t code) {
    const uint32_t sign = (code & 0x80u) << 24;
    const uint32_t magnitude = code & 0x7fu;
    if (magnitude == 0x7f) return as_float(sign | 0x7fc00000u);
    return as_float(as_bits(as_float(magnitude << 20) * 0x1p120f) | sign);
}

PM_INLINE float e5m2_to_f32(uint8_t code) {
    const uint32_t sign = (code & 0x80u) << 24;
    const uint32_t magnitude = code & 0x7fu;
    if (magnitude >= 0x7c) return as_float(sign | (magnitude == 0x7c ? 0x7f800000u : 0x7fc00000u));
    return as_float(as_bits(as_float(magnitude << 21) * 0x1p112f) | sign);
}

struct Scalar {
    static constexpr size_t kLanes = 1;
    using F = float;
    using I = int32_t;
    using M = bool;
    // As many 64-bit integers as a register holds, and float64 numbers.
    static constexpr size_t kWideLanes = 1;
    using W = uint64_t;
    using D = double;

    PM_INLINE static F get(const float* p) { return *p; }
    PM_INLINE static I get(const int32_t* p) { return *p; }
    PM_INLINE static void put(float* p, F x) { *p = x; }
    PM_INLINE static void put(int32_t* p, I x) { *p = x; }

    PM_INLINE static F load(Tag<Format::F64>, const void* p) { return static_cast<float>(load_as<double>(p)); }
    PM_INLINE static F load(Tag<Format::F32>, const void* p) { return load_as<float>(p); }
    PM_INLINE static F load(Tag<Format::F16>, const void* p) { return f16_to_f32(load_as<uint16_t>(p)); }
    PM_INLINE static F load(Tag<Format::BF16>, const void* p) {
        return as_float(static_cast<uint32_t>(load_as<uint16_t>(p)) << 16);
    }
    PM_INLINE static F load(Tag<Format::F8_E4M3>, const void* p) { return e4m3_to_f32(load_as<uint8_t>(p)); }
    PM_INLINE static F load(Tag<Format::F8_E5M2>, const void* p) { return e5m2_to_f32(load_as<uint8_t>(p)); }

    PM_INLINE static void store(Tag<Format::F64>, void* p, F x) {
        const double wide = x;
        memcpy(p, &wide, sizeof wide);
    }
    PM_INLINE static void store(Tag<Format::F32>, void* p, F x) { memcpy(p, &x, sizeof x); }
    PM_INLINE static void store(Tag<Format::F16>, void* p, F x) {
        const uint16_t rounded = f32_to_f16(x);
        memcpy(p, &rounded, sizeof rounded);
    }
    PM_INLINE static void store(Tag<Format::BF16>, void* p, F x) {
        const uint16_t rounded = f32_to_bf16(x);
        memcpy(p, &rounded, sizeof rounded);
    }

    PM_INLINE static F set(float x) { return x; }
    PM_INLINE static I set(int32_t x) { return x; }
    PM_INLINE static I lanes() { return 0; }
    PM_INLINE static I bits(F x) { return load_as<int32_t>(&x); }
    PM_INLINE static F floats(I x) { return load_as<float>(&x); }

#ifdef __CUDA_ARCH__
    // By intrinsics, which no compiler flag contracts or approximates.
    PM_INLINE static F add(F a, F b) { return __fadd_rn(a, b); }
    PM_INLINE static F sub(F a, F b) { return __fsub_rn(a, b); }
    PM_INLINE static F mul(F a, F b) { return __fmul_rn(a, b); }
    PM_INLINE static F div(F a, F b) { return __fdiv_rn(a, b); }
    PM_INLINE static F sqrt(F a) { return __fsqrt_rn(a); }
#else
    PM_INLINE static F add(F a, F b) { return a + b; }
    PM_INLINE static F sub(F a, F b) { return a - b; }
    PM_INLINE static F mul(F a, F b) { return a * b; }
    PM_INLINE static F div(F a, F b) { return a / b; }
    PM_INLINE static F sqrt(F a) { return __builtin_sqrtf(a); }
#endif
    PM_INLINE static I add(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
    PM_INLINE static I sub(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
    PM_INLINE static I bit_and(I a, I b) { return a & b; }
    PM_INLINE static I bit_or(I a, I b) { return a | b; }
    PM_INLINE static I bit_xor(I a, I b) { return a ^ b; }
    PM_INLINE static I min(I a, I b) { return a < b ? a : b; }
    PM_INLINE static I shift_right(I a, int32_t n) { return static_cast<I>(static_cast<uint32_t>(a) >> n); }
    PM_INLINE static I shift_left(I a, int32_t n) { return static_cast<I>(static_cast<uint32_t>(a) << n); }
    PM_INLINE static I halve(I a) { return a >> 1; }
    PM_INLINE static I to_int(F x) { return static_cast<I>(x); }
    PM_INLINE static F to_float(I x) { return static_cast<F>(x); }

    PM_INLINE static M greater(I a, I b) { return a > b; }
    PM_INLINE static M equal(I a, I b) { return a == b; }
    PM_INLINE static M below_unsigned(I a, I b) { return static_cast<uint32_t>(a) < static_cast<uint32_t>(b); }
    PM_INLINE static M above(F a, F b) { return a > b; }
    PM_INLINE static M at_least(F a, F b) { return a >= b; }
    PM_INLINE static M same(F a, F b) { return a == b; }
    PM_INLINE static M is_nan(F a) { return a != a; }
    PM_INLINE static M both(M a, M b) { return a & b; }
    PM_INLINE static M either(M a, M b) { return a | b; }
    PM_INLINE static M negate(M a) { return !a; }
    PM_INLINE static M first(size_t n) { return n > 0; }

    // By masks: signs and kept elements are as good as random, and branches on them would be mispredicted.
    PM_INLINE static I select(M m, I yes, I no) { return no ^ ((yes ^ no) & -static_cast<I>(m)); }
    PM_INLINE static F select(M m, F yes, F no) { return floats(select(m, bits(yes), bits(no))); }
    PM_INLINE static F zero_unless(M m, F x) { return floats(bits(x) & -static_cast<I>(m)); }
    // For sums that start at +0 and so are never -0: adding +0 changes nothing.
    PM_INLINE static F add_where(M m, F acc, F x) { return add(acc, zero_unless(m, x)); }
    PM_INLINE static I count(I acc, M m) { return acc + m; }
    PM_INLINE static uint64_t sum(I counts) { return static_cast<uint64_t>(counts); }
    PM_INLINE static size_t compress(int32_t* dst, M m, I x) {
        *dst = x;
        return m;
    }

    PM_INLINE static W set_wide(uint64_t x) { return x; }
    PM_INLINE static W wide_lanes() { return 0; }
    PM_INLINE static W add_wide(W a, W b) { return a + b; }
    PM_INLINE static W xor_wide(W a, W b) { return a ^ b; }
    PM_INLINE static W high_half(W a) { return a >> 32; }
    PM_INLINE static W multiply_low_halves(W a, W b) {
        return static_cast<uint64_t>(static_cast<uint32_t>(a)) * static_cast<uint32_t>(b);
    }
    PM_INLINE static void put_words(int32_t* dst, const W words[4]) {
        for (int k = 0; k < 4; ++k) dst[k] = static_cast<int32_t>(static_cast<uint32_t>(words[k]));
    }

    PM_INLINE static F load_first(const float*, size_t) { return 0.0f; }
    PM_INLINE static I load_ints(const int32_t* p) { return *p; }
    PM_INLINE static void store_ints(int32_t* p, I x) { *p = x; }
    PM_INLINE static I gather(const int32_t* table, I at) { return table[at]; }
    PM_INLINE static F gather(const float* table, I at) { return table[at]; }
    PM_INLINE static uint32_t to_bits(M m) { return m; }
    PM_INLINE static M from_bits(uint32_t bits) { return bits & 1; }

    PM_INLINE static D get_wide(const double* p) { return *p; }
    PM_INLINE static void put_wide(double* p, D x) { *p = x; }
    PM_INLINE static D to_doubles(const float* p) { return static_cast<double>(*p); }
#ifdef __CUDA_ARCH__
    PM_INLINE static D add_doubles(D a, D b) { return __dadd_rn(a, b); }
    PM_INLINE static D add_product(D acc, D a, D b) { return __fma_rn(a, b, acc); }
#else
    PM_INLINE static D add_doubles(D a, D b) { return a + b; }
    PM_INLINE static D add_product(D acc, D a, D b) { return acc + a * b; }
#endif
};

}  // namespace
}  // namespace pymerge

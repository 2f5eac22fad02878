// What the arithmetic is written in: a vector policy V, and the smallest functions over it.
//
// A policy V has kLanes and the types F (float32), I (int32) and M (lane mask), with
//   set(x), lanes() = 0, 1, ..., bits(F), floats(I)
//   add, sub, mul, div, sqrt of F; add, sub, min, bit_and, bit_or, bit_xor of I
//   shift_right (logical), shift_left, halve (I >> 1 with the sign), to_int(F) of integers, to_float(I)
//   greater, equal (I, signed), below_unsigned(I, I); above, at_least, same (F, ordered), is_nan
//   both, either, negate, first(n); select(M, yes, no), zero_unless(M, F), add_where(M, acc, F)
//   count(I, M): plus one where set; sum(I counts)
// and W, kWideLanes 64-bit integers: set_wide, wide_lanes, add_wide, xor_wide, high_half, and
// multiply_low_halves (32 x 32 -> 64).
#pragma once

#include <cstddef>
#include <cstdint>

#include "pymerge/format.h"

#if defined(__CUDACC__)
#define PM_INLINE __host__ __device__ __forceinline__
// The callables that a kernel passes in exist on the device alone, and so do all uses of what takes them.
#pragma nv_diag_suppress 20011
#pragma nv_diag_suppress 20013
#pragma nv_diag_suppress 20014
#pragma nv_diag_suppress 20015
#else
#define PM_INLINE __attribute__((always_inline)) inline
#endif

namespace pymerge {
namespace {

template <Format kFormat>
struct Tag {};

constexpr int32_t kMagnitude = 0x7fffffff;
constexpr int32_t kInfinity = 0x7f800000;
constexpr int32_t kQuietNan = 0x7fc00000;

// The smallest float32 magnitude, as bits, that rounds to infinity in a format: halfway above the largest
// finite number, which is odd, so the tie goes up.
constexpr int32_t overflow_bits(Format format) {
    return format == Format::F16 ? 0x477ff000 : format == Format::BF16 ? 0x7f7f8000 : kInfinity;
}

template <class V>
PM_INLINE typename V::I magnitude_bits(typename V::F x) {
    return V::bit_and(V::bits(x), V::set(kMagnitude));
}

template <class V>
PM_INLINE typename V::F absolute(typename V::F x) {
    return V::floats(magnitude_bits<V>(x));
}

// The magnitude of the first with the sign of the second.
template <class V>
PM_INLINE typename V::F copy_sign(typename V::F x, typename V::F sign) {
    return V::floats(V::bit_or(magnitude_bits<V>(x), V::bit_and(V::bits(sign), V::set(INT32_MIN))));
}

template <class V>
PM_INLINE typename V::F nan() {
    return V::floats(V::set(kQuietNan));
}

// low where x is below it, high where it is above; NaN stays.
template <class V>
PM_INLINE typename V::F clamp(typename V::F x, typename V::F low, typename V::F high) {
    x = V::select(V::above(low, x), low, x);
    return V::select(V::above(x, high), high, x);
}

// The key of any number, signalling NaN included.
template <class V>
PM_INLINE typename V::I key_of(typename V::F x) {
    const typename V::I bits = magnitude_bits<V>(x);
    return V::select(V::greater(bits, V::set(kInfinity)), V::set(kQuietNan), bits);
}

// The key of the result of an operation, in which a NaN is quiet.
template <class V>
PM_INLINE typename V::I key_of_result(typename V::F x) {
    return V::min(magnitude_bits<V>(x), V::set(kQuietNan));
}

// term(0) + term(1) + ..., in order.
template <class V, class Term>
PM_INLINE typename V::F total_of(size_t num_models, const Term& term) {
    typename V::F total = term(0);
    for (size_t i = 1; i < num_models; ++i) total = V::add(total, term(i));
    return total;
}

}  // namespace
}  // namespace pymerge

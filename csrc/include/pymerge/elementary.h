// exp, log and tanh in float32, step for step as pymerge/ops/reference/elementary.py: the same bits everywhere.
#pragma once

#include "pymerge/policy.h"

namespace pymerge {
namespace {

template <class V>
PM_INLINE typename V::F fma_free(typename V::F y, typename V::F x, float coefficient) {
    return V::add(V::mul(y, x), V::set(coefficient));
}

// 2**n for -126 <= n <= 127.
template <class V>
PM_INLINE typename V::F power_of_two(typename V::I n) {
    return V::floats(V::shift_left(V::add(n, V::set(int32_t{127})), 23));
}

template <class V>
PM_INLINE typename V::F exp_f32(typename V::F x) {
    const typename V::F top = V::set(88.72284f);
    const typename V::F bottom = V::set(-87.33654f);
    const typename V::F rounder = V::set(12582912.0f);
    const typename V::M valid = V::both(V::at_least(x, bottom), V::at_least(top, x));
    const typename V::F inside = V::zero_unless(valid, x);
    const typename V::F n = V::sub(V::add(V::mul(inside, V::set(1.44269504f)), rounder), rounder);
    const typename V::F r = V::sub(V::sub(inside, V::mul(n, V::set(0.693359375f))), V::mul(n, V::set(-2.12194440e-4f)));
    typename V::F y = V::set(1.9875691500e-4f);
    y = fma_free<V>(y, r, 1.3981999507e-3f);
    y = fma_free<V>(y, r, 8.3334519073e-3f);
    y = fma_free<V>(y, r, 4.1665795894e-2f);
    y = fma_free<V>(y, r, 1.6666665459e-1f);
    y = fma_free<V>(y, r, 5.0000001201e-1f);
    y = V::add(V::add(V::mul(y, V::mul(r, r)), r), V::set(1.0f));
    const typename V::I whole = V::to_int(n);
    const typename V::I half = V::halve(whole);
    y = V::mul(V::mul(y, power_of_two<V>(half)), power_of_two<V>(V::sub(whole, half)));
    y = V::select(V::above(bottom, x), V::set(0.0f), y);
    y = V::select(V::above(x, top), V::floats(V::set(kInfinity)), y);
    return V::select(V::is_nan(x), nan<V>(), y);
}

template <class V>
PM_INLINE typename V::F log_f32(typename V::F x) {
    const typename V::F infinity = V::floats(V::set(kInfinity));
    const typename V::F one = V::set(1.0f);
    const typename V::M valid = V::both(V::at_least(x, V::set(1.17549435e-38f)), V::above(infinity, x));
    const typename V::I bits = V::bits(V::select(valid, x, one));
    typename V::I exponent = V::sub(V::shift_right(bits, 23), V::set(int32_t{126}));
    typename V::F m = V::floats(V::bit_or(V::bit_and(bits, V::set(0x7fffff)), V::set(0x3f000000)));
    const typename V::M small = V::above(V::set(0.70710678f), m);
    exponent = V::select(small, V::sub(exponent, V::set(int32_t{1})), exponent);
    m = V::sub(V::select(small, V::add(m, m), m), one);
    const typename V::F e = V::to_float(exponent);
    const typename V::F z = V::mul(m, m);
    typename V::F y = V::set(7.0376836292e-2f);
    y = fma_free<V>(y, m, -1.1514610310e-1f);
    y = fma_free<V>(y, m, 1.1676998740e-1f);
    y = fma_free<V>(y, m, -1.2420140846e-1f);
    y = fma_free<V>(y, m, 1.4249322787e-1f);
    y = fma_free<V>(y, m, -1.6668057665e-1f);
    y = fma_free<V>(y, m, 2.0000714765e-1f);
    y = fma_free<V>(y, m, -2.4999993993e-1f);
    y = fma_free<V>(y, m, 3.3333331174e-1f);
    y = V::mul(V::mul(y, m), z);
    y = V::add(y, V::mul(e, V::set(-2.12194440e-4f)));
    y = V::add(y, V::mul(V::set(-0.5f), z));
    y = V::add(V::add(m, y), V::mul(e, V::set(0.693359375f)));
    return V::select(valid, y, V::select(V::same(x, infinity), x, nan<V>()));
}

template <class V>
PM_INLINE typename V::F tanh_f32(typename V::F x) {
    const typename V::F one = V::set(1.0f);
    const typename V::F size = absolute<V>(x);
    const typename V::M beyond = V::above(size, V::set(9.0f));
    const typename V::F z = V::mul(x, x);
    typename V::F near = V::set(-5.70498872745e-3f);
    near = fma_free<V>(near, z, 2.06390887954e-2f);
    near = fma_free<V>(near, z, -5.37397155531e-2f);
    near = fma_free<V>(near, z, 1.33314422036e-1f);
    near = fma_free<V>(near, z, -3.33332819422e-1f);
    near = V::add(V::mul(V::mul(near, z), x), x);
    const typename V::F t = exp_f32<V>(V::select(beyond, V::set(0.0f), V::add(size, size)));
    typename V::F far = V::sub(one, V::div(V::set(2.0f), V::add(t, one)));
    far = V::select(beyond, one, far);
    const typename V::F y = V::select(V::above(V::set(0.625f), size), near, copy_sign<V>(far, x));
    return V::select(V::is_nan(x), nan<V>(), y);
}

}  // namespace
}  // namespace pymerge

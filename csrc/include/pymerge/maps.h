// The maps of one element of the base and of every model that single methods need.
#pragma once

#include "pymerge/elementary.h"
#include "pymerge/parameters.h"

namespace pymerge {
namespace {

template <class V>
PM_INLINE typename V::F nearswap(typename V::F a, typename V::F b, float t) {
    const typename V::F one = V::set(1.0f);
    const typename V::F least = V::set(1e-6f);
    typename V::F size = absolute<V>(V::sub(b, a));
    size = V::select(V::above(least, size), least, size);
    const typename V::F w = clamp<V>(V::div(V::set(t), size), V::set(0.0f), one);
    return V::add(V::mul(w, b), V::mul(V::sub(one, w), a));
}

template <class V, class Delta>
PM_INLINE typename V::F variance(size_t num_models, const Delta& delta) {
    const typename V::F count = V::set(static_cast<float>(num_models));
    const typename V::F mean = V::div(total_of<V>(num_models, delta), count);
    const auto square = [&](size_t i) {
        const typename V::F off = V::sub(delta(i), mean);
        return V::mul(off, off);
    };
    return V::div(total_of<V>(num_models, square), count);
}

// NaN is active.
template <class V>
PM_INLINE typename V::M is_active(typename V::F delta, float epsilon) {
    return V::negate(V::at_least(V::set(epsilon), absolute<V>(delta)));
}

template <class V, class Delta>
PM_INLINE typename V::I num_active(size_t num_models, const Delta& delta, float epsilon) {
    typename V::I count = V::set(int32_t{0});
    for (size_t i = 0; i < num_models; ++i) count = V::count(count, is_active<V>(delta(i), epsilon));
    return count;
}

template <class V, class Delta>
PM_INLINE typename V::F overlap_merge(typename V::F base, size_t num_models, const Delta& delta, const float* factors,
                                      float epsilon) {
    const typename V::I count = num_active<V>(num_models, delta, epsilon);
    const typename V::M alone = V::equal(count, V::set(int32_t{1}));
    const typename V::F share = V::to_float(count);
    typename V::F num = V::set(0.0f);
    for (size_t i = 0; i < num_models; ++i) {
        const typename V::F d = delta(i);
        const typename V::F term = V::select(alone, V::mul(d, V::set(factors[i])), V::div(d, share));
        num = V::add_where(is_active<V>(d, epsilon), num, term);
    }
    return V::add(base, num);
}

template <class V, class Delta>
PM_INLINE typename V::F magmax_merge(typename V::F base, size_t num_models, const Delta& delta, float scale) {
    typename V::F best = delta(0);
    for (size_t i = 1; i < num_models; ++i) {
        const typename V::F d = delta(i);
        best = V::select(V::greater(key_of<V>(best), key_of<V>(d)), best, d);
    }
    return V::add(base, V::mul(V::set(scale), best));
}

// An infinity less itself is NaN, as a NaN is.
template <class V>
PM_INLINE typename V::M is_not_finite(typename V::F x) {
    return V::is_nan(V::sub(x, x));
}

// Whether a model uses an element, as consensus_merge and tall_masks mean it.
template <class V>
PM_INLINE typename V::M is_used(typename V::F delta, typename V::F total, float threshold) {
    return V::above(absolute<V>(delta), V::mul(V::set(threshold), absolute<V>(V::sub(total, delta))));
}

template <class V, class Delta>
PM_INLINE typename V::F consensus_merge(typename V::F base, size_t num_models, const Delta& delta,
                                        const float* thresholds, int32_t minimum, float scale) {
    const typename V::F total = total_of<V>(num_models, delta);
    typename V::I count = V::set(int32_t{0});
    for (size_t i = 0; i < num_models; ++i) count = V::count(count, is_used<V>(delta(i), total, thresholds[i]));
    const typename V::M stays = V::either(V::negate(V::greater(V::set(minimum), count)), is_not_finite<V>(total));
    return V::add(base, V::mul(V::set(scale), V::zero_unless(stays, total)));
}

// Whether a delta has the sign that elect_max elects: plus where the total is above zero, else minus.
template <class V>
PM_INLINE typename V::M agrees(typename V::F delta, typename V::F total) {
    const typename V::F zero = V::set(0.0f);
    const typename V::I flip = V::select(V::above(total, zero), V::set(int32_t{0}), V::set(INT32_MIN));
    return V::above(V::floats(V::bit_xor(V::bits(delta), flip)), zero);
}

template <class V, class Delta>
PM_INLINE typename V::F elect_max(size_t num_models, const Delta& delta) {
    const typename V::F total = total_of<V>(num_models, delta);
    typename V::F best = V::set(0.0f);
    for (size_t i = 0; i < num_models; ++i) {
        const typename V::F d = delta(i);
        const typename V::M larger = V::above(absolute<V>(d), absolute<V>(best));
        best = V::select(V::both(agrees<V>(d, total), larger), d, best);
    }
    return V::select(V::is_nan(total), nan<V>(), best);
}

template <class V>
PM_INLINE typename V::F apply_task(typename V::F base, typename V::F vector, typename V::M bit, float scale) {
    return V::add(base, V::mul(V::set(scale), V::zero_unless(bit, vector)));
}

// A step of Adam; the corrections of the bias are in the rate and the floor.
template <class V>
PM_INLINE void adam_step(const Adam& adam, typename V::F gradient, typename V::F* theta, typename V::F* first,
                         typename V::F* second) {
    *first = V::add(*first, V::mul(V::set(adam.gain1), V::sub(gradient, *first)));
    *second = V::add(V::mul(V::set(adam.decay2), *second), V::mul(V::set(adam.gain2), V::mul(gradient, gradient)));
    const typename V::F root = V::add(V::sqrt(*second), V::set(adam.floor));
    *theta = V::sub(*theta, V::div(V::mul(V::set(adam.rate), *first), root));
}

// The mean of value(0), value(1), ... by the weights that follow them, each with its floor; by the coefficients alone
// where the weights sum to zero.
template <class V, class Value>
PM_INLINE typename V::F weighted_mean(size_t num_models, const Value& value, const float* coefficients,
                                      const float* floors, bool adds_floor) {
    typename V::F num = V::set(0.0f);
    typename V::F den = V::set(0.0f);
    typename V::F plain_num = V::set(0.0f);
    typename V::F plain_den = V::set(0.0f);
    for (size_t i = 0; i < num_models; ++i) {
        const typename V::F x = value(i);
        const typename V::F c = V::set(coefficients[i]);
        const typename V::F floor = V::set(floors[i]);
        typename V::F weight = value(num_models + i);
        weight = adds_floor ? V::add(weight, floor) : V::select(V::above(floor, weight), floor, weight);
        weight = V::mul(c, weight);
        num = i ? V::add(num, V::mul(weight, x)) : V::mul(weight, x);
        den = i ? V::add(den, weight) : weight;
        plain_num = i ? V::add(plain_num, V::mul(c, x)) : V::mul(c, x);
        plain_den = i ? V::add(plain_den, c) : c;
    }
    const typename V::M none = V::same(den, V::set(0.0f));
    return V::div(V::select(none, plain_num, num), V::select(none, plain_den, den));
}

// (x - low) / (high - low), or x * 0 where they are equal.
template <class V>
PM_INLINE typename V::F share_of_range(typename V::F x, float low, float high) {
    const float width = high - low;
    return width != 0.0f ? V::div(V::sub(x, V::set(low)), V::set(width)) : V::mul(x, V::set(0.0f));
}

template <class V>
PM_INLINE typename V::F signed_or_zero(typename V::F size, typename V::F delta) {
    return V::select(V::same(delta, V::set(0.0f)), V::set(0.0f), copy_sign<V>(size, delta));
}

// |delta| clipped to the range of model i, without a sign.
template <class V>
PM_INLINE typename V::F pcb_clipped(const Pcb& pcb, size_t i, typename V::F delta) {
    return clamp<V>(absolute<V>(delta), V::set(pcb.lows[i]), V::set(pcb.highs[i]));
}

template <class V>
PM_INLINE typename V::F pcb_normal(const Pcb& pcb, size_t i, typename V::F delta) {
    return share_of_range<V>(pcb_clipped<V>(pcb, i, delta), pcb.lows[i], pcb.highs[i]);
}

template <class V>
PM_INLINE typename V::F pcb_signed(const Pcb& pcb, size_t i, typename V::F delta) {
    return signed_or_zero<V>(pcb_normal<V>(pcb, i, delta), delta);
}

// The sum over the models that pcb_score needs; not used in mode pairwise.
template <class V, class Delta>
PM_INLINE typename V::F pcb_total(const Pcb& pcb, const Delta& delta) {
    if (pcb.mode == PcbMode::Raw) return total_of<V>(pcb.num_models, delta);
    return total_of<V>(pcb.num_models, [&](size_t i) { return pcb_signed<V>(pcb, i, delta(i)); });
}

template <class V, class Delta>
PM_INLINE typename V::F pcb_score(const Pcb& pcb, const Delta& delta, size_t i, typename V::F total) {
    const typename V::F d = delta(i);
    const typename V::F normal = pcb_normal<V>(pcb, i, d);
    typename V::F inter;
    if (pcb.mode == PcbMode::Pairwise) {
        const typename V::F own = signed_or_zero<V>(normal, d);
        inter = tanh_f32<V>(V::mul(own, pcb_signed<V>(pcb, 0, delta(0))));
        for (size_t j = 1; j < pcb.num_models; ++j) {
            inter = V::add(inter, tanh_f32<V>(V::mul(own, pcb_signed<V>(pcb, j, delta(j)))));
        }
    } else {
        inter = tanh_f32<V>(V::mul(d, total));
    }
    const typename V::F count = V::set(static_cast<float>(pcb.num_models));
    return V::mul(exp_f32<V>(V::mul(count, V::mul(normal, normal))), inter);
}

// max(part * score, 0), NaN and -0 as they are.
template <class V>
PM_INLINE typename V::F pcb_part(typename V::F score, float part) {
    const typename V::F scaled = V::mul(V::set(part), score);
    return V::select(V::above(V::set(0.0f), scaled), V::set(0.0f), scaled);
}

template <class V, class Delta>
PM_INLINE typename V::F pcb_merge(const Pcb& pcb, typename V::F base, const Delta& delta, const float* cuts,
                                  const float* tops, const float* weights, float scale) {
    const typename V::F least = V::set(1e-12f);
    typename V::F total = V::set(0.0f);
    if (pcb.mode != PcbMode::Pairwise) total = pcb_total<V>(pcb, delta);
    typename V::F num = total;
    typename V::F den = total;
    for (size_t i = 0; i < pcb.num_models; ++i) {
        const typename V::F d = delta(i);
        const typename V::F score = pcb_score<V>(pcb, delta, i, total);
        const typename V::F limited = clamp<V>(score, V::set(cuts[i]), V::set(tops[i]));
        const typename V::F share = share_of_range<V>(limited, cuts[i], tops[i]);
        const typename V::F clipped = signed_or_zero<V>(pcb_clipped<V>(pcb, i, d), d);
        const typename V::F term = V::mul(V::set(weights[i]), V::mul(share, clipped));
        num = i ? V::add(num, term) : term;
        den = i ? V::add(den, share) : share;
    }
    den = V::select(V::above(least, den), least, den);
    return V::add(base, V::mul(V::set(scale), V::div(num, den)));
}

}  // namespace
}  // namespace pymerge

// The arithmetic of every op on one element (or one vector of them), the same for every backend: C++ for each
// instruction set and CUDA compile these lines, so their bytes agree.
//
// Everything has internal linkage and no std template is used: the linker merges inline functions of the
// same name, and a copy compiled for AVX-512 must never end up in code that runs elsewhere. Nothing may be
// contracted (-ffp-contract=off, --fmad=false).
//
// policy.h says what a policy V has. Values of the models come as x(i) or delta(i), callables that return F.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pymerge/elementary.h"
#include "pymerge/maps.h"
#include "pymerge/parameters.h"
#include "pymerge/policy.h"

namespace pymerge {
namespace {

// ---- Random draws: Philox4x32-10

// Four words of each counter (low 32 bits of `quarter`, high 32 bits, 0, 0), in the low halves of `words`; what
// is in the high halves means nothing. No word is ever cut to 32 bits: only low halves are multiplied.
template <class V>
PM_INLINE void philox(typename V::W quarter, uint64_t seed, typename V::W words[4]) {
    typename V::W c0 = quarter;
    typename V::W c1 = V::high_half(quarter);
    typename V::W c2 = V::set_wide(0);
    typename V::W c3 = V::set_wide(0);
    uint32_t k0 = static_cast<uint32_t>(seed);
    uint32_t k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const typename V::W first = V::multiply_low_halves(c0, V::set_wide(0xD2511F53u));
        const typename V::W second = V::multiply_low_halves(c2, V::set_wide(0xCD9E8D57u));
        c0 = V::xor_wide(V::xor_wide(V::high_half(second), c1), V::set_wide(k0));
        c1 = second;
        c2 = V::xor_wide(V::xor_wide(V::high_half(first), c3), V::set_wide(k1));
        c3 = first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// ---- Keep

// A Keep made ready for a run of elements: cutoffs count from the run's first element.
struct LocalKeep {
    int32_t threshold;
    int32_t cutoff;
    int32_t ceiling;
    int32_t ceiling_cutoff;
    uint32_t draws;
    bool has_ceiling;
    bool has_draws;
};

PM_INLINE int32_t local_cutoff(int64_t cutoff, int64_t index, int32_t length) {
    if (cutoff <= index) return 0;
    const uint64_t before = static_cast<uint64_t>(cutoff) - static_cast<uint64_t>(index);
    return before < static_cast<uint64_t>(length) ? static_cast<int32_t>(before) : length;
}

// For `length` elements from `index` in the full tensor.
PM_INLINE LocalKeep local_keep(const Keep& keep, int64_t index, int32_t length) {
    LocalKeep local;
    local.threshold = keep.threshold < -1 ? -1 : keep.threshold;
    local.cutoff = local_cutoff(keep.cutoff, index, length);
    local.ceiling = keep.ceiling < -1 ? -1 : keep.ceiling;
    local.ceiling_cutoff = local_cutoff(keep.ceiling_cutoff, index, length);
    local.draws = static_cast<uint32_t>(keep.draws);
    local.has_ceiling = keep.ceiling < kQuietNan;
    local.has_draws = keep.draws < kAllDraws;
    return local;
}

// `place` is the element's number in the run; draw() is called only where draws decide.
template <class V, class Draw>
PM_INLINE typename V::M is_kept(const LocalKeep& keep, typename V::I key, typename V::I place, const Draw& draw) {
    // key >= limit before the cutoff, written as key > limit - 1.
    const typename V::I limit = V::count(V::set(keep.threshold - 1), V::greater(place, V::set(keep.cutoff - 1)));
    typename V::M kept = V::greater(key, limit);
    if (keep.has_ceiling) {
        const typename V::I top =
            V::count(V::set(keep.ceiling - 1), V::greater(place, V::set(keep.ceiling_cutoff - 1)));
        kept = V::both(kept, V::either(V::negate(V::greater(key, top)), V::equal(key, V::set(kQuietNan))));
    }
    if (keep.has_draws) {
        const typename V::M drawn = V::below_unsigned(draw(), V::set(static_cast<int32_t>(keep.draws)));
        kept = V::both(kept, V::either(drawn, V::equal(key, V::set(kQuietNan))));
    }
    return kept;
}

// ---- axpy_n, axpy_grid

// w_0 delta_0 + w_1 delta_1 + ...; weight(i) returns F.
template <class V, class Delta, class Weight>
PM_INLINE typename V::F weighted_sum(size_t num_models, const Delta& delta, const Weight& weight) {
    typename V::F acc = V::mul(weight(0), delta(0));
    for (size_t i = 1; i < num_models; ++i) acc = V::add(acc, V::mul(weight(i), delta(i)));
    return acc;
}

template <class V>
PM_INLINE typename V::F divided_and_scaled(typename V::F x, float divisor, float scale) {
    if (divisor != 1.0f) x = V::div(x, V::set(divisor));
    if (scale != 1.0f) x = V::mul(x, V::set(scale));
    return x;
}

// ---- disjoint_merge, count_votes

// What model i casts: the vote, or with a plain election the delta; zero where it is not kept.
template <class V, Elect kElect>
PM_INLINE typename V::F ballot_of(const Vote& vote, size_t i, typename V::F delta, typename V::M kept) {
    if (vote.factors) delta = V::mul(V::set(vote.factors[i]), delta);
    if (kElect != Elect::Plain) delta = V::mul(V::set(vote.weights[i]), delta);
    return V::zero_unless(kept, delta);
}

template <class V, Combine kCombine>
PM_INLINE void take_vote(typename V::F vote, typename V::M chosen, float weight, typename V::F* num,
                         typename V::F* den) {
    if (kCombine == Combine::Max) {
        const typename V::M larger = V::above(absolute<V>(vote), absolute<V>(*num));
        *num = V::select(V::both(chosen, larger), vote, *num);
    } else {
        *num = V::add_where(chosen, *num, vote);
    }
    if (kCombine == Combine::Mean) *den = V::add_where(chosen, *den, V::set(weight));
    if (kCombine == Combine::Count) *den = V::add_where(chosen, *den, V::set(1.0f));
}

template <class V, Combine kCombine>
PM_INLINE typename V::F shared(typename V::F num, typename V::F den) {
    if (kCombine == Combine::Sum || kCombine == Combine::Max) return num;
    return V::div(num, V::select(V::same(den, V::set(0.0f)), V::set(1.0f), den));
}

// The merged delta from ballot(i), read twice: elects a sign and combines what agrees with it.
template <class V, Elect kElect, Combine kCombine, class Ballot>
PM_INLINE typename V::F elect_and_combine(const Vote& vote, const Ballot& ballot) {
    const typename V::F zero = V::set(0.0f);
    const typename V::F total = total_of<V>(vote.num_models, ballot);
    const typename V::M plus = vote.zero_sign > 0 ? V::at_least(total, zero) : V::above(total, zero);
    // Turns "below zero" into "above zero" where minus won.
    const typename V::I flip = V::select(plus, V::set(int32_t{0}), V::set(INT32_MIN));
    typename V::F num = zero;
    typename V::F den = zero;
    for (size_t i = 0; i < vote.num_models; ++i) {
        const typename V::F cast = ballot(i);
        const typename V::M chosen = V::above(V::floats(V::bit_xor(V::bits(cast), flip)), zero);
        const typename V::F value = kElect == Elect::Plain ? V::mul(V::set(vote.weights[i]), cast) : cast;
        take_vote<V, kCombine>(value, chosen, vote.weights[i], &num, &den);
    }
    num = shared<V, kCombine>(num, den);
    if (vote.zero_sign == 0) num = V::select(V::same(total, zero), zero, num);
    return V::select(V::is_nan(total), total, num);
}

// The merged delta without an election: all that is kept is combined. ballot(i, &kept) also says what is kept.
template <class V, Combine kCombine, class Ballot>
PM_INLINE typename V::F combine_kept(const Vote& vote, const Ballot& ballot) {
    typename V::F total = V::set(0.0f);
    typename V::F num = V::set(0.0f);
    typename V::F den = V::set(0.0f);
    for (size_t i = 0; i < vote.num_models; ++i) {
        typename V::M kept;
        const typename V::F value = ballot(i, &kept);
        total = V::add(total, value);
        take_vote<V, kCombine>(value, kept, vote.weights[i], &num, &den);
    }
    return V::select(V::is_nan(total), total, shared<V, kCombine>(num, den));
}

// The output element from the merged delta.
template <class V>
PM_INLINE typename V::F merged(const Vote& vote, typename V::F base, typename V::F num) {
    num = divided_and_scaled<V>(num, vote.divisor, vote.scale);
    return vote.add_base ? V::add(base, num) : num;
}

// ---- Rows

template <class V>
PM_INLINE typename V::F row_score(typename V::F delta, typename V::F factor) {
    return V::mul(absolute<V>(delta), factor);
}

template <class V>
PM_INLINE typename V::F select_by_score(typename V::F base, typename V::F model, typename V::F factor,
                                        float threshold) {
    const typename V::F score = row_score<V>(V::sub(model, base), factor);
    return V::select(V::above(V::set(threshold), score), base, model);
}

// `factor` is the row's, or nullptr.
template <class V>
PM_INLINE typename V::F lora_add(typename V::F weight, typename V::F acc, float scale, const float* factor) {
    const typename V::F x = V::add(weight, V::mul(V::set(scale), acc));
    return factor ? V::mul(x, V::set(*factor)) : x;
}

// The larger, a NaN only where both are.
template <class V>
PM_INLINE typename V::F larger_number(typename V::F a, typename V::F b) {
    return V::select(V::either(V::above(b, a), V::is_nan(a)), b, a);
}

// p log(p / q) from exp(x - top) of the model and the base and the sums of these over the row.
template <class V>
PM_INLINE typename V::F divergence_term(typename V::F model, float model_total, typename V::F base, float base_total) {
    const typename V::F least = V::set(1e-8f);
    const typename V::F p = V::add(V::div(model, V::set(model_total)), least);
    const typename V::F q = V::add(V::div(base, V::set(base_total)), least);
    return V::mul(p, log_f32<V>(V::div(p, q)));
}

// row_sparsify: an element of this rank is kept where its draw is below the limit.
PM_INLINE int64_t draw_limit(int64_t rank, int64_t columns, int64_t draws_low, int64_t draws_span) {
    const int64_t divisor = columns > 1 ? columns - 1 : 2;
    const int64_t dividend = columns > 1 ? rank * draws_span : draws_span;
    const int64_t quotient = dividend / divisor;
    return draws_low + quotient - (dividend % divisor < 0 ? 1 : 0);
}

// The probability of a limit, by which row_sparsify rescales.
PM_INLINE float draw_share(int64_t limit) {
    return limit < static_cast<int64_t>(kAllDraws) ? static_cast<float>(limit) * 0x1p-32f : 1.0f;
}

// ---- Sums over a span

// A sum as it is stored: a NaN is the positive quiet one.
PM_INLINE double finished_sum(double sum) {
    if (sum == sum) return sum;
    const uint64_t quiet_nan = 0x7ff8000000000000u;
    memcpy(&sum, &quiet_nan, sizeof sum);
    return sum;
}

// The sum of a span from its 64 lanes, of which lane l has added elements l, l + 64, ... in order, from +0.
PM_INLINE double add_lanes(double* lanes) {
    for (size_t width = kSumLanes / 2; width > 0; width /= 2) {
        for (size_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return finished_sum(lanes[0]);
}

}  // namespace
}  // namespace pymerge

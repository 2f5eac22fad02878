// The maps of one element of the base and of every model that single methods need.
#pragma once

#include "elements_inl.h"

namespace pymerge {
namespace {

template <class V>
uint64_t nearswap(const ElementMap& op) {
    alignas(64) float base[kBlockElements];
    alignas(64) float x[kBlockElements];
    const Models& models = op.models;
    uint64_t nonfinite = 0;
    for (size_t begin = 0; begin < models.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, models.num - begin);
        widen<V>(models.base, begin, n, base);
        widen<V>(models.inputs[0], begin, n, x);
        for (size_t j = 0; j < n; j += V::kLanes) {
            V::put(x + j, nearswap<V>(V::get(base + j), V::get(x + j), op.t));
        }
        nonfinite += narrow<V>(x, begin, n, op.out);
    }
    return nonfinite;
}

template <class V>
uint64_t apply_task(const ElementMap& op) {
    alignas(64) float base[kBlockElements];
    alignas(64) float x[kBlockElements];
    uint8_t bits[kBlockElements / 8 + 1] = {};
    const Models& models = op.models;
    uint64_t nonfinite = 0;
    for (size_t begin = 0; begin < models.num; begin += kBlockElements) {
        const size_t n = smaller(kBlockElements, models.num - begin);
        widen<V>(models.base, begin, n, base);
        widen<V>(models.inputs[0], begin, n, x);
        memcpy(bits, op.mask + begin / 8, (n + 7) / 8);
        for (size_t j = 0; j < n; j += V::kLanes) {
            V::put(x + j, apply_task<V>(V::get(base + j), V::get(x + j), get_bits<V>(bits, j), op.scale));
        }
        nonfinite += narrow<V>(x, begin, n, op.out);
    }
    return nonfinite;
}

template <class V>
uint64_t variance_score(const ElementMap& op) {
    const size_t num_models = op.models.num_models;
    return map_elements<V>(op.models, op.out,
                           [&](typename V::F, const Deltas<V>& delta) { return variance<V>(num_models, delta); });
}

template <class V>
uint64_t overlap_merge(const ElementMap& op) {
    const size_t num_models = op.models.num_models;
    return map_elements<V>(op.models, op.out, [&](typename V::F base, const Deltas<V>& delta) {
        return overlap_merge<V>(base, num_models, delta, op.limits, op.epsilon);
    });
}

template <class V>
void overlap_counts(const ElementMap& op) {
    const Models& models = op.models;
    for_each_block<V>(models, [&](size_t, size_t n, const float* base) {
        for (size_t i = 0; i < models.num_models; ++i) {
            typename V::I active = V::set(int32_t{0});
            typename V::I alone = V::set(int32_t{0});
            for (size_t j = 0; j < n; j += V::kLanes) {
                const Deltas<V> delta{models.workspace + j, V::get(base + j)};
                const typename V::M own =
                    V::both(V::first(smaller(n - j, V::kLanes)), is_active<V>(delta(i), op.epsilon));
                const typename V::I count = num_active<V>(models.num_models, delta, op.epsilon);
                active = V::count(active, own);
                alone = V::count(alone, V::both(own, V::equal(count, V::set(int32_t{1}))));
            }
            op.counts[2 * i] += static_cast<int64_t>(V::sum(active));
            op.counts[2 * i + 1] += static_cast<int64_t>(V::sum(alone));
        }
    });
}

template <class V>
uint64_t magmax_merge(const ElementMap& op) {
    const size_t num_models = op.models.num_models;
    return map_elements<V>(op.models, op.out, [&](typename V::F base, const Deltas<V>& delta) {
        return magmax_merge<V>(base, num_models, delta, op.scale);
    });
}

template <class V>
uint64_t consensus_merge(const ElementMap& op) {
    const size_t num_models = op.models.num_models;
    return map_elements<V>(op.models, op.out, [&](typename V::F base, const Deltas<V>& delta) {
        return consensus_merge<V>(base, num_models, delta, op.limits, op.minimum, op.scale);
    });
}

template <class V>
uint64_t elect_max(const ElementMap& op) {
    const size_t num_models = op.models.num_models;
    return map_elements<V>(op.models, op.out,
                           [&](typename V::F, const Deltas<V>& delta) { return elect_max<V>(num_models, delta); });
}

// Packs holds(delta(i), total, i) of each model into its mask.
template <class V, class Holds>
void pack_masks(const ElementMap& op, Holds holds) {
    const Models& models = op.models;
    uint8_t bits[kBlockElements / 8];
    for_each_block<V>(models, [&](size_t begin, size_t n, const float* base) {
        for (size_t i = 0; i < models.num_models; ++i) {
            for (size_t j = 0; j < n; j += V::kLanes) {
                const Deltas<V> delta{models.workspace + j, V::get(base + j)};
                const typename V::F total = total_of<V>(models.num_models, delta);
                put_bits<V>(bits, j, V::both(V::first(smaller(n - j, V::kLanes)), holds(delta(i), total, i)));
            }
            memcpy(op.masks[i] + begin / 8, bits, (n + 7) / 8);
        }
    });
}

template <class V>
void tall_masks(const ElementMap& op) {
    pack_masks<V>(
        op, [&](typename V::F delta, typename V::F total, size_t i) { return is_used<V>(delta, total, op.limits[i]); });
}

template <class V>
void elect_masks(const ElementMap& op) {
    pack_masks<V>(op, [](typename V::F delta, typename V::F total, size_t) { return agrees<V>(delta, total); });
}

template <class V>
uint64_t pcb_score(const ElementMap& op) {
    return map_elements<V>(op.models, op.out, [&](typename V::F, const Deltas<V>& delta) {
        typename V::F total = V::set(0.0f);
        if (op.pcb.mode != PcbMode::Pairwise) total = pcb_total<V>(op.pcb, delta);
        return pcb_part<V>(pcb_score<V>(op.pcb, delta, op.index, total), op.part);
    });
}

template <class V>
uint64_t pcb_merge(const ElementMap& op) {
    return map_elements<V>(op.models, op.out, [&](typename V::F base, const Deltas<V>& delta) {
        return pcb_merge<V>(op.pcb, base, delta, op.cuts, op.tops, op.weights, op.scale);
    });
}

template <class V>
uint64_t weighted_mean(const ElementMap& op) {
    const size_t num_models = op.models.num_models / 2;
    return map_elements<V>(op.models, op.out, [&](typename V::F, const Deltas<V>& value) {
        return weighted_mean<V>(num_models, value, op.weights, op.floors, op.adds_floor);
    });
}

// Stores the first n lanes, a NaN as the positive quiet one.
template <class V>
PM_INLINE void store_up_to(float* p, size_t n, typename V::F x) {
    x = V::select(V::is_nan(x), nan<V>(), x);
    if (n >= V::kLanes) return V::store(Tag<Format::F32>{}, p, x);
    alignas(64) float rest[V::kLanes];
    V::put(rest, x);
    memcpy(p, rest, n * sizeof(float));
}

template <class V>
uint64_t adam_step(const AdamStep& op) {
    uint64_t nonfinite = 0;
    for (size_t begin = 0; begin < op.num; begin += kBlockElements) {
        const size_t end = begin + smaller(kBlockElements, op.num - begin);
        typename V::I counts = V::set(int32_t{0});
        for (size_t j = begin; j < end; j += V::kLanes) {
            const size_t n = end - j;
            typename V::F theta = load_up_to<V>(op.theta + j, n);
            typename V::F first = load_up_to<V>(op.first + j, n);
            typename V::F second = load_up_to<V>(op.second + j, n);
            adam_step<V>(op.adam, load_up_to<V>(op.gradient + j, n), &theta, &first, &second);
            store_up_to<V>(op.theta + j, n, theta);
            store_up_to<V>(op.first + j, n, first);
            store_up_to<V>(op.second + j, n, second);
            counts = V::count(counts, V::both(V::first(smaller(n, V::kLanes)), is_not_finite<V>(theta)));
        }
        nonfinite += V::sum(counts);
    }
    return nonfinite;
}

}  // namespace
}  // namespace pymerge

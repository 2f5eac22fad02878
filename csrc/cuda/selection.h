// The keys of a chunk, for kernels that count them.
#pragma once

#include "map.h"

namespace pymerge {
namespace cuda {
namespace {

PM_DEVICE Lanes::I keys_of(const Scene<AnyReader>& scene, size_t i, const Lanes::F& base) {
    // Lanes behind the end have a key below every other.
    return Lanes::select(scene.there(), key_of<Lanes>(scene.delta(i, base)), Lanes::set(INT32_MIN));
}

}  // namespace
}  // namespace cuda
}  // namespace pymerge

// What ops take beside memory, alike on every backend: plain structs, no pointers to elements.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pymerge {

// A draw is 32 random bits; as many of them as there are.
constexpr uint64_t kAllDraws = uint64_t{1} << 32;
// The 64 float64 lanes of a sum over a span, see add_lanes in arithmetic.h.
constexpr size_t kSumLanes = 64;

// What is kept of one model, by key and by index in the full tensor: pymerge/ops/selection.py.
struct Keep {
    int32_t threshold = -1;
    int32_t ceiling = INT32_MAX;
    int64_t cutoff = 0;
    int64_t ceiling_cutoff = 0;
    uint64_t draws = kAllDraws;
    uint64_t seed = 0;
};

enum class Elect : int32_t { None = 0, Weighted, Plain };
enum class Combine : int32_t { Mean = 0, Count, Sum, Max };
enum class PcbMode : int32_t { Raw = 0, Normalized, Pairwise };

// disjoint_merge and count_votes, once the elements to keep are known.
struct Vote {
    const float* weights = nullptr;
    const float* factors = nullptr;  // nullptr: none
    size_t num_models = 0;
    int32_t zero_sign = 1;
    float divisor = 1.0f;
    float scale = 1.0f;
    bool add_base = true;
};

// The numbers of a step of Adam, see maps.h.
struct Adam {
    float gain1 = 0.0f;   // 1 - beta1
    float decay2 = 0.0f;  // beta2
    float gain2 = 0.0f;   // 1 - beta2
    float rate = 0.0f;
    float floor = 0.0f;
};

struct Pcb {
    const float* lows = nullptr;
    const float* highs = nullptr;
    size_t num_models = 0;
    PcbMode mode = PcbMode::Raw;
};

}  // namespace pymerge

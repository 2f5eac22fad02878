// The ops on device memory. pymerge/ops/table.py says what each computes, pymerge/ops/cuda.py has checked the
// arguments. Every call runs on the current place of runtime.h, and has finished there when it returns; what
// fails throws Failure. Nothing here knows CUDA or pybind11.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "pymerge/parameters.h"
#include "runtime.h"

namespace pymerge {
namespace cuda {

struct View {
    uint64_t address = 0;
    int32_t format = 0;
    int64_t num = 0;
};

struct Models {
    std::optional<View> base;
    std::vector<View> views;
    int64_t num = 0;
};

// A float32 array in host memory.
struct HostFloats {
    const float* data = nullptr;
    size_t num = 0;
};

struct Disjoint {
    Models models;
    std::optional<View> score;
    std::vector<float> weights;
    std::vector<Keep> keeps;
    std::vector<float> factors;  // empty: none
    int64_t start = 0;
    Elect elect = Elect::Weighted;
    Combine combine = Combine::Mean;
    int32_t zero_sign = 1;
    float divisor = 1.0f;
    float scale = 1.0f;
    bool deltas = false;
};

struct PcbRanges {
    std::vector<float> lows;
    std::vector<float> highs;
    PcbMode mode = PcbMode::Raw;
};

// maps.cu: these return how many elements of the output are not finite.
uint64_t axpy_n(const View& out, const Models& models, const std::vector<float>& weights, float divisor, float scale,
                bool add_base);
uint64_t axpy_grid(const View& out, const Models& models, const HostFloats& weights, int64_t columns, bool along_rows);
uint64_t convert(const View& out, const View& input);
uint64_t count_nonfinite(const View& input);
uint64_t row_scores(const View& out, const Models& models, const HostFloats& factors, int64_t columns);
uint64_t select_by_score(const View& out, const Models& models, const HostFloats& factors, float threshold,
                         int64_t columns);
uint64_t lora_add(const View& out, const View& weight, const HostFloats& left, const HostFloats& right, int64_t start,
                  int64_t columns, int64_t rank, float scale, const HostFloats& factors);

// disjoint.cu
uint64_t disjoint_merge(const View& out, const Disjoint& op);
std::pair<uint64_t, uint64_t> count_votes(const Disjoint& op);

// methods.cu
uint64_t nearswap(const View& out, const Models& models, float t);
uint64_t variance_score(const View& out, const Models& models);
std::vector<int64_t> overlap_counts(const Models& models, float epsilon);
uint64_t overlap_merge(const View& out, const Models& models, const std::vector<float>& factors, float epsilon);
uint64_t magmax_merge(const View& out, const Models& models, float scale);
uint64_t consensus_merge(const View& out, const Models& models, const std::vector<float>& thresholds, int32_t minimum,
                         float scale);
void tall_masks(const std::vector<uint64_t>& masks, const Models& models, const std::vector<float>& thresholds);
uint64_t elect_max(const View& out, const Models& models);
void elect_masks(const std::vector<uint64_t>& masks, const Models& models);
uint64_t apply_task(const View& out, const Models& models, uint64_t mask, float scale);
uint64_t pcb_score(const View& out, const Models& models, size_t index, const PcbRanges& ranges, int32_t part);
uint64_t pcb_merge(const View& out, const Models& models, const PcbRanges& ranges, const std::vector<float>& cuts,
                   const std::vector<float>& tops, const std::vector<float>& weights, float scale);
uint64_t adam_step(const View& theta, const View& first, const View& second, const View& gradient, const Adam& adam);
// The second half of the models are the weights of the first.
uint64_t weighted_mean(const View& out, const Models& models, const std::vector<float>& coefficients,
                       const std::vector<float>& floors, bool adds_floor);

// selection.cu
void magnitude_sample(const Models& models, int64_t start, int64_t group, int64_t stride, int64_t num_sampled,
                      int32_t* keys);
void bracket_count(const Models& models, const std::vector<int32_t>& low, const std::vector<int32_t>& high,
                   int64_t capacity, int64_t* counts, std::vector<std::vector<int32_t>>* candidates);
void magnitude_histogram(const Models& models, int32_t shift, const std::vector<int32_t>* prefix, int32_t prefix_shift,
                         uint64_t* counts, int64_t num_bins);
std::pair<int64_t, uint64_t> locate_equal(const Models& models, int32_t key, uint64_t nth);

// sums.cu: span sums are float64 arrays in host memory.
void kept_sums(const Disjoint& op, int64_t span, double* sums);
void gram_n(const Models& models, int64_t span, double* sums);
void gram_columns(const Models& models, int64_t columns, double* sums);
void masked_sums(const View& vector, const std::vector<uint64_t>& masks, int64_t span, double* sums);

// rows.cu
uint64_t row_sparsify(const View& out, const Models& models, int64_t start, int64_t columns, int64_t first,
                      int64_t last, int64_t draws_low, int64_t draws_span, uint64_t seed, bool rescale);
void row_divergence(const Models& models, int64_t columns, float* divergences);

}  // namespace cuda
}  // namespace pymerge

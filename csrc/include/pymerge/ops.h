// The merge ops on raw memory, framework-free. pymerge/ops/table.py describes each op for users,
// pymerge/ops/reference states it in numpy, arithmetic.h has the arithmetic of an element.
//
// Shared definitions. value(x) is the float32 of an element; delta = value(x) - value(base), or value(x) without
// a base; the key of a delta is min(bits(|delta|), 0x7fc00000) as int32, so that keys order like magnitudes with
// NaN on top. Element memory may be misaligned. Outputs never overlap inputs. Every result is the same bit
// pattern on every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pymerge/format.h"
#include "pymerge/parameters.h"

namespace pymerge {

// Elements an op works on at a time.
constexpr size_t kBlockElements = 512;
// Floats of workspace for each model: a block, and a bit for each of its elements.
constexpr size_t kWorkspaceFloats = kBlockElements + kBlockElements / 32;
// Rows that gram_columns takes at a time; its workspace is that many times larger.
constexpr size_t kGramRows = 4;

struct Input {
    const void* data = nullptr;
    Format format = Format::F32;
};

struct Output {
    void* data = nullptr;
    Format format = Format::F32;
};

// The models of one tensor. Without a base (data == nullptr) the elements themselves are the deltas.
struct Models {
    Input base;
    const Input* inputs = nullptr;
    size_t num_models = 0;
    size_t num = 0;
    // num_models * kWorkspaceFloats, aligned to 64 bytes, for ops that look at all models at once.
    float* workspace = nullptr;
};

struct AxpyN {
    Models models;
    const float* weights = nullptr;
    float divisor = 1.0f;
    float scale = 1.0f;
    bool add_base = true;
    Output out;
};

struct AxpyGrid {
    Models models;
    const float* weights = nullptr;  // [num_models, num_rows], or [num_models, columns]
    size_t columns = 1;
    bool along_rows = true;
    Output out;
};

struct MagnitudeSample {
    Models models;
    uint64_t start = 0;  // index in the full tensor of the first element
    uint64_t group = 1;
    uint64_t stride = 1;
    int32_t* keys = nullptr;  // [num_models, num_sampled]
    size_t num_sampled = 0;   // num_sampled(start, num, group, stride)
};

struct BracketCount {
    Models models;
    const int32_t* low = nullptr;
    const int32_t* high = nullptr;
    int64_t* counts = nullptr;      // [num_models, 4], zero at entry: above, at high, at low, between
    int32_t* candidates = nullptr;  // [num_models, capacity]
    size_t capacity = 0;
};

struct MagnitudeHistogram {
    Models models;
    int32_t shift = 0;
    const int32_t* prefix = nullptr;  // [num_models], or nullptr for all keys
    int32_t prefix_shift = 31;
    uint64_t* counts = nullptr;  // [num_models, num_bins], added to
    size_t num_bins = 0;         // a power of two
};

struct LocateEqual {
    Input base;
    Input model;
    size_t num = 0;
    int32_t key = 0;
    uint64_t nth = 0;
};

struct Location {
    int64_t index = -1;
    uint64_t count = 0;
};

struct DisjointMerge {
    Models models;
    bool deltas = false;  // the models are deltas already; the base is only added
    Input score;          // whose keys decide what is kept, or no data: those of the deltas
    const Keep* keeps = nullptr;
    int64_t start = 0;
    Elect elect = Elect::Weighted;
    Combine combine = Combine::Mean;
    Vote vote;
    Output out;
};

struct CountVotes {
    Models models;
    const Keep* keeps = nullptr;
    int64_t start = 0;
    Elect elect = Elect::Weighted;
    Vote vote;
    uint64_t* counts = nullptr;  // totals above zero, totals below zero
};

struct KeptSums {
    Models models;
    Input score;
    const Keep* keeps = nullptr;
    int64_t start = 0;
    size_t span = 1;
    double* sums = nullptr;   // [num_spans, num_models, 3]
    double* lanes = nullptr;  // [num_models, 3, kSumLanes]
};

struct GramN {
    Models models;
    size_t span = 1;
    double* sums = nullptr;   // [num_spans, num_pairs]
    double* lanes = nullptr;  // [num_pairs, kSumLanes]
};

struct GramColumns {
    Models models;  // with kGramRows times the workspace
    size_t columns = 1;
    double* sums = nullptr;  // [num_pairs, columns], added to
};

struct MaskedSums {
    Input vector;
    size_t num = 0;
    const uint8_t* const* masks = nullptr;
    size_t num_masks = 0;
    size_t span = 1;
    double* sums = nullptr;   // [num_spans, num_masks]
    double* lanes = nullptr;  // [num_masks, kSumLanes]
};

struct RowSparsify {
    Input base;
    Input model;
    size_t num = 0;
    int64_t start = 0;
    size_t columns = 1;
    int64_t first = 0;
    int64_t last = 0;
    int64_t draws_low = 0;
    int64_t draws_span = 0;
    uint64_t seed = 0;
    bool rescale = false;
    Output out;
    void* scratch = nullptr;  // row_sparsify_scratch(columns) bytes, aligned to 64
};

struct RowDivergence {
    Input base;
    Input model;
    size_t num = 0;
    size_t columns = 1;
    float* divergences = nullptr;  // [num_rows]
};

struct RowScores {
    Models models;                   // one model
    const float* factors = nullptr;  // [num_rows]
    size_t columns = 1;
    float threshold = 0.0f;  // of select_by_score
    Output out;
};

struct LoraAdd {
    Input weight;
    size_t num = 0;
    int64_t start = 0;
    const float* left = nullptr;   // [num_rows, rank]
    const float* right = nullptr;  // [rank, columns]
    size_t rank = 1;
    size_t columns = 1;
    float scale = 1.0f;
    const float* factors = nullptr;  // [num_rows], or nullptr
    Output out;
};

// The maps of one element that need few numbers: each op reads those it names.
struct ElementMap {
    Models models;
    float scale = 1.0f;               // magmax_merge, consensus_merge, apply_task, pcb_merge
    float t = 0.0f;                   // nearswap
    float epsilon = 0.0f;             // overlap_counts, overlap_merge
    int32_t minimum = 0;              // consensus_merge
    const float* limits = nullptr;    // factors of overlap_merge, thresholds of consensus_merge and tall_masks
    const uint8_t* mask = nullptr;    // apply_task
    uint8_t* const* masks = nullptr;  // tall_masks, elect_masks: written
    int64_t* counts = nullptr;        // overlap_counts: [num_models, 2], zero at entry
    Pcb pcb;
    size_t index = 0;   // pcb_score
    float part = 1.0f;  // pcb_score
    const float* cuts = nullptr;
    const float* tops = nullptr;
    const float* weights = nullptr;  // pcb_merge; the coefficients of weighted_mean
    const float* floors = nullptr;   // weighted_mean
    bool adds_floor = true;          // weighted_mean, or the larger of weight and floor
    Output out;
};

// All memory is float32; theta, first and second are updated in place.
struct AdamStep {
    float* theta = nullptr;
    float* first = nullptr;
    float* second = nullptr;
    const float* gradient = nullptr;
    size_t num = 0;
    Adam adam;
};

enum class StatusCode : int32_t { Ok = 0, NoIsa, UnknownFormat, NotWritable, BadShape };

// What a call refused: the argument (-1 base, -2 output, -3 score, else the index of a model), what was found there
// and what was expected.
struct Status {
    StatusCode code = StatusCode::Ok;
    int32_t argument = 0;
    int64_t found = 0;
    int64_t expected = 0;
};

// Ops that write elements return in num_nonfinite how many are infinite or NaN after rounding.
Status axpy_n(const AxpyN& op, uint64_t* num_nonfinite);
Status axpy_grid(const AxpyGrid& op, uint64_t* num_nonfinite);
Status magnitude_sample(const MagnitudeSample& op);
Status bracket_count(const BracketCount& op);
Status magnitude_histogram(const MagnitudeHistogram& op);
Status locate_equal(const LocateEqual& op, Location* location);
Status disjoint_merge(const DisjointMerge& op, uint64_t* num_nonfinite);
Status count_votes(const CountVotes& op);
Status kept_sums(const KeptSums& op);
Status convert(const Output& out, const Input& input, size_t num, uint64_t* num_nonfinite);
Status count_nonfinite(const Input& input, size_t num, uint64_t* num_nonfinite);
Status gram_n(const GramN& op);
Status gram_columns(const GramColumns& op);
Status masked_sums(const MaskedSums& op);
Status row_sparsify(const RowSparsify& op, uint64_t* num_nonfinite);
Status row_divergence(const RowDivergence& op);
Status row_scores(const RowScores& op, uint64_t* num_nonfinite);
Status select_by_score(const RowScores& op, uint64_t* num_nonfinite);
Status lora_add(const LoraAdd& op, uint64_t* num_nonfinite);
Status nearswap(const ElementMap& op, uint64_t* num_nonfinite);
Status variance_score(const ElementMap& op, uint64_t* num_nonfinite);
Status overlap_counts(const ElementMap& op);
Status overlap_merge(const ElementMap& op, uint64_t* num_nonfinite);
Status magmax_merge(const ElementMap& op, uint64_t* num_nonfinite);
Status consensus_merge(const ElementMap& op, uint64_t* num_nonfinite);
Status tall_masks(const ElementMap& op);
Status elect_max(const ElementMap& op, uint64_t* num_nonfinite);
Status elect_masks(const ElementMap& op);
Status apply_task(const ElementMap& op, uint64_t* num_nonfinite);
Status pcb_score(const ElementMap& op, uint64_t* num_nonfinite);
Status pcb_merge(const ElementMap& op, uint64_t* num_nonfinite);
Status adam_step(const AdamStep& op, uint64_t* num_nonfinite);
// The second half of the models are the weights of the first.
Status weighted_mean(const ElementMap& op, uint64_t* num_nonfinite);

// How many indices e in [start, start + num) satisfy (e / group) % stride == 0.
uint64_t num_sampled(uint64_t start, uint64_t num, uint64_t group, uint64_t stride);

// Bytes of scratch that row_sparsify needs for rows of `columns` elements.
size_t row_sparsify_scratch(size_t columns);

// The instruction set in use; "" when PYMERGE_ISA names one that this machine or build lacks.
const char* isa();
// Names from worst to best, up to and excluding a nullptr.
const char* const* available_isas();
// False, and no change, when the name is not among available_isas().
bool use_isa(const char* name);

}  // namespace pymerge

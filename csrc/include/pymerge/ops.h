// The element-wise merge ops on raw memory, framework-free. pymerge/ops/table.py describes each op for
// users; the arithmetic is in cpu/ops_inl.h.
//
// Shared definitions. value(x) is the float32 of an element; delta = value(x) - value(base); the key of a
// delta is min(bits(|delta|), 0x7fc00000) as int32, so that keys order like magnitudes with NaN on top.
// Element memory may be misaligned. Outputs never overlap inputs. Every result is the same bit pattern
// on every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pymerge/format.h"

namespace pymerge {

// Elements an op works on at a time; a workspace for n models holds n * kBlockElements floats.
constexpr size_t kBlockElements = 512;

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
};

struct AxpyN {
    Models models;
    const float* weights = nullptr;
    float divisor = 1.0f;
    float scale = 1.0f;
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
    const float* weights = nullptr;
    const int32_t* thresholds = nullptr;
    const int64_t* cutoffs = nullptr;
    int64_t start = 0;
    bool normalize = true;
    float scale = 1.0f;
    Output out;
    float* workspace = nullptr;  // num_models * kBlockElements floats
};

enum class StatusCode : int32_t { Ok = 0, NoIsa, UnknownFormat, NotWritable, BadShape };

// What a call refused: the argument (-1 base, -2 output, else the index of a model), what was found there
// and what was expected.
struct Status {
    StatusCode code = StatusCode::Ok;
    int32_t argument = 0;
    int64_t found = 0;
    int64_t expected = 0;
};

// Ops that write return in num_nonfinite how many elements are infinite or NaN after rounding.
Status axpy_n(const AxpyN& op, uint64_t* num_nonfinite);
Status magnitude_sample(const MagnitudeSample& op);
Status bracket_count(const BracketCount& op);
Status magnitude_histogram(const MagnitudeHistogram& op);
Status locate_equal(const LocateEqual& op, Location* location);
Status disjoint_merge(const DisjointMerge& op, uint64_t* num_nonfinite);
Status convert(const Output& out, const Input& input, size_t num, uint64_t* num_nonfinite);
Status count_nonfinite(const Input& input, size_t num, uint64_t* num_nonfinite);

// How many indices e in [start, start + num) satisfy (e / group) % stride == 0.
uint64_t num_sampled(uint64_t start, uint64_t num, uint64_t group, uint64_t stride);

// The instruction set in use; "" when PYMERGE_ISA names one that this machine or build lacks.
const char* isa();
// Names from worst to best, up to and excluding a nullptr.
const char* const* available_isas();
// False, and no change, when the name is not among available_isas().
bool use_isa(const char* name);

}  // namespace pymerge

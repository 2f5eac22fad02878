// What each instruction set's object file offers to dispatch.cpp.
#pragma once

#include "pymerge/ops.h"

namespace pymerge {

struct OpTable {
    const char* name;
    uint64_t (*axpy_n)(const AxpyN&);
    void (*magnitude_sample)(const MagnitudeSample&);
    void (*bracket_count)(const BracketCount&);
    void (*magnitude_histogram)(const MagnitudeHistogram&);
    Location (*locate_equal)(const LocateEqual&);
    uint64_t (*disjoint_merge)(const DisjointMerge&);
    uint64_t (*convert)(const Output&, const Input&, size_t num);
    uint64_t (*count_nonfinite)(const Input&, size_t num);
};

extern const OpTable scalar_ops;
extern const OpTable avx2_ops;
extern const OpTable avx512_ops;

}  // namespace pymerge

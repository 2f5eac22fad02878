// What each instruction set's object file offers to dispatch.cpp.
#pragma once

#include "pymerge/ops.h"

namespace pymerge {

// Bins of row_sparsify's scratch: three digits of up to 13 bits.
constexpr size_t kRankBins = 3 * 8192;

struct OpTable {
    const char* name;
    uint64_t (*axpy_n)(const AxpyN&);
    uint64_t (*axpy_grid)(const AxpyGrid&);
    void (*magnitude_sample)(const MagnitudeSample&);
    void (*bracket_count)(const BracketCount&);
    void (*magnitude_histogram)(const MagnitudeHistogram&);
    Location (*locate_equal)(const LocateEqual&);
    uint64_t (*disjoint_merge)(const DisjointMerge&);
    void (*count_votes)(const CountVotes&);
    void (*kept_sums)(const KeptSums&);
    uint64_t (*convert)(const Output&, const Input&, size_t num);
    uint64_t (*count_nonfinite)(const Input&, size_t num);
    void (*gram_n)(const GramN&);
    void (*gram_columns)(const GramColumns&);
    void (*masked_sums)(const MaskedSums&);
    uint64_t (*row_sparsify)(const RowSparsify&);
    void (*row_divergence)(const RowDivergence&);
    uint64_t (*row_scores)(const RowScores&);
    uint64_t (*select_by_score)(const RowScores&);
    uint64_t (*lora_add)(const LoraAdd&);
    uint64_t (*nearswap)(const ElementMap&);
    uint64_t (*variance_score)(const ElementMap&);
    void (*overlap_counts)(const ElementMap&);
    uint64_t (*overlap_merge)(const ElementMap&);
    uint64_t (*magmax_merge)(const ElementMap&);
    uint64_t (*consensus_merge)(const ElementMap&);
    void (*tall_masks)(const ElementMap&);
    uint64_t (*elect_max)(const ElementMap&);
    void (*elect_masks)(const ElementMap&);
    uint64_t (*apply_task)(const ElementMap&);
    uint64_t (*pcb_score)(const ElementMap&);
    uint64_t (*pcb_merge)(const ElementMap&);
    uint64_t (*adam_step)(const AdamStep&);
    uint64_t (*weighted_mean)(const ElementMap&);
};

extern const OpTable scalar_ops;
extern const OpTable avx2_ops;
extern const OpTable avx512_ops;

}  // namespace pymerge

// The ops, written once over a vector policy V and compiled once per instruction set.
//
// Everything has internal linkage and no std template is used: the linker merges inline functions of the
// same name, and a copy compiled for AVX-512 must never end up in code that runs elsewhere.
//
// All ops go through blocks of kBlockElements. widen() turns a block of any format into float32 in L1, the
// arithmetic of arithmetic.h runs on whole vectors of that scratch (its padding is computed on and ignored),
// narrow() rounds to the output format. Bitwise class: models in order, no contraction, one rounding, so that
// every instruction set gives the same bytes.
//
// A policy V has what arithmetic.h names, and for memory:
//   load(Tag<format>, p), store(Tag<format>, p, F)   elements at a misaligned address
//   load_first(p, n)                                 the first n < kLanes float32 there, the other lanes 0
//   get, put                                         float32 or int32 in aligned scratch
//   load_ints, store_ints                            int32 at a misaligned address
//   gather(table, I)                                 table[lane] of float32 or int32
//   compress(dst, M, I) -> count                     the lanes of the mask, in order; may write kLanes values
//   to_bits(M), from_bits(uint32_t)                  lane l in bit l
//   put_words(dst, W words[4])                       the low halves of words[0..3] of lane 0, then of lane 1, ...
// and D, kWideLanes float64 numbers: get_wide, put_wide at a misaligned address, add_doubles, add_product(acc, a, b) =
// acc + a b for products that are exact, to_doubles(p) of kWideLanes float32 in aligned scratch.
#pragma once

#include "elementwise_inl.h"
#include "merge_inl.h"
#include "ranks_inl.h"
#include "rows_inl.h"
#include "selection_inl.h"
#include "sums_inl.h"

namespace pymerge {
namespace {

template <class V>
constexpr OpTable op_table(const char* name) {
    return OpTable{name,
                   axpy_n<V>,
                   axpy_grid<V>,
                   magnitude_sample<V>,
                   bracket_count<V>,
                   magnitude_histogram<V>,
                   locate_equal<V>,
                   disjoint_merge<V>,
                   count_votes<V>,
                   kept_sums<V>,
                   convert<V>,
                   count_nonfinite<V>,
                   gram_n<V>,
                   gram_columns<V>,
                   masked_sums<V>,
                   row_sparsify<V>,
                   row_divergence<V>,
                   row_scores<V>,
                   select_by_score<V>,
                   lora_add<V>,
                   nearswap<V>,
                   variance_score<V>,
                   overlap_counts<V>,
                   overlap_merge<V>,
                   magmax_merge<V>,
                   consensus_merge<V>,
                   tall_masks<V>,
                   elect_max<V>,
                   elect_masks<V>,
                   apply_task<V>,
                   pcb_score<V>,
                   pcb_merge<V>,
                   adam_step<V>,
                   weighted_mean<V>};
}

}  // namespace
}  // namespace pymerge

// Picks the instruction set at load time, and is the checked entry to the ops.
//
// The best set that both the processor and the operating system support is used, unless the environment
// variable PYMERGE_ISA names one. A name that cannot be honoured leaves no set selected: every op then
// answers NoIsa instead of quietly running something else.
#include <atomic>
#include <cfenv>
#include <cstdlib>
#include <cstring>

#include "op_table.h"

#ifdef PYMERGE_X86
#include <cpuid.h>
#endif

namespace pymerge {
namespace {

#ifdef PYMERGE_X86
struct CpuFeatures {
    bool avx2 = false;
    bool avx512 = false;
};

CpuFeatures cpu_features() {
    CpuFeatures found;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
    const unsigned needed = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C | bit_POPCNT;
    if ((ecx & needed) != needed) return found;
    // The operating system must save the wide registers: bits 1, 2 of XCR0 for SSE and AVX, 5 to 7 for AVX-512.
    unsigned xcr0, xcr0_high;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    found.avx2 = (xcr0 & 0x06) == 0x06 && (ebx & bit_AVX2);
    found.avx512 = found.avx2 && (xcr0 & 0xe6) == 0xe6 && (ebx & avx512) == avx512;
    return found;
}
#endif

// What can run here, from worst to best.
struct Available {
    const OpTable* tables[3] = {};
    const char* names[4] = {};
    size_t num = 0;

    Available() {
        add(&scalar_ops);
#ifdef PYMERGE_X86
        const CpuFeatures features = cpu_features();
        if (features.avx2) add(&avx2_ops);
        if (features.avx512) add(&avx512_ops);
#endif
    }

    void add(const OpTable* table) {
        tables[num] = table;
        names[num++] = table->name;
    }

    const OpTable* find(const char* name) const {
        for (size_t i = 0; i < num; ++i) {
            if (std::strcmp(names[i], name) == 0) return tables[i];
        }
        return nullptr;
    }
};

const Available& available() {
    static const Available instance;
    return instance;
}

const OpTable* table_at_load() {
    const char* asked = std::getenv("PYMERGE_ISA");
    return asked && *asked ? available().find(asked) : available().tables[available().num - 1];
}

std::atomic<const OpTable*>& selected() {
    static std::atomic<const OpTable*> table{table_at_load()};
    return table;
}

// Rounding to nearest with subnormals, whatever another library has set for this thread (a shared object
// linked with -ffast-math turns subnormals off for everyone).
class DefaultFloatEnvironment {
  public:
    DefaultFloatEnvironment() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
    DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
    DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

  private:
    std::fenv_t saved_;
};

constexpr int32_t kBaseArgument = -1;
constexpr int32_t kOutputArgument = -2;
constexpr int32_t kScoreArgument = -3;

bool is_known(Format format) { return static_cast<int32_t>(format) >= 0 && format <= Format::F8_E5M2; }

Status check_input(const Input& input, int32_t argument) {
    if (is_known(input.format)) return {};
    return {StatusCode::UnknownFormat, argument, static_cast<int64_t>(input.format),
            static_cast<int64_t>(Format::F8_E5M2)};
}

Status check_models(const Models& models) {
    if (!selected().load(std::memory_order_relaxed)) return {StatusCode::NoIsa, 0, 0, 0};
    if (models.num_models == 0) return {StatusCode::BadShape, 0, 0, 1};
    if (models.base.data) {
        const Status status = check_input(models.base, kBaseArgument);
        if (status.code != StatusCode::Ok) return status;
    }
    for (size_t i = 0; i < models.num_models; ++i) {
        const Status status = check_input(models.inputs[i], static_cast<int32_t>(i));
        if (status.code != StatusCode::Ok) return status;
    }
    return {};
}

Status check_output(const Output& out) {
    if (is_known(out.format) && is_writable(out.format)) return {};
    return {StatusCode::NotWritable, kOutputArgument, static_cast<int64_t>(out.format),
            static_cast<int64_t>(Format::BF16)};
}

// Runs body with the selected table when status is Ok.
template <class Body>
Status run(Status status, Body body) {
    if (status.code != StatusCode::Ok) return status;
    const DefaultFloatEnvironment environment;
    body(*selected().load(std::memory_order_relaxed));
    return status;
}

Status first_of(const Status& a, const Status& b) { return a.code != StatusCode::Ok ? a : b; }

Status check_pair(const Input& base, const Input& model) { return check_models({base, &model, 1, 0, nullptr}); }

Status check_score(const Input& score) { return score.data ? check_input(score, kScoreArgument) : Status{}; }

// Whole rows of at least one and at most `most` elements.
Status check_rows(size_t num, size_t columns, size_t most = SIZE_MAX) {
    if (columns == 0 || columns > most) return {StatusCode::BadShape, 0, static_cast<int64_t>(columns), 1};
    const size_t rest = num % columns;
    if (rest) return {StatusCode::BadShape, 0, static_cast<int64_t>(num), static_cast<int64_t>(num - rest)};
    return {};
}

// Ops that write elements, and ops that measure.
template <class Op>
Status write(const Op& op, uint64_t (*OpTable::*kernel)(const Op&), uint64_t* num_nonfinite) {
    return run(first_of(check_models(op.models), check_output(op.out)),
               [&](const OpTable& table) { *num_nonfinite = (table.*kernel)(op); });
}

template <class Op>
Status measure(const Op& op, void (*OpTable::*kernel)(const Op&)) {
    return run(check_models(op.models), [&](const OpTable& table) { (table.*kernel)(op); });
}

Status write_rows(const RowScores& op, uint64_t (*OpTable::*kernel)(const RowScores&), uint64_t* num_nonfinite) {
    const Status shape = check_rows(op.models.num, op.columns);
    return shape.code == StatusCode::Ok ? write(op, kernel, num_nonfinite) : shape;
}

}  // namespace

Status axpy_n(const AxpyN& op, uint64_t* num_nonfinite) { return write(op, &OpTable::axpy_n, num_nonfinite); }

Status axpy_grid(const AxpyGrid& op, uint64_t* num_nonfinite) {
    return run(first_of(check_rows(op.models.num, op.columns), first_of(check_models(op.models), check_output(op.out))),
               [&](const OpTable& table) { *num_nonfinite = table.axpy_grid(op); });
}

Status magnitude_sample(const MagnitudeSample& op) {
    Status status = check_models(op.models);
    if (status.code == StatusCode::Ok) {
        const bool sane = op.group > 0 && op.stride > 0 && op.group <= INT64_MAX / op.stride;
        const uint64_t expected = sane ? num_sampled(op.start, op.models.num, op.group, op.stride) : 0;
        if (!sane || expected != op.num_sampled) {
            status = {StatusCode::BadShape, 0, static_cast<int64_t>(op.num_sampled), static_cast<int64_t>(expected)};
        }
    }
    return run(status, [&](const OpTable& table) { table.magnitude_sample(op); });
}

Status bracket_count(const BracketCount& op) { return measure(op, &OpTable::bracket_count); }

Status magnitude_histogram(const MagnitudeHistogram& op) {
    Status status = check_models(op.models);
    if (status.code == StatusCode::Ok) {
        const int32_t top = op.prefix ? op.prefix_shift : 31;
        const bool sane = op.shift >= 0 && op.shift <= top && top <= 31;
        const int64_t expected = sane ? int64_t{1} << (top - op.shift) : 0;
        if (static_cast<int64_t>(op.num_bins) != expected) {
            status = {StatusCode::BadShape, 0, static_cast<int64_t>(op.num_bins), expected};
        }
    }
    return run(status, [&](const OpTable& table) { table.magnitude_histogram(op); });
}

Status locate_equal(const LocateEqual& op, Location* location) {
    return run(check_pair(op.base, op.model), [&](const OpTable& table) { *location = table.locate_equal(op); });
}

Status disjoint_merge(const DisjointMerge& op, uint64_t* num_nonfinite) {
    return run(first_of(check_score(op.score), first_of(check_models(op.models), check_output(op.out))),
               [&](const OpTable& table) { *num_nonfinite = table.disjoint_merge(op); });
}

Status count_votes(const CountVotes& op) { return measure(op, &OpTable::count_votes); }

Status kept_sums(const KeptSums& op) {
    return run(first_of(check_rows(0, op.span), first_of(check_score(op.score), check_models(op.models))),
               [&](const OpTable& table) { table.kept_sums(op); });
}

Status convert(const Output& out, const Input& input, size_t num, uint64_t* num_nonfinite) {
    const Status output_status = out.format == input.format ? Status{} : check_output(out);
    return run(first_of(check_pair({}, input), output_status),
               [&](const OpTable& table) { *num_nonfinite = table.convert(out, input, num); });
}

Status count_nonfinite(const Input& input, size_t num, uint64_t* num_nonfinite) {
    return run(check_pair({}, input),
               [&](const OpTable& table) { *num_nonfinite = table.count_nonfinite(input, num); });
}

Status gram_n(const GramN& op) {
    return run(first_of(check_rows(0, op.span), check_models(op.models)),
               [&](const OpTable& table) { table.gram_n(op); });
}

Status gram_columns(const GramColumns& op) {
    return run(first_of(check_rows(op.models.num, op.columns), check_models(op.models)),
               [&](const OpTable& table) { table.gram_columns(op); });
}

Status masked_sums(const MaskedSums& op) {
    return run(first_of(check_rows(0, op.span), check_pair({}, op.vector)),
               [&](const OpTable& table) { table.masked_sums(op); });
}

Status row_sparsify(const RowSparsify& op, uint64_t* num_nonfinite) {
    const Status shape = check_rows(op.num, op.columns, INT32_MAX);
    return run(first_of(shape, first_of(check_pair(op.base, op.model), check_output(op.out))),
               [&](const OpTable& table) { *num_nonfinite = table.row_sparsify(op); });
}

Status row_divergence(const RowDivergence& op) {
    return run(first_of(check_rows(op.num, op.columns), check_pair(op.base, op.model)),
               [&](const OpTable& table) { table.row_divergence(op); });
}

Status row_scores(const RowScores& op, uint64_t* num_nonfinite) {
    return write_rows(op, &OpTable::row_scores, num_nonfinite);
}

Status select_by_score(const RowScores& op, uint64_t* num_nonfinite) {
    return write_rows(op, &OpTable::select_by_score, num_nonfinite);
}

Status lora_add(const LoraAdd& op, uint64_t* num_nonfinite) {
    const Status shape = first_of(check_rows(0, op.columns), check_rows(0, op.rank));
    return run(first_of(shape, first_of(check_pair({}, op.weight), check_output(op.out))),
               [&](const OpTable& table) { *num_nonfinite = table.lora_add(op); });
}

Status nearswap(const ElementMap& op, uint64_t* num_nonfinite) { return write(op, &OpTable::nearswap, num_nonfinite); }

Status variance_score(const ElementMap& op, uint64_t* num_nonfinite) {
    return write(op, &OpTable::variance_score, num_nonfinite);
}

Status overlap_counts(const ElementMap& op) { return measure(op, &OpTable::overlap_counts); }

Status overlap_merge(const ElementMap& op, uint64_t* num_nonfinite) {
    return write(op, &OpTable::overlap_merge, num_nonfinite);
}

Status magmax_merge(const ElementMap& op, uint64_t* num_nonfinite) {
    return write(op, &OpTable::magmax_merge, num_nonfinite);
}

Status consensus_merge(const ElementMap& op, uint64_t* num_nonfinite) {
    return write(op, &OpTable::consensus_merge, num_nonfinite);
}

Status tall_masks(const ElementMap& op) { return measure(op, &OpTable::tall_masks); }

Status elect_max(const ElementMap& op, uint64_t* num_nonfinite) {
    return write(op, &OpTable::elect_max, num_nonfinite);
}

Status elect_masks(const ElementMap& op) { return measure(op, &OpTable::elect_masks); }

Status apply_task(const ElementMap& op, uint64_t* num_nonfinite) {
    return write(op, &OpTable::apply_task, num_nonfinite);
}

Status pcb_score(const ElementMap& op, uint64_t* num_nonfinite) {
    return write(op, &OpTable::pcb_score, num_nonfinite);
}

Status pcb_merge(const ElementMap& op, uint64_t* num_nonfinite) {
    return write(op, &OpTable::pcb_merge, num_nonfinite);
}

Status adam_step(const AdamStep& op, uint64_t* num_nonfinite) {
    return run(check_pair({}, {op.gradient, Format::F32}),
               [&](const OpTable& table) { *num_nonfinite = table.adam_step(op); });
}

Status weighted_mean(const ElementMap& op, uint64_t* num_nonfinite) {
    if (op.models.num_models % 2) {
        const int64_t found = static_cast<int64_t>(op.models.num_models);
        return {StatusCode::BadShape, 0, found, found + 1};
    }
    return write(op, &OpTable::weighted_mean, num_nonfinite);
}

uint64_t num_sampled(uint64_t start, uint64_t num, uint64_t group, uint64_t stride) {
    const uint64_t period = group * stride;
    const auto sampled_before = [&](uint64_t end) {
        const uint64_t rest = end % period;
        return end / period * group + (rest < group ? rest : group);
    };
    return sampled_before(start + num) - sampled_before(start);
}

size_t row_sparsify_scratch(size_t columns) {
    const size_t capacity = (columns + 15) / 16 * 16 + 16;
    return kRankBins * sizeof(uint32_t) + capacity * (3 * sizeof(uint32_t) + 2 * sizeof(uint64_t));
}

const char* isa() {
    const OpTable* table = selected().load(std::memory_order_relaxed);
    return table ? table->name : "";
}

const char* const* available_isas() { return available().names; }

bool use_isa(const char* name) {
    const OpTable* table = available().find(name);
    if (table) selected().store(table, std::memory_order_relaxed);
    return table != nullptr;
}

}  // namespace pymerge

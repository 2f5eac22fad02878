// Binds selection, weighted sums and the disjoint merge; what the bindings share.
#include "bind_ops.h"

namespace binding {

pymerge::Input input(const View& view) {
    return {pointer<const void>(std::get<0>(view)), static_cast<pymerge::Format>(std::get<1>(view))};
}

pymerge::Output output(const View& view) {
    return {pointer<void>(std::get<0>(view)), static_cast<pymerge::Format>(std::get<1>(view))};
}

pymerge::Input optional_input(const std::optional<View>& view) { return view ? input(*view) : pymerge::Input{}; }

std::vector<pymerge::Keep> keeps(const char* op, const std::vector<KeepTuple>& tuples, size_t num_models) {
    require_count(op, "keeps", tuples.size(), num_models);
    std::vector<pymerge::Keep> all;
    all.reserve(tuples.size());
    for (const auto& [threshold, cutoff, ceiling, ceiling_cutoff, draws, seed] : tuples) {
        all.push_back({threshold, ceiling, cutoff, ceiling_cutoff, draws, seed});
    }
    return all;
}

ModelSet::ModelSet(const char* op, const std::optional<View>& base, const Views& views, size_t num, size_t num_blocks) {
    require_equal_counts(op, num, views, base);
    inputs_.reserve(views.size());
    for (const View& view : views) inputs_.push_back(input(view));
    if (num_blocks) workspace_ = scratch<float>(num_blocks * views.size() * pymerge::kWorkspaceFloats);
    models = {optional_input(base), inputs_.data(), inputs_.size(), num, workspace_.get()};
}

namespace {

std::string argument_name(int32_t argument) {
    if (argument == -1) return "the base";
    if (argument == -2) return "the output";
    if (argument == -3) return "the score";
    return "model " + std::to_string(argument);
}

}  // namespace

void raise_unless_ok(const char* op, const pymerge::Status& status) {
    using pymerge::StatusCode;
    const std::string found = std::to_string(status.found);
    switch (status.code) {
        case StatusCode::Ok:
            return;
        case StatusCode::NoIsa:
            throw std::runtime_error(std::string(op) + ": PYMERGE_ISA names an instruction set that is not available");
        case StatusCode::UnknownFormat:
            throw std::invalid_argument(std::string(op) + ": " + argument_name(status.argument) + " has format code " +
                                        found + ", known are 0 to " + std::to_string(status.expected));
        case StatusCode::NotWritable:
            throw std::invalid_argument(std::string(op) + ": cannot round to format code " + found +
                                        ", writable are 0 to " + std::to_string(status.expected));
        case StatusCode::BadShape:
            throw std::invalid_argument(std::string(op) + ": expected " + std::to_string(status.expected) +
                                        " entries, found " + found);
    }
}

void require_count(const char* op, const char* what, size_t found, size_t expected) {
    if (found == expected) return;
    throw std::invalid_argument(std::string(op) + ": expected " + std::to_string(expected) + " " + what + ", found " +
                                std::to_string(found));
}

void require_memory(const char* op, const char* what, uintptr_t address, size_t count) {
    if (address || !count) return;
    throw std::invalid_argument(std::string(op) + ": expected memory for " + std::to_string(count) + " " + what +
                                ", found address 0");
}

void require_equal_counts(const char* op, size_t expected, const Views& views, const std::optional<View>& base) {
    for (const View& view : views) require_count(op, "elements in every view", count_of(view), expected);
    if (base) require_count(op, "elements in the base", count_of(*base), expected);
}

namespace {

// A sample of every stride-th group; their product is the period of the sample.
void require_sampling(const char* op, uint64_t group, uint64_t stride) {
    if (group > 0 && stride > 0 && group <= INT64_MAX / stride) return;
    throw std::invalid_argument(std::string(op) + ": expected group and stride of at least 1 and a product below " +
                                "2**63, found " + std::to_string(group) + " and " + std::to_string(stride));
}

uint64_t axpy_n(const View& out, const std::optional<View>& base, const Views& views, const Numbers& weights,
                float divisor, float scale, bool add_base) {
    require_count("axpy_n", "weights", weights.size(), views.size());
    const ModelSet set("axpy_n", base, views, count_of(out), 0);
    const pymerge::AxpyN op{set.models, weights.data(), divisor, scale, add_base, output(out)};
    return run_write("axpy_n", pymerge::axpy_n, op);
}

uint64_t axpy_grid(const View& out, const std::optional<View>& base, const Views& views, uintptr_t weights,
                   size_t columns, bool along_rows) {
    require_memory("axpy_grid", "weights", weights, count_of(out));
    const ModelSet set("axpy_grid", base, views, count_of(out), 0);
    const pymerge::AxpyGrid op{set.models, pointer<const float>(weights), columns, along_rows, output(out)};
    return run_write("axpy_grid", pymerge::axpy_grid, op);
}

uint64_t num_sampled(uint64_t start, uint64_t num, uint64_t group, uint64_t stride) {
    require_sampling("num_sampled", group, stride);
    return pymerge::num_sampled(start, num, group, stride);
}

void magnitude_sample(const std::optional<View>& base, const Views& views, size_t num, uint64_t start, uint64_t group,
                      uint64_t stride, uintptr_t keys, size_t num_sampled) {
    require_sampling("magnitude_sample", group, stride);
    require_memory("magnitude_sample", "keys", keys, views.size() * num_sampled);
    const ModelSet set("magnitude_sample", base, views, num, 0);
    const pymerge::MagnitudeSample op{set.models, start, group, stride, pointer<int32_t>(keys), num_sampled};
    run_measure("magnitude_sample", pymerge::magnitude_sample, op);
}

void bracket_count(const std::optional<View>& base, const Views& views, size_t num, const std::vector<int32_t>& low,
                   const std::vector<int32_t>& high, uintptr_t counts, uintptr_t candidates, size_t capacity) {
    require_count("bracket_count", "lower ends", low.size(), views.size());
    require_count("bracket_count", "upper ends", high.size(), views.size());
    const ModelSet set("bracket_count", base, views, num, 0);
    if (capacity > num) require_count("bracket_count", "candidates of each model at most", capacity, num);
    require_memory("bracket_count", "counts", counts, views.size());
    require_memory("bracket_count", "candidates", candidates, views.size() * capacity);
    const pymerge::BracketCount op{
        set.models, low.data(), high.data(), pointer<int64_t>(counts), pointer<int32_t>(candidates), capacity};
    run_measure("bracket_count", pymerge::bracket_count, op);
}

void magnitude_histogram(const std::optional<View>& base, const Views& views, size_t num, int32_t shift,
                         const std::optional<std::vector<int32_t>>& prefix, int32_t prefix_shift, uintptr_t counts,
                         size_t num_bins) {
    if (prefix) require_count("magnitude_histogram", "prefixes", prefix->size(), views.size());
    const ModelSet set("magnitude_histogram", base, views, num, 0);
    require_memory("magnitude_histogram", "bins", counts, views.size() * num_bins);
    const pymerge::MagnitudeHistogram op{
        set.models, shift, prefix ? prefix->data() : nullptr, prefix_shift, pointer<uint64_t>(counts), num_bins};
    run_measure("magnitude_histogram", pymerge::magnitude_histogram, op);
}

std::pair<int64_t, uint64_t> locate_equal(const std::optional<View>& base, const View& model, int32_t key,
                                          uint64_t nth) {
    require_equal_counts("locate_equal", count_of(model), {}, base);
    const pymerge::LocateEqual op{optional_input(base), input(model), count_of(model), key, nth};
    pymerge::Location location;
    run("locate_equal", [&] { return pymerge::locate_equal(op, &location); });
    return {location.index, location.count};
}

// `found` as one word of an enumeration, whose last is `last`.
template <class Word>
Word word(const char* op, const char* what, int32_t found, Word last) {
    if (found < 0 || found > static_cast<int32_t>(last)) {
        throw std::invalid_argument(std::string(op) + ": unknown " + what + " " + std::to_string(found));
    }
    return static_cast<Word>(found);
}

pymerge::Vote vote(const char* op, const Numbers& weights, const std::optional<Numbers>& factors, size_t num_models) {
    require_count(op, "weights", weights.size(), num_models);
    if (factors) require_count(op, "factors", factors->size(), num_models);
    pymerge::Vote vote;
    vote.weights = weights.data();
    vote.factors = factors ? factors->data() : nullptr;
    vote.num_models = num_models;
    return vote;
}

uint64_t disjoint_merge(const View& out, const std::optional<View>& base, const Views& views, const Numbers& weights,
                        const std::vector<KeepTuple>& keep_tuples, int64_t start, int32_t elect, int32_t combine,
                        int32_t zero_sign, const std::optional<Numbers>& factors, float divisor, float scale,
                        const std::optional<View>& score, bool deltas) {
    const char* name = "disjoint_merge";
    const ModelSet set(name, base, views, count_of(out), 1);
    if (score) require_count(name, "elements in the score", count_of(*score), count_of(out));
    const auto all_keeps = keeps(name, keep_tuples, views.size());
    pymerge::DisjointMerge op;
    op.models = set.models;
    op.deltas = deltas;
    op.score = optional_input(score);
    op.keeps = all_keeps.data();
    op.start = start;
    op.elect = word(name, "election", elect, pymerge::Elect::Plain);
    op.combine = word(name, "combination", combine, pymerge::Combine::Max);
    op.vote = vote(name, weights, factors, views.size());
    op.vote.zero_sign = zero_sign;
    op.vote.divisor = divisor;
    op.vote.scale = scale;
    op.vote.add_base = base.has_value();
    op.out = output(out);
    return run_write(name, pymerge::disjoint_merge, op);
}

std::pair<uint64_t, uint64_t> count_votes(const std::optional<View>& base, const Views& views, size_t num,
                                          const Numbers& weights, const std::vector<KeepTuple>& keep_tuples,
                                          int64_t start, int32_t elect, const std::optional<Numbers>& factors) {
    const char* name = "count_votes";
    const ModelSet set(name, base, views, num, 1);
    const auto all_keeps = keeps(name, keep_tuples, views.size());
    uint64_t counts[2] = {};
    pymerge::CountVotes op;
    op.models = set.models;
    op.keeps = all_keeps.data();
    op.start = start;
    op.elect = word(name, "election", elect, pymerge::Elect::Plain);
    op.vote = vote(name, weights, factors, views.size());
    op.counts = counts;
    run_measure(name, pymerge::count_votes, op);
    return {counts[0], counts[1]};
}

uint64_t convert(const View& out, const View& view) {
    require_equal_counts("convert", count_of(out), {view});
    uint64_t num_nonfinite = 0;
    run("convert", [&] { return pymerge::convert(output(out), input(view), count_of(view), &num_nonfinite); });
    return num_nonfinite;
}

uint64_t count_nonfinite(const View& view) {
    uint64_t num_nonfinite = 0;
    run("count_nonfinite", [&] { return pymerge::count_nonfinite(input(view), count_of(view), &num_nonfinite); });
    return num_nonfinite;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const char* const* name = pymerge::available_isas(); *name; ++name) names.emplace_back(*name);
    return names;
}

}  // namespace
}  // namespace binding

void bind_ops(pybind11::module_& module) {
    using namespace binding;
    using namespace py::literals;
    module.def("axpy_n", &axpy_n, "out"_a, "base"_a, "inputs"_a, "weights"_a, "divisor"_a, "scale"_a,
               "add_base"_a = true);
    module.def("axpy_grid", &axpy_grid, "out"_a, "base"_a, "inputs"_a, "weights"_a, "columns"_a, "along_rows"_a);
    module.def("magnitude_sample", &magnitude_sample, "base"_a, "models"_a, "num"_a, "start"_a, "group"_a, "stride"_a,
               "keys"_a, "num_sampled"_a);
    module.def("num_sampled", &num_sampled, "start"_a, "num"_a, "group"_a, "stride"_a);
    module.def("bracket_count", &bracket_count, "base"_a, "models"_a, "num"_a, "low"_a, "high"_a, "counts"_a,
               "candidates"_a, "capacity"_a);
    module.def("magnitude_histogram", &magnitude_histogram, "base"_a, "models"_a, "num"_a, "shift"_a, "prefix"_a,
               "prefix_shift"_a, "counts"_a, "num_bins"_a);
    module.def("locate_equal", &locate_equal, "base"_a, "model"_a, "key"_a, "nth"_a);
    module.def("disjoint_merge", &disjoint_merge, "out"_a, "base"_a, "models"_a, "weights"_a, "keeps"_a, "start"_a,
               "elect"_a, "combine"_a, "zero_sign"_a, "factors"_a, "divisor"_a, "scale"_a, "score"_a, "deltas"_a);
    module.def("count_votes", &count_votes, "base"_a, "models"_a, "num"_a, "weights"_a, "keeps"_a, "start"_a, "elect"_a,
               "factors"_a);
    module.def("convert", &convert, "out"_a, "input"_a);
    module.def("count_nonfinite", &count_nonfinite, "input"_a);
    module.def("isa", &pymerge::isa);
    module.def("available_isas", &available_isas);
    module.def("use_isa", &pymerge::use_isa, "name"_a);
}

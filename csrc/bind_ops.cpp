// Binds the ops of pymerge/ops.h: addresses come as integers, pymerge/ops/cpu.py has checked the arguments
// and says what is wrong with them; what is checked again here keeps a wrong call from touching foreign memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "pymerge/ops.h"

namespace py = pybind11;

namespace {

// A pymerge.ops.View: address, format code, number of elements.
using View = std::tuple<uintptr_t, int32_t, size_t>;

pymerge::Input input(const View& view) {
    return {reinterpret_cast<const void*>(std::get<0>(view)), static_cast<pymerge::Format>(std::get<1>(view))};
}

pymerge::Output output(const View& view) {
    return {reinterpret_cast<void*>(std::get<0>(view)), static_cast<pymerge::Format>(std::get<1>(view))};
}

pymerge::Input optional_input(const std::optional<View>& view) { return view ? input(*view) : pymerge::Input{}; }

std::vector<pymerge::Input> inputs(const std::vector<View>& views) {
    std::vector<pymerge::Input> all;
    all.reserve(views.size());
    for (const View& view : views) all.push_back(input(view));
    return all;
}

pymerge::Models models(const std::optional<View>& base, const std::vector<pymerge::Input>& all, size_t num) {
    return {optional_input(base), all.data(), all.size(), num};
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::string argument_name(int32_t argument) {
    if (argument == -1) return "the base";
    if (argument == -2) return "the output";
    return "model " + std::to_string(argument);
}

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

// Runs call() without the GIL.
template <class Call>
void run(const char* op, Call call) {
    pymerge::Status status;
    {
        py::gil_scoped_release release;
        status = call();
    }
    raise_unless_ok(op, status);
}

void require_count(const char* op, const char* what, size_t found, size_t expected) {
    if (found == expected) return;
    throw std::invalid_argument(std::string(op) + ": expected " + std::to_string(expected) + " " + what + ", found " +
                                std::to_string(found));
}

// Every view has `expected` elements.
void require_equal_counts(const char* op, size_t expected, const std::vector<View>& views,
                          const std::optional<View>& base = std::nullopt) {
    for (const View& view : views) require_count(op, "elements in every view", std::get<2>(view), expected);
    if (base) require_count(op, "elements in the base", std::get<2>(*base), expected);
}

// A sample of every stride-th group; their product is the period of the sample.
void require_sampling(const char* op, uint64_t group, uint64_t stride) {
    if (group > 0 && stride > 0 && group <= INT64_MAX / stride) return;
    throw std::invalid_argument(std::string(op) + ": expected group and stride of at least 1 and a product below " +
                                "2**63, found " + std::to_string(group) + " and " + std::to_string(stride));
}

// The address of an array that the caller allocated: it must be there unless nothing is stored in it.
void require_memory(const char* op, const char* what, uintptr_t address, size_t num) {
    if (address || !num) return;
    throw std::invalid_argument(std::string(op) + ": expected memory for " + std::to_string(num) + " " + what +
                                ", found address 0");
}

struct AlignedDelete {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

uint64_t axpy_n(const View& out, const std::optional<View>& base, const std::vector<View>& views,
                const std::vector<float>& weights, float divisor, float scale) {
    require_count("axpy_n", "weights", weights.size(), views.size());
    require_equal_counts("axpy_n", std::get<2>(out), views, base);
    const auto all = inputs(views);
    const pymerge::AxpyN op{models(base, all, std::get<2>(out)), weights.data(), divisor, scale, output(out)};
    uint64_t num_nonfinite = 0;
    run("axpy_n", [&] { return pymerge::axpy_n(op, &num_nonfinite); });
    return num_nonfinite;
}

uint64_t num_sampled(uint64_t start, uint64_t num, uint64_t group, uint64_t stride) {
    require_sampling("num_sampled", group, stride);
    return pymerge::num_sampled(start, num, group, stride);
}

void magnitude_sample(const std::optional<View>& base, const std::vector<View>& views, size_t num, uint64_t start,
                      uint64_t group, uint64_t stride, uintptr_t keys, size_t num_sampled) {
    require_equal_counts("magnitude_sample", num, views, base);
    require_sampling("magnitude_sample", group, stride);
    require_memory("magnitude_sample", "keys", keys, views.size() * num_sampled);
    const auto all = inputs(views);
    const pymerge::MagnitudeSample op{models(base, all, num), start,      group, stride,
                                      pointer<int32_t>(keys), num_sampled};
    run("magnitude_sample", [&] { return pymerge::magnitude_sample(op); });
}

void bracket_count(const std::optional<View>& base, const std::vector<View>& views, size_t num,
                   const std::vector<int32_t>& low, const std::vector<int32_t>& high, uintptr_t counts,
                   uintptr_t candidates, size_t capacity) {
    require_count("bracket_count", "lower ends", low.size(), views.size());
    require_count("bracket_count", "upper ends", high.size(), views.size());
    require_equal_counts("bracket_count", num, views, base);
    if (capacity > num) require_count("bracket_count", "candidates of each model at most", capacity, num);
    require_memory("bracket_count", "counts", counts, views.size());
    require_memory("bracket_count", "candidates", candidates, views.size() * capacity);
    const auto all = inputs(views);
    const pymerge::BracketCount op{models(base, all, num),       low.data(), high.data(), pointer<int64_t>(counts),
                                   pointer<int32_t>(candidates), capacity};
    run("bracket_count", [&] { return pymerge::bracket_count(op); });
}

void magnitude_histogram(const std::optional<View>& base, const std::vector<View>& views, size_t num, int32_t shift,
                         const std::optional<std::vector<int32_t>>& prefix, int32_t prefix_shift, uintptr_t counts,
                         size_t num_bins) {
    if (prefix) require_count("magnitude_histogram", "prefixes", prefix->size(), views.size());
    require_equal_counts("magnitude_histogram", num, views, base);
    require_memory("magnitude_histogram", "bins", counts, views.size() * num_bins);
    const auto all = inputs(views);
    const pymerge::MagnitudeHistogram op{
        models(base, all, num),    shift,   prefix ? prefix->data() : nullptr, prefix_shift,
        pointer<uint64_t>(counts), num_bins};
    run("magnitude_histogram", [&] { return pymerge::magnitude_histogram(op); });
}

std::pair<int64_t, uint64_t> locate_equal(const std::optional<View>& base, const View& model, int32_t key,
                                          uint64_t nth) {
    require_equal_counts("locate_equal", std::get<2>(model), {}, base);
    const pymerge::LocateEqual op{optional_input(base), input(model), std::get<2>(model), key, nth};
    pymerge::Location location;
    run("locate_equal", [&] { return pymerge::locate_equal(op, &location); });
    return {location.index, location.count};
}

uint64_t disjoint_merge(const View& out, const View& base, const std::vector<View>& views,
                        const std::vector<float>& weights, const std::vector<int32_t>& thresholds,
                        const std::vector<int64_t>& cutoffs, int64_t start, bool normalize, float scale) {
    require_count("disjoint_merge", "weights", weights.size(), views.size());
    require_count("disjoint_merge", "thresholds", thresholds.size(), views.size());
    require_count("disjoint_merge", "cutoffs", cutoffs.size(), views.size());
    require_equal_counts("disjoint_merge", std::get<2>(out), views, base);
    const auto all = inputs(views);
    const size_t workspace_bytes = views.size() * pymerge::kBlockElements * sizeof(float);
    const std::unique_ptr<float[], AlignedDelete> workspace(
        static_cast<float*>(::operator new[](workspace_bytes, std::align_val_t{64})));
    const pymerge::DisjointMerge op{models(base, all, std::get<2>(out)),
                                    weights.data(),
                                    thresholds.data(),
                                    cutoffs.data(),
                                    start,
                                    normalize,
                                    scale,
                                    output(out),
                                    workspace.get()};
    uint64_t num_nonfinite = 0;
    run("disjoint_merge", [&] { return pymerge::disjoint_merge(op, &num_nonfinite); });
    return num_nonfinite;
}

uint64_t convert(const View& out, const View& view) {
    require_equal_counts("convert", std::get<2>(out), {view});
    uint64_t num_nonfinite = 0;
    run("convert", [&] { return pymerge::convert(output(out), input(view), std::get<2>(view), &num_nonfinite); });
    return num_nonfinite;
}

uint64_t count_nonfinite(const View& view) {
    uint64_t num_nonfinite = 0;
    run("count_nonfinite", [&] { return pymerge::count_nonfinite(input(view), std::get<2>(view), &num_nonfinite); });
    return num_nonfinite;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const char* const* name = pymerge::available_isas(); *name; ++name) names.emplace_back(*name);
    return names;
}

}  // namespace

void bind_ops(py::module_& module) {
    using namespace py::literals;
    module.def("axpy_n", &axpy_n, "out"_a, "base"_a, "inputs"_a, "weights"_a, "divisor"_a, "scale"_a);
    module.def("magnitude_sample", &magnitude_sample, "base"_a, "models"_a, "num"_a, "start"_a, "group"_a, "stride"_a,
               "keys"_a, "num_sampled"_a);
    module.def("num_sampled", &num_sampled, "start"_a, "num"_a, "group"_a, "stride"_a);
    module.def("bracket_count", &bracket_count, "base"_a, "models"_a, "num"_a, "low"_a, "high"_a, "counts"_a,
               "candidates"_a, "capacity"_a);
    module.def("magnitude_histogram", &magnitude_histogram, "base"_a, "models"_a, "num"_a, "shift"_a, "prefix"_a,
               "prefix_shift"_a, "counts"_a, "num_bins"_a);
    module.def("locate_equal", &locate_equal, "base"_a, "model"_a, "key"_a, "nth"_a);
    module.def("disjoint_merge", &disjoint_merge, "out"_a, "base"_a, "models"_a, "weights"_a, "thresholds"_a,
               "cutoffs"_a, "start"_a, "normalize"_a, "scale"_a);
    module.def("convert", &convert, "out"_a, "input"_a);
    module.def("count_nonfinite", &count_nonfinite, "input"_a);
    module.def("isa", &pymerge::isa);
    module.def("available_isas", &available_isas);
    module.def("use_isa", &pymerge::use_isa, "name"_a);
}

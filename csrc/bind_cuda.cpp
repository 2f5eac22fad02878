// Binds the ops of cuda/ops.h and the runtime of cuda/runtime.h, once as pymerge._cuda and once, compiled for the
// host, as pymerge._cuda_emulated. Addresses come as integers, pymerge/ops/cuda.py has checked the arguments; what is
// checked again here keeps a wrong call from touching foreign memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/ops.h"
#include "pymerge/format.h"

namespace py = pybind11;
namespace cuda = pymerge::cuda;

namespace {

// A pymerge.ops.View: address, format code, number of elements.
using View = std::tuple<uint64_t, int32_t, int64_t>;
using Views = std::vector<View>;
using MaybeView = std::optional<View>;
// A pymerge.ops.selection.Keep: threshold, cutoff, ceiling, ceiling_cutoff, draws, seed.
using Keep = std::tuple<int32_t, int64_t, int32_t, int64_t, uint64_t, uint64_t>;
// The address of a float32 array in host memory and its number of elements.
using Floats = std::pair<uint64_t, size_t>;
using Place = std::pair<int, uint64_t>;

cuda::Place place(const Place& at) { return {at.first, at.second}; }

template <class T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

cuda::HostFloats floats(const Floats& array) { return {pointer<const float>(array.first), array.second}; }

void require(bool holds, const char* op, const std::string& what) {
    if (!holds) throw std::invalid_argument(std::string(op) + ": " + what);
}

void require_count(const char* op, const char* what, size_t found, size_t expected) {
    require(found == expected, op,
            "expected " + std::to_string(expected) + " " + what + ", found " + std::to_string(found));
}

cuda::View checked(const char* op, const char* what, const View& view, int64_t num) {
    const auto [address, format, found] = view;
    require(format >= 0 && format <= 5, op, std::string(what) + " has format code " + std::to_string(format));
    require(found == num, op,
            std::string(what) + " has " + std::to_string(found) + " elements, expected " + std::to_string(num));
    if (num > 0) cuda::require_reachable(op, what, address);
    return {address, format, num};
}

cuda::View output(const char* op, const View& view) {
    require(std::get<1>(view) <= 3, op, "cannot round to format code " + std::to_string(std::get<1>(view)));
    return checked(op, "the output", view, std::get<2>(view));
}

cuda::Models models(const char* op, const MaybeView& base, const Views& views, int64_t num) {
    cuda::Models all;
    all.num = num;
    require(!views.empty(), op, "expected at least one model");
    if (base) all.base = checked(op, "the base", *base, num);
    for (const View& view : views) all.views.push_back(checked(op, "a model", view, num));
    return all;
}

int64_t num_of(const Views& views) { return views.empty() ? 0 : std::get<2>(views[0]); }

void require_masks(const char* op, const std::vector<uint64_t>& masks, int64_t num) {
    for (const uint64_t mask : masks) {
        if (num > 0) cuda::require_reachable(op, "a mask", mask);
    }
}

std::vector<pymerge::Keep> keeps(const std::vector<Keep>& all) {
    std::vector<pymerge::Keep> made;
    for (const auto& [threshold, cutoff, ceiling, ceiling_cutoff, draws, seed] : all) {
        pymerge::Keep keep;
        keep.threshold = threshold;
        keep.cutoff = cutoff;
        keep.ceiling = ceiling;
        keep.ceiling_cutoff = ceiling_cutoff;
        keep.draws = draws;
        keep.seed = seed;
        made.push_back(keep);
    }
    return made;
}

// Runs call() without the GIL.
template <class Call>
auto run(Call call) {
    py::gil_scoped_release release;
    return call();
}

uint64_t axpy_n(const View& out, const MaybeView& base, const Views& views, const std::vector<float>& weights,
                float divisor, float scale, bool add_base) {
    const char* op = "axpy_n";
    require_count(op, "weights", weights.size(), views.size());
    const cuda::View target = output(op, out);
    const cuda::Models all = models(op, base, views, target.num);
    return run([&] { return cuda::axpy_n(target, all, weights, divisor, scale, add_base); });
}

uint64_t axpy_grid(const View& out, const MaybeView& base, const Views& views, const Floats& weights, int64_t columns,
                   bool along_rows) {
    const char* op = "axpy_grid";
    const cuda::View target = output(op, out);
    const cuda::Models all = models(op, base, views, target.num);
    require(columns > 0 && target.num % columns == 0, op, "expected whole rows");
    const int64_t stride = along_rows ? target.num / columns : columns;
    require_count(op, "weights", weights.second, views.size() * static_cast<size_t>(stride));
    return run([&] { return cuda::axpy_grid(target, all, floats(weights), columns, along_rows); });
}

uint64_t convert(const View& out, const View& input) {
    const int64_t num = std::get<2>(out);
    const cuda::View source = checked("convert", "the input", input, num);
    const bool copies = std::get<1>(out) == std::get<1>(input);
    const cuda::View target = copies ? checked("convert", "the output", out, num) : output("convert", out);
    return run([&] { return cuda::convert(target, source); });
}

uint64_t count_nonfinite(const View& input) {
    const cuda::View source = checked("count_nonfinite", "the input", input, std::get<2>(input));
    return run([&] { return cuda::count_nonfinite(source); });
}

cuda::Disjoint disjoint(const char* op, const MaybeView& base, const Views& views, const std::vector<float>& weights,
                        const std::vector<Keep>& all_keeps, int64_t start) {
    cuda::Disjoint made;
    made.models = models(op, base, views, num_of(views));
    require_count(op, "weights", weights.size(), views.size());
    require_count(op, "keeps", all_keeps.size(), views.size());
    made.weights = weights;
    made.keeps = keeps(all_keeps);
    made.start = start;
    return made;
}

void set_election(const char* op, cuda::Disjoint* made, int32_t elect, const std::vector<float>& factors) {
    require(elect >= 0 && elect <= 2, op, "there is no such election");
    if (!factors.empty()) require_count(op, "factors", factors.size(), made->models.views.size());
    made->elect = static_cast<pymerge::Elect>(elect);
    made->factors = factors;
}

uint64_t disjoint_merge(const View& out, const MaybeView& base, const Views& views, const std::vector<float>& weights,
                        const std::vector<Keep>& all_keeps, int64_t start, int32_t elect, int32_t zero_sign,
                        int32_t combine, const std::vector<float>& factors, float divisor, float scale,
                        const MaybeView& score, bool deltas) {
    const char* op = "disjoint_merge";
    const cuda::View target = output(op, out);
    cuda::Disjoint made = disjoint(op, base, views, weights, all_keeps, start);
    require_count(op, "elements in the output", static_cast<size_t>(target.num), static_cast<size_t>(made.models.num));
    set_election(op, &made, elect, factors);
    require(combine >= 0 && combine <= 3, op, "there is no such combination");
    made.combine = static_cast<pymerge::Combine>(combine);
    made.zero_sign = zero_sign;
    made.divisor = divisor;
    made.scale = scale;
    made.deltas = deltas;
    if (score) made.score = checked(op, "the score", *score, target.num);
    return run([&] { return cuda::disjoint_merge(target, made); });
}

std::pair<uint64_t, uint64_t> count_votes(const MaybeView& base, const Views& views, const std::vector<float>& weights,
                                          const std::vector<Keep>& all_keeps, int64_t start, int32_t elect,
                                          const std::vector<float>& factors) {
    const char* op = "count_votes";
    cuda::Disjoint made = disjoint(op, base, views, weights, all_keeps, start);
    set_election(op, &made, elect, factors);
    return run([&] { return cuda::count_votes(made); });
}

void kept_sums(const MaybeView& base, const Views& views, const std::vector<Keep>& all_keeps, int64_t start,
               int64_t span, const MaybeView& score, uint64_t sums) {
    const char* op = "kept_sums";
    require(span > 0, op, "expected a span of at least 1");
    cuda::Disjoint made = disjoint(op, base, views, std::vector<float>(views.size()), all_keeps, start);
    if (score) made.score = checked(op, "the score", *score, made.models.num);
    run([&] { cuda::kept_sums(made, span, pointer<double>(sums)); });
}

void gram_n(const MaybeView& base, const Views& views, int64_t span, uint64_t sums) {
    require(span > 0, "gram_n", "expected a span of at least 1");
    const cuda::Models all = models("gram_n", base, views, num_of(views));
    run([&] { cuda::gram_n(all, span, pointer<double>(sums)); });
}

void gram_columns(const MaybeView& base, const Views& views, int64_t columns, uint64_t sums) {
    const cuda::Models all = models("gram_columns", base, views, num_of(views));
    require(columns > 0 && all.num % columns == 0, "gram_columns", "expected whole rows");
    run([&] { cuda::gram_columns(all, columns, pointer<double>(sums)); });
}

void masked_sums(const View& vector, const std::vector<uint64_t>& masks, int64_t span, uint64_t sums) {
    const char* op = "masked_sums";
    require(span > 0, op, "expected a span of at least 1");
    const cuda::View source = checked(op, "the vector", vector, std::get<2>(vector));
    require_masks(op, masks, source.num);
    run([&] { cuda::masked_sums(source, masks, span, pointer<double>(sums)); });
}

void magnitude_sample(const MaybeView& base, const Views& views, int64_t start, int64_t group, int64_t stride,
                      int64_t num_sampled, uint64_t keys) {
    const char* op = "magnitude_sample";
    require(group > 0 && stride > 0 && group <= INT64_MAX / stride, op, "expected group and stride of at least 1");
    const cuda::Models all = models(op, base, views, num_of(views));
    require(num_sampled <= all.num, op, "more elements sampled than there are");
    run([&] { cuda::magnitude_sample(all, start, group, stride, num_sampled, pointer<int32_t>(keys)); });
}

std::vector<py::bytes> bracket_count(const MaybeView& base, const Views& views, const std::vector<int32_t>& low,
                                     const std::vector<int32_t>& high, int64_t capacity, uint64_t counts) {
    const char* op = "bracket_count";
    require_count(op, "lower ends", low.size(), views.size());
    require_count(op, "upper ends", high.size(), views.size());
    const cuda::Models all = models(op, base, views, num_of(views));
    std::vector<std::vector<int32_t>> candidates;
    run([&] { cuda::bracket_count(all, low, high, capacity, pointer<int64_t>(counts), &candidates); });
    std::vector<py::bytes> keys;
    for (const std::vector<int32_t>& found : candidates) {
        keys.emplace_back(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(int32_t));
    }
    return keys;
}

void magnitude_histogram(const MaybeView& base, const Views& views, int32_t shift,
                         const std::optional<std::vector<int32_t>>& prefix, int32_t prefix_shift, uint64_t counts,
                         int64_t num_bins) {
    const char* op = "magnitude_histogram";
    if (prefix) require_count(op, "prefixes", prefix->size(), views.size());
    require(
        shift >= 0 && shift <= prefix_shift && prefix_shift <= 31 && num_bins == int64_t{1} << (prefix_shift - shift),
        op, "bins and shifts do not fit");
    const cuda::Models all = models(op, base, views, num_of(views));
    run([&] {
        cuda::magnitude_histogram(all, shift, prefix ? &*prefix : nullptr, prefix_shift, pointer<uint64_t>(counts),
                                  num_bins);
    });
}

std::pair<int64_t, uint64_t> locate_equal(const MaybeView& base, const View& model, int32_t key, uint64_t nth) {
    const cuda::Models all = models("locate_equal", base, {model}, std::get<2>(model));
    return run([&] { return cuda::locate_equal(all, key, nth); });
}

uint64_t row_sparsify(const View& out, const MaybeView& base, const View& model, int64_t start, int64_t columns,
                      int64_t first, int64_t last, int64_t draws_low, int64_t draws_span, uint64_t seed, bool rescale) {
    const char* op = "row_sparsify";
    const cuda::View target = output(op, out);
    const cuda::Models all = models(op, base, {model}, target.num);
    require(columns > 0 && columns <= INT32_MAX && target.num % columns == 0, op, "expected whole rows");
    return run([&] {
        return cuda::row_sparsify(target, all, start, columns, first, last, draws_low, draws_span, seed, rescale);
    });
}

void row_divergence(const View& base, const View& model, int64_t columns, uint64_t divergences) {
    const cuda::Models all = models("row_divergence", base, {model}, std::get<2>(model));
    require(columns > 0 && all.num % columns == 0, "row_divergence", "expected whole rows");
    run([&] { cuda::row_divergence(all, columns, pointer<float>(divergences)); });
}

uint64_t row_scores(const View& out, const View& base, const View& model, const Floats& factors, int64_t columns) {
    const char* op = "row_scores";
    const cuda::View target = output(op, out);
    const cuda::Models all = models(op, base, {model}, target.num);
    require(columns > 0, op, "expected columns");
    require_count(op, "factors", factors.second, static_cast<size_t>(target.num / columns));
    return run([&] { return cuda::row_scores(target, all, floats(factors), columns); });
}

uint64_t select_by_score(const View& out, const View& base, const View& model, const Floats& factors, float threshold,
                         int64_t columns) {
    const char* op = "select_by_score";
    const cuda::View target = output(op, out);
    const cuda::Models all = models(op, base, {model}, target.num);
    require(columns > 0, op, "expected columns");
    require_count(op, "factors", factors.second, static_cast<size_t>(target.num / columns));
    return run([&] { return cuda::select_by_score(target, all, floats(factors), threshold, columns); });
}

uint64_t lora_add(const View& out, const View& weight, const Floats& left, const Floats& right, int64_t start,
                  int64_t columns, int64_t rank, float scale, const Floats& factors) {
    const char* op = "lora_add";
    const cuda::View target = output(op, out);
    const cuda::View source = checked(op, "the weight", weight, target.num);
    require(columns > 0 && rank > 0 && start >= 0, op, "expected columns, a rank and a start");
    require_count(op, "elements of right", right.second, static_cast<size_t>(rank * columns));
    const int64_t num_rows = static_cast<int64_t>(left.second) / rank;
    require(start + target.num <= num_rows * columns, op, "more elements than rows");
    require(factors.second == 0 || static_cast<int64_t>(factors.second) == num_rows, op, "expected a factor per row");
    return run([&] {
        return cuda::lora_add(target, source, floats(left), floats(right), start, columns, rank, scale,
                              floats(factors));
    });
}

uint64_t nearswap(const View& out, const View& base, const View& model, float t) {
    const cuda::View target = output("nearswap", out);
    const cuda::Models all = models("nearswap", base, {model}, target.num);
    return run([&] { return cuda::nearswap(target, all, t); });
}

uint64_t variance_score(const View& out, const MaybeView& base, const Views& views) {
    const cuda::View target = output("variance_score", out);
    const cuda::Models all = models("variance_score", base, views, target.num);
    return run([&] { return cuda::variance_score(target, all); });
}

std::vector<int64_t> overlap_counts(const View& base, const Views& views, float epsilon) {
    const cuda::Models all = models("overlap_counts", base, views, std::get<2>(base));
    return run([&] { return cuda::overlap_counts(all, epsilon); });
}

uint64_t overlap_merge(const View& out, const View& base, const Views& views, const std::vector<float>& factors,
                       float epsilon) {
    const char* op = "overlap_merge";
    require_count(op, "factors", factors.size(), views.size());
    const cuda::View target = output(op, out);
    const cuda::Models all = models(op, base, views, target.num);
    return run([&] { return cuda::overlap_merge(target, all, factors, epsilon); });
}

uint64_t magmax_merge(const View& out, const View& base, const Views& views, float scale) {
    const cuda::View target = output("magmax_merge", out);
    const cuda::Models all = models("magmax_merge", base, views, target.num);
    return run([&] { return cuda::magmax_merge(target, all, scale); });
}

uint64_t consensus_merge(const View& out, const View& base, const Views& views, const std::vector<float>& thresholds,
                         int32_t minimum, float scale) {
    const char* op = "consensus_merge";
    require_count(op, "thresholds", thresholds.size(), views.size());
    const cuda::View target = output(op, out);
    const cuda::Models all = models(op, base, views, target.num);
    return run([&] { return cuda::consensus_merge(target, all, thresholds, minimum, scale); });
}

void tall_masks(const std::vector<uint64_t>& masks, const View& base, const Views& views,
                const std::vector<float>& thresholds) {
    const char* op = "tall_masks";
    require_count(op, "masks", masks.size(), views.size());
    require_count(op, "thresholds", thresholds.size(), views.size());
    const cuda::Models all = models(op, base, views, std::get<2>(base));
    require_masks(op, masks, all.num);
    run([&] { cuda::tall_masks(masks, all, thresholds); });
}

uint64_t elect_max(const View& out, const View& base, const Views& views) {
    const cuda::View target = output("elect_max", out);
    const cuda::Models all = models("elect_max", base, views, target.num);
    return run([&] { return cuda::elect_max(target, all); });
}

void elect_masks(const std::vector<uint64_t>& masks, const View& base, const Views& views) {
    const char* op = "elect_masks";
    require_count(op, "masks", masks.size(), views.size());
    const cuda::Models all = models(op, base, views, std::get<2>(base));
    require_masks(op, masks, all.num);
    run([&] { cuda::elect_masks(masks, all); });
}

uint64_t apply_task(const View& out, const View& base, const View& vector, uint64_t mask, float scale) {
    const cuda::View target = output("apply_task", out);
    const cuda::Models all = models("apply_task", base, {vector}, target.num);
    require_masks("apply_task", {mask}, target.num);
    return run([&] { return cuda::apply_task(target, all, mask, scale); });
}

cuda::PcbRanges ranges(const char* op, const std::vector<float>& lows, const std::vector<float>& highs, int32_t mode,
                       size_t num_models) {
    require_count(op, "lows", lows.size(), num_models);
    require_count(op, "highs", highs.size(), num_models);
    require(mode >= 0 && mode <= 2, op, "there is no such mode");
    return {lows, highs, static_cast<pymerge::PcbMode>(mode)};
}

// numbers: as the fields of Adam.
uint64_t adam_step(const View& theta, const View& first, const View& second, const View& gradient,
                   const std::vector<float>& numbers) {
    const char* op = "adam_step";
    const int64_t num = std::get<2>(theta);
    require_count(op, "numbers", numbers.size(), 5);
    const cuda::View state[] = {output(op, theta), checked(op, "the first moment", first, num),
                                checked(op, "the second moment", second, num),
                                checked(op, "the gradient", gradient, num)};
    for (const cuda::View& view : state) {
        require(view.format == static_cast<int32_t>(pymerge::Format::F32), op, "expected float32 memory");
    }
    const pymerge::Adam adam{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
    return run([&] { return cuda::adam_step(state[0], state[1], state[2], state[3], adam); });
}

uint64_t weighted_mean(const View& out, const Views& views, const Views& weights,
                       const std::vector<float>& coefficients, const std::vector<float>& floors, bool adds_floor) {
    const char* op = "weighted_mean";
    require_count(op, "weights", weights.size(), views.size());
    require_count(op, "coefficients", coefficients.size(), views.size());
    require_count(op, "floors", floors.size(), views.size());
    Views inputs = views;
    inputs.insert(inputs.end(), weights.begin(), weights.end());
    const cuda::View target = output(op, out);
    const cuda::Models all = models(op, std::nullopt, inputs, target.num);
    return run([&] { return cuda::weighted_mean(target, all, coefficients, floors, adds_floor); });
}

uint64_t pcb_score(const View& out, const View& base, const Views& views, size_t index, const std::vector<float>& lows,
                   const std::vector<float>& highs, int32_t mode, int32_t part) {
    const char* op = "pcb_score";
    require(index < views.size(), op, "there is no such model");
    const cuda::PcbRanges made = ranges(op, lows, highs, mode, views.size());
    const cuda::View target = output(op, out);
    const cuda::Models all = models(op, base, views, target.num);
    return run([&] { return cuda::pcb_score(target, all, index, made, part); });
}

uint64_t pcb_merge(const View& out, const View& base, const Views& views, const std::vector<float>& lows,
                   const std::vector<float>& highs, const std::vector<float>& cuts, const std::vector<float>& tops,
                   const std::vector<float>& weights, int32_t mode, float scale) {
    const char* op = "pcb_merge";
    const cuda::PcbRanges made = ranges(op, lows, highs, mode, views.size());
    require_count(op, "cuts", cuts.size(), views.size());
    require_count(op, "tops", tops.size(), views.size());
    require_count(op, "weights", weights.size(), views.size());
    const cuda::View target = output(op, out);
    const cuda::Models all = models(op, base, views, target.num);
    return run([&] { return cuda::pcb_merge(target, all, made, cuts, tops, weights, scale); });
}

py::dict device_info(int device) {
    using namespace py::literals;
    const cuda::DeviceInfo info = run([&] { return cuda::device_info(device); });
    return py::dict("name"_a = info.name, "capability"_a = py::make_tuple(info.major, info.minor),
                    "num_multiprocessors"_a = info.num_multiprocessors, "shared_bytes"_a = info.shared_bytes,
                    "total_bytes"_a = info.total_bytes, "free_bytes"_a = info.free_bytes);
}

void bind_runtime(py::module_& module) {
    using namespace py::literals;
    using Release = py::call_guard<py::gil_scoped_release>;
    module.def("is_emulated", &cuda::is_emulated);
    module.def("why_not", &cuda::why_not, Release());
    module.def("num_devices", &cuda::num_devices, Release());
    module.def("device_info", &device_info, "device"_a);
    module.def("allocate", &cuda::allocate, "device"_a, "num_bytes"_a, Release());
    module.def("release", &cuda::release, "device"_a, "address"_a, Release());
    module.def("register_host", &cuda::register_host, "address"_a, "num_bytes"_a, Release());
    module.def("unregister_host", &cuda::unregister_host, "address"_a, Release());
    module.def("make_stream", &cuda::make_stream, "device"_a, Release());
    module.def("destroy_stream", [](const Place& at) { cuda::destroy_stream(place(at)); }, "place"_a, Release());
    module.def(
        "wait_for", [](const Place& at, const Place& other) { cuda::wait_for(place(at), place(other)); }, "place"_a,
        "other"_a, Release());
    module.def("synchronize", [](const Place& at) { cuda::synchronize(place(at)); }, "place"_a, Release());
    module.def(
        "copy",
        [](const Place& at, uint64_t target, uint64_t source, uint64_t num_bytes) {
            cuda::copy(place(at), target, source, num_bytes);
        },
        "place"_a, "target"_a, "source"_a, "num_bytes"_a, Release());
    module.def("use", [](const Place& at) { cuda::use(place(at)); }, "place"_a, Release());
}

void bind_ops(py::module_& module) {
    using namespace py::literals;
    module.def("axpy_n", &axpy_n, "out"_a, "base"_a, "inputs"_a, "weights"_a, "divisor"_a, "scale"_a, "add_base"_a);
    module.def("axpy_grid", &axpy_grid, "out"_a, "base"_a, "inputs"_a, "weights"_a, "columns"_a, "along_rows"_a);
    module.def("convert", &convert, "out"_a, "input"_a);
    module.def("count_nonfinite", &count_nonfinite, "input"_a);
    module.def("disjoint_merge", &disjoint_merge, "out"_a, "base"_a, "models"_a, "weights"_a, "keeps"_a, "start"_a,
               "elect"_a, "zero_sign"_a, "combine"_a, "factors"_a, "divisor"_a, "scale"_a, "score"_a, "deltas"_a);
    module.def("count_votes", &count_votes, "base"_a, "models"_a, "weights"_a, "keeps"_a, "start"_a, "elect"_a,
               "factors"_a);
    module.def("kept_sums", &kept_sums, "base"_a, "models"_a, "keeps"_a, "start"_a, "span"_a, "score"_a, "sums"_a);
    module.def("gram_n", &gram_n, "base"_a, "inputs"_a, "span"_a, "sums"_a);
    module.def("gram_columns", &gram_columns, "base"_a, "inputs"_a, "columns"_a, "sums"_a);
    module.def("masked_sums", &masked_sums, "vector"_a, "masks"_a, "span"_a, "sums"_a);
    module.def("magnitude_sample", &magnitude_sample, "base"_a, "models"_a, "start"_a, "group"_a, "stride"_a,
               "num_sampled"_a, "keys"_a);
    module.def("bracket_count", &bracket_count, "base"_a, "models"_a, "low"_a, "high"_a, "capacity"_a, "counts"_a);
    module.def("magnitude_histogram", &magnitude_histogram, "base"_a, "models"_a, "shift"_a, "prefix"_a,
               "prefix_shift"_a, "counts"_a, "num_bins"_a);
    module.def("locate_equal", &locate_equal, "base"_a, "model"_a, "key"_a, "nth"_a);
    module.def("row_sparsify", &row_sparsify, "out"_a, "base"_a, "model"_a, "start"_a, "columns"_a, "first"_a, "last"_a,
               "draws_low"_a, "draws_span"_a, "seed"_a, "rescale"_a);
    module.def("row_divergence", &row_divergence, "base"_a, "model"_a, "columns"_a, "divergences"_a);
    module.def("row_scores", &row_scores, "out"_a, "base"_a, "model"_a, "factors"_a, "columns"_a);
    module.def("select_by_score", &select_by_score, "out"_a, "base"_a, "model"_a, "factors"_a, "threshold"_a,
               "columns"_a);
    module.def("lora_add", &lora_add, "out"_a, "weight"_a, "left"_a, "right"_a, "start"_a, "columns"_a, "rank"_a,
               "scale"_a, "factors"_a);
    module.def("nearswap", &nearswap, "out"_a, "base"_a, "model"_a, "t"_a);
    module.def("variance_score", &variance_score, "out"_a, "base"_a, "models"_a);
    module.def("overlap_counts", &overlap_counts, "base"_a, "models"_a, "epsilon"_a);
    module.def("overlap_merge", &overlap_merge, "out"_a, "base"_a, "models"_a, "factors"_a, "epsilon"_a);
    module.def("magmax_merge", &magmax_merge, "out"_a, "base"_a, "models"_a, "scale"_a);
    module.def("consensus_merge", &consensus_merge, "out"_a, "base"_a, "models"_a, "thresholds"_a, "minimum"_a,
               "scale"_a);
    module.def("tall_masks", &tall_masks, "masks"_a, "base"_a, "models"_a, "thresholds"_a);
    module.def("elect_max", &elect_max, "out"_a, "base"_a, "models"_a);
    module.def("elect_masks", &elect_masks, "masks"_a, "base"_a, "models"_a);
    module.def("apply_task", &apply_task, "out"_a, "base"_a, "vector"_a, "mask"_a, "scale"_a);
    module.def("adam_step", &adam_step, "theta"_a, "first"_a, "second"_a, "gradient"_a, "numbers"_a);
    module.def("weighted_mean", &weighted_mean, "out"_a, "models"_a, "weights"_a, "coefficients"_a, "floors"_a,
               "adds_floor"_a);
    module.def("pcb_score", &pcb_score, "out"_a, "base"_a, "models"_a, "index"_a, "lows"_a, "highs"_a, "mode"_a,
               "part"_a);
    module.def("pcb_merge", &pcb_merge, "out"_a, "base"_a, "models"_a, "lows"_a, "highs"_a, "cuts"_a, "tops"_a,
               "weights"_a, "mode"_a, "scale"_a);
}

}  // namespace

PYBIND11_MODULE(PYMERGE_CUDA_MODULE, module) {
    module.doc() = "The ops of pymerge on CUDA devices, or emulated on the host";
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const cuda::Failure& failure) {
            const py::object type = py::module_::import("pymerge.errors").attr("BackendError");
            PyErr_SetString(type.ptr(), failure.what());
        }
    });
    bind_runtime(module);
    bind_ops(module);
}

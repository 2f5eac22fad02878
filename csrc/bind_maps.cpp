// Binds sums over spans, ops on rows and the maps of single methods.
#include "bind_ops.h"

namespace binding {
namespace {

size_t num_pairs(size_t num_models) { return num_models * (num_models + 1) / 2; }

size_t num_spans(size_t num, size_t span) { return span ? (num + span - 1) / span : 0; }

// ---- Sums

void kept_sums(const std::optional<View>& base, const Views& views, size_t num,
               const std::vector<KeepTuple>& keep_tuples, int64_t start, size_t span, const std::optional<View>& score,
               uintptr_t sums) {
    const char* name = "kept_sums";
    const ModelSet set(name, base, views, num, 0);
    if (score) require_count(name, "elements in the score", count_of(*score), num);
    const auto all_keeps = keeps(name, keep_tuples, views.size());
    require_memory(name, "sums", sums, num_spans(num, span));
    const auto lanes = scratch<double>(views.size() * 3 * pymerge::kSumLanes);
    run_measure(name, pymerge::kept_sums,
                {set.models, optional_input(score), all_keeps.data(), start, span, pointer<double>(sums), lanes.get()});
}

void gram_n(const std::optional<View>& base, const Views& views, size_t num, size_t span, uintptr_t sums) {
    const ModelSet set("gram_n", base, views, num, 1);
    require_memory("gram_n", "sums", sums, num_spans(num, span));
    const auto lanes = scratch<double>(num_pairs(views.size()) * pymerge::kSumLanes);
    run_measure("gram_n", pymerge::gram_n, {set.models, span, pointer<double>(sums), lanes.get()});
}

void gram_columns(const std::optional<View>& base, const Views& views, size_t num, size_t columns, uintptr_t sums) {
    const ModelSet set("gram_columns", base, views, num, pymerge::kGramRows);
    require_memory("gram_columns", "sums", sums, columns);
    run_measure("gram_columns", pymerge::gram_columns, {set.models, columns, pointer<double>(sums)});
}

void masked_sums(const View& vector, const std::vector<uintptr_t>& masks, size_t span, uintptr_t sums) {
    const char* name = "masked_sums";
    std::vector<const uint8_t*> bits;
    for (const uintptr_t mask : masks) {
        require_memory(name, "bits", mask, count_of(vector));
        bits.push_back(pointer<const uint8_t>(mask));
    }
    require_memory(name, "sums", sums, num_spans(count_of(vector), span));
    const auto lanes = scratch<double>(masks.size() * pymerge::kSumLanes);
    run_measure(name, pymerge::masked_sums,
                {input(vector), count_of(vector), bits.data(), bits.size(), span, pointer<double>(sums), lanes.get()});
}

// ---- Rows

uint64_t row_sparsify(const View& out, const std::optional<View>& base, const View& model, int64_t start,
                      size_t columns, int64_t first, int64_t last, int64_t draws_low, int64_t draws_span, uint64_t seed,
                      bool rescale) {
    const char* name = "row_sparsify";
    require_equal_counts(name, count_of(out), {model}, base);
    // Rows longer than the memory are refused here; the op refuses all others that are not whole.
    const size_t longest = count_of(out) ? count_of(out) : 1;
    if (columns > longest) require_count(name, "columns at most", columns, longest);
    const auto memory = scratch<unsigned char>(pymerge::row_sparsify_scratch(columns));
    pymerge::RowSparsify op;
    op.base = optional_input(base);
    op.model = input(model);
    op.num = count_of(out);
    op.start = start;
    op.columns = columns;
    op.first = first;
    op.last = last;
    op.draws_low = draws_low;
    op.draws_span = draws_span;
    op.seed = seed;
    op.rescale = rescale;
    op.out = output(out);
    op.scratch = memory.get();
    return run_write(name, pymerge::row_sparsify, op);
}

void row_divergence(const View& base, const View& model, size_t columns, uintptr_t divergences) {
    const char* name = "row_divergence";
    require_equal_counts(name, count_of(model), {base});
    require_memory(name, "divergences", divergences, count_of(model));
    run_measure(name, pymerge::row_divergence,
                {input(base), input(model), count_of(model), columns, pointer<float>(divergences)});
}

uint64_t row_scores(const View& out, const View& base, const View& model, uintptr_t factors, size_t columns) {
    const ModelSet set("row_scores", base, {model}, count_of(out), 0);
    require_memory("row_scores", "factors", factors, count_of(out));
    return run_write("row_scores", pymerge::row_scores,
                     {set.models, pointer<const float>(factors), columns, 0.0f, output(out)});
}

uint64_t select_by_score(const View& out, const View& base, const View& model, uintptr_t factors, size_t columns,
                         float threshold) {
    const ModelSet set("select_by_score", base, {model}, count_of(out), 0);
    require_memory("select_by_score", "factors", factors, count_of(out));
    return run_write("select_by_score", pymerge::select_by_score,
                     {set.models, pointer<const float>(factors), columns, threshold, output(out)});
}

uint64_t lora_add(const View& out, const View& weight, uintptr_t left, uintptr_t right, int64_t start, size_t rank,
                  size_t columns, float scale, uintptr_t factors) {
    const char* name = "lora_add";
    require_equal_counts(name, count_of(out), {weight});
    require_memory(name, "entries of the left factor", left, count_of(out));
    require_memory(name, "entries of the right factor", right, count_of(out));
    return run_write(name, pymerge::lora_add,
                     {input(weight), count_of(out), start, pointer<const float>(left), pointer<const float>(right),
                      rank, columns, scale, pointer<const float>(factors), output(out)});
}

// ---- Maps of single methods

// Fills what all maps share.
pymerge::ElementMap element_map(const ModelSet& set, const View& out) {
    pymerge::ElementMap op;
    op.models = set.models;
    op.out = output(out);
    return op;
}

uint64_t nearswap(const View& out, const View& base, const View& model, float t) {
    const ModelSet set("nearswap", base, {model}, count_of(out), 0);
    pymerge::ElementMap op = element_map(set, out);
    op.t = t;
    return run_write("nearswap", pymerge::nearswap, op);
}

uint64_t variance_score(const View& out, const std::optional<View>& base, const Views& views) {
    const ModelSet set("variance_score", base, views, count_of(out), 1);
    return run_write("variance_score", pymerge::variance_score, element_map(set, out));
}

void overlap_counts(const View& base, const Views& views, float epsilon, uintptr_t counts) {
    const ModelSet set("overlap_counts", base, views, count_of(base), 1);
    require_memory("overlap_counts", "counts", counts, views.size());
    pymerge::ElementMap op;
    op.models = set.models;
    op.epsilon = epsilon;
    op.counts = pointer<int64_t>(counts);
    run_measure("overlap_counts", pymerge::overlap_counts, op);
}

uint64_t overlap_merge(const View& out, const View& base, const Views& views, const Numbers& factors, float epsilon) {
    require_count("overlap_merge", "factors", factors.size(), views.size());
    const ModelSet set("overlap_merge", base, views, count_of(out), 1);
    pymerge::ElementMap op = element_map(set, out);
    op.limits = factors.data();
    op.epsilon = epsilon;
    return run_write("overlap_merge", pymerge::overlap_merge, op);
}

uint64_t magmax_merge(const View& out, const View& base, const Views& views, float scale) {
    const ModelSet set("magmax_merge", base, views, count_of(out), 1);
    pymerge::ElementMap op = element_map(set, out);
    op.scale = scale;
    return run_write("magmax_merge", pymerge::magmax_merge, op);
}

uint64_t consensus_merge(const View& out, const View& base, const Views& views, const Numbers& thresholds,
                         int32_t minimum, float scale) {
    require_count("consensus_merge", "thresholds", thresholds.size(), views.size());
    const ModelSet set("consensus_merge", base, views, count_of(out), 1);
    pymerge::ElementMap op = element_map(set, out);
    op.limits = thresholds.data();
    op.minimum = minimum;
    op.scale = scale;
    return run_write("consensus_merge", pymerge::consensus_merge, op);
}

std::vector<uint8_t*> masks_of(const char* op, const std::vector<uintptr_t>& masks, size_t num_models, size_t num) {
    require_count(op, "masks", masks.size(), num_models);
    std::vector<uint8_t*> all;
    for (const uintptr_t mask : masks) {
        require_memory(op, "bits", mask, num);
        all.push_back(pointer<uint8_t>(mask));
    }
    return all;
}

void tall_masks(const std::vector<uintptr_t>& masks, const View& base, const Views& views, const Numbers& thresholds) {
    require_count("tall_masks", "thresholds", thresholds.size(), views.size());
    const ModelSet set("tall_masks", base, views, count_of(base), 1);
    const auto all = masks_of("tall_masks", masks, views.size(), count_of(base));
    pymerge::ElementMap op;
    op.models = set.models;
    op.limits = thresholds.data();
    op.masks = all.data();
    run_measure("tall_masks", pymerge::tall_masks, op);
}

void elect_masks(const std::vector<uintptr_t>& masks, const View& base, const Views& views) {
    const ModelSet set("elect_masks", base, views, count_of(base), 1);
    const auto all = masks_of("elect_masks", masks, views.size(), count_of(base));
    pymerge::ElementMap op;
    op.models = set.models;
    op.masks = all.data();
    run_measure("elect_masks", pymerge::elect_masks, op);
}

uint64_t elect_max(const View& out, const View& base, const Views& views) {
    const ModelSet set("elect_max", base, views, count_of(out), 1);
    return run_write("elect_max", pymerge::elect_max, element_map(set, out));
}

uint64_t apply_task(const View& out, const View& base, const View& vector, uintptr_t mask, float scale) {
    const ModelSet set("apply_task", base, {vector}, count_of(out), 0);
    require_memory("apply_task", "bits", mask, count_of(out));
    pymerge::ElementMap op = element_map(set, out);
    op.mask = pointer<const uint8_t>(mask);
    op.scale = scale;
    return run_write("apply_task", pymerge::apply_task, op);
}

pymerge::Pcb pcb(const char* op, const Numbers& lows, const Numbers& highs, size_t num_models, int32_t mode) {
    require_count(op, "lower ends", lows.size(), num_models);
    require_count(op, "upper ends", highs.size(), num_models);
    if (mode < 0 || mode > static_cast<int32_t>(pymerge::PcbMode::Pairwise)) {
        throw std::invalid_argument(std::string(op) + ": unknown mode " + std::to_string(mode));
    }
    return {lows.data(), highs.data(), num_models, static_cast<pymerge::PcbMode>(mode)};
}

uint64_t pcb_score(const View& out, const View& base, const Views& views, size_t index, const Numbers& lows,
                   const Numbers& highs, int32_t mode, float part) {
    const ModelSet set("pcb_score", base, views, count_of(out), 1);
    if (index >= views.size()) require_count("pcb_score", "models at least", views.size(), index + 1);
    pymerge::ElementMap op = element_map(set, out);
    op.pcb = pcb("pcb_score", lows, highs, views.size(), mode);
    op.index = index;
    op.part = part;
    return run_write("pcb_score", pymerge::pcb_score, op);
}

uint64_t pcb_merge(const View& out, const View& base, const Views& views, const Numbers& lows, const Numbers& highs,
                   const Numbers& cuts, const Numbers& tops, const Numbers& weights, int32_t mode, float scale) {
    const ModelSet set("pcb_merge", base, views, count_of(out), 1);
    require_count("pcb_merge", "cuts", cuts.size(), views.size());
    require_count("pcb_merge", "tops", tops.size(), views.size());
    require_count("pcb_merge", "weights", weights.size(), views.size());
    pymerge::ElementMap op = element_map(set, out);
    op.pcb = pcb("pcb_merge", lows, highs, views.size(), mode);
    op.cuts = cuts.data();
    op.tops = tops.data();
    op.weights = weights.data();
    op.scale = scale;
    return run_write("pcb_merge", pymerge::pcb_merge, op);
}

// numbers: as the fields of Adam.
uint64_t adam_step(const View& theta, const View& first, const View& second, const View& gradient,
                   const Numbers& numbers) {
    const char* name = "adam_step";
    const size_t num = count_of(theta);
    require_equal_counts(name, num, {first, second, gradient});
    require_count(name, "numbers", numbers.size(), 5);
    for (const View& view : {theta, first, second, gradient}) {
        require_memory(name, "elements", std::get<0>(view), num);
        require_count(name, "as format code", static_cast<size_t>(std::get<1>(view)),
                      static_cast<size_t>(pymerge::Format::F32));
    }
    return run_write(name, pymerge::adam_step,
                     {pointer<float>(std::get<0>(theta)),
                      pointer<float>(std::get<0>(first)),
                      pointer<float>(std::get<0>(second)),
                      pointer<const float>(std::get<0>(gradient)),
                      num,
                      {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]}});
}

uint64_t weighted_mean(const View& out, const Views& views, const Views& weights, const Numbers& coefficients,
                       const Numbers& floors, bool adds_floor) {
    const char* name = "weighted_mean";
    require_count(name, "weights", weights.size(), views.size());
    require_count(name, "coefficients", coefficients.size(), views.size());
    require_count(name, "floors", floors.size(), views.size());
    Views all = views;
    all.insert(all.end(), weights.begin(), weights.end());
    const ModelSet set(name, std::nullopt, all, count_of(out), 1);
    pymerge::ElementMap op = element_map(set, out);
    op.weights = coefficients.data();
    op.floors = floors.data();
    op.adds_floor = adds_floor;
    return run_write(name, pymerge::weighted_mean, op);
}

}  // namespace
}  // namespace binding

void bind_maps(pybind11::module_& module) {
    using namespace binding;
    using namespace py::literals;
    module.def("kept_sums", &kept_sums, "base"_a, "models"_a, "num"_a, "keeps"_a, "start"_a, "span"_a, "score"_a,
               "sums"_a);
    module.def("gram_n", &gram_n, "base"_a, "inputs"_a, "num"_a, "span"_a, "sums"_a);
    module.def("gram_columns", &gram_columns, "base"_a, "inputs"_a, "num"_a, "columns"_a, "sums"_a);
    module.def("masked_sums", &masked_sums, "vector"_a, "masks"_a, "span"_a, "sums"_a);
    module.def("row_sparsify", &row_sparsify, "out"_a, "base"_a, "model"_a, "start"_a, "columns"_a, "first"_a, "last"_a,
               "draws_low"_a, "draws_span"_a, "seed"_a, "rescale"_a);
    module.def("row_divergence", &row_divergence, "base"_a, "model"_a, "columns"_a, "divergences"_a);
    module.def("row_scores", &row_scores, "out"_a, "base"_a, "model"_a, "factors"_a, "columns"_a);
    module.def("select_by_score", &select_by_score, "out"_a, "base"_a, "model"_a, "factors"_a, "columns"_a,
               "threshold"_a);
    module.def("lora_add", &lora_add, "out"_a, "weight"_a, "left"_a, "right"_a, "start"_a, "rank"_a, "columns"_a,
               "scale"_a, "factors"_a);
    module.def("nearswap", &nearswap, "out"_a, "base"_a, "model"_a, "t"_a);
    module.def("variance_score", &variance_score, "out"_a, "base"_a, "models"_a);
    module.def("overlap_counts", &overlap_counts, "base"_a, "models"_a, "epsilon"_a, "counts"_a);
    module.def("overlap_merge", &overlap_merge, "out"_a, "base"_a, "models"_a, "factors"_a, "epsilon"_a);
    module.def("magmax_merge", &magmax_merge, "out"_a, "base"_a, "models"_a, "scale"_a);
    module.def("consensus_merge", &consensus_merge, "out"_a, "base"_a, "models"_a, "thresholds"_a, "minimum"_a,
               "scale"_a);
    module.def("tall_masks", &tall_masks, "masks"_a, "base"_a, "models"_a, "thresholds"_a);
    module.def("elect_max", &elect_max, "out"_a, "base"_a, "models"_a);
    module.def("elect_masks", &elect_masks, "masks"_a, "base"_a, "models"_a);
    module.def("apply_task", &apply_task, "out"_a, "base"_a, "vector"_a, "mask"_a, "scale"_a);
    module.def("pcb_score", &pcb_score, "out"_a, "base"_a, "models"_a, "index"_a, "lows"_a, "highs"_a, "mode"_a,
               "part"_a);
    module.def("adam_step", &adam_step, "theta"_a, "first"_a, "second"_a, "gradient"_a, "numbers"_a);
    module.def("weighted_mean", &weighted_mean, "out"_a, "models"_a, "weights"_a, "coefficients"_a, "floors"_a,
               "adds_floor"_a);
    module.def("pcb_merge", &pcb_merge, "out"_a, "base"_a, "models"_a, "lows"_a, "highs"_a, "cuts"_a, "tops"_a,
               "weights"_a, "mode"_a, "scale"_a);
}

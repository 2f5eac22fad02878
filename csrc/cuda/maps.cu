// Weighted sums, conversion, row scores, low-rank additions. Each element is read once and written once.
#include "map.h"

namespace pymerge {
namespace cuda {
namespace {

struct axpy_n_map : PlainMap {
    uint32_t weights;
    float divisor;
    float scale;
    bool add_base;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        const float* w = scene.template table<float>(weights);
        const Lanes::F base = scene.base();
        const Lanes::F acc = weighted_sum<Lanes>(
            scene.num_models(), [&](size_t i) { return scene.delta(i, base); },
            [&](size_t i) { return Lanes::set(w[i]); });
        const Lanes::F total = divided_and_scaled<Lanes>(acc, divisor, scale);
        return add_base && scene.inputs.has_base ? Lanes::add(base, total) : total;
    }
};

// The row and the column of each lane.
template <class Chunk>
PM_DEVICE void rows_and_columns(const Chunk& chunk, int64_t start, int64_t columns, int64_t (&rows)[kLanes],
                                int64_t (&places)[kLanes]) {
    int64_t row = (start + chunk.begin) / columns;
    int64_t column = start + chunk.begin - row * columns;
    PM_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
        rows[lane] = row;
        places[lane] = column;
        // Lanes behind the end stay within the tables.
        if (lane + 1 < chunk.length && ++column == columns) {
            column = 0;
            ++row;
        }
    }
}

struct axpy_grid_map : PlainMap {
    const float* weights;  // [num_models, stride]
    int64_t stride;
    int64_t columns;
    bool along_rows;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        int64_t rows[kLanes];
        int64_t places[kLanes];
        rows_and_columns(scene.chunk, 0, columns, rows, places);
        const Lanes::F base = scene.base();
        const Lanes::F acc = weighted_sum<Lanes>(
            scene.num_models(), [&](size_t i) { return scene.delta(i, base); },
            [&](size_t i) {
                const float* w = weights + static_cast<int64_t>(i) * stride;
                return gather<float>([&](int lane) { return w[along_rows ? rows[lane] : places[lane]]; });
            });
        return scene.inputs.has_base ? Lanes::add(base, acc) : acc;
    }
};

struct convert_map : PlainMap {
    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        return scene.value(0);
    }
};

PM_DEVICE Lanes::F row_factors(const Chunk& chunk, const float* factors, int64_t columns) {
    int64_t rows[kLanes];
    int64_t places[kLanes];
    rows_and_columns(chunk, 0, columns, rows, places);
    return gather<float>([&](int lane) { return factors[rows[lane]]; });
}

struct row_scores_map : PlainMap {
    const float* factors;
    int64_t columns;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        return row_score<Lanes>(scene.delta(0, scene.base()), row_factors(scene.chunk, factors, columns));
    }
};

struct select_by_score_map : PlainMap {
    const float* factors;
    int64_t columns;
    float threshold;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        return pymerge::select_by_score<Lanes>(scene.base(), scene.value(0), row_factors(scene.chunk, factors, columns),
                                               threshold);
    }
};

struct lora_add_map : PlainMap {
    const float* left;     // [rows from first_row on, rank]
    const float* right;    // [rank, columns]
    const float* factors;  // of the rows from first_row on, or nullptr
    int64_t start;
    int64_t first_row;
    int64_t columns;
    int64_t rank;
    float scale;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        int64_t rows[kLanes];
        int64_t places[kLanes];
        rows_and_columns(scene.chunk, start, columns, rows, places);
        const auto product = [&](int64_t k) {
            return gather<float>([&](int lane) {
                return Scalar::mul(left[(rows[lane] - first_row) * rank + k], right[k * columns + places[lane]]);
            });
        };
        Lanes::F acc = product(0);
        for (int64_t k = 1; k < rank; ++k) acc = Lanes::add(acc, product(k));
        const Lanes::F weight = scene.value(0);
        return gather<float>([&](int lane) {
            const float* factor = factors ? factors + (rows[lane] - first_row) : nullptr;
            return pymerge::lora_add<Scalar>(weight.v[lane], acc.v[lane], scale, factor);
        });
    }
};

// Elements that are infinite or NaN in their own format: float64 is judged by its own bits.
struct count_nonfinite_kernel {
    static constexpr int kThreads = 256;
    Source source;
    int64_t num;
    uint64_t* nonfinite;

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        uint32_t* count = block.template shared<uint32_t>();
        block.phase([&](int thread) {
            if (thread == 0) *count = 0;
        });
        block.phase([&](int thread) {
            uint32_t bad = 0;
            const int64_t num_chunks = (num + kLanes - 1) / kLanes;
            for (int64_t number = block.index() * kThreads + thread; number < num_chunks;
                 number += block.num() * kThreads) {
                const Chunk chunk = chunk_of(number, num);
                if (source.format == static_cast<int32_t>(Format::F64)) {
                    for (int lane = 0; lane < chunk.length; ++lane) {
                        const unsigned char* p = source.data + (chunk.begin + lane) * 8;
                        const uint32_t top = load_byte(p + 7) << 8 | load_byte(p + 6);
                        bad += (top & 0x7ff0u) == 0x7ff0u;
                    }
                } else {
                    const Lanes::F x = read(source, chunk);
                    PM_UNROLL
                    for (int lane = 0; lane < kLanes; ++lane) bad += magnitude_bits<Scalar>(x.v[lane]) >= kInfinity;
                }
            }
            if (bad) atomic_add(count, bad);
        });
        block.phase([&](int thread) {
            if (thread == 0 && *count) atomic_add(nonfinite, uint64_t{*count});
        });
    }
};

Models one_model(const View& view) { return {std::nullopt, {view}, view.num}; }

// Room for an array in the workspace and its upload.
class Floats {
  public:
    Floats(Workspace* workspace, const HostFloats& host) : host_(host) {
        place_ = workspace->reserve(host.num * sizeof(float));
    }
    const float* upload_to(const char* op, const Workspace& workspace) const {
        if (host_.num == 0) return nullptr;
        upload(op, workspace.at<float>(place_), host_.data, host_.num * sizeof(float));
        return workspace.at<float>(place_);
    }

  private:
    HostFloats host_;
    size_t place_;
};

}  // namespace

uint64_t axpy_n(const View& out, const Models& models, const std::vector<float>& weights, float divisor, float scale,
                bool add_base) {
    Tables tables;
    axpy_n_map map{};
    map.weights = tables.add(weights);
    map.divisor = divisor;
    map.scale = scale;
    map.add_base = add_base;
    return run_map<Speed::StagedToo>("axpy_n", out, models, &tables, false, map);
}

uint64_t axpy_grid(const View& out, const Models& models, const HostFloats& weights, int64_t columns, bool along_rows) {
    const char* op = "axpy_grid";
    Tables tables;
    Workspace workspace;
    const Floats array(&workspace, weights);
    axpy_grid_map map{};
    map.stride = static_cast<int64_t>(weights.num / models.views.size());
    map.columns = columns;
    map.along_rows = along_rows;
    return run_map<Speed::Any>(
        op, out, models, &tables, &workspace, false, map,
        [&](const Workspace& there, axpy_grid_map* m) { m->weights = array.upload_to(op, there); });
}

uint64_t count_nonfinite(const View& input) {
    const char* op = "count_nonfinite";
    if (input.num == 0) return 0;
    uint64_t* count = reinterpret_cast<uint64_t*>(scratch(sizeof(uint64_t)));
    clear(op, count, sizeof(uint64_t));
    const count_nonfinite_kernel kernel{source_of(input), input.num, count};
    launch(op, input.num, blocks_for(divided_up(input.num, kLanes), kernel.kThreads), kCountBytes, kernel);
    uint64_t nonfinite = 0;
    download(op, &nonfinite, count, sizeof nonfinite);
    return nonfinite;
}

uint64_t convert(const View& out, const View& input) {
    if (out.format == input.format) {
        copy(current(), out.address, input.address,
             static_cast<uint64_t>(input.num) * num_bytes(static_cast<Format>(input.format)));
        return count_nonfinite(input);
    }
    Tables tables;
    return run_map<Speed::Any>("convert", out, one_model(input), &tables, false, convert_map{});
}

uint64_t row_scores(const View& out, const Models& models, const HostFloats& factors, int64_t columns) {
    const char* op = "row_scores";
    Tables tables;
    Workspace workspace;
    const Floats array(&workspace, factors);
    row_scores_map map{};
    map.columns = columns;
    return run_map<Speed::Any>(
        op, out, models, &tables, &workspace, false, map,
        [&](const Workspace& there, row_scores_map* m) { m->factors = array.upload_to(op, there); });
}

uint64_t select_by_score(const View& out, const Models& models, const HostFloats& factors, float threshold,
                         int64_t columns) {
    const char* op = "select_by_score";
    Tables tables;
    Workspace workspace;
    const Floats array(&workspace, factors);
    select_by_score_map map{};
    map.columns = columns;
    map.threshold = threshold;
    return run_map<Speed::Any>(
        op, out, models, &tables, &workspace, false, map,
        [&](const Workspace& there, select_by_score_map* m) { m->factors = array.upload_to(op, there); });
}

uint64_t lora_add(const View& out, const View& weight, const HostFloats& left, const HostFloats& right, int64_t start,
                  int64_t columns, int64_t rank, float scale, const HostFloats& factors) {
    const char* op = "lora_add";
    if (out.num == 0) return 0;
    // Of the left factor only the rows of these elements are needed.
    const int64_t first_row = start / columns;
    const int64_t num_rows = (start + out.num - 1) / columns - first_row + 1;
    Tables tables;
    Workspace workspace;
    const Floats left_rows(&workspace, {left.data + first_row * rank, static_cast<size_t>(num_rows * rank)});
    const Floats whole_right(&workspace, right);
    const Floats row_factors(
        &workspace, factors.num ? HostFloats{factors.data + first_row, static_cast<size_t>(num_rows)} : HostFloats{});
    lora_add_map map{};
    map.start = start;
    map.first_row = first_row;
    map.columns = columns;
    map.rank = rank;
    map.scale = scale;
    return run_map<Speed::Any>(op, out, one_model(weight), &tables, &workspace, false, map,
                               [&](const Workspace& there, lora_add_map* m) {
                                   m->left = left_rows.upload_to(op, there);
                                   m->right = whole_right.upload_to(op, there);
                                   m->factors = row_factors.upload_to(op, there);
                               });
}

}  // namespace cuda
}  // namespace pymerge

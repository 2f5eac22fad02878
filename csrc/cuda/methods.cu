// The maps that single methods need, and the masks and counts beside them.
#include "map.h"

namespace pymerge {
namespace cuda {
namespace {

struct nearswap_map : PlainMap {
    float t;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        return pymerge::nearswap<Lanes>(scene.base(), scene.value(0), t);
    }
};

struct variance_score_map : PlainMap {
    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        return variance<Lanes>(scene.num_models(), scene.cached_deltas(scene.base()));
    }
};

struct overlap_merge_map : PlainMap {
    uint32_t factors;
    float epsilon;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        const Lanes::F base = scene.base();
        return pymerge::overlap_merge<Lanes>(base, scene.num_models(), scene.cached_deltas(base),
                                             scene.template table<float>(factors), epsilon);
    }
};

struct magmax_merge_map : PlainMap {
    float scale;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        const Lanes::F base = scene.base();
        return pymerge::magmax_merge<Lanes>(
            base, scene.num_models(), [&](size_t i) { return scene.delta(i, base); }, scale);
    }
};

struct consensus_merge_map : PlainMap {
    uint32_t thresholds;
    int32_t minimum;
    float scale;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        const Lanes::F base = scene.base();
        return pymerge::consensus_merge<Lanes>(base, scene.num_models(), scene.cached_deltas(base),
                                               scene.template table<float>(thresholds), minimum, scale);
    }
};

struct elect_max_map : PlainMap {
    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        return pymerge::elect_max<Lanes>(scene.num_models(), scene.cached_deltas(scene.base()));
    }
};

// The bits of a chunk, which is one byte of a mask.
PM_DEVICE Lanes::M unpacked(const unsigned char* mask, int64_t number) {
    const uint32_t bits = mask[number];
    return gather<bool>([&](int lane) { return (bits >> lane & 1) != 0; });
}

struct apply_task_map : PlainMap {
    const unsigned char* mask;
    float scale;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        return pymerge::apply_task<Lanes>(scene.base(), scene.value(0), unpacked(mask, scene.number), scale);
    }
};

struct PcbTables {
    uint32_t lows;
    uint32_t highs;
    PcbMode mode;

    template <class Scene>
    PM_DEVICE Pcb ranges(const Scene& scene) const {
        return {scene.template table<float>(lows), scene.template table<float>(highs), scene.num_models(), mode};
    }
};

struct pcb_score_map : PlainMap, PcbTables {
    uint32_t index;
    float part;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        const Pcb pcb = ranges(scene);
        const auto delta = scene.cached_deltas(scene.base());
        Lanes::F total = Lanes::set(0.0f);
        if (mode != PcbMode::Pairwise) total = pcb_total<Lanes>(pcb, delta);
        return pcb_part<Lanes>(pymerge::pcb_score<Lanes>(pcb, delta, index, total), part);
    }
};

struct pcb_merge_map : PlainMap, PcbTables {
    uint32_t cuts;
    uint32_t tops;
    uint32_t weights;
    float scale;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        const Lanes::F base = scene.base();
        return pymerge::pcb_merge<Lanes>(ranges(scene), base, scene.cached_deltas(base),
                                         scene.template table<float>(cuts), scene.template table<float>(tops),
                                         scene.template table<float>(weights), scale);
    }
};

struct weighted_mean_map : PlainMap {
    uint32_t coefficients;
    uint32_t floors;
    bool adds_floor;

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        return pymerge::weighted_mean<Lanes>(
            scene.num_models() / 2, [&](size_t i) { return scene.value(i); }, scene.template table<float>(coefficients),
            scene.template table<float>(floors), adds_floor);
    }
};

// ---- Masks and counts: a thread's chunk is one byte of every mask

enum class Vote8 : int32_t { Used, Agrees };

struct masks_kernel {
    static constexpr int kThreads = 256;
    Arguments arguments;
    Inputs inputs;
    int64_t num;
    uint32_t masks;  // addresses
    uint32_t thresholds;
    Vote8 vote;

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        unsigned char* tables = block.template shared<unsigned char>();
        arguments.bring(block, kThreads, tables);
        block.phase([&](int thread) {
            const int64_t num_chunks = (num + kLanes - 1) / kLanes;
            for (int64_t number = block.index() * kThreads + thread; number < num_chunks;
                 number += block.num() * kThreads) {
                const Scene<AnyReader> scene{tables, inputs, chunk_of(number, num), number, {}, {}};
                const Lanes::F base = scene.base();
                const Lanes::F total =
                    total_of<Lanes>(scene.num_models(), [&](size_t i) { return scene.delta(i, base); });
                PM_ROLLED
                for (size_t i = 0; i < scene.num_models(); ++i) {
                    const Lanes::F delta = scene.delta(i, base);
                    const Lanes::M set = Lanes::both(
                        scene.there(), vote == Vote8::Used
                                           ? is_used<Lanes>(delta, total, scene.template table<float>(thresholds)[i])
                                           : agrees<Lanes>(delta, total));
                    uint32_t bits = 0;
                    PM_UNROLL
                    for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(set.v[lane]) << lane;
                    reinterpret_cast<unsigned char*>(scene.template table<uint64_t>(masks)[i])[number] =
                        static_cast<unsigned char>(bits);
                }
            }
        });
    }
};

struct overlap_counts_kernel {
    static constexpr int kThreads = 256;
    Arguments arguments;
    Inputs inputs;
    int64_t num;
    float epsilon;
    uint64_t* counts;  // [num_models, 2]

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        unsigned char* tables = block.template shared<unsigned char>();
        uint32_t* found = block.template shared<uint32_t>(arguments.num_bytes);
        arguments.bring(block, kThreads, tables);
        block.phase([&](int thread) {
            for (int i = thread; i < 2 * inputs.num_models; i += kThreads) found[i] = 0;
        });
        block.phase([&](int thread) {
            const int64_t num_chunks = (num + kLanes - 1) / kLanes;
            for (int64_t number = block.index() * kThreads + thread; number < num_chunks;
                 number += block.num() * kThreads) {
                const Scene<AnyReader> scene{tables, inputs, chunk_of(number, num), number, {}, {}};
                const Lanes::F base = scene.base();
                const Lanes::I none = Lanes::set(int32_t{0});
                const Lanes::I active =
                    num_active<Lanes>(scene.num_models(), [&](size_t i) { return scene.delta(i, base); }, epsilon);
                const Lanes::M alone = Lanes::equal(active, Lanes::set(int32_t{1}));
                PM_ROLLED
                for (size_t i = 0; i < scene.num_models(); ++i) {
                    const Lanes::M own = Lanes::both(scene.there(), is_active<Lanes>(scene.delta(i, base), epsilon));
                    add_together(&found[2 * i], Lanes::sum(Lanes::count(none, own)));
                    add_together(&found[2 * i + 1], Lanes::sum(Lanes::count(none, Lanes::both(own, alone))));
                }
            }
        });
        block.phase([&](int thread) {
            for (int i = thread; i < 2 * inputs.num_models; i += kThreads) {
                if (found[i]) atomic_add(&counts[i], uint64_t{found[i]});
            }
        });
    }
};

struct adam_step_kernel {
    static constexpr int kThreads = 256;
    Source gradient;
    Target theta;
    Target first;
    Target second;
    int64_t num;
    Adam adam;
    uint64_t* nonfinite;

    PM_DEVICE static Lanes::F current(const Target& target, const Chunk& chunk) {
        return read({target.data, target.format, target.width < 8 ? 1 : target.width}, chunk);
    }

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
                Lanes::F x = current(theta, chunk);
                Lanes::F m = current(first, chunk);
                Lanes::F v = current(second, chunk);
                pymerge::adam_step<Lanes>(adam, read(gradient, chunk), &x, &m, &v);
                bad += write(theta, chunk, x);
                write(first, chunk, m);
                write(second, chunk, v);
            }
            if (bad) atomic_add(count, bad);
        });
        block.phase([&](int thread) {
            if (thread == 0 && *count) atomic_add(nonfinite, uint64_t{*count});
        });
    }
};

void run_masks(const char* op, const std::vector<uint64_t>& masks, const Models& models,
               const std::vector<float>& thresholds, Vote8 vote) {
    if (models.num == 0) return;
    Tables tables;
    Workspace workspace;
    masks_kernel kernel{};
    kernel.inputs = add_inputs(&tables, models);
    kernel.masks = tables.add(masks);
    kernel.thresholds = tables.add(thresholds);
    kernel.vote = vote;
    kernel.num = models.num;
    tables.reserve(&workspace);
    workspace.allocate();
    kernel.arguments = tables.finish(op, workspace);
    launch(op, models.num, blocks_for(divided_up(models.num, kLanes), kernel.kThreads), tables.num_bytes(), kernel);
    download(op, nullptr, nullptr, 0);
}

void set_ranges(PcbTables* map, Tables* tables, const PcbRanges& ranges) {
    map->lows = tables->add(ranges.lows);
    map->highs = tables->add(ranges.highs);
    map->mode = ranges.mode;
}

}  // namespace

uint64_t nearswap(const View& out, const Models& models, float t) {
    Tables tables;
    nearswap_map map{};
    map.t = t;
    return run_map<Speed::Any>("nearswap", out, models, &tables, false, map);
}

uint64_t variance_score(const View& out, const Models& models) {
    Tables tables;
    return run_map<Speed::Any>("variance_score", out, models, &tables, true, variance_score_map{});
}

std::vector<int64_t> overlap_counts(const Models& models, float epsilon) {
    const char* op = "overlap_counts";
    const size_t num_counts = 2 * models.views.size();
    std::vector<int64_t> found(num_counts);
    if (models.num == 0) return found;
    Tables tables;
    Workspace workspace;
    overlap_counts_kernel kernel{};
    kernel.inputs = add_inputs(&tables, models);
    kernel.num = models.num;
    kernel.epsilon = epsilon;
    tables.reserve(&workspace);
    const size_t counts = workspace.reserve(num_counts * sizeof(uint64_t));
    workspace.allocate();
    clear(op, workspace.at<uint64_t>(counts), num_counts * sizeof(uint64_t));
    kernel.arguments = tables.finish(op, workspace);
    kernel.counts = workspace.at<uint64_t>(counts);
    launch(op, models.num, blocks_for(divided_up(models.num, kLanes), kernel.kThreads),
           tables.num_bytes() + num_counts * sizeof(uint32_t), kernel);
    download(op, found.data(), kernel.counts, num_counts * sizeof(uint64_t));
    return found;
}

uint64_t overlap_merge(const View& out, const Models& models, const std::vector<float>& factors, float epsilon) {
    Tables tables;
    overlap_merge_map map{};
    map.factors = tables.add(factors);
    map.epsilon = epsilon;
    return run_map<Speed::Any>("overlap_merge", out, models, &tables, true, map);
}

uint64_t magmax_merge(const View& out, const Models& models, float scale) {
    Tables tables;
    magmax_merge_map map{};
    map.scale = scale;
    return run_map<Speed::Any>("magmax_merge", out, models, &tables, false, map);
}

uint64_t consensus_merge(const View& out, const Models& models, const std::vector<float>& thresholds, int32_t minimum,
                         float scale) {
    Tables tables;
    consensus_merge_map map{};
    map.thresholds = tables.add(thresholds);
    map.minimum = minimum;
    map.scale = scale;
    return run_map<Speed::Any>("consensus_merge", out, models, &tables, true, map);
}

void tall_masks(const std::vector<uint64_t>& masks, const Models& models, const std::vector<float>& thresholds) {
    run_masks("tall_masks", masks, models, thresholds, Vote8::Used);
}

uint64_t elect_max(const View& out, const Models& models) {
    Tables tables;
    return run_map<Speed::Any>("elect_max", out, models, &tables, true, elect_max_map{});
}

void elect_masks(const std::vector<uint64_t>& masks, const Models& models) {
    run_masks("elect_masks", masks, models, {}, Vote8::Agrees);
}

uint64_t apply_task(const View& out, const Models& models, uint64_t mask, float scale) {
    Tables tables;
    apply_task_map map{};
    map.mask = reinterpret_cast<const unsigned char*>(mask);
    map.scale = scale;
    return run_map<Speed::Any>("apply_task", out, models, &tables, false, map);
}

uint64_t pcb_score(const View& out, const Models& models, size_t index, const PcbRanges& ranges, int32_t part) {
    Tables tables;
    pcb_score_map map{};
    set_ranges(&map, &tables, ranges);
    map.index = static_cast<uint32_t>(index);
    map.part = static_cast<float>(part);
    return run_map<Speed::Any>("pcb_score", out, models, &tables, true, map);
}

uint64_t pcb_merge(const View& out, const Models& models, const PcbRanges& ranges, const std::vector<float>& cuts,
                   const std::vector<float>& tops, const std::vector<float>& weights, float scale) {
    Tables tables;
    pcb_merge_map map{};
    set_ranges(&map, &tables, ranges);
    map.cuts = tables.add(cuts);
    map.tops = tables.add(tops);
    map.weights = tables.add(weights);
    map.scale = scale;
    return run_map<Speed::Any>("pcb_merge", out, models, &tables, true, map);
}

uint64_t weighted_mean(const View& out, const Models& models, const std::vector<float>& coefficients,
                       const std::vector<float>& floors, bool adds_floor) {
    Tables tables;
    weighted_mean_map map{};
    map.coefficients = tables.add(coefficients);
    map.floors = tables.add(floors);
    map.adds_floor = adds_floor;
    return run_map<Speed::Any>("weighted_mean", out, models, &tables, false, map);
}

uint64_t adam_step(const View& theta, const View& first, const View& second, const View& gradient, const Adam& adam) {
    const char* op = "adam_step";
    if (theta.num == 0) return 0;
    Workspace workspace;
    const size_t count = workspace.reserve(sizeof(uint64_t));
    workspace.allocate();
    adam_step_kernel kernel{};
    kernel.gradient = source_of(gradient);
    kernel.theta = target_of(theta);
    kernel.first = target_of(first);
    kernel.second = target_of(second);
    kernel.num = theta.num;
    kernel.adam = adam;
    kernel.nonfinite = workspace.at<uint64_t>(count);
    clear(op, kernel.nonfinite, sizeof(uint64_t));
    launch(op, theta.num, blocks_for(divided_up(theta.num, kLanes), kernel.kThreads), kCountBytes, kernel);
    uint64_t nonfinite = 0;
    download(op, &nonfinite, kernel.nonfinite, sizeof nonfinite);
    return nonfinite;
}

}  // namespace cuda
}  // namespace pymerge

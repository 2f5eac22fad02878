// What a model keeps, for kernels that need it: by key and place, and by draws.
#pragma once

#include "map.h"

namespace pymerge {
namespace cuda {
namespace {

// Places within a launch are 32-bit numbers; what is longer comes in parts of so many elements.
constexpr int64_t kPart = int64_t{1} << 30;

// The keeps of an op in its tables. The kernel makes them local to its elements before the first chunk.
struct Keeping {
    uint32_t keeps;   // Keep [num_models]
    uint32_t locals;  // LocalKeep [num_models], made by prepare()
    int32_t num_models;
    int64_t start;
    bool has_score;
    Source score;

    PM_DEVICE void prepare(unsigned char* tables, int thread, int num_threads, int64_t num) const {
        const Keep* all = reinterpret_cast<const Keep*>(tables + keeps);
        LocalKeep* made = reinterpret_cast<LocalKeep*>(tables + locals);
        for (int i = thread; i < num_models; i += num_threads) {
            made[i] = local_keep(all[i], start, static_cast<int32_t>(num));
        }
    }
};

// Which elements of a chunk each model keeps. kDraws: there may be draws or a score.
template <class Scene, bool kDraws>
class Keys {
  public:
    PM_DEVICE Keys(const Keeping& keeping, const Scene& scene) : keeping_(keeping), scene_(scene) {
        if (kDraws && keeping.has_score) score_ = key_of<Lanes>(read(keeping.score, scene.chunk));
    }
    PM_DEVICE Lanes::M kept(size_t i, const Lanes::F& delta) const {
        const Lanes::I key = kDraws && keeping_.has_score ? score_ : key_of<Lanes>(delta);
        const uint64_t seed = scene_.template table<Keep>(keeping_.keeps)[i].seed;
        LocalKeep keep = scene_.template table<LocalKeep>(keeping_.locals)[i];
        keep.has_draws = kDraws && keep.has_draws;
        return is_kept<Lanes>(keep, key, scene_.places(),
                              [&] { return draws_of(seed, keeping_.start + scene_.chunk.begin); });
    }

  private:
    const Keeping& keeping_;
    const Scene& scene_;
    Lanes::I score_;
};

inline bool has_draws(const Disjoint& op) {
    bool found = op.score.has_value();
    for (const Keep& keep : op.keeps) found = found || keep.draws < kAllDraws;
    return found;
}

inline Keeping add_keeping(Tables* tables, const Disjoint& op) {
    Keeping keeping{};
    keeping.keeps = tables->add(op.keeps);
    keeping.locals = tables->leave(op.keeps.size() * sizeof(LocalKeep));
    keeping.num_models = static_cast<int32_t>(op.keeps.size());
    keeping.start = op.start;
    keeping.has_score = op.score.has_value();
    if (op.score) keeping.score = source_of(*op.score);
    return keeping;
}

inline View part_of(const View& view, int64_t first, int64_t num) {
    const uint64_t size = num_bytes(static_cast<Format>(view.format));
    return {view.address + static_cast<uint64_t>(first) * size, view.format, num};
}

// Calls body(part, index of its first element) for parts that 32-bit places can number.
template <class Body>
void for_parts(const Disjoint& op, const Body& body, int64_t length = kPart) {
    for (int64_t first = 0; first < op.models.num; first += length) {
        const int64_t num = op.models.num - first < length ? op.models.num - first : length;
        Disjoint part = op;
        part.models.num = num;
        part.start += first;
        if (op.models.base) part.models.base = part_of(*op.models.base, first, num);
        for (View& view : part.models.views) view = part_of(view, first, num);
        if (op.score) part.score = part_of(*op.score, first, num);
        body(part, first);
    }
}

}  // namespace
}  // namespace cuda
}  // namespace pymerge

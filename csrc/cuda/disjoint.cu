// disjoint_merge and count_votes: what each model keeps, the election, the merge, in one read of everything.
#include "disjoint.h"

namespace pymerge {
namespace cuda {
namespace {

// What the models cast, ready for one chunk after another.
struct Ballots : Keeping {
    uint32_t weights;
    uint32_t factors;
    bool has_factors;
    Elect elect;

    PM_DEVICE Lanes::F cast(const Vote& vote, size_t i, const Lanes::F& delta, const Lanes::M& kept) const {
        return elect == Elect::Plain ? ballot_of<Lanes, Elect::Plain>(vote, i, delta, kept)
                                     : ballot_of<Lanes, Elect::Weighted>(vote, i, delta, kept);
    }
    PM_DEVICE Vote vote(const unsigned char* tables, int32_t num_models) const {
        Vote vote;
        vote.weights = reinterpret_cast<const float*>(tables + weights);
        vote.factors = has_factors ? reinterpret_cast<const float*>(tables + factors) : nullptr;
        vote.num_models = static_cast<size_t>(num_models);
        return vote;
    }
};

struct Merging : Ballots {
    Combine combine;
    int32_t zero_sign;
    float divisor;
    float scale;
    bool add_base;
    bool subtract;  // the base from the models
};

template <bool kDraws>
struct disjoint_merge_map : Merging {
    // What runs where the other's speed cannot be had; to compile one kernel less.
    using General = disjoint_merge_map<true>;

    General general() const {
        General map;
        static_cast<Merging&>(map) = *this;
        return map;
    }

    template <Combine kCombine, class Scene>
    PM_DEVICE Lanes::F combined(const Vote& vote, const Scene& scene) const {
        const Cache cache = scene.cache;
        const auto cast = [cache](size_t i) { return cache.get(i); };
        if (elect == Elect::Weighted) return elect_and_combine<Lanes, Elect::Weighted, kCombine>(vote, cast);
        if (elect == Elect::Plain) return elect_and_combine<Lanes, Elect::Plain, kCombine>(vote, cast);
        return combine_kept<Lanes, kCombine>(vote, [&vote, cache](size_t i, Lanes::M* kept) {
            const unsigned marks = cache.marks(i, vote.num_models);
            *kept = gather<bool>([&](int lane) { return (marks >> lane & 1) != 0; });
            return cache.get(i);
        });
    }

    template <class Scene>
    PM_DEVICE Lanes::F operator()(const Scene& scene) const {
        Vote vote = this->vote(scene.tables, scene.inputs.num_models);
        vote.zero_sign = zero_sign;
        vote.divisor = divisor;
        vote.scale = scale;
        vote.add_base = add_base;
        const Lanes::F base = scene.base();
        const Keys<Scene, kDraws> keys(*this, scene);
        PM_ROLLED
        for (size_t i = 0; i < vote.num_models; ++i) {
            const Lanes::F x = scene.value(i);
            const Lanes::F delta = subtract ? Lanes::sub(x, base) : x;
            const Lanes::M kept = keys.kept(i, delta);
            scene.cache.put(i, cast(vote, i, delta, kept));
            if (elect == Elect::None) {
                unsigned marks = 0;
                PM_UNROLL
                for (int lane = 0; lane < kLanes; ++lane) marks |= static_cast<unsigned>(kept.v[lane]) << lane;
                scene.cache.marks(i, vote.num_models) = static_cast<unsigned char>(marks);
            }
        }
        Lanes::F num;
        switch (combine) {
            case Combine::Mean:
                num = combined<Combine::Mean>(vote, scene);
                break;
            case Combine::Count:
                num = combined<Combine::Count>(vote, scene);
                break;
            case Combine::Sum:
                num = combined<Combine::Sum>(vote, scene);
                break;
            default:
                num = combined<Combine::Max>(vote, scene);
                break;
        }
        return merged<Lanes>(vote, base, num);
    }
};

struct count_votes_kernel {
    static constexpr int kThreads = 256;
    Arguments arguments;
    Inputs inputs;
    int64_t num;
    uint64_t* counts;  // above zero, below zero
    Ballots ballots;

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        uint32_t* count = block.template shared<uint32_t>();
        unsigned char* tables = block.template shared<unsigned char>(kCountBytes);
        arguments.bring(block, kThreads, tables);
        block.phase([&](int thread) {
            if (thread < 2) count[thread] = 0;
            ballots.prepare(tables, thread, kThreads, num);
        });
        block.phase([&](int thread) {
            const Vote vote = ballots.vote(tables, inputs.num_models);
            const Lanes::F zero = Lanes::set(0.0f);
            uint32_t above = 0;
            uint32_t below = 0;
            const int64_t num_chunks = (num + kLanes - 1) / kLanes;
            for (int64_t number = block.index() * kThreads + thread; number < num_chunks;
                 number += block.num() * kThreads) {
                const Scene<AnyReader> scene{tables, inputs, chunk_of(number, num), number, {}, {}};
                const Lanes::F base = scene.base();
                const Keys<Scene<AnyReader>, true> keys(ballots, scene);
                Lanes::F total = zero;
                PM_ROLLED
                for (size_t i = 0; i < vote.num_models; ++i) {
                    const Lanes::F delta = scene.delta(i, base);
                    const Lanes::F cast = ballots.cast(vote, i, delta, keys.kept(i, delta));
                    total = i ? Lanes::add(total, cast) : cast;
                }
                const Lanes::I none = Lanes::set(int32_t{0});
                above += Lanes::sum(Lanes::count(none, Lanes::both(scene.there(), Lanes::above(total, zero))));
                below += Lanes::sum(Lanes::count(none, Lanes::both(scene.there(), Lanes::above(zero, total))));
            }
            if (above) atomic_add(&count[0], above);
            if (below) atomic_add(&count[1], below);
        });
        block.phase([&](int thread) {
            if (thread < 2 && count[thread]) atomic_add(&counts[thread], uint64_t{count[thread]});
        });
    }
};

Ballots add_ballots(Tables* tables, const Disjoint& op) {
    Ballots ballots{};
    static_cast<Keeping&>(ballots) = add_keeping(tables, op);
    ballots.weights = tables->add(op.weights);
    ballots.factors = tables->add(op.factors);
    ballots.has_factors = !op.factors.empty();
    ballots.elect = op.elect;
    return ballots;
}

template <bool kDraws>
uint64_t merge(const View& out, const Disjoint& op) {
    Tables tables;
    disjoint_merge_map<kDraws> map{};
    static_cast<Ballots&>(map) = add_ballots(&tables, op);
    map.combine = op.combine;
    map.zero_sign = op.zero_sign;
    map.divisor = op.divisor;
    map.scale = op.scale;
    map.add_base = op.models.base.has_value();
    map.subtract = op.models.base && !op.deltas;
    return run_map<Speed::StagedToo>("disjoint_merge", out, op.models, &tables, true, map);
}

std::pair<uint64_t, uint64_t> count(const Disjoint& op) {
    const char* name = "count_votes";
    Tables tables;
    Workspace workspace;
    count_votes_kernel kernel{};
    kernel.inputs = add_inputs(&tables, op.models);
    kernel.ballots = add_ballots(&tables, op);
    tables.reserve(&workspace);
    const size_t counts = workspace.reserve(2 * sizeof(uint64_t));
    workspace.allocate();
    clear(name, workspace.at<uint64_t>(counts), 2 * sizeof(uint64_t));
    kernel.arguments = tables.finish(name, workspace);
    kernel.num = op.models.num;
    kernel.counts = workspace.at<uint64_t>(counts);
    launch(name, kernel.num, blocks_for(divided_up(kernel.num, kLanes), kernel.kThreads),
           kCountBytes + tables.num_bytes(), kernel);
    uint64_t found[2] = {};
    download(name, found, kernel.counts, sizeof found);
    return {found[0], found[1]};
}

}  // namespace

uint64_t disjoint_merge(const View& out, const Disjoint& op) {
    uint64_t nonfinite = 0;
    for_parts(op, [&](const Disjoint& part, int64_t first) {
        const View there = part_of(out, first, part.models.num);
        nonfinite += has_draws(op) ? merge<true>(there, part) : merge<false>(there, part);
    });
    return nonfinite;
}

std::pair<uint64_t, uint64_t> count_votes(const Disjoint& op) {
    std::pair<uint64_t, uint64_t> counts{0, 0};
    for_parts(op, [&](const Disjoint& part, int64_t) {
        const auto found = count(part);
        counts.first += found.first;
        counts.second += found.second;
    });
    return counts;
}

}  // namespace cuda
}  // namespace pymerge

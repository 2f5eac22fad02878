// magnitude_histogram: all models in one sweep where their bins fit the shared memory of a block.
#include "selection.h"

namespace pymerge {
namespace cuda {
namespace {

// Adds one to a bin: threads of a warp that come here with the same bin send one of them.
template <class Count>
PM_DEVICE void add_to_bin(Count* bins, uint32_t bin) {
#ifdef __CUDA_ARCH__
    const unsigned together = __activemask();
    const unsigned same = __match_any_sync(together, bin);
    if ((threadIdx.x & 31) == static_cast<unsigned>(__ffs(static_cast<int>(same)) - 1)) {
        atomic_add(&bins[bin], static_cast<Count>(__popc(same)));
    }
#else
    atomic_add(&bins[bin], Count{1});
#endif
}

// kShared: a block counts in shared memory of its own and adds that to the device's at the end; bins that are too
// many for it are counted in the device's memory directly.
template <bool kShared>
struct magnitude_histogram_kernel {
    static constexpr int kThreads = 1024;
    Arguments arguments;
    Inputs inputs;
    int64_t num;
    int32_t shift;
    uint32_t prefixes;
    bool has_prefix;
    int32_t prefix_shift;
    int64_t num_bins;
    uint64_t* counts;  // [num_models, num_bins]

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        unsigned char* tables = block.template shared<unsigned char>();
        uint32_t* zeros = block.template shared<uint32_t>(arguments.num_bytes);
        uint32_t* bins = zeros + inputs.num_models;
        const int64_t num_counters = inputs.num_models + (kShared ? inputs.num_models * num_bins : 0);
        arguments.bring(block, kThreads, tables);
        block.phase([&](int thread) {
            for (int64_t i = thread; i < num_counters; i += kThreads) zeros[i] = 0;
        });
        block.phase([&](int thread) {
            const int32_t* prefix = reinterpret_cast<const int32_t*>(tables + prefixes);
            const uint32_t bin_mask = static_cast<uint32_t>(num_bins - 1);
            const int64_t num_chunks = (num + kLanes - 1) / kLanes;
            for (int64_t number = block.index() * kThreads + thread; number < num_chunks;
                 number += block.num() * kThreads) {
                const Scene<AnyReader> scene{tables, inputs, chunk_of(number, num), number, {}, {}};
                const Lanes::F base = scene.base();
                PM_ROLLED
                for (int i = 0; i < inputs.num_models; ++i) {
                    const Lanes::I key = keys_of(scene, static_cast<size_t>(i), base);
                    const int32_t wanted = has_prefix ? prefix[i] : 0;
                    uint32_t num_zeros = 0;
                    PM_UNROLL
                    for (int lane = 0; lane < kLanes; ++lane) {
                        // Zeros are often a third of all, and one bin.
                        const bool counts_here =
                            key.v[lane] >= 0 && (!has_prefix || key.v[lane] >> prefix_shift == wanted);
                        num_zeros += counts_here && key.v[lane] == 0;
                        if (counts_here && key.v[lane] != 0) {
                            const uint32_t bin = static_cast<uint32_t>(key.v[lane] >> shift) & bin_mask;
                            if constexpr (kShared) {
                                add_to_bin(bins + i * num_bins, bin);
                            } else {
                                add_to_bin(counts + i * num_bins, bin);
                            }
                        }
                    }
                    add_together(&zeros[i], num_zeros);
                }
            }
        });
        block.phase([&](int thread) {
            if constexpr (kShared) {
                for (int64_t i = thread; i < inputs.num_models * num_bins; i += kThreads) {
                    if (bins[i]) atomic_add(&counts[i], uint64_t{bins[i]});
                }
            }
            for (int i = thread; i < inputs.num_models; i += kThreads) {
                if (zeros[i]) atomic_add(&counts[i * num_bins], uint64_t{zeros[i]});
            }
        });
    }
};

// How many models' bins a block can hold, all of them if few enough.
size_t models_of_block(size_t num_models, int64_t num_bins, size_t beside) {
    const size_t room =
        (most_shared_bytes() - beside) / (static_cast<size_t>(num_bins) * sizeof(uint32_t) + sizeof(uint32_t));
    return room < num_models ? room : num_models;
}

template <bool kShared>
void run_histogram(const Models& models, int32_t shift, const std::vector<int32_t>& prefix, int32_t prefix_shift,
                   uint64_t* counts, int64_t num_bins) {
    const char* op = "magnitude_histogram";
    Tables tables;
    Workspace workspace;
    magnitude_histogram_kernel<kShared> kernel{};
    kernel.inputs = add_inputs(&tables, models);
    kernel.num = models.num;
    kernel.shift = shift;
    kernel.prefixes = tables.add(prefix);
    kernel.has_prefix = !prefix.empty();
    kernel.prefix_shift = prefix_shift;
    kernel.num_bins = num_bins;
    const size_t num_counts = models.views.size() * static_cast<size_t>(num_bins);
    tables.reserve(&workspace);
    const size_t place = workspace.reserve(num_counts * sizeof(uint64_t));
    workspace.allocate();
    kernel.arguments = tables.finish(op, workspace);
    kernel.counts = workspace.at<uint64_t>(place);
    clear(op, kernel.counts, num_counts * sizeof(uint64_t));
    const size_t counters = models.views.size() + (kShared ? num_counts : 0);
    launch(op, models.num, blocks_for(divided_up(models.num, kLanes), kernel.kThreads),
           tables.num_bytes() + counters * sizeof(uint32_t), kernel);
    std::vector<uint64_t> found(num_counts);
    download(op, found.data(), kernel.counts, num_counts * sizeof(uint64_t));
    for (size_t i = 0; i < num_counts; ++i) counts[i] += found[i];
}

}  // namespace

void magnitude_histogram(const Models& models, int32_t shift, const std::vector<int32_t>* prefix, int32_t prefix_shift,
                         uint64_t* counts, int64_t num_bins) {
    if (models.num == 0) return;
    const size_t num_models = models.views.size();
    const size_t beside = 16 * (num_models + 4) + 8 * num_models;
    const size_t together = models_of_block(num_models, num_bins, beside);
    if (together == 0) {
        run_histogram<false>(models, shift, prefix ? *prefix : std::vector<int32_t>(), prefix_shift, counts, num_bins);
        return;
    }
    for (size_t first = 0; first < num_models; first += together) {
        const size_t last = first + together < num_models ? first + together : num_models;
        const Models some{models.base, {models.views.begin() + first, models.views.begin() + last}, models.num};
        std::vector<int32_t> wanted;
        if (prefix) wanted.assign(prefix->begin() + first, prefix->begin() + last);
        run_histogram<true>(some, shift, wanted, prefix_shift, counts + first * static_cast<size_t>(num_bins),
                            num_bins);
    }
}

}  // namespace cuda
}  // namespace pymerge

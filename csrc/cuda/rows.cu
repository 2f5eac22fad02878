// Ops that look at whole rows: a block is a row at a time, of any length.
#include "map.h"

namespace pymerge {
namespace cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kDigitBits = 4;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kKeyBits = 31;

// Ranks come from a stable radix sort of places by key, four bits at a time from the lowest. Threads own runs of the
// order so far: each counts the digits of its run, the counts are added up digit by digit and thread by thread, and
// each thread then moves its run in order. So equal keys keep their order, and no place comes from an atomic.
//
// Place is what numbers a row's elements: 16 bits in shared memory, for rows that fit there, else 32 bits in
// memory of the block's own.
template <class Place>
struct row_sparsify_kernel {
    static constexpr int kThreads = kRowThreads;
    Source base;
    bool has_base;
    Source model;
    Target out;
    int64_t start;
    int64_t num_rows;
    int64_t columns;
    int64_t first;
    int64_t last;
    int64_t draws_low;
    int64_t draws_span;
    uint64_t seed;
    bool rescale;
    unsigned char* far;  // memory of all blocks, or nullptr: shared
    size_t row_bytes;    // of each block
    uint64_t* nonfinite;

    PM_DEVICE float delta(int64_t index) const {
        const float x = read_one(model, index);
        return has_base ? Scalar::sub(x, read_one(base, index)) : x;
    }

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        uint32_t* bad = block.template shared<uint32_t>();
        uint32_t* varying = bad + 1;                         // bits in which the keys of the row differ
        uint32_t* sums = bad + 4;                            // [kThreads + kThreads / 16]
        uint32_t* counts = sums + kThreads + kThreads / 16;  // [kDigits, kThreads]
        unsigned char* rows =
            far ? far + block.index() * row_bytes : reinterpret_cast<unsigned char*>(counts + kDigits * kThreads);
        int32_t* keys = reinterpret_cast<int32_t*>(rows);
        Place* order = reinterpret_cast<Place*>(keys + columns);
        Place* next = order + columns;
        block.phase([&](int thread) {
            if (thread == 0) *bad = 0;
        });
        for (int64_t row = block.index(); row < num_rows; row += block.num()) {
            block.phase([&](int thread) {
                if (thread == 0) *varying = 0;
                // Of equal keys the lower index ranks higher, so the sort begins with the last.
                for (int64_t c = thread; c < columns; c += kThreads) {
                    keys[c] = key_of<Scalar>(delta(row * columns + c));
                    order[columns - 1 - c] = static_cast<Place>(c);
                }
            });
            block.phase([&](int thread) {
                uint32_t own = 0;
                for (int64_t c = thread; c < columns; c += kThreads) own |= static_cast<uint32_t>(keys[c] ^ keys[0]);
                if (own) atomic_or(varying, own);
            });
            for (int shift = 0; shift < kKeyBits; shift += kDigitBits) {
                if ((*varying >> shift & (kDigits - 1)) == 0) continue;
                sort_digit(block, keys, order, next, counts, sums, shift);
                Place* sorted = next;
                next = order;
                order = sorted;
            }
            // The keys are not needed any more: their place is the ranks'.
            block.phase([&](int thread) {
                for (int64_t j = thread; j < columns; j += kThreads) keys[order[j]] = static_cast<int32_t>(j);
            });
            block.phase([&](int thread) {
                uint32_t own = 0;
                for (int64_t c = thread; c < columns; c += kThreads) {
                    own += write_one(out, row * columns + c, kept_delta(row * columns + c, keys[c]));
                }
                if (own) atomic_add(bad, own);
            });
        }
        block.phase([&](int thread) {
            if (thread == 0 && *bad) atomic_add(nonfinite, uint64_t{*bad});
        });
    }

    PM_DEVICE float kept_delta(int64_t index, int32_t rank) const {
        const int64_t limit = draw_limit(rank, columns, draws_low, draws_span);
        const float x = delta(index);
        if (Scalar::is_nan(x)) return x;
        if (rank < first || rank >= last) return 0.0f;
        if (limit < static_cast<int64_t>(kAllDraws) && draw_of(seed, start + index) >= limit) return 0.0f;
        return rescale ? Scalar::div(x, draw_share(limit)) : x;
    }

    template <class Block>
    PM_DEVICE void sort_digit(const Block& block, const int32_t* keys, const Place* order, Place* next,
                              uint32_t* counts, uint32_t* sums, int shift) const {
        const int64_t run = (columns + kThreads - 1) / kThreads;
        const auto for_run = [&](int thread, const auto& body) {
            const int64_t end = (thread + 1) * run < columns ? (thread + 1) * run : columns;
            for (int64_t j = thread * run; j < end; ++j) {
                body(order[j], (static_cast<uint32_t>(keys[order[j]]) >> shift) & (kDigits - 1));
            }
        };
        block.phase([&](int thread) {
            for (int digit = 0; digit < kDigits; ++digit) counts[digit * kThreads + thread] = 0;
            for_run(thread, [&](Place, uint32_t digit) { ++counts[digit * kThreads + thread]; });
        });
        // The sum of all counts before each: of kDigits neighbours by a thread, of 16 threads by one, of all.
        block.phase([&](int thread) {
            uint32_t own = 0;
            for (int i = 0; i < kDigits; ++i) own += counts[thread * kDigits + i];
            sums[thread] = own;
        });
        block.phase([&](int thread) {
            if (thread >= kThreads / 16) return;
            uint32_t total = 0;
            for (int i = 0; i < 16; ++i) {
                const uint32_t own = sums[thread * 16 + i];
                sums[thread * 16 + i] = total;
                total += own;
            }
            sums[kThreads + thread] = total;
        });
        block.phase([&](int thread) {
            uint32_t total = sums[thread];
            for (int i = 0; i < thread / 16; ++i) total += sums[kThreads + i];
            for (int i = 0; i < kDigits; ++i) {
                const uint32_t own = counts[thread * kDigits + i];
                counts[thread * kDigits + i] = total;
                total += own;
            }
        });
        block.phase([&](int thread) {
            for_run(thread, [&](Place place, uint32_t digit) { next[counts[digit * kThreads + thread]++] = place; });
        });
    }
};

constexpr size_t kSortBytes = (4 + kRowThreads + kRowThreads / 16 + kDigits * kRowThreads) * sizeof(uint32_t);

// A thread is one of the 64 lanes of a row's sums.
struct row_divergence_kernel {
    static constexpr int kThreads = static_cast<int>(kSumLanes);
    Source base;
    Source model;
    int64_t num_rows;
    int64_t columns;
    float* divergences;

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        double* lanes = block.template shared<double>();                            // [2, kThreads]
        float* tops = block.template shared<float>(2 * kThreads * sizeof(double));  // [2, kThreads]
        float* totals = tops + 2 * kThreads;                                        // [2]
        const auto source = [&](int which) -> const Source& { return which ? base : model; };
        for (int64_t row = block.index(); row < num_rows; row += block.num()) {
            const auto shifted = [&](int which, int64_t c) {
                return exp_f32<Scalar>(Scalar::sub(read_one(source(which), row * columns + c), tops[which * kThreads]));
            };
            block.phase([&](int thread) {
                for (int which = 0; which < 2; ++which) {
                    float top = nan<Scalar>();
                    for (int64_t c = thread; c < columns; c += kThreads) {
                        top = larger_number<Scalar>(top, read_one(source(which), row * columns + c));
                    }
                    tops[which * kThreads + thread] = top;
                }
            });
            for (int width = kThreads / 2; width > 0; width /= 2) {
                block.phase([&](int thread) {
                    for (int which = 0; which < 2 && thread < width; ++which) {
                        float* own = tops + which * kThreads + thread;
                        *own = larger_number<Scalar>(own[0], own[width]);
                    }
                });
            }
            block.phase([&](int thread) {
                for (int which = 0; which < 2; ++which) {
                    double own = 0.0;
                    for (int64_t c = thread; c < columns; c += kThreads) own += shifted(which, c);
                    lanes[which * kThreads + thread] = own;
                }
            });
            add_halves(block, lanes, 2);
            block.phase([&](int thread) {
                if (thread < 2) totals[thread] = static_cast<float>(finished_sum(lanes[thread * kThreads]));
            });
            block.phase([&](int thread) {
                double own = 0.0;
                for (int64_t c = thread; c < columns; c += kThreads) {
                    own += divergence_term<Scalar>(shifted(0, c), totals[0], shifted(1, c), totals[1]);
                }
                lanes[thread] = own;
            });
            add_halves(block, lanes, 1);
            block.phase([&](int thread) {
                if (thread == 0) divergences[row] = one_nan(static_cast<float>(finished_sum(lanes[0])));
            });
        }
    }

    template <class Block>
    PM_DEVICE static void add_halves(const Block& block, double* lanes, int num_sums) {
        for (int width = kThreads / 2; width > 0; width /= 2) {
            block.phase([&](int thread) {
                for (int which = 0; which < num_sums && thread < width; ++which) {
                    lanes[which * kThreads + thread] += lanes[which * kThreads + thread + width];
                }
            });
        }
    }
};

template <class Place>
uint64_t sparsify(row_sparsify_kernel<Place> kernel, size_t row_bytes, bool is_far) {
    const char* op = "row_sparsify";
    const int64_t num = kernel.num_rows * kernel.columns;
    const int64_t filling = filling_blocks(kRowThreads);
    const int64_t num_blocks = kernel.num_rows < filling ? kernel.num_rows : filling;
    Workspace workspace;
    const size_t count = workspace.reserve(sizeof(uint64_t));
    const size_t rows = workspace.reserve(is_far ? row_bytes * static_cast<size_t>(num_blocks) : 0);
    workspace.allocate();
    kernel.far = is_far ? workspace.at<unsigned char>(rows) : nullptr;
    kernel.row_bytes = row_bytes;
    kernel.nonfinite = workspace.at<uint64_t>(count);
    clear(op, kernel.nonfinite, sizeof(uint64_t));
    launch(op, num, num_blocks, kSortBytes + (is_far ? 0 : row_bytes), kernel);
    uint64_t nonfinite = 0;
    download(op, &nonfinite, kernel.nonfinite, sizeof nonfinite);
    return nonfinite;
}

template <class Place>
row_sparsify_kernel<Place> sparsify_kernel(const View& out, const Models& models) {
    row_sparsify_kernel<Place> kernel{};
    kernel.has_base = models.base.has_value();
    if (models.base) kernel.base = source_of(*models.base);
    kernel.model = source_of(models.views[0]);
    kernel.out = target_of(out);
    return kernel;
}

}  // namespace

uint64_t row_sparsify(const View& out, const Models& models, int64_t start, int64_t columns, int64_t first,
                      int64_t last, int64_t draws_low, int64_t draws_span, uint64_t seed, bool rescale) {
    if (out.num == 0) return 0;
    const auto run = [&](auto kernel, size_t row_bytes, bool is_far) {
        kernel.start = start;
        kernel.num_rows = out.num / columns;
        kernel.columns = columns;
        kernel.first = first;
        kernel.last = last;
        kernel.draws_low = draws_low;
        kernel.draws_span = draws_span;
        kernel.seed = seed;
        kernel.rescale = rescale;
        return sparsify(kernel, row_bytes, is_far);
    };
    const size_t near_bytes = rounded_up(static_cast<size_t>(columns) * (sizeof(int32_t) + 2 * sizeof(uint16_t)), 256);
    if (columns <= 65536 && kSortBytes + near_bytes <= most_shared_bytes()) {
        return run(sparsify_kernel<uint16_t>(out, models), near_bytes, false);
    }
    const size_t far_bytes = rounded_up(static_cast<size_t>(columns) * (sizeof(int32_t) + 2 * sizeof(uint32_t)), 256);
    return run(sparsify_kernel<uint32_t>(out, models), far_bytes, true);
}

void row_divergence(const Models& models, int64_t columns, float* divergences) {
    const char* op = "row_divergence";
    if (models.num == 0) return;
    const int64_t num_rows = models.num / columns;
    Workspace workspace;
    const size_t place = workspace.reserve(static_cast<size_t>(num_rows) * sizeof(float));
    workspace.allocate();
    const row_divergence_kernel kernel{source_of(*models.base), source_of(models.views[0]), num_rows, columns,
                                       workspace.at<float>(place)};
    const int64_t filling = filling_blocks(kernel.kThreads);
    launch(op, models.num, num_rows < filling ? num_rows : filling,
           2 * kernel.kThreads * (sizeof(double) + sizeof(float)) + 2 * sizeof(float), kernel);
    download(op, divergences, kernel.divergences, static_cast<size_t>(num_rows) * sizeof(float));
}

}  // namespace cuda
}  // namespace pymerge

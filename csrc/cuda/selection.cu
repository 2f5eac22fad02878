// Selection by magnitude: samples, counts with the keys between, the place of a tie.
//
// Whatever depends on the order of elements is counted first, by segments of so many elements, then added up over
// the segments in order, then written to places that are known: no place comes from an atomic.
#include "selection.h"

namespace pymerge {
namespace cuda {
namespace {

constexpr int kSegmentThreads = 256;
constexpr int kChunksOfThread = 8;
constexpr int kSegmentChunks = kSegmentThreads * kChunksOfThread;
constexpr int64_t kSegment = int64_t{kSegmentChunks} * kLanes;

PM_DEVICE uint32_t count_of(const Lanes::M& mask) { return Lanes::sum(Lanes::count(Lanes::set(int32_t{0}), mask)); }

// ---- magnitude_sample: a thread is a sampled element

struct magnitude_sample_kernel {
    static constexpr int kThreads = 256;
    Arguments arguments;
    Inputs inputs;
    int64_t start;
    int64_t group;
    int64_t period;
    int64_t sampled_before;  // of the elements before start
    int64_t num_sampled;
    int32_t* keys;  // [num_models, num_sampled]

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        unsigned char* tables = block.template shared<unsigned char>();
        arguments.bring(block, kThreads, tables);
        block.phase([&](int thread) {
            const Source* sources = reinterpret_cast<const Source*>(tables + inputs.sources);
            for (int64_t k = block.index() * kThreads + thread; k < num_sampled; k += block.num() * kThreads) {
                const int64_t number = sampled_before + k;
                const int64_t index = number / group * period + number % group - start;
                const float base = inputs.has_base ? read_one(sources[0], index) : 0.0f;
                for (int i = 0; i < inputs.num_models; ++i) {
                    const float x = read_one(sources[1 + i], index);
                    keys[i * num_sampled + k] = key_of<Scalar>(inputs.has_base ? Scalar::sub(x, base) : x);
                }
            }
        });
    }
};

// ---- bracket_count: count by segments, add up, write what lies between

struct Brackets {
    uint32_t low;  // int32 per model
    uint32_t high;
};

struct bracket_count_kernel {
    static constexpr int kThreads = kSegmentThreads;
    Arguments arguments;
    Inputs inputs;
    int64_t num;
    Brackets brackets;
    uint32_t* counts;  // [num_segments, num_models, 4]

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        unsigned char* tables = block.template shared<unsigned char>();
        uint32_t* found = block.template shared<uint32_t>(arguments.num_bytes);
        const int num_counts = 4 * inputs.num_models;
        arguments.bring(block, kThreads, tables);
        block.phase([&](int thread) {
            for (int i = thread; i < num_counts; i += kThreads) found[i] = 0;
        });
        block.phase([&](int thread) {
            const int32_t* low = reinterpret_cast<const int32_t*>(tables + brackets.low);
            const int32_t* high = reinterpret_cast<const int32_t*>(tables + brackets.high);
            const int64_t num_chunks = (num + kLanes - 1) / kLanes;
            for (int step = 0; step < kChunksOfThread; ++step) {
                const int64_t number = block.index() * kSegmentChunks + step * kThreads + thread;
                if (number >= num_chunks) break;
                const Scene<AnyReader> scene{tables, inputs, chunk_of(number, num), number, {}, {}};
                const Lanes::F base = scene.base();
                PM_ROLLED
                for (int i = 0; i < inputs.num_models; ++i) {
                    const Lanes::I key = keys_of(scene, static_cast<size_t>(i), base);
                    const Lanes::I bottom = Lanes::set(low[i]);
                    const Lanes::I top = Lanes::set(high[i]);
                    const uint32_t at_low = low[i] == high[i] ? 0 : count_of(Lanes::equal(key, bottom));
                    const uint32_t between =
                        count_of(Lanes::both(Lanes::greater(key, bottom), Lanes::greater(top, key)));
                    // At most 8 * 32 each of a warp: two counts go together in one word.
                    add_pair(found + 4 * i, count_of(Lanes::greater(key, top)), count_of(Lanes::equal(key, top)));
                    add_pair(found + 4 * i + 2, at_low, between);
                }
            }
        });
        block.phase([&](int thread) {
            for (int i = thread; i < num_counts; i += kThreads) counts[block.index() * num_counts + i] = found[i];
        });
    }

    PM_DEVICE static void add_pair(uint32_t* sums, uint32_t first, uint32_t second) {
#ifdef __CUDA_ARCH__
        const unsigned together = __activemask();
        const uint32_t total = __reduce_add_sync(together, first | second << 16);
        if ((threadIdx.x & 31) == static_cast<unsigned>(__ffs(static_cast<int>(together)) - 1)) {
            if (total & 0xffffu) atomic_add(sums, total & 0xffffu);
            if (total >> 16) atomic_add(sums + 1, total >> 16);
        }
#else
        sums[0] += first;
        sums[1] += second;
#endif
    }
};

// One block for each model adds up the segments: totals of the four counts, and for each segment how many keys lie
// between in the segments before it. Threads take runs of segments.
struct add_segments_kernel {
    static constexpr int kThreads = kSegmentThreads;
    int64_t num_segments;
    int32_t num_models;
    const uint32_t* counts;  // [num_segments, num_models, 4]
    uint64_t* totals;        // [num_models, 4]
    uint64_t* before;        // [num_models, num_segments]

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        const int64_t model = block.index();
        const int64_t run = (num_segments + kThreads - 1) / kThreads;
        uint64_t* sums = block.template shared<uint64_t>();  // [kThreads, 4]
        const auto count = [&](int64_t segment, int which) {
            return uint64_t{counts[(segment * num_models + model) * 4 + which]};
        };
        block.phase([&](int thread) {
            uint64_t own[4] = {};
            for (int64_t segment = thread * run; segment < (thread + 1) * run && segment < num_segments; ++segment) {
                for (int which = 0; which < 4; ++which) own[which] += count(segment, which);
            }
            for (int which = 0; which < 4; ++which) sums[4 * thread + which] = own[which];
        });
        block.phase([&](int thread) {
            if (thread >= 4) return;
            uint64_t total = 0;
            for (int i = 0; i < kThreads; ++i) {
                const uint64_t own = sums[4 * i + thread];
                sums[4 * i + thread] = total;
                total += own;
            }
            totals[4 * model + thread] = total;
        });
        block.phase([&](int thread) {
            uint64_t so_far = sums[4 * thread + 3];
            for (int64_t segment = thread * run; segment < (thread + 1) * run && segment < num_segments; ++segment) {
                before[model * num_segments + segment] = so_far;
                so_far += count(segment, 3);
            }
        });
    }
};

// Numbers of a segment's chunks become the sums of those before: numbers[kSegmentChunks], sums[kSegmentThreads].
template <class Block>
PM_DEVICE void add_chunks(const Block& block, uint32_t* numbers, uint32_t* sums) {
    block.phase([&](int thread) {
        uint32_t own = 0;
        for (int i = 0; i < kChunksOfThread; ++i) own += numbers[thread * kChunksOfThread + i];
        sums[thread] = own;
    });
    constexpr int kRun = 16;
    block.phase([&](int thread) {
        if (thread >= kSegmentThreads / kRun) return;
        uint32_t total = 0;
        for (int i = 0; i < kRun; ++i) {
            const uint32_t own = sums[thread * kRun + i];
            sums[thread * kRun + i] = total;
            total += own;
        }
        sums[kSegmentThreads + thread] = total;
    });
    block.phase([&](int thread) {
        uint32_t total = sums[thread];
        for (int i = 0; i < thread / kRun; ++i) total += sums[kSegmentThreads + i];
        for (int i = 0; i < kChunksOfThread; ++i) {
            const uint32_t own = numbers[thread * kChunksOfThread + i];
            numbers[thread * kChunksOfThread + i] = total;
            total += own;
        }
    });
}

constexpr size_t kChunkSumsBytes = (kSegmentChunks + kSegmentThreads + kSegmentThreads / 16) * sizeof(uint32_t);

// A block writes the keys between of one segment and one model, in order.
struct write_between_kernel {
    static constexpr int kThreads = kSegmentThreads;
    Arguments arguments;
    Inputs inputs;
    int64_t num;
    int64_t num_segments;
    Brackets brackets;
    const uint64_t* before;  // [num_models, num_segments]
    uint32_t places;         // uint64 [num_models]: where each model's keys begin in `candidates`
    uint32_t lengths;        // uint64 [num_models]: how many of them are written
    int32_t* candidates;

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        uint32_t* numbers = block.template shared<uint32_t>();
        uint32_t* sums = numbers + kSegmentChunks;
        unsigned char* tables = block.template shared<unsigned char>(kChunkSumsBytes);
        const int64_t segment = block.index() % num_segments;
        const size_t model = static_cast<size_t>(block.index() / num_segments);
        arguments.bring(block, kThreads, tables);
        const int32_t low = reinterpret_cast<const int32_t*>(tables + brackets.low)[model];
        const int32_t high = reinterpret_cast<const int32_t*>(tables + brackets.high)[model];
        const uint64_t length = reinterpret_cast<const uint64_t*>(tables + lengths)[model];
        const uint64_t first = before[static_cast<int64_t>(model) * num_segments + segment];
        int32_t* target = candidates + reinterpret_cast<const uint64_t*>(tables + places)[model];
        if (first >= length) return;
        const auto for_chunks = [&](int thread, const auto& body) {
            const int64_t num_chunks = (num + kLanes - 1) / kLanes;
            for (int step = 0; step < kChunksOfThread; ++step) {
                const int in_segment = step * kThreads + thread;
                const int64_t number = segment * kSegmentChunks + in_segment;
                if (number >= num_chunks) {
                    body(in_segment, Lanes::set(INT32_MIN), Lanes::first(0));
                    continue;
                }
                const Scene<AnyReader> scene{tables, inputs, chunk_of(number, num), number, {}, {}};
                const Lanes::I key = keys_of(scene, model, scene.base());
                body(in_segment, key,
                     Lanes::both(Lanes::greater(key, Lanes::set(low)), Lanes::greater(Lanes::set(high), key)));
            }
        };
        block.phase([&](int thread) {
            for_chunks(thread, [&](int in_segment, const Lanes::I&, const Lanes::M& between) {
                numbers[in_segment] = count_of(between);
            });
        });
        add_chunks(block, numbers, sums);
        block.phase([&](int thread) {
            for_chunks(thread, [&](int in_segment, const Lanes::I& key, const Lanes::M& between) {
                uint64_t place = first + numbers[in_segment];
                PM_UNROLL
                for (int lane = 0; lane < kLanes; ++lane) {
                    if (!between.v[lane]) continue;
                    if (place < length) target[place] = key.v[lane];
                    ++place;
                }
            });
        });
    }
};

// ---- locate_equal: count by segments, then one block finds the segment and the place in it

struct count_equal_kernel {
    static constexpr int kThreads = kSegmentThreads;
    Arguments arguments;
    Inputs inputs;
    int64_t num;
    int32_t key;
    uint32_t* counts;  // [num_segments]

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        uint32_t* found = block.template shared<uint32_t>();
        unsigned char* tables = block.template shared<unsigned char>(kCountBytes);
        arguments.bring(block, kThreads, tables);
        block.phase([&](int thread) {
            if (thread == 0) *found = 0;
        });
        block.phase([&](int thread) {
            const int64_t num_chunks = (num + kLanes - 1) / kLanes;
            uint32_t own = 0;
            for (int step = 0; step < kChunksOfThread; ++step) {
                const int64_t number = block.index() * kSegmentChunks + step * kThreads + thread;
                if (number >= num_chunks) break;
                const Scene<AnyReader> scene{tables, inputs, chunk_of(number, num), number, {}, {}};
                own += count_of(Lanes::equal(keys_of(scene, 0, scene.base()), Lanes::set(key)));
            }
            if (own) atomic_add(found, own);
        });
        block.phase([&](int thread) {
            if (thread == 0) counts[block.index()] = *found;
        });
    }
};

struct Location {
    int64_t index;
    uint64_t count;
};

struct locate_equal_kernel {
    static constexpr int kThreads = kSegmentThreads;
    Arguments arguments;
    Inputs inputs;
    int64_t num;
    int64_t num_segments;
    int32_t key;
    uint64_t nth;
    const uint32_t* counts;
    Location* location;

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        uint32_t* numbers = block.template shared<uint32_t>();
        uint32_t* sums = numbers + kSegmentChunks;
        uint64_t* runs = block.template shared<uint64_t>(rounded(kChunkSumsBytes));
        int64_t* found = reinterpret_cast<int64_t*>(runs + kThreads);  // segment, how many come before it
        unsigned char* tables = reinterpret_cast<unsigned char*>(found + 2);
        arguments.bring(block, kThreads, tables);
        const int64_t run = (num_segments + kThreads - 1) / kThreads;
        block.phase([&](int thread) {
            uint64_t own = 0;
            for (int64_t segment = thread * run; segment < (thread + 1) * run && segment < num_segments; ++segment) {
                own += counts[segment];
            }
            runs[thread] = own;
        });
        block.phase([&](int thread) {
            if (thread != 0) return;
            uint64_t before = 0;
            int in_run = 0;
            while (in_run < kThreads && before + runs[in_run] <= nth) before += runs[in_run++];
            found[0] = -1;
            location->index = -1;
            location->count = before;
            if (in_run == kThreads) return;
            int64_t segment = in_run * run;
            while (before + counts[segment] <= nth) before += counts[segment++];
            found[0] = segment;
            found[1] = static_cast<int64_t>(before);
            location->count = nth + 1;
        });
        if (found[0] < 0) return;
        const auto equals = [&](int in_segment, int64_t* begin) {
            const int64_t number = found[0] * kSegmentChunks + in_segment;
            const Scene<AnyReader> scene{tables, inputs, chunk_of(number, num), number, {}, {}};
            *begin = scene.chunk.begin;
            if (scene.chunk.length <= 0) return Lanes::first(0);
            return Lanes::equal(keys_of(scene, 0, scene.base()), Lanes::set(key));
        };
        block.phase([&](int thread) {
            for (int step = 0; step < kChunksOfThread; ++step) {
                int64_t begin;
                numbers[step * kThreads + thread] = count_of(equals(step * kThreads + thread, &begin));
            }
        });
        add_chunks(block, numbers, sums);
        block.phase([&](int thread) {
            const uint64_t wanted = nth - static_cast<uint64_t>(found[1]);
            for (int step = 0; step < kChunksOfThread; ++step) {
                int64_t begin;
                const int in_segment = step * kThreads + thread;
                const Lanes::M equal = equals(in_segment, &begin);
                uint64_t number = numbers[in_segment];
                PM_UNROLL
                for (int lane = 0; lane < kLanes; ++lane) {
                    if (equal.v[lane] && number++ == wanted) location->index = begin + lane;
                }
            }
        });
    }

    PM_DEVICE static size_t rounded(size_t bytes) { return (bytes + 15) / 16 * 16; }
};

}  // namespace

void magnitude_sample(const Models& models, int64_t start, int64_t group, int64_t stride, int64_t num_sampled,
                      int32_t* keys) {
    const char* op = "magnitude_sample";
    if (num_sampled == 0) return;
    Tables tables;
    Workspace workspace;
    magnitude_sample_kernel kernel{};
    kernel.inputs = add_inputs(&tables, models);
    kernel.start = start;
    kernel.group = group;
    kernel.period = group * stride;
    const int64_t rest = start % kernel.period;
    kernel.sampled_before = start / kernel.period * group + (rest < group ? rest : group);
    kernel.num_sampled = num_sampled;
    const size_t num_bytes = models.views.size() * static_cast<size_t>(num_sampled) * sizeof(int32_t);
    tables.reserve(&workspace);
    const size_t place = workspace.reserve(num_bytes);
    workspace.allocate();
    kernel.arguments = tables.finish(op, workspace);
    kernel.keys = workspace.at<int32_t>(place);
    launch(op, models.num, blocks_for(num_sampled, kernel.kThreads), tables.num_bytes(), kernel);
    download(op, keys, kernel.keys, num_bytes);
}

void bracket_count(const Models& models, const std::vector<int32_t>& low, const std::vector<int32_t>& high,
                   int64_t capacity, int64_t* counts, std::vector<std::vector<int32_t>>* candidates) {
    const char* op = "bracket_count";
    const size_t num_models = models.views.size();
    candidates->assign(num_models, {});
    for (size_t i = 0; i < 4 * num_models; ++i) counts[i] = 0;
    if (models.num == 0) return;
    const int64_t num_segments = divided_up(models.num, kSegment);
    Tables tables;
    Workspace workspace;
    bracket_count_kernel count{};
    count.inputs = add_inputs(&tables, models);
    count.brackets = {tables.add(low), tables.add(high)};
    count.num = models.num;
    tables.reserve(&workspace);
    const size_t totals = workspace.reserve(4 * num_models * sizeof(uint64_t));
    const size_t before = workspace.reserve(num_models * static_cast<size_t>(num_segments) * sizeof(uint64_t));
    const size_t by_segment = workspace.reserve(static_cast<size_t>(num_segments) * num_models * 4 * sizeof(uint32_t));
    workspace.allocate();
    count.arguments = tables.finish(op, workspace);
    count.counts = workspace.at<uint32_t>(by_segment);
    launch(op, models.num, num_segments, tables.num_bytes() + 4 * num_models * sizeof(uint32_t), count);
    const add_segments_kernel add{num_segments, count.inputs.num_models, count.counts, workspace.at<uint64_t>(totals),
                                  workspace.at<uint64_t>(before)};
    launch(op, models.num, static_cast<int64_t>(num_models), kSegmentThreads * 4 * sizeof(uint64_t), add);
    download(op, counts, add.totals, 4 * num_models * sizeof(uint64_t));

    std::vector<uint64_t> first(num_models);
    std::vector<uint64_t> length(num_models);
    uint64_t total = 0;
    for (size_t i = 0; i < num_models; ++i) {
        first[i] = total;
        length[i] = static_cast<uint64_t>(counts[4 * i + 3] < capacity ? counts[4 * i + 3] : capacity);
        total += length[i];
    }
    if (total == 0) return;
    std::vector<uint64_t> sums_before(num_models * static_cast<size_t>(num_segments));
    download(op, sums_before.data(), add.before, sums_before.size() * sizeof(uint64_t));
    Tables write_tables;
    Workspace write_workspace;
    write_between_kernel write{};
    write.inputs = add_inputs(&write_tables, models);
    write.brackets = {write_tables.add(low), write_tables.add(high)};
    write.num = models.num;
    write.num_segments = num_segments;
    write.places = write_tables.add(first);
    write.lengths = write_tables.add(length);
    write_tables.reserve(&write_workspace);
    const size_t before_place = write_workspace.reserve(sums_before.size() * sizeof(uint64_t));
    const size_t keys = write_workspace.reserve(total * sizeof(int32_t));
    write_workspace.allocate();
    write.arguments = write_tables.finish(op, write_workspace);
    upload(op, write_workspace.at<uint64_t>(before_place), sums_before.data(), sums_before.size() * sizeof(uint64_t));
    write.before = write_workspace.at<uint64_t>(before_place);
    write.candidates = write_workspace.at<int32_t>(keys);
    launch(op, models.num, num_segments * static_cast<int64_t>(num_models), kChunkSumsBytes + write_tables.num_bytes(),
           write);
    std::vector<int32_t> found(total);
    download(op, found.data(), write.candidates, total * sizeof(int32_t));
    for (size_t i = 0; i < num_models; ++i) {
        (*candidates)[i].assign(found.begin() + static_cast<int64_t>(first[i]),
                                found.begin() + static_cast<int64_t>(first[i] + length[i]));
    }
}

std::pair<int64_t, uint64_t> locate_equal(const Models& models, int32_t key, uint64_t nth) {
    const char* op = "locate_equal";
    if (models.num == 0) return {-1, 0};
    const int64_t num_segments = divided_up(models.num, kSegment);
    Tables tables;
    Workspace workspace;
    count_equal_kernel count{};
    count.inputs = add_inputs(&tables, models);
    tables.reserve(&workspace);
    const size_t by_segment = workspace.reserve(static_cast<size_t>(num_segments) * sizeof(uint32_t));
    const size_t result = workspace.reserve(sizeof(Location));
    workspace.allocate();
    count.arguments = tables.finish(op, workspace);
    count.num = models.num;
    count.key = key;
    count.counts = workspace.at<uint32_t>(by_segment);
    launch(op, models.num, num_segments, kCountBytes + tables.num_bytes(), count);
    const locate_equal_kernel locate{count.arguments,
                                     count.inputs,
                                     models.num,
                                     num_segments,
                                     key,
                                     nth,
                                     count.counts,
                                     workspace.at<Location>(result)};
    launch(op, models.num, 1,
           rounded_up(kChunkSumsBytes, 16) + (kSegmentThreads + 2) * sizeof(uint64_t) + tables.num_bytes(), locate);
    Location location{};
    download(op, &location, locate.location, sizeof location);
    return {location.index, location.count};
}

}  // namespace cuda
}  // namespace pymerge

// The driver of the maps: every element of the output from the same element of the base and of every model.
#pragma once

#include <type_traits>

#include "arguments.h"

namespace pymerge {
namespace cuda {
namespace {

// Reads memory of any format and alignment.
struct AnyReader {
    PM_DEVICE Lanes::F read(const Source* sources, size_t i, const Chunk& chunk) const {
        return cuda::read(sources[i], chunk);
    }
};

// Reads whole chunks of 16-bit elements that the thread has brought into shared memory.
struct StagedReader {
    const Words4* staged;
    int num_threads;

    PM_DEVICE Lanes::F read(const Source* sources, size_t i, const Chunk&) const {
        return decoded_halves(staged[i * static_cast<size_t>(num_threads)], sources[i].format);
    }
};

// A thread's own values of the models of a chunk, and for each a byte of marks, kept in shared memory for maps
// that look at them twice. Many models leave room for few threads.
struct Cache {
    Words4* memory;
    int num_threads;
    int thread;

    PM_DEVICE void put(size_t i, const Lanes::F& x) const {
        PM_UNROLL
        for (int half = 0; half < 2; ++half) {
            Words4 words;
            PM_UNROLL
            for (int j = 0; j < 4; ++j) words.w[j] = as_bits(x.v[4 * half + j]);
            memory[(2 * i + half) * num_threads + thread] = words;
        }
    }
    PM_DEVICE Lanes::F get(size_t i) const {
        Lanes::F x;
        PM_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Words4 words = memory[(2 * i + half) * num_threads + thread];
            PM_UNROLL
            for (int j = 0; j < 4; ++j) x.v[4 * half + j] = as_float(words.w[j]);
        }
        return x;
    }
    PM_DEVICE unsigned char& marks(size_t i, size_t num_models) const {
        return reinterpret_cast<unsigned char*>(memory + 2 * num_models * num_threads)[i * num_threads + thread];
    }
};

constexpr size_t kCachedBytes = 33;  // of a thread and a model

// One chunk as a map sees it.
template <class Reader>
struct Scene {
    const unsigned char* tables;  // in shared memory
    const Inputs& inputs;
    Chunk chunk;
    int64_t number;
    Cache cache;
    Reader reader;

    template <class T>
    PM_DEVICE const T* table(uint32_t offset) const {
        return reinterpret_cast<const T*>(tables + offset);
    }
    PM_DEVICE size_t num_models() const { return static_cast<size_t>(inputs.num_models); }
    PM_DEVICE Lanes::F base() const {
        return inputs.has_base ? reader.read(table<Source>(inputs.sources), 0, chunk) : Lanes::set(0.0f);
    }
    PM_DEVICE Lanes::F value(size_t i) const { return reader.read(table<Source>(inputs.sources), 1 + i, chunk); }
    PM_DEVICE Lanes::F delta(size_t i, const Lanes::F& base) const {
        const Lanes::F x = value(i);
        return inputs.has_base ? Lanes::sub(x, base) : x;
    }
    // Brings the deltas of a chunk into the cache; returns delta(i), which may be called any number of times.
    PM_DEVICE auto cached_deltas(const Lanes::F& base) const {
        PM_ROLLED
        for (size_t i = 0; i < num_models(); ++i) cache.put(i, delta(i, base));
        return [cache = cache](size_t i) { return cache.get(i); };
    }
    PM_DEVICE Lanes::M there() const { return Lanes::first(static_cast<size_t>(chunk.length)); }
    PM_DEVICE Lanes::I places() const {
        return Lanes::add(Lanes::set(static_cast<int32_t>(chunk.begin)), Lanes::lanes());
    }
};

// Adds to a sum in shared memory, for the threads of a warp that come here together in one go.
PM_DEVICE void add_together(uint32_t* sum, uint32_t x) {
#ifdef __CUDA_ARCH__
    const unsigned together = __activemask();
    const uint32_t total = __reduce_add_sync(together, x);
    if ((threadIdx.x & 31) == static_cast<unsigned>(__ffs(static_cast<int>(together)) - 1) && total) {
        atomic_add(sum, total);
    }
#else
    atomic_add(sum, x);
#endif
}

constexpr uint32_t kCountBytes = 16;

template <class Map>
struct MapTask {
    Arguments arguments;
    Inputs inputs;
    Target out;
    int64_t first;  // of the chunks
    int64_t last;
    int64_t num;
    uint64_t* nonfinite;
    int32_t num_active;  // threads of a block that have room in the cache
    Map map;

    // Calls body(thread, tables, memory of the cache), which returns how many elements are not finite.
    template <class Block, class Body>
    PM_DEVICE void run(const Block& block, int num_threads, const Body& body) const {
        uint32_t* count = block.template shared<uint32_t>();
        unsigned char* tables = block.template shared<unsigned char>(kCountBytes);
        Words4* cached = block.template shared<Words4>(kCountBytes + arguments.num_bytes);
        arguments.bring(block, num_threads, tables);
        block.phase([&](int thread) {
            if (thread == 0) *count = 0;
            map.prepare(tables, thread, num_threads, num);
        });
        block.phase([&](int thread) {
            const uint32_t bad = thread < num_active ? body(thread, tables, cached) : 0;
            if (bad) atomic_add(count, bad);
        });
        block.phase([&](int thread) {
            if (thread == 0 && *count) atomic_add(nonfinite, uint64_t{*count});
        });
    }
};

template <class Map>
struct map_kernel : MapTask<Map> {
    static constexpr int kThreads = 256;

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        this->run(block, kThreads, [&](int thread, const unsigned char* tables, Words4* cached) {
            uint32_t bad = 0;
            const int64_t step = block.num() * this->num_active;
            for (int64_t number = this->first + block.index() * this->num_active + thread; number < this->last;
                 number += step) {
                const Scene<AnyReader> scene{
                    tables, this->inputs, chunk_of(number, this->num), number, {cached, this->num_active, thread}, {}};
                bad += write(this->out, scene.chunk, this->map(scene));
            }
            return bad;
        });
    }
};

// For 16-bit inputs at 16-byte addresses and outputs at 4-byte ones: while a thread computes on one chunk, all of its
// next one is on the way. Smaller blocks, for the shared memory that this takes.
template <class Map>
struct staged_map_kernel : MapTask<Map> {
    static constexpr int kThreads = 128;
    size_t cache_bytes;  // what comes behind the cache is staged: [2, 1 + num_models, num_active]

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        this->run(block, kThreads, [&](int thread, const unsigned char* tables, Words4* cached) {
            const Source* sources = reinterpret_cast<const Source*>(tables + this->inputs.sources);
            const int num_sources = 1 + this->inputs.num_models;
            const int num_active = this->num_active;
            Words4* staged = reinterpret_cast<Words4*>(reinterpret_cast<unsigned char*>(cached) + cache_bytes) + thread;
            const auto bring_chunk = [&](int64_t number, Words4* target) {
                PM_ROLLED
                for (int i = this->inputs.has_base ? 0 : 1; i < num_sources; ++i) {
                    bring(target + i * num_active, sources[i].data + number * int64_t{sizeof(Words4)});
                }
            };
            uint32_t bad = 0;
            const int64_t step = block.num() * num_active;
            int64_t number = this->first + block.index() * num_active + thread;
            if (number < this->last) bring_chunk(number, staged);
            end_of_batch();
            int half = 0;
            for (; number < this->last; number += step) {
                if (number + step < this->last) {
                    bring_chunk(number + step, staged + (1 - half) * num_sources * num_active);
                }
                end_of_batch();
                wait_for_batches();
                const Scene<StagedReader> scene{tables,
                                                this->inputs,
                                                {number * kLanes, kLanes, true},
                                                number,
                                                {cached, num_active, thread},
                                                {staged + half * num_sources * num_active, num_active}};
                bad += write<true>(this->out, scene.chunk, this->map(scene));
                half = 1 - half;
            }
            return bad;
        });
    }
};

// A map without work of its own before the first chunk.
struct PlainMap {
    PM_DEVICE void prepare(unsigned char*, int, int, int64_t) const {}
};

// Blocks for so many threads of work, no more than fill the device.
inline int64_t blocks_for(int64_t num_threads, int threads) {
    const int64_t needed = divided_up(num_threads, threads);
    const int64_t filling = filling_blocks(threads);
    return needed < filling ? needed : filling;
}

// How many of a block's threads have room in what the tables leave of shared memory: all, unless models are many.
inline int32_t num_with_room(const char* op, size_t num_models, size_t bytes_of_thread, size_t tables_bytes,
                             int32_t threads) {
    if (bytes_of_thread == 0) return threads;
    const size_t room = (most_shared_bytes() - kCountBytes - tables_bytes - 16) / bytes_of_thread;
    if (room >= static_cast<size_t>(threads)) return threads;
    if (room >= 32) return static_cast<int32_t>(room / 32 * 32);
    if (room == 0) throw Failure(std::string(op) + ": " + std::to_string(num_models) + " models are too many at once");
    return static_cast<int32_t>(room);
}

// Whether all inputs are of 16-bit formats at 16-byte addresses.
inline bool can_be_staged(const Models& models) {
    const auto fits = [](const View& view) {
        return num_bytes(static_cast<Format>(view.format)) == 2 && view.address % 16 == 0;
    };
    bool all = !models.base || fits(*models.base);
    for (const View& view : models.views) all = all && fits(view);
    return all;
}

enum class Speed { Any, StagedToo };

// The kernel of a map, or of the map that stands for it where elements are of any format.
template <class Map>
auto general_kernel(const MapTask<Map>& task) {
    if constexpr (std::is_base_of_v<PlainMap, Map>) {
        map_kernel<Map> kernel{};
        static_cast<MapTask<Map>&>(kernel) = task;
        return kernel;
    } else {
        map_kernel<typename Map::General> kernel{};
        kernel.arguments = task.arguments;
        kernel.inputs = task.inputs;
        kernel.out = task.out;
        kernel.num = task.num;
        kernel.nonfinite = task.nonfinite;
        kernel.map = task.map.general();
        return kernel;
    }
}

// Runs a map. `tables` and `workspace` hold what the map reserved for itself; fill(workspace, &map) is called when
// addresses are known, to upload. Maps that look at deltas twice ask for a cache.
template <Speed kSpeed, class Map, class Fill>
uint64_t run_map(const char* op, const View& out, const Models& models, Tables* tables, Workspace* workspace,
                 bool wants_cache, Map map, const Fill& fill) {
    if (out.num == 0) return 0;
    MapTask<Map> task{};
    task.inputs = add_inputs(tables, models);
    tables->reserve(workspace);
    const size_t count = workspace->reserve(sizeof(uint64_t));
    workspace->allocate();
    clear(op, workspace->at<uint64_t>(count), sizeof(uint64_t));
    task.arguments = tables->finish(op, *workspace);
    fill(*workspace, &map);
    task.out = target_of(out);
    task.num = out.num;
    task.nonfinite = workspace->at<uint64_t>(count);
    task.map = map;
    const size_t num_models = models.views.size();
    const size_t cached = wants_cache ? num_models * kCachedBytes : 0;
    const size_t beside = kCountBytes + tables->num_bytes();
    int64_t first = 0;
    if constexpr (kSpeed == Speed::StagedToo) {
        if (can_be_staged(models) && task.out.width >= 4) {
            staged_map_kernel<Map> kernel{};
            static_cast<MapTask<Map>&>(kernel) = task;
            const size_t staged = 2 * (1 + num_models) * sizeof(Words4);
            kernel.num_active = num_with_room(op, num_models, cached + staged, tables->num_bytes(), kernel.kThreads);
            kernel.cache_bytes = rounded_up(cached * static_cast<size_t>(kernel.num_active), 16);
            kernel.last = first = out.num / kLanes;
            launch(op, out.num, blocks_for(first, kernel.num_active),
                   beside + kernel.cache_bytes + staged * static_cast<size_t>(kernel.num_active), kernel);
        }
    }
    const int64_t num_chunks = divided_up(out.num, kLanes);
    if (first < num_chunks) {
        auto kernel = general_kernel(task);
        kernel.num_active = num_with_room(op, num_models, cached, tables->num_bytes(), kernel.kThreads);
        kernel.first = first;
        kernel.last = num_chunks;
        launch(op, out.num, blocks_for(num_chunks - first, kernel.num_active),
               beside + cached * static_cast<size_t>(kernel.num_active), kernel);
    }
    uint64_t nonfinite = 0;
    download(op, &nonfinite, task.nonfinite, sizeof nonfinite);
    return nonfinite;
}

template <Speed kSpeed, class Map>
uint64_t run_map(const char* op, const View& out, const Models& models, Tables* tables, bool wants_cache,
                 const Map& map) {
    Workspace workspace;
    return run_map<kSpeed>(op, out, models, tables, &workspace, wants_cache, map, [](const Workspace&, Map*) {});
}

}  // namespace
}  // namespace cuda
}  // namespace pymerge

// Elements of any format in memory of any alignment, eight at a time.
//
// A chunk is eight elements from a multiple of eight on, and one thread's work. Whole chunks are read by the
// widest access that their addresses allow: 16 bytes, 8 bytes, or, for anything else, the 4-byte words around
// them, shifted into place. Those words may begin before and end behind the chunk, so the first and the last
// chunk of such memory, and a chunk that is not whole, are read byte by byte instead.
#pragma once

#include "lanes.h"

namespace pymerge {
namespace cuda {
namespace {

// What is known of a format when a kernel is compiled.
template <Format kFormat>
struct Known {
    static constexpr int kBytes = num_bytes(kFormat);
    static constexpr int32_t kOverflow = overflow_bits(kFormat);
};

struct Source {
    const unsigned char* data;
    int32_t format;
    int32_t width;  // bytes of an access: 16, 8, or 1 for the words around
};

struct Target {
    unsigned char* data;
    int32_t format;
    int32_t width;  // 16, 8, 4, or 1 for bytes
};

// Which elements a thread works on.
struct Chunk {
    int64_t begin;
    int32_t length;  // 8, or less at the end
    bool inner;      // not the first, not the last
};

PM_DEVICE Chunk chunk_of(int64_t number, int64_t num) {
    Chunk chunk;
    chunk.begin = number * kLanes;
    chunk.length = num - chunk.begin < kLanes ? static_cast<int32_t>(num - chunk.begin) : kLanes;
    chunk.inner = number > 0 && chunk.begin + 2 * kLanes <= num;
    return chunk;
}

struct alignas(16) Words4 {
    uint32_t w[4];
};
struct alignas(8) Words2 {
    uint32_t w[2];
};

#ifdef __CUDACC__
// Inputs are never written while a kernel runs, outputs are not read again soon.
PM_DEVICE void load_into(uint32_t* w, const Words4* p) {
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(p));
    w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
}
PM_DEVICE void load_into(uint32_t* w, const Words2* p) {
    const uint2 x = __ldg(reinterpret_cast<const uint2*>(p));
    w[0] = x.x, w[1] = x.y;
}
PM_DEVICE uint32_t load_word(const unsigned char* p) { return __ldg(reinterpret_cast<const unsigned*>(p)); }
PM_DEVICE uint32_t load_byte(const unsigned char* p) { return __ldg(p); }
PM_DEVICE void store_from(const uint32_t* w, Words4* p) {
    __stcs(reinterpret_cast<uint4*>(p), make_uint4(w[0], w[1], w[2], w[3]));
}
PM_DEVICE void store_from(const uint32_t* w, Words2* p) { __stcs(reinterpret_cast<uint2*>(p), make_uint2(w[0], w[1])); }
PM_DEVICE void store_word(unsigned char* p, uint32_t w) { __stcs(reinterpret_cast<unsigned*>(p), w); }
PM_DEVICE uint32_t joined(uint32_t low, uint32_t high, int bits) { return __funnelshift_r(low, high, bits); }
#else
inline void load_into(uint32_t* w, const Words4* p) { memcpy(w, p->w, sizeof p->w); }
inline void load_into(uint32_t* w, const Words2* p) { memcpy(w, p->w, sizeof p->w); }
inline uint32_t load_word(const unsigned char* p) { return *reinterpret_cast<const uint32_t*>(p); }
inline uint32_t load_byte(const unsigned char* p) { return *p; }
inline void store_from(const uint32_t* w, Words4* p) { memcpy(p->w, w, sizeof p->w); }
inline void store_from(const uint32_t* w, Words2* p) { memcpy(p->w, w, sizeof p->w); }
inline void store_word(unsigned char* p, uint32_t w) { *reinterpret_cast<uint32_t*>(p) = w; }
inline uint32_t joined(uint32_t low, uint32_t high, int bits) {
    return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> bits);
}
#endif

constexpr int kMostWords = 16;

// The words of a chunk at p, num_words of them where the chunk is whole.
PM_DEVICE void load_words(const unsigned char* p, int32_t width, const Chunk& chunk, int num_words, uint32_t* w) {
    const bool whole = chunk.length == kLanes;
    if (whole && width == 16 && num_words >= 4) {
        PM_UNROLL
        for (int i = 0; i < kMostWords; i += 4) {
            if (i < num_words) load_into(w + i, reinterpret_cast<const Words4*>(p + 4 * i));
        }
    } else if (whole && width >= 8) {
        PM_UNROLL
        for (int i = 0; i < kMostWords; i += 2) {
            if (i < num_words) load_into(w + i, reinterpret_cast<const Words2*>(p + 4 * i));
        }
    } else if (chunk.inner) {
        const int bits = 8 * static_cast<int>(reinterpret_cast<uintptr_t>(p) & 3);
        const unsigned char* around = p - bits / 8;
        uint32_t low = load_word(around);
        PM_UNROLL
        for (int i = 0; i < kMostWords; ++i) {
            if (i < num_words) {
                // A chunk of whole words has nothing behind the last of them.
                const uint32_t high = bits || i + 1 < num_words ? load_word(around + 4 * (i + 1)) : 0;
                w[i] = joined(low, high, bits);
                low = high;
            }
        }
    } else {
        uint32_t own[kMostWords] = {};
        unsigned char* bytes = reinterpret_cast<unsigned char*>(own);
        const int num_bytes = num_words * 4 / kLanes * chunk.length;
        PM_ROLLED
        for (int i = 0; i < num_bytes; ++i) bytes[i] = static_cast<unsigned char>(load_byte(p + i));
        PM_UNROLL
        for (int i = 0; i < kMostWords; ++i) w[i] = own[i];
    }
}

template <Format kFormat>
PM_DEVICE Lanes::F decoded(const uint32_t* w) {
    constexpr int size = Known<kFormat>::kBytes;
    return gather<float>([&](int lane) -> float {
        if constexpr (size == 8) {
            const uint64_t bits = static_cast<uint64_t>(w[2 * lane + 1]) << 32 | w[2 * lane];
            return Scalar::load(Tag<kFormat>{}, &bits);
        } else if constexpr (size == 4) {
            return Scalar::load(Tag<kFormat>{}, &w[lane]);
        } else if constexpr (size == 2) {
            const uint16_t bits = static_cast<uint16_t>(w[lane / 2] >> (16 * (lane % 2)));
            return Scalar::load(Tag<kFormat>{}, &bits);
        } else {
            const uint8_t bits = static_cast<uint8_t>(w[lane / 4] >> (8 * (lane % 4)));
            return Scalar::load(Tag<kFormat>{}, &bits);
        }
    });
}

PM_DEVICE int bytes_of(int32_t format) {
    return format == static_cast<int32_t>(Format::F64)       ? 8
           : format == static_cast<int32_t>(Format::F32)     ? 4
           : format >= static_cast<int32_t>(Format::F8_E4M3) ? 1
                                                             : 2;
}

// The values of a chunk. Lanes behind its end hold +0.
PM_DEVICE Lanes::F read(const Source& source, const Chunk& chunk) {
    uint32_t w[kMostWords];
    const int size = bytes_of(source.format);
    load_words(source.data + chunk.begin * size, source.width, chunk, 2 * size, w);
    switch (static_cast<Format>(source.format)) {
        case Format::F64:
            return decoded<Format::F64>(w);
        case Format::F32:
            return decoded<Format::F32>(w);
        case Format::F16:
            return decoded<Format::F16>(w);
        case Format::F8_E4M3:
            return decoded<Format::F8_E4M3>(w);
        case Format::F8_E5M2:
            return decoded<Format::F8_E5M2>(w);
        default:
            return decoded<Format::BF16>(w);
    }
}

// The values of a whole chunk of 16-bit elements.
PM_DEVICE Lanes::F decoded_halves(const Words4& words, int32_t format) {
    return format == static_cast<int32_t>(Format::F16) ? decoded<Format::F16>(words.w) : decoded<Format::BF16>(words.w);
}

// Brings 16 bytes into shared memory while the thread goes on; end_of_batch() closes what was asked for together,
// and wait_for_batches() returns when all batches but the latest are there.
PM_DEVICE void bring(Words4* shared, const unsigned char* p) {
#ifdef __CUDA_ARCH__
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
        "l"(p)
        : "memory");
#else
    memcpy(shared, p, sizeof *shared);
#endif
}
PM_DEVICE void end_of_batch() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
PM_DEVICE void wait_for_batches() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
}

// One value, byte by byte where the memory is not aligned for it.
template <Format kFormat>
PM_DEVICE float read_one_as(const unsigned char* p) {
    constexpr int size = Known<kFormat>::kBytes;
    unsigned char bytes[size];
    if constexpr (size == 2) {
#ifdef __CUDACC__
        if ((reinterpret_cast<uintptr_t>(p) & 1) == 0) {
            const uint16_t bits = __ldg(reinterpret_cast<const unsigned short*>(p));
            return Scalar::load(Tag<kFormat>{}, &bits);
        }
#endif
    }
    if constexpr (size == 4) {
#ifdef __CUDACC__
        if ((reinterpret_cast<uintptr_t>(p) & 3) == 0) {
            const uint32_t bits = load_word(p);
            return Scalar::load(Tag<kFormat>{}, &bits);
        }
#endif
    }
    PM_UNROLL
    for (int byte = 0; byte < size; ++byte) bytes[byte] = static_cast<unsigned char>(load_byte(p + byte));
    return Scalar::load(Tag<kFormat>{}, bytes);
}

PM_DEVICE float read_one(const Source& source, int64_t index) {
    const Format format = static_cast<Format>(source.format);
    switch (format) {
        case Format::F64:
            return read_one_as<Format::F64>(source.data + 8 * index);
        case Format::F32:
            return read_one_as<Format::F32>(source.data + 4 * index);
        case Format::F16:
            return read_one_as<Format::F16>(source.data + 2 * index);
        case Format::F8_E4M3:
            return read_one_as<Format::F8_E4M3>(source.data + index);
        case Format::F8_E5M2:
            return read_one_as<Format::F8_E5M2>(source.data + index);
        default:
            return read_one_as<Format::BF16>(source.data + 2 * index);
    }
}

// kWhole: the caller knows that the chunk is whole and the width at least 4.
template <bool kWhole>
PM_DEVICE void store_words(unsigned char* p, int32_t width, const Chunk& chunk, int num_words, const uint32_t* w) {
    const bool whole = kWhole || chunk.length == kLanes;
    if (whole && width == 16) {
        PM_UNROLL
        for (int i = 0; i < kMostWords; i += 4) {
            if (i < num_words) store_from(w + i, reinterpret_cast<Words4*>(p + 4 * i));
        }
    } else if (whole && width == 8) {
        PM_UNROLL
        for (int i = 0; i < kMostWords; i += 2) {
            if (i < num_words) store_from(w + i, reinterpret_cast<Words2*>(p + 4 * i));
        }
    } else if (kWhole || (whole && width == 4)) {
        PM_UNROLL
        for (int i = 0; i < kMostWords; ++i) {
            if (i < num_words) store_word(p + 4 * i, w[i]);
        }
    } else {
        uint32_t own[kMostWords];
        PM_UNROLL
        for (int i = 0; i < kMostWords; ++i) own[i] = w[i];
        const unsigned char* bytes = reinterpret_cast<const unsigned char*>(own);
        const int num_bytes = num_words * 4 / kLanes * chunk.length;
        PM_ROLLED
        for (int i = 0; i < num_bytes; ++i) p[i] = bytes[i];
    }
}

// x, NaN as the positive quiet one.
PM_DEVICE float one_nan(float x) { return Scalar::select(Scalar::is_nan(x), nan<Scalar>(), x); }

// Rounds to a format; returns how many of the first `length` lanes are not finite then.
template <Format kFormat>
PM_DEVICE uint32_t encode(const Lanes::F& x, int length, uint32_t* w) {
    constexpr int size = Known<kFormat>::kBytes;
    uint32_t nonfinite = 0;
    PM_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
        nonfinite += lane < length && magnitude_bits<Scalar>(x.v[lane]) >= Known<kFormat>::kOverflow;
        const float value = one_nan(x.v[lane]);
        if constexpr (size == 8) {
            uint64_t bits;
            Scalar::store(Tag<kFormat>{}, &bits, value);
            w[2 * lane] = static_cast<uint32_t>(bits);
            w[2 * lane + 1] = static_cast<uint32_t>(bits >> 32);
        } else if constexpr (size == 4) {
            Scalar::store(Tag<kFormat>{}, &w[lane], value);
        } else {
            uint16_t bits;
            Scalar::store(Tag<kFormat>{}, &bits, value);
            w[lane / 2] = lane % 2 ? w[lane / 2] | static_cast<uint32_t>(bits) << 16 : bits;
        }
    }
    return nonfinite;
}

// Rounds a chunk into the target; returns how many of its elements are not finite then.
template <bool kWhole = false>
PM_DEVICE uint32_t write(const Target& target, const Chunk& chunk, const Lanes::F& x) {
    uint32_t w[kMostWords] = {};
    uint32_t nonfinite = 0;
    switch (static_cast<Format>(target.format)) {
        case Format::F64:
            nonfinite = encode<Format::F64>(x, chunk.length, w);
            break;
        case Format::F32:
            nonfinite = encode<Format::F32>(x, chunk.length, w);
            break;
        case Format::F16:
            nonfinite = encode<Format::F16>(x, chunk.length, w);
            break;
        default:
            nonfinite = encode<Format::BF16>(x, chunk.length, w);
            break;
    }
    const int size = bytes_of(target.format);
    store_words<kWhole>(target.data + chunk.begin * size, target.width, chunk, 2 * size, w);
    return nonfinite;
}

// One element, byte by byte: for kernels whose elements do not come in chunks.
template <Format kFormat>
PM_DEVICE uint32_t write_one_as(unsigned char* p, float x) {
    constexpr int size = Known<kFormat>::kBytes;
    unsigned char bytes[size];
    Scalar::store(Tag<kFormat>{}, bytes, one_nan(x));
    if (reinterpret_cast<uintptr_t>(p) % size == 0) {
        memcpy(__builtin_assume_aligned(p, size), bytes, size);
    } else {
        PM_UNROLL
        for (int byte = 0; byte < size; ++byte) p[byte] = bytes[byte];
    }
    return magnitude_bits<Scalar>(x) >= Known<kFormat>::kOverflow;
}

PM_DEVICE uint32_t write_one(const Target& target, int64_t index, float x) {
    switch (static_cast<Format>(target.format)) {
        case Format::F64:
            return write_one_as<Format::F64>(target.data + 8 * index, x);
        case Format::F32:
            return write_one_as<Format::F32>(target.data + 4 * index, x);
        case Format::F16:
            return write_one_as<Format::F16>(target.data + 2 * index, x);
        default:
            return write_one_as<Format::BF16>(target.data + 2 * index, x);
    }
}

}  // namespace
}  // namespace cuda
}  // namespace pymerge

// The policy of arithmetic.h for eight neighbouring elements in the registers of one thread: Scalar, eight times.
// Eight 16-bit elements are 16 bytes, the widest access that there is.
#pragma once

#include "block.h"
#include "pymerge/scalar.h"

namespace pymerge {
namespace cuda {
namespace {

constexpr int kLanes = 8;

template <class T>
struct Eight {
    T v[8];
};

// Calls body(lane) for each lane and gathers what it returns.
template <class T, class Body>
PM_DEVICE Eight<T> gather(const Body& body) {
    Eight<T> all;
    PM_UNROLL
    for (int lane = 0; lane < 8; ++lane) all.v[lane] = body(lane);
    return all;
}

struct Lanes {
    static constexpr size_t kLanes = 8;
    using F = Eight<float>;
    using I = Eight<int32_t>;
    using M = Eight<bool>;

    PM_DEVICE static F set(float x) {
        return gather<float>([&](int) { return x; });
    }
    PM_DEVICE static I set(int32_t x) {
        return gather<int32_t>([&](int) { return x; });
    }
    PM_DEVICE static I lanes() {
        return gather<int32_t>([&](int lane) { return lane; });
    }
    PM_DEVICE static M first(size_t n) {
        return gather<bool>([&](int lane) { return static_cast<size_t>(lane) < n; });
    }

    PM_DEVICE static I bits(const F& a) {
        return gather<int32_t>([&](int lane) { return Scalar::bits(a.v[lane]); });
    }
    PM_DEVICE static F floats(const I& a) {
        return gather<float>([&](int lane) { return Scalar::floats(a.v[lane]); });
    }
    PM_DEVICE static I to_int(const F& a) {
        return gather<int32_t>([&](int lane) { return Scalar::to_int(a.v[lane]); });
    }
    PM_DEVICE static F to_float(const I& a) {
        return gather<float>([&](int lane) { return Scalar::to_float(a.v[lane]); });
    }
    PM_DEVICE static I halve(const I& a) {
        return gather<int32_t>([&](int lane) { return Scalar::halve(a.v[lane]); });
    }
    PM_DEVICE static I shift_right(const I& a, int32_t n) {
        return gather<int32_t>([&](int lane) { return Scalar::shift_right(a.v[lane], n); });
    }
    PM_DEVICE static I shift_left(const I& a, int32_t n) {
        return gather<int32_t>([&](int lane) { return Scalar::shift_left(a.v[lane], n); });
    }
    PM_DEVICE static F sqrt(const F& a) {
        return gather<float>([&](int lane) { return Scalar::sqrt(a.v[lane]); });
    }
    PM_DEVICE static M is_nan(const F& a) {
        return gather<bool>([&](int lane) { return Scalar::is_nan(a.v[lane]); });
    }
    PM_DEVICE static M negate(const M& a) {
        return gather<bool>([&](int lane) { return Scalar::negate(a.v[lane]); });
    }

#define PM_BINARY(name, Lane, Operand)                                                     \
    PM_DEVICE static Eight<Lane> name(const Eight<Operand>& a, const Eight<Operand>& b) {  \
        return gather<Lane>([&](int lane) { return Scalar::name(a.v[lane], b.v[lane]); }); \
    }
    PM_BINARY(add, float, float)
    PM_BINARY(sub, float, float)
    PM_BINARY(mul, float, float)
    PM_BINARY(div, float, float)
    PM_BINARY(above, bool, float)
    PM_BINARY(at_least, bool, float)
    PM_BINARY(same, bool, float)
    PM_BINARY(add, int32_t, int32_t)
    PM_BINARY(sub, int32_t, int32_t)
    PM_BINARY(min, int32_t, int32_t)
    PM_BINARY(bit_and, int32_t, int32_t)
    PM_BINARY(bit_or, int32_t, int32_t)
    PM_BINARY(bit_xor, int32_t, int32_t)
    PM_BINARY(greater, bool, int32_t)
    PM_BINARY(equal, bool, int32_t)
    PM_BINARY(below_unsigned, bool, int32_t)
    PM_BINARY(both, bool, bool)
    PM_BINARY(either, bool, bool)
#undef PM_BINARY

    template <class T>
    PM_DEVICE static Eight<T> select(const M& m, const Eight<T>& yes, const Eight<T>& no) {
        return gather<T>([&](int lane) { return m.v[lane] ? yes.v[lane] : no.v[lane]; });
    }
    PM_DEVICE static F zero_unless(const M& m, const F& x) {
        return gather<float>([&](int lane) { return m.v[lane] ? x.v[lane] : 0.0f; });
    }
    PM_DEVICE static F add_where(const M& m, const F& acc, const F& x) {
        return gather<float>([&](int lane) { return m.v[lane] ? Scalar::add(acc.v[lane], x.v[lane]) : acc.v[lane]; });
    }
    PM_DEVICE static I count(const I& acc, const M& m) {
        return gather<int32_t>([&](int lane) { return Scalar::count(acc.v[lane], m.v[lane]); });
    }
    PM_DEVICE static uint32_t sum(const I& counts) {
        uint32_t total = 0;
        PM_UNROLL
        for (int lane = 0; lane < 8; ++lane) total += static_cast<uint32_t>(counts.v[lane]);
        return total;
    }
};

// The draws of eight elements from index `first` in the full tensor on.
PM_DEVICE Lanes::I draws_of(uint64_t seed, int64_t first) {
    const uint64_t quarter = static_cast<uint64_t>(first) >> 2;
    const int phase = static_cast<int>(first & 3);
    uint32_t words[12];
    PM_UNROLL
    for (int counter = 0; counter < 3; ++counter) {
        uint64_t wide[4] = {};
        // Eight draws that begin at a whole counter are two counters.
        if (counter < 2 || phase != 0) philox<Scalar>(quarter + counter, seed, wide);
        PM_UNROLL
        for (int word = 0; word < 4; ++word) words[4 * counter + word] = static_cast<uint32_t>(wide[word]);
    }
    // Constant places, for an array that is indexed by a variable would go to memory.
    return gather<int32_t>([&](int lane) {
        const uint32_t draw = phase == 0   ? words[lane]
                              : phase == 1 ? words[lane + 1]
                              : phase == 2 ? words[lane + 2]
                                           : words[lane + 3];
        return static_cast<int32_t>(draw);
    });
}

PM_DEVICE uint32_t draw_of(uint64_t seed, int64_t index) {
    uint64_t words[4];
    philox<Scalar>(static_cast<uint64_t>(index) >> 2, seed, words);
    const int word = static_cast<int>(index & 3);
    return static_cast<uint32_t>(word == 0 ? words[0] : word == 1 ? words[1] : word == 2 ? words[2] : words[3]);
}

}  // namespace
}  // namespace cuda
}  // namespace pymerge

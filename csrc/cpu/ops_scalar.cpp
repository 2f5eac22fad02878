// The ops in portable C++, one element at a time: what other processors run, and the check of the others.
#include "float8_inl.h"
#include "ops_inl.h"

namespace pymerge {
namespace {

template <class T>
T load_as(const void* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}

float as_float(uint32_t bits) { return load_as<float>(&bits); }
uint32_t as_bits(float x) { return load_as<uint32_t>(&x); }

float f16_to_f32(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 0x1f;
    const uint32_t mantissa = half & 0x3ffu;
    if (exponent == 0x1f) return as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    // Subnormal: an exact multiple of 2**-24.
    return as_float(as_bits(static_cast<float>(mantissa) * 0x1p-24f) | sign);
}

// Rounds to nearest even; NaN must already be the positive quiet one.
uint16_t f32_to_f16(float x) {
    const uint32_t sign = (as_bits(x) >> 16) & 0x8000u;
    const uint32_t magnitude = as_bits(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7e00;
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Below the smallest normal half: adding 0.5 leaves the multiple of 2**-24 in the low bits, rounded by the FPU.
        return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u));
    }
    const uint32_t odd = (magnitude >> 13) & 1;
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

struct Scalar {
    static constexpr size_t kLanes = 1;
    using F = float;
    using I = int32_t;
    using M = bool;

    static F get(const float* p) { return *p; }
    static void put(float* p, F x) { *p = x; }
    static void put(int32_t* p, I x) { *p = x; }

    static F load(Tag<Format::F64>, const void* p) { return static_cast<float>(load_as<double>(p)); }
    static F load(Tag<Format::F32>, const void* p) { return load_as<float>(p); }
    static F load(Tag<Format::F16>, const void* p) { return f16_to_f32(load_as<uint16_t>(p)); }
    static F load(Tag<Format::BF16>, const void* p) {
        return as_float(static_cast<uint32_t>(load_as<uint16_t>(p)) << 16);
    }
    static F load(Tag<Format::F8_E4M3>, const void* p) { return as_float(kE4M3.bits[load_as<uint8_t>(p)]); }
    static F load(Tag<Format::F8_E5M2>, const void* p) { return as_float(kE5M2.bits[load_as<uint8_t>(p)]); }

    static void store(Tag<Format::F64>, void* p, F x) {
        const double wide = x;
        memcpy(p, &wide, sizeof wide);
    }
    static void store(Tag<Format::F32>, void* p, F x) { memcpy(p, &x, sizeof x); }
    static void store(Tag<Format::F16>, void* p, F x) {
        const uint16_t half = f32_to_f16(x);
        memcpy(p, &half, sizeof half);
    }
    static void store(Tag<Format::BF16>, void* p, F x) {
        const uint32_t bits = as_bits(x);
        const uint16_t rounded = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
        memcpy(p, &rounded, sizeof rounded);
    }

    static F set(float x) { return x; }
    static I set(int32_t x) { return x; }
    static I bits(F x) { return load_as<int32_t>(&x); }
    static F floats(I x) { return load_as<float>(&x); }

    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static I bit_and(I a, I b) { return a & b; }
    static I bit_xor(I a, I b) { return a ^ b; }
    static I min(I a, I b) { return a < b ? a : b; }
    static I shift_right(I a, int32_t n) { return static_cast<int32_t>(static_cast<uint32_t>(a) >> n); }

    static M greater(I a, I b) { return a > b; }
    static M equal(I a, I b) { return a == b; }
    static M above(F a, F b) { return a > b; }
    static M at_least(F a, F b) { return a >= b; }
    static M same(F a, F b) { return a == b; }
    static M is_nan(F a) { return a != a; }
    static M both(M a, M b) { return a & b; }
    static M first(size_t n) { return n > 0; }

    // By masks: signs and kept elements are as good as random, and branches on them would be mispredicted.
    static I select(M m, I yes, I no) { return no ^ ((yes ^ no) & -static_cast<I>(m)); }
    static F select(M m, F yes, F no) { return floats(select(m, bits(yes), bits(no))); }
    static F zero_unless(M m, F x) { return floats(bits(x) & -static_cast<I>(m)); }
    // Sums start at +0 and so are never -0: adding +0 changes nothing.
    static F add_where(M m, F acc, F x) { return acc + zero_unless(m, x); }
    static I count(I acc, M m) { return acc + m; }
    static uint64_t sum(I counts) { return static_cast<uint64_t>(counts); }
    static size_t compress(int32_t* dst, M m, I x) {
        *dst = x;
        return m;
    }
};

}  // namespace

constexpr OpTable kOps = op_table<Scalar>("scalar");
const OpTable scalar_ops = kOps;

}  // namespace pymerge

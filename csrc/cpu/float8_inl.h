// float32 bit patterns of all 8-bit floats, computed at compile time. Internal linkage throughout.
#pragma once

#include <cstdint>

namespace pymerge {
namespace {

struct Float8Table {
    uint32_t bits[256];
};

// An 8-bit float with the given mantissa bits and exponent bias. has_inf: the top exponent means inf and NaN
// as in IEEE 754 (e5m2); otherwise only the all-ones pattern is NaN (e4m3fn).
constexpr Float8Table float8_table(int mantissa_bits, int bias, bool has_inf) {
    Float8Table table{};
    const int exponent_mask = (1 << (7 - mantissa_bits)) - 1;
    const uint32_t mantissa_mask = (1u << mantissa_bits) - 1;
    for (uint32_t code = 0; code < 256; ++code) {
        const uint32_t sign = (code & 0x80u) << 24;
        int exponent = static_cast<int>((code & 0x7fu) >> mantissa_bits);
        uint32_t mantissa = code & mantissa_mask;
        uint32_t magnitude = 0;
        if (exponent == exponent_mask && (has_inf || mantissa == mantissa_mask)) {
            magnitude = has_inf && mantissa == 0 ? 0x7f800000u : 0x7fc00000u;
        } else if (exponent != 0 || mantissa != 0) {
            if (exponent == 0) {
                exponent = 1;
                while ((mantissa & (1u << mantissa_bits)) == 0) {
                    mantissa <<= 1;
                    --exponent;
                }
                mantissa &= mantissa_mask;
            }
            magnitude = static_cast<uint32_t>(exponent - bias + 127) << 23 | mantissa << (23 - mantissa_bits);
        }
        table.bits[code] = sign | magnitude;
    }
    return table;
}

alignas(64) constexpr Float8Table kE4M3 = float8_table(3, 7, false);
alignas(64) constexpr Float8Table kE5M2 = float8_table(2, 15, true);

}  // namespace
}  // namespace pymerge

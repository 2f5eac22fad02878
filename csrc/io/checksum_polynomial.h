// Polynomials over GF(2) modulo the CRC-32C polynomial. Bit 31 is the coefficient of x^0.
#pragma once

#include <cstdint>

namespace pymerge::io {

constexpr uint32_t kCastagnoli = 0x82f63b78u;

// a * b
constexpr uint32_t multiply_modulo(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
        if ((a & bit) != 0) product ^= b;
        b = (b & 1) != 0 ? (b >> 1) ^ kCastagnoli : b >> 1;
    }
    return product;
}

// x^(8 * num_bytes), the factor by which a checksum register moves over that many zero bytes. Squares and multiplies.
constexpr uint32_t shift_factor(uint64_t num_bytes) {
    uint32_t factor = 0x80000000u;  // 1
    uint32_t power = 0x00800000u;   // x^8
    for (; num_bytes != 0; num_bytes >>= 1) {
        if ((num_bytes & 1) != 0) factor = multiply_modulo(factor, power);
        power = multiply_modulo(power, power);
    }
    return factor;
}

}  // namespace pymerge::io

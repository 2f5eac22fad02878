#include "checksum.h"

#include <array>
#include <cstring>

#include "checksum_hardware.h"
#include "checksum_polynomial.h"

namespace pymerge::io {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][v]: the register after byte v and k zero bytes.
Tables make_tables() {
    Tables tables{};
    for (uint32_t value = 0; value < 256; ++value) {
        uint32_t crc = value;
        for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) != 0 ? (crc >> 1) ^ kCastagnoli : crc >> 1;
        tables[0][value] = crc;
    }
    for (size_t k = 1; k < tables.size(); ++k) {
        for (uint32_t value = 0; value < 256; ++value) {
            const uint32_t previous = tables[k - 1][value];
            tables[k][value] = (previous >> 8) ^ tables[0][previous & 0xff];
        }
    }
    return tables;
}

uint32_t little_endian(const unsigned char* bytes) {
    return bytes[0] | uint32_t{bytes[1]} << 8 | uint32_t{bytes[2]} << 16 | uint32_t{bytes[3]} << 24;
}

}  // namespace

uint32_t crc32c_tables(const void* data, size_t num_bytes, uint32_t crc) {
    static const Tables tables = make_tables();
    const auto* next = static_cast<const unsigned char*>(data);
    crc = ~crc;
    for (; num_bytes >= 8; num_bytes -= 8, next += 8) {
        const uint32_t low = little_endian(next) ^ crc;
        crc = tables[7][low & 0xff] ^ tables[6][low >> 8 & 0xff] ^ tables[5][low >> 16 & 0xff] ^ tables[4][low >> 24] ^
              tables[3][next[4]] ^ tables[2][next[5]] ^ tables[1][next[6]] ^ tables[0][next[7]];
    }
    for (; num_bytes > 0; --num_bytes, ++next) crc = (crc >> 8) ^ tables[0][(crc ^ *next) & 0xff];
    return ~crc;
}

uint32_t crc32c(const void* data, size_t num_bytes, uint32_t crc) {
    static const bool hardware = has_crc32c_instruction();
    return hardware ? crc32c_hardware(data, num_bytes, crc) : crc32c_tables(data, num_bytes, crc);
}

const char* crc32c_implementation() { return has_crc32c_instruction() ? crc32c_instruction_name() : "tables"; }

uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t num_bytes_b) {
    return multiply_modulo(shift_factor(num_bytes_b), crc_a) ^ crc_b;
}

}  // namespace pymerge::io

// CRC-32C (Castagnoli), as in RFC 3720: reflected, initial value and final exclusive-or all ones.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pymerge::io {

// The checksum of bytes that follow others whose checksum is `crc`; 0 to begin.
uint32_t crc32c(const void* data, size_t num_bytes, uint32_t crc);

// The same by tables only, for processors without the instruction.
uint32_t crc32c_tables(const void* data, size_t num_bytes, uint32_t crc);

// "sse4.2", "armv8" or "tables"
const char* crc32c_implementation();

// The checksum of A followed by B, from the checksums of both and the length of B, in O(log num_bytes_b).
uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t num_bytes_b);

}  // namespace pymerge::io

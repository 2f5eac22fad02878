// CRC-32C by the processor's own instruction.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pymerge::io {

bool has_crc32c_instruction();
const char* crc32c_instruction_name();

// Only where has_crc32c_instruction().
uint32_t crc32c_hardware(const void* data, size_t num_bytes, uint32_t crc);

}  // namespace pymerge::io

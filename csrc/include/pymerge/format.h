// Element formats by tag; the tags equal the codes of pymerge/formats.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pymerge {

enum class Format : int32_t { F64 = 0, F32 = 1, F16 = 2, BF16 = 3, F8_E4M3 = 4, F8_E5M2 = 5 };

constexpr size_t num_bytes(Format format) {
    switch (format) {
        case Format::F64:
            return 8;
        case Format::F32:
            return 4;
        case Format::F16:
        case Format::BF16:
            return 2;
        default:
            return 1;
    }
}

constexpr bool is_writable(Format format) {
    return format == Format::F64 || format == Format::F32 || format == Format::F16 || format == Format::BF16;
}

}  // namespace pymerge

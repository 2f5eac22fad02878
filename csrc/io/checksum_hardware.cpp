// The instruction takes 8 bytes, delivers after about 3 cycles and can start every cycle, so three independent streams
// keep it busy. Each stream covers one piece of the block; their registers are joined by moving the first ones over the
// length of a piece with tables.
#include "checksum_hardware.h"

#include <array>
#include <cstring>

#include "checksum.h"
#include "checksum_polynomial.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#ifdef __clang__
#define PYMERGE_CRC_TARGET __attribute__((target("sse4.2,crc32")))
#else
#define PYMERGE_CRC_TARGET __attribute__((target("sse4.2")))
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <sys/auxv.h>
#ifdef __clang__
#define PYMERGE_CRC_TARGET __attribute__((target("crc")))
#else
#define PYMERGE_CRC_TARGET __attribute__((target("+crc")))
#endif
#endif

namespace pymerge::io {

#ifdef PYMERGE_CRC_TARGET
namespace {

constexpr size_t kLongPiece = 4096;
constexpr size_t kShortPiece = 256;

// Moves a register over a fixed number of zero bytes: one table for each byte of the register.
class Shift {
  public:
    explicit Shift(size_t num_bytes) {
        const uint32_t factor = shift_factor(num_bytes);
        for (uint32_t byte = 0; byte < 4; ++byte) {
            for (uint32_t value = 0; value < 256; ++value) {
                tables_[byte][value] = multiply_modulo(factor, value << 8 * byte);
            }
        }
    }

    uint32_t operator()(uint32_t crc) const {
        return tables_[0][crc & 0xff] ^ tables_[1][crc >> 8 & 0xff] ^ tables_[2][crc >> 16 & 0xff] ^
               tables_[3][crc >> 24];
    }

  private:
    std::array<std::array<uint32_t, 256>, 4> tables_;
};

PYMERGE_CRC_TARGET inline uint32_t step(uint32_t crc, unsigned char value) {
#if defined(__x86_64__)
    return _mm_crc32_u8(crc, value);
#else
    return __crc32cb(crc, value);
#endif
}

PYMERGE_CRC_TARGET inline uint32_t step(uint32_t crc, uint64_t value) {
#if defined(__x86_64__)
    return static_cast<uint32_t>(_mm_crc32_u64(crc, value));
#else
    return __crc32cd(crc, value);
#endif
}

inline uint64_t load(const unsigned char* bytes) {
    uint64_t value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

// Consumes blocks of three pieces while there are any.
PYMERGE_CRC_TARGET uint32_t run_pieces(const unsigned char** next, size_t* num_bytes, uint32_t crc, size_t piece,
                                       const Shift& shift) {
    while (*num_bytes >= 3 * piece) {
        const unsigned char* const first = *next;
        uint32_t a = crc, b = 0, c = 0;
        for (size_t i = 0; i < piece; i += 8) {
            a = step(a, load(first + i));
            b = step(b, load(first + piece + i));
            c = step(c, load(first + 2 * piece + i));
        }
        crc = shift(shift(a) ^ b) ^ c;
        *next += 3 * piece;
        *num_bytes -= 3 * piece;
    }
    return crc;
}

}  // namespace

PYMERGE_CRC_TARGET uint32_t crc32c_hardware(const void* data, size_t num_bytes, uint32_t crc) {
    static const Shift long_shift(kLongPiece);
    static const Shift short_shift(kShortPiece);
    const auto* next = static_cast<const unsigned char*>(data);
    crc = ~crc;
    crc = run_pieces(&next, &num_bytes, crc, kLongPiece, long_shift);
    crc = run_pieces(&next, &num_bytes, crc, kShortPiece, short_shift);
    for (; num_bytes >= 8; num_bytes -= 8, next += 8) crc = step(crc, load(next));
    for (; num_bytes > 0; --num_bytes, ++next) crc = step(crc, *next);
    return ~crc;
}

#if defined(__x86_64__)
bool has_crc32c_instruction() { return __builtin_cpu_supports("sse4.2"); }
const char* crc32c_instruction_name() { return "sse4.2"; }
#else
bool has_crc32c_instruction() { return (getauxval(AT_HWCAP) & (1ul << 7)) != 0; }  // HWCAP_CRC32
const char* crc32c_instruction_name() { return "armv8"; }
#endif

#else

bool has_crc32c_instruction() { return false; }
const char* crc32c_instruction_name() { return "none"; }
uint32_t crc32c_hardware(const void* data, size_t num_bytes, uint32_t crc) {
    return crc32c_tables(data, num_bytes, crc);
}

#endif

}  // namespace pymerge::io

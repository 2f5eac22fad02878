#include "system_calls.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#if !defined(SYS_cachestat) && (defined(__x86_64__) || defined(__aarch64__))
#define SYS_cachestat 451
#endif

namespace pymerge::io {
namespace {

constexpr int kDontCache = 0x80;                    // RWF_DONTCACHE
constexpr unsigned kDirectAlignmentMask = 0x2000u;  // STATX_DIOALIGN
constexpr int kEmptyPath = 0x1000;                  // AT_EMPTY_PATH

// struct statx is 256 bytes long by its ABI; older headers lack the fields that we read.
constexpr size_t kStatxBytes = 256;
constexpr size_t kMemoryAlignField = 0x98;
constexpr size_t kOffsetAlignField = 0x9c;

[[maybe_unused]] ssize_t transfer(long number, int fd, void* data, size_t num_bytes, off_t offset) {
    iovec vector{data, num_bytes};
    const auto position = static_cast<uint64_t>(offset);
    return syscall(number, fd, &vector, 1ul, static_cast<long>(position), static_cast<long>(position >> 32),
                   kDontCache);
}

}  // namespace

ssize_t read_dontcache([[maybe_unused]] int fd, [[maybe_unused]] void* data, [[maybe_unused]] size_t num_bytes,
                       [[maybe_unused]] off_t offset) {
#ifdef SYS_preadv2
    return transfer(SYS_preadv2, fd, data, num_bytes, offset);
#else
    errno = ENOSYS;
    return -1;
#endif
}

ssize_t write_dontcache([[maybe_unused]] int fd, [[maybe_unused]] const void* data, [[maybe_unused]] size_t num_bytes,
                        [[maybe_unused]] off_t offset) {
#ifdef SYS_pwritev2
    return transfer(SYS_pwritev2, fd, const_cast<void*>(data), num_bytes, offset);
#else
    errno = ENOSYS;
    return -1;
#endif
}

bool is_unsupported(int error) { return error == EOPNOTSUPP || error == EINVAL || error == ENOSYS; }

DirectAlignment direct_alignment([[maybe_unused]] int fd) {
    DirectAlignment result;
#ifdef SYS_statx
    alignas(8) char buffer[kStatxBytes] = {};
    if (syscall(SYS_statx, fd, "", kEmptyPath, kDirectAlignmentMask, buffer) != 0) return result;
    uint32_t mask;
    std::memcpy(&mask, buffer, sizeof mask);
    if ((mask & kDirectAlignmentMask) == 0) return result;
    result.known = true;
    std::memcpy(&result.memory, buffer + kMemoryAlignField, sizeof result.memory);
    std::memcpy(&result.offset, buffer + kOffsetAlignField, sizeof result.offset);
#endif
    return result;
}

int64_t count_cached_pages([[maybe_unused]] int fd) {
#ifdef SYS_cachestat
    struct {
        uint64_t offset, num_bytes;
    } range{0, 0};  // zero length: to the end of the file
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } counts{};
    if (syscall(SYS_cachestat, fd, &range, &counts, 0u) != 0) return -1;
    return static_cast<int64_t>(counts.cached);
#else
    errno = ENOSYS;
    return -1;
#endif
}

}  // namespace pymerge::io

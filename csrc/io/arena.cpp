#include "arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <limits>

namespace pymerge::io {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;

size_t page_bytes() {
    static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

Status Arena::map(size_t num_bytes) {
    if (num_bytes == 0) return argument_error("an arena needs at least one byte, 0 were asked for");
    const size_t alignment = num_bytes >= kHugePageBytes ? kHugePageBytes : page_bytes();
    const std::string asked = "reserving " + std::to_string(num_bytes) + " bytes of memory";
    if (num_bytes > std::numeric_limits<size_t>::max() / 2) return system_error(ENOMEM, asked, {});

    // Map more than is needed, then cut the ends off so that what stays begins at an aligned address.
    const size_t wanted = round_up(num_bytes, page_bytes());
    const size_t spare = alignment - page_bytes();
    void* raw =
        mmap(nullptr, wanted + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return system_error(errno, asked, {});
    char* const begin = static_cast<char*>(raw);
    const size_t head = round_up(reinterpret_cast<uintptr_t>(begin), alignment) - reinterpret_cast<uintptr_t>(begin);
    if (head > 0) munmap(begin, head);
    if (spare > head) munmap(begin + head + wanted, spare - head);

    data_ = begin + head;
    num_bytes_ = num_bytes;
    mapped_bytes_ = wanted;
#ifdef MADV_HUGEPAGE
    if (alignment == kHugePageBytes) madvise(data_, mapped_bytes_, MADV_HUGEPAGE);
#endif
    return {};
}

Arena::~Arena() {
    if (data_ != nullptr) munmap(data_, mapped_bytes_);
}

Status Arena::release_pages(size_t offset, size_t num_bytes) {
    if (offset > num_bytes_ || num_bytes > num_bytes_ - offset) {
        return argument_error("cannot release " + describe_range(offset, num_bytes) + " of an arena of " +
                              std::to_string(num_bytes_) + " bytes");
    }
    const size_t end = offset + num_bytes;
    const size_t first = round_up(offset, page_bytes());
    const size_t last = end == num_bytes_ ? mapped_bytes_ : end / page_bytes() * page_bytes();
    if (last <= first) return {};
    if (madvise(static_cast<char*>(data_) + first, last - first, MADV_DONTNEED) != 0) {
        return system_error(errno, "releasing " + describe_range(offset, num_bytes) + " of an arena", {});
    }
    return {};
}

}  // namespace pymerge::io

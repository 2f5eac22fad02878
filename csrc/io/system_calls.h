// Linux calls that the C library or its headers may not know yet, called by number.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace pymerge::io {

// pread and pwrite that leave nothing in the page cache (RWF_DONTCACHE, Linux 6.14). Return -1 and errno as pread does.
ssize_t read_dontcache(int fd, void* data, size_t num_bytes, off_t offset);
ssize_t write_dontcache(int fd, const void* data, size_t num_bytes, off_t offset);

// Whether an error of the two calls above means "not here" rather than a failed transfer.
bool is_unsupported(int error);

// What O_DIRECT asks of addresses and offsets, in bytes; both 0 where the file cannot be read directly.
struct DirectAlignment {
    bool known = false;  // false: the kernel (before 6.1) or the filesystem does not say
    uint32_t memory = 0;
    uint32_t offset = 0;
};
DirectAlignment direct_alignment(int fd);

// Pages of the file in the page cache, by cachestat (Linux 6.5). Returns -1 and errno where that fails.
int64_t count_cached_pages(int fd);

}  // namespace pymerge::io

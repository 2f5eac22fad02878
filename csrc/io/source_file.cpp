#include "source_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <mutex>

namespace pymerge::io {
namespace {

// Linux moves at most 2 GiB less a page in one call; staying well below keeps every request an aligned one.
constexpr size_t kMaxRequestBytes = size_t{1} << 29;

// What is assumed where the kernel does not tell the alignment.
constexpr uint32_t kUsualAlignment = 4096;

constexpr uint64_t kMaxOffset = std::numeric_limits<int64_t>::max();

Status end_of_file(uint64_t offset, size_t num_bytes, size_t got, int fd, const std::string& path) {
    struct stat info;
    const std::string found =
        fstat(fd, &info) == 0 ? ", the file has " + std::to_string(info.st_size) + " bytes" : std::string();
    const std::string asked = "the file ends too early: expected " + describe_range(offset, num_bytes) + ", found " +
                              std::to_string(got) + found;
    return system_error(EIO, asked, path);
}

}  // namespace

Status SourceFile::open(const std::string& path, ReadMethod method) {
    path_ = path;
    method_ = method;
    file_ = Descriptor::open_to_read(path.c_str());
    if (!file_.valid()) return system_error(errno, "opening to read", path);
    struct stat info;
    if (fstat(file_.get(), &info) != 0) return system_error(errno, "asking for the file type", path);
    if (!S_ISREG(info.st_mode)) return system_error(EINVAL, "expected a regular file to read", path);
    if (method == ReadMethod::Direct) return open_direct();
    if (method == ReadMethod::Buffered) {
        before_ = Residency::snapshot(file_.get(), path);
        posix_fadvise(file_.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
    }
    return {};
}

Status SourceFile::open_direct() {
#ifdef O_DIRECT
    alignment_ = direct_alignment(file_.get());
    if (!alignment_.known) alignment_.memory = alignment_.offset = kUsualAlignment;
    alignment_.memory = std::max(alignment_.memory, uint32_t{1});
    if (alignment_.offset == 0) return system_error(EINVAL, "direct reads are not supported for this file", path_);
    if (std::max(alignment_.memory, alignment_.offset) > kMaxDirectAlignment) {
        return system_error(EINVAL,
                            "direct reads of this file need an alignment of " +
                                std::to_string(std::max(alignment_.memory, alignment_.offset)) +
                                " bytes, at most 4096 are supported",
                            path_);
    }
    direct_file_ = Descriptor::open(path_.c_str(), O_RDONLY | O_DIRECT);
    if (!direct_file_.valid()) return system_error(errno, "opening for direct reads", path_);
    return {};
#else
    return system_error(ENOSYS, "opening for direct reads", path_);
#endif
}

Status SourceFile::read(uint64_t offset, size_t num_bytes, char* block, size_t block_bytes, char** data) {
    *data = block;
    if (offset > kMaxOffset || num_bytes > kMaxOffset - offset) {
        return argument_error(describe_range(offset, num_bytes) + " lie past the largest possible file");
    }
    if (num_bytes > block_bytes) {
        return argument_error("cannot read " + describe_range(offset, num_bytes) + " into a block of " +
                              std::to_string(block_bytes) + " bytes");
    }
    const std::shared_lock<std::shared_mutex> lock(in_use_);
    if (!file_.valid()) return argument_error("the file is closed: " + path_);
    if (num_bytes == 0) return {};
    if (direct_file_.valid()) return read_direct(offset, num_bytes, block, block_bytes, data);
    return read_range(offset, num_bytes, block, 0);
}

Status SourceFile::read_direct(uint64_t offset, size_t num_bytes, char* block, size_t block_bytes, char** data) {
    const auto address = reinterpret_cast<uintptr_t>(block);
    const size_t pad = (alignment_.memory - address % alignment_.memory) % alignment_.memory;
    const size_t unit = alignment_.offset;
    const size_t head = offset % unit;
    const size_t wanted = head + num_bytes;  // bytes from the aligned offset on
    const size_t request = (wanted + unit - 1) / unit * unit;
    // Asked for always, not only where this offset needs it, so that a block too small shows at its first use.
    const size_t needed = std::max(pad + request, num_bytes + 2 * kMaxDirectAlignment);
    if (needed > block_bytes) {
        return argument_error("a direct read of " + describe_range(offset, num_bytes) + " needs a block of " +
                              std::to_string(needed) + " bytes, this one has " + std::to_string(block_bytes));
    }
    char* const aligned = block + pad;
    *data = aligned + head;

    size_t got = 0;
    while (got < wanted) {
        const size_t length = std::min(request - got, kMaxRequestBytes);
        const ssize_t count = pread(direct_file_.get(), aligned + got, length, static_cast<off_t>(offset - head + got));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0 && !is_unsupported(errno)) {
            return system_error(errno, "reading " + describe_range(offset, num_bytes) + " directly", path_);
        }
        // An end of file, a count that leaves the next request unaligned, or a refusal of O_DIRECT after all: what is
        // missing comes through the page cache, where the end of a truncated file is reported too.
        if (count < 0) method_ = ReadMethod::Plain;
        if (count > 0) got += static_cast<size_t>(count);
        if (count <= 0 || got % unit != 0) break;
    }
    return read_range(offset, num_bytes, *data, got > head ? got - head : 0);
}

Status SourceFile::read_range(uint64_t offset, size_t num_bytes, char* data, size_t got) {
    has_read_ = true;
    while (got < num_bytes) {
        const size_t length = std::min(num_bytes - got, kMaxRequestBytes);
        const auto position = static_cast<off_t>(offset + got);
        ssize_t count;
        if (method_ == ReadMethod::DontCache) {
            count = read_dontcache(file_.get(), data + got, length, position);
            if (count < 0 && is_unsupported(errno)) {
                method_ = ReadMethod::Plain;
                continue;
            }
        } else {
            count = pread(file_.get(), data + got, length, position);
        }
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) {
            return system_error(
                errno, "reading " + describe_range(offset, num_bytes) + " (" + std::to_string(got) + " were read)",
                path_);
        }
        if (count == 0) return end_of_file(offset, num_bytes, got, file_.get(), path_);
        got += static_cast<size_t>(count);
    }
    if (method_ == ReadMethod::Buffered) before_.drop_others(file_.get(), offset, num_bytes);
    return {};
}

Status SourceFile::close() {
    const std::unique_lock<std::shared_mutex> lock(in_use_);
    if (!file_.valid()) return {};
    // The page or large folio that two reads share outlives the drops of both, and so does what was read ahead.
    if (method_ == ReadMethod::Buffered && has_read_) {
        struct stat info;
        if (fstat(file_.get(), &info) == 0) {
            before_.drop_others(file_.get(), 0, static_cast<uint64_t>(info.st_size));
        }
    }
    direct_file_.close();
    const int error = file_.close();
    if (error != 0) return system_error(error, "closing", path_);
    return {};
}

}  // namespace pymerge::io

// Two ways to keep the device busy from the first block on, so that sync() has little left to wait for. With
// drop_cache, RWF_DONTCACHE starts write-back with each write and frees the pages after it; where fresh memory is
// expensive (virtual machines) it is several times faster than filling the page cache, because few pages are used again
// and again. Else, or where the kernel lacks it, plain writes with write-back started for each batch.
#include "shard_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>

#include "filesystem.h"
#include "system_calls.h"

namespace pymerge::io {
namespace {

constexpr size_t kMaxRequestBytes = size_t{1} << 29;
constexpr uint64_t kWriteBackBytes = uint64_t{16} << 20;

bool is_full(int error) { return error == ENOSPC || error == EDQUOT; }

std::string free_text(const std::string& path) {
    uint64_t num_bytes = 0;
    if (!free_bytes(path, &num_bytes).ok()) return {};
    return " (" + std::to_string(num_bytes) + " bytes are free)";
}

// The system call itself: where it is not supported, the library's posix_fallocate would write zeros instead.
int allocate(int fd, uint64_t num_bytes) {
    int result;
    do {
        result = fallocate(fd, 0, 0, static_cast<off_t>(num_bytes));
    } while (result != 0 && errno == EINTR);
    return result == 0 ? 0 : errno;
}

int set_length(int fd, uint64_t num_bytes) {
    int result;
    do {
        result = ftruncate(fd, static_cast<off_t>(num_bytes));
    } while (result != 0 && errno == EINTR);
    return result == 0 ? 0 : errno;
}

}  // namespace

Status ShardFile::open(const std::string& path, uint64_t num_bytes, bool drop_cache, bool resume) {
    path_ = path;
    num_bytes_ = num_bytes;
    drop_cache_ = drop_cache;
    dontcache_ = drop_cache;
    if (num_bytes > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return argument_error(std::to_string(num_bytes) + " bytes are more than any file can have");
    }
    file_ = Descriptor::open(path.c_str(), O_WRONLY | O_NONBLOCK | (resume ? 0 : O_CREAT | O_TRUNC), 0666);
    if (!file_.valid()) return system_error(errno, resume ? "opening to go on writing" : "creating", path);
    struct stat info;
    if (fstat(file_.get(), &info) != 0) return system_error(errno, "asking for type and length", path);
    if (!S_ISREG(info.st_mode)) return system_error(EINVAL, "expected a regular file to write", path);
    if (resume && static_cast<uint64_t>(info.st_size) != num_bytes) {
        return system_error(EINVAL,
                            "cannot go on writing: expected a file of " + std::to_string(num_bytes) + " bytes, found " +
                                std::to_string(info.st_size),
                            path);
    }
    return reserve(resume);
}

Status ShardFile::reserve(bool resume) {
    if (num_bytes_ == 0) return {};
    int error = allocate(file_.get(), num_bytes_);
    preallocated_ = error == 0;
    if (is_unsupported(error)) error = resume ? 0 : set_length(file_.get(), num_bytes_);
    if (error == 0) return {};
    if (!resume) {
        // A failed allocation may leave the length and a part of the blocks.
        set_length(file_.get(), 0);
        unlink(path_.c_str());
    }
    const std::string free = is_full(error) ? free_text(path_.substr(0, path_.rfind('/') + 1) + ".") : std::string();
    return system_error(error, "reserving " + std::to_string(num_bytes_) + " bytes" + free, path_);
}

Status ShardFile::write(uint64_t offset, const char* data, size_t num_bytes) {
    if (offset > num_bytes_ || num_bytes > num_bytes_ - offset) {
        return argument_error("cannot write " + describe_range(offset, num_bytes) + " of a file of " +
                              std::to_string(num_bytes_) + " bytes: " + path_);
    }
    const std::shared_lock<std::shared_mutex> lock(in_use_);
    if (!file_.valid()) return argument_error("the file is closed: " + path_);
    size_t done = 0;
    while (done < num_bytes) {
        const size_t length = std::min(num_bytes - done, kMaxRequestBytes);
        const auto position = static_cast<off_t>(offset + done);
        ssize_t count;
        if (dontcache_) {
            count = write_dontcache(file_.get(), data + done, length, position);
            if (count < 0 && is_unsupported(errno)) {
                dontcache_ = false;
                continue;
            }
        } else {
            count = pwrite(file_.get(), data + done, length, position);
        }
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) {
            const int error = count < 0 ? errno : EIO;
            return system_error(error,
                                "writing " + describe_range(offset, num_bytes) + " (" + std::to_string(done) +
                                    " were written)" + (is_full(error) ? free_text(path_) : std::string()),
                                path_);
        }
        done += static_cast<size_t>(count);
    }
    if (!dontcache_) start_write_back(offset, num_bytes);
    return {};
}

// A sync_file_range call returns in well under a millisecond while the device keeps up and waits as long as a slow
// write does once its queue is full. So it is made for batches only, and by one writer at a time: the others go on and
// leave their bytes to the next batch.
void ShardFile::start_write_back([[maybe_unused]] uint64_t offset, [[maybe_unused]] size_t num_bytes) {
#ifdef SYNC_FILE_RANGE_WRITE
    uint64_t begin, length;
    {
        const std::lock_guard<std::mutex> lock(pending_lock_);
        if (pending_bytes_ == 0) {
            pending_begin_ = offset;
            pending_end_ = offset;
        }
        pending_begin_ = std::min(pending_begin_, offset);
        pending_end_ = std::max(pending_end_, offset + num_bytes);
        pending_bytes_ += num_bytes;
        if (pending_bytes_ < kWriteBackBytes || is_starting_) return;
        begin = pending_begin_;
        length = pending_end_ - pending_begin_;
        pending_bytes_ = 0;
        is_starting_ = true;
    }
    sync_file_range(file_.get(), static_cast<off_t>(begin), static_cast<off_t>(length), SYNC_FILE_RANGE_WRITE);
    const std::lock_guard<std::mutex> lock(pending_lock_);
    is_starting_ = false;
#endif
}

Status ShardFile::sync() {
    const std::shared_lock<std::shared_mutex> lock(in_use_);
    if (!file_.valid()) return argument_error("the file is closed: " + path_);
    int result;
    do {
        result = fdatasync(file_.get());
    } while (result != 0 && errno == EINTR);
    if (result != 0) return system_error(errno, "making the file durable (fdatasync)", path_);
    // Only clean pages can be dropped; where RWF_DONTCACHE works, none are left.
    if (drop_cache_ && !dontcache_) posix_fadvise(file_.get(), 0, 0, POSIX_FADV_DONTNEED);
    return {};
}

Status ShardFile::close() {
    const std::unique_lock<std::shared_mutex> lock(in_use_);
    const int error = file_.close();
    if (error != 0) return system_error(error, "closing", path_);
    return {};
}

}  // namespace pymerge::io

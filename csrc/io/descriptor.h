// Owner of one file descriptor.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace pymerge::io {

class Descriptor {
  public:
    Descriptor() = default;
    explicit Descriptor(int fd) : fd_(fd) {}
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    Descriptor(Descriptor&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
    Descriptor& operator=(Descriptor&& other) noexcept {
        if (this != &other) {
            close();
            fd_ = other.fd_;
            other.fd_ = -1;
        }
        return *this;
    }
    ~Descriptor() { close(); }

    // Opens with O_CLOEXEC; an invalid owner and errno where that fails.
    static Descriptor open(const char* path, int flags, mode_t mode = 0) {
        int fd;
        do {
            fd = ::open(path, flags | O_CLOEXEC, mode);
        } while (fd < 0 && errno == EINTR);
        return Descriptor(fd);
    }

    // Does not wait where the path is a pipe instead of a file; on files O_NONBLOCK means nothing.
    static Descriptor open_to_read(const char* path) { return open(path, O_RDONLY | O_NONBLOCK); }

    int get() const { return fd_; }
    bool valid() const { return fd_ >= 0; }

    // 0 or errno. The descriptor is gone either way: Linux frees it before it can report EINTR or EIO.
    int close() {
        if (fd_ < 0) return 0;
        const int result = ::close(fd_);
        const int error = result < 0 && errno != EINTR ? errno : 0;
        fd_ = -1;
        return error;
    }

  private:
    int fd_ = -1;
};

}  // namespace pymerge::io

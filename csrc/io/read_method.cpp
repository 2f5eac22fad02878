#include "read_method.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "descriptor.h"
#include "filesystem.h"
#include "residency.h"
#include "system_calls.h"

namespace pymerge::io {
namespace {

// Where more of the file than this is in the page cache, reading past the cache would be the slower way.
constexpr double kMostlyCached = 0.5;

alignas(kMaxDirectAlignment) thread_local char trial_block[kMaxDirectAlignment];

std::string error_text(int error) { return std::generic_category().message(error); }

// Empty where direct reads work, else why they are not used.
std::string why_not_direct(const std::string& path, int fd, const std::string& filesystem) {
#ifndef O_DIRECT
    return "this system has no O_DIRECT";
#else
    // A network client has its own read-ahead, which O_DIRECT switches off.
    for (const char* remote : {"nfs", "fuse", "ceph", "cifs", "smb2", "9p"}) {
        if (filesystem == remote) return std::string(remote) + " reads ahead better than direct reads would";
    }
    const DirectAlignment alignment = direct_alignment(fd);
    if (alignment.known && alignment.offset == 0) return "the filesystem does not support direct reads of this file";
    if (alignment.known && std::max(alignment.offset, alignment.memory) > kMaxDirectAlignment) {
        return "direct reads need an alignment of " + std::to_string(std::max(alignment.offset, alignment.memory)) +
               " bytes";
    }
    double fraction = 0;
    if (cached_fraction(fd, path, &fraction).ok() && fraction > kMostlyCached) {
        return "the file is already in the page cache";
    }
    const Descriptor direct = Descriptor::open(path.c_str(), O_RDONLY | O_DIRECT);
    if (!direct.valid()) return "O_DIRECT is refused: " + error_text(errno);
    if (pread(direct.get(), trial_block, sizeof trial_block, 0) < 0) {
        return "a direct read fails: " + error_text(errno);
    }
    return {};
#endif
}

}  // namespace

const char* to_string(ReadMethod method) {
    switch (method) {
        case ReadMethod::DontCache:
            return "dontcache";
        case ReadMethod::Direct:
            return "direct";
        case ReadMethod::Buffered:
            return "buffered";
        default:
            return "plain";
    }
}

bool parse(const std::string& name, ReadMethod* method) {
    for (const ReadMethod candidate :
         {ReadMethod::DontCache, ReadMethod::Direct, ReadMethod::Buffered, ReadMethod::Plain}) {
        if (name == to_string(candidate)) {
            *method = candidate;
            return true;
        }
    }
    return false;
}

Status probe_read_method(const std::string& path, ReadMethod* method, std::string* reason) {
    const Descriptor file = Descriptor::open_to_read(path.c_str());
    if (!file.valid()) return system_error(errno, "opening to find a read method", path);
    struct stat info;
    if (fstat(file.get(), &info) != 0) return system_error(errno, "asking for the file type", path);
    if (!S_ISREG(info.st_mode)) return system_error(EINVAL, "expected a regular file", path);
    std::string filesystem;
    if (const Status status = filesystem_name(path, &filesystem); !status.ok()) return status;

    if (is_in_memory(filesystem)) {
        *method = ReadMethod::Plain;
        *reason = filesystem + " keeps its files in memory";
        return {};
    }
    if (read_dontcache(file.get(), trial_block, sizeof trial_block, 0) >= 0) {
        *method = ReadMethod::DontCache;
        *reason = "the kernel and " + filesystem + " read without leaving pages in the cache (RWF_DONTCACHE)";
        return {};
    }
    if (!is_unsupported(errno)) return system_error(errno, "reading 4096 bytes at offset 0 as a trial", path);
    *reason = "no RWF_DONTCACHE here (" + error_text(errno) + ")";

    const std::string no_direct = why_not_direct(path, file.get(), filesystem);
    if (no_direct.empty()) {
        *method = ReadMethod::Direct;
        *reason += "; " + filesystem + " reads directly";
        return {};
    }
    *reason += "; " + no_direct;

    const int error = posix_fadvise(file.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
    *method = error == 0 ? ReadMethod::Buffered : ReadMethod::Plain;
    if (error != 0) *reason += "; advice on the page cache is refused: " + error_text(error);
    return {};
}

}  // namespace pymerge::io

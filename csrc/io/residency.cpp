#include "residency.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "system_calls.h"

namespace pymerge::io {
namespace {

uint64_t page_bytes() {
    static const auto bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

// Since Linux 5.2 mincore answers "all cached" to a process that neither owns the file nor may write it.
bool may_ask(const struct stat& info, const std::string& path) {
    const uid_t user = geteuid();
    return user == 0 || user == info.st_uid || faccessat(AT_FDCWD, path.c_str(), W_OK, AT_EACCESS) == 0;
}

// Calls visit(first page, residency bytes, number of pages) over the file. Returns 0 or errno.
template <typename Visit>
int for_each_page(int fd, uint64_t file_bytes, Visit visit) {
    constexpr uint64_t kPiecePages = uint64_t{1} << 16;
    const uint64_t num_pages = (file_bytes + page_bytes() - 1) / page_bytes();
    std::vector<unsigned char> pages(std::min(num_pages, kPiecePages));
    for (uint64_t first = 0; first < num_pages; first += kPiecePages) {
        const uint64_t count = std::min(kPiecePages, num_pages - first);
        // The mapping is never touched, so a file that shrinks meanwhile cannot fault.
        void* map =
            mmap(nullptr, count * page_bytes(), PROT_READ, MAP_SHARED, fd, static_cast<off_t>(first * page_bytes()));
        if (map == MAP_FAILED) return errno;
        const int error = mincore(map, count * page_bytes(), pages.data()) == 0 ? 0 : errno;
        munmap(map, count * page_bytes());
        if (error != 0) return error;
        visit(first, pages.data(), count);
    }
    return 0;
}

}  // namespace

Status cached_fraction(int fd, const std::string& path, double* fraction) {
    const std::string asked = "asking which pages are in the page cache";
    struct stat info;
    if (fstat(fd, &info) != 0) return system_error(errno, asked, path);
    *fraction = 0;
    if (info.st_size == 0) return {};
    const auto file_bytes = static_cast<uint64_t>(info.st_size);
    const auto num_pages = static_cast<double>((file_bytes + page_bytes() - 1) / page_bytes());
    int64_t num_cached = count_cached_pages(fd);
    if (num_cached < 0) {
        if (!may_ask(info, path)) return system_error(EPERM, asked, path);
        num_cached = 0;
        const int error = for_each_page(fd, file_bytes, [&](uint64_t, const unsigned char* pages, uint64_t count) {
            num_cached += std::count_if(pages, pages + count, [](unsigned char page) { return (page & 1) != 0; });
        });
        if (error != 0) return system_error(error, asked, path);
    }
    *fraction = std::min(1.0, static_cast<double>(num_cached) / num_pages);
    return {};
}

Residency Residency::snapshot(int fd, const std::string& path) {
    Residency result;
    struct stat info;
    if (fstat(fd, &info) != 0 || !may_ask(info, path)) {
        result.all_cached_ = true;
        return result;
    }
    const auto file_bytes = static_cast<uint64_t>(info.st_size);
    bool any = false;
    result.cached_.resize((file_bytes + page_bytes() - 1) / page_bytes());
    const int error = for_each_page(fd, file_bytes, [&](uint64_t first, const unsigned char* pages, uint64_t count) {
        for (uint64_t i = 0; i < count; ++i) {
            if ((pages[i] & 1) == 0) continue;
            result.cached_[first + i] = true;
            any = true;
        }
    });
    if (error != 0) result.all_cached_ = true;
    if (error != 0 || !any) std::vector<bool>().swap(result.cached_);
    return result;
}

void Residency::drop_others(int fd, uint64_t offset, uint64_t num_bytes) const {
    if (all_cached_ || num_bytes == 0) return;
    const auto drop = [fd](uint64_t begin, uint64_t end) {
        posix_fadvise(fd, static_cast<off_t>(begin), static_cast<off_t>(end - begin), POSIX_FADV_DONTNEED);
    };
    const uint64_t end = offset + num_bytes;
    if (cached_.empty()) {
        drop(offset, end);
        return;
    }
    uint64_t begin = offset;  // of the run of pages to drop
    for (uint64_t page = offset / page_bytes(); page * page_bytes() < end; ++page) {
        if (page >= cached_.size() || !cached_[page]) continue;
        if (page * page_bytes() > begin) drop(begin, page * page_bytes());
        begin = (page + 1) * page_bytes();
    }
    if (begin < end) drop(begin, end);
}

}  // namespace pymerge::io
